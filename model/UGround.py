"""UGround as the paper has it: Policy-Prompted Masking on LLaVA."""

from __future__ import annotations

from model.backbones.llava import LlavaLlamaForCausalLM
from model.config import UGroundConfig
from model.grounding import GroundingModel


class UGroundForCausalLM(GroundingModel, LlavaLlamaForCausalLM):
    """LLaVA with Policy-Prompted Masking in front of SAM's decoder."""

    config_class = UGroundConfig
    config: UGroundConfig  # type: ignore[assignment]  # transformers declares it less narrowly
