"""Qwen2.5-VL as a backbone: cells of 28 x 28 pixels; the vision tower attends within windows in most layers.

Source: Qwen2.5-VL (arXiv 2502.13923) and transformers' ``qwen2_5_vl``.
"""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from model.backbones.qwen_vl import QwenConfig, QwenReader, QwenVL
from model.processing.template import ChatTemplate

TEMPLATE = ChatTemplate(
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n",
    image=("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    question="{}<|im_end|>\n<|im_start|>assistant\n",
    answer="{}",
    end="<|im_end|>",
    between="\n<|im_start|>user\n",
    system_prompt="You are a helpful assistant.",
)


class Reader(QwenReader):
    """Images as Qwen2.5-VL reads them."""

    backbone, template = "qwen2_5_vl", TEMPLATE


class Config(QwenConfig, Qwen2_5_VLConfig):
    """The configuration of UGround on Qwen2.5-VL."""

    model_type = "uground_qwen2_5_vl"
    backbone, reader_class = "qwen2_5_vl", Reader

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)


class UGroundQwen25VL(QwenVL, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with Policy-Prompted Masking in front of a mask decoder."""

    config_class = Config
    config: Config  # type: ignore[assignment]  # transformers declares it less narrowly
    published_keys = (  # the hub's, and transformers' since 4.52; the first prefix that matches applies
        ("model.language_model.", "model.language_model."),
        ("model.visual.", "model.visual."),
        ("visual.", "model.visual."),
        ("model.", "model.language_model."),
    )
