"""A folder opened as the tests compare models: on the CPU, in fp32 unless they say otherwise."""

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
