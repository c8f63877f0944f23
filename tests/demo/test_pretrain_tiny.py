"""The recipe of assets/tiny runs end to end, and its output loads like published weights."""

from __future__ import annotations

import sys

import pytest
import torch

from model.loading.pretrained import load_for_training
from scripts.dev import pretrain_tiny
from utils.demo import scene_texts

pytestmark = pytest.mark.slow


def test_every_stage_runs_and_the_result_loads(tmp_path, monkeypatch):
    command = ["pretrain_tiny.py", "--output", str(tmp_path), "--steps", "0.0006", "--device", "cpu", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", command)
    corpus = scene_texts.corpus
    monkeypatch.setattr(scene_texts, "corpus", lambda rng, n: corpus(rng, n // 10))  # all words in fewer texts
    pretrain_tiny.main()
    model, processor, _ = load_for_training(
        str(tmp_path / "llava"), str(tmp_path / "clip"), str(tmp_path / "sam.pth"), "fp32"
    )
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    tokens = processor.tokenizer.tokenize(" red star")
    assert tokens == ["Ġred", "Ġstar"]  # words are single tokens
