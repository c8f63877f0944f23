"""Qwen3-VL as a backbone: cells of 32 x 32 pixels; *deepstack* adds image features after the first decoder layers.

Source: Qwen3-VL (arXiv 2511.21631) and transformers' ``qwen3_vl``.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from model.backbones import qwen2_5_vl
from model.backbones.qwen_vl import QwenConfig, QwenReader, QwenVL

TEMPLATE = replace(qwen2_5_vl.TEMPLATE, system_prompt="")


class Reader(QwenReader):
    """Images as Qwen3-VL reads them."""

    backbone, template = "qwen3_vl", TEMPLATE


class Config(QwenConfig, Qwen3VLConfig):
    """The configuration of UGround on Qwen3-VL."""

    model_type = "uground_qwen3_vl"
    backbone, reader_class = "qwen3_vl", Reader

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)


class UGroundQwen3VL(QwenVL, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with Policy-Prompted Masking in front of a mask decoder."""

    config_class = Config
    config: Config  # type: ignore[assignment]  # transformers declares it less narrowly
