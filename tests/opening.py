"""Loading of model folders on the CPU, in fp32 by default."""

from __future__ import annotations

from pathlib import Path

from model.loading.pretrained import load
from model.processing.processor import UGroundProcessor
from model.UGround import UGroundForCausalLM


def load_pretrained(
    folder: str | Path, precision: str = "fp32", **paths: str
) -> tuple[UGroundForCausalLM, UGroundProcessor]:
    opened = load(folder, precision, "cpu", **paths)
    return opened.model, opened.processor
