"""How the paper's release does the work of UGround, imitated on this model for ``scripts/bench.py --table``.

Imitated: a row per question, each with its copy of the image; tokens for padded patches; the hidden states of all
layers stacked and kept until the step ends; answers without a KV cache, so that CLIP and the whole row run again for
every token.

Not imitated: its attention without fused kernels, logits of all tokens in float32, an image encoded by CLIP in every
row's own call, its own SAM, DeepSpeed. Each would cost more, not less. Loss and masks are those of UGround.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from model.backbones.base import LanguageOutput
from model.structures import Batch, Sample
from model.UGround import UGroundForCausalLM
from utils.diagnostics.benchmark import Bench, replaced

ANSWER = "Sure, it is the red star, [SEG]."  # 12 tokens with its end, as in ``Bench.scripted_answers``


@contextmanager
def stacked_states(model: UGroundForCausalLM) -> Iterator[None]:
    """Forward passes inside stack the states of all layers, [L, B, T, D], which are kept until the end."""
    kept: list[torch.Tensor] = []
    forward_packed = model.forward_packed

    def stacked(*args, **kwargs) -> LanguageOutput:
        output = forward_packed(*args, **kwargs)
        kept.append(torch.stack(output.hidden))
        return replace(output, hidden=kept[-1].unbind())

    with replaced(model, forward_packed=stacked):
        yield


def training(bench: Bench, samples: list[Sample]) -> Callable[[], None]:
    """A call that takes the training step."""
    with bench.padded_patches():
        batch = bench.batch(samples, packed=False)

    def call() -> None:
        with stacked_states(bench.model):
            bench.step(batch)

    return call


def answering(bench: Bench, samples: list[Sample]) -> Callable[[], None]:
    """A call that answers a question about each image in 12 tokens, with a mask.

    The tokens are given, and written one after another all the same: pass k reads the prompt and k - 1 of them. The
    states of the last pass have the [SEG] token's.
    """
    given = [replace(s, conversations=[(replace(s.conversations[0][0], answer=ANSWER),)]) for s in samples]
    with bench.padded_patches():
        batch = bench.prompts(given, answers=True)
    width, tokens = batch.input_ids.shape[1], len(batch.label_ids) // len(samples)

    def call() -> None:
        bench.wrapped.eval()
        with torch.inference_mode():
            for written in range(tokens - 1):
                with stacked_states(bench.model):
                    hidden = bench.model.forward_language(first_columns(batch, width - tokens + written)).hidden[-1]
                bench.model.lm_head(hidden[:, -1]).argmax(-1).tolist()
            with stacked_states(bench.model):
                bench.model.predict(batch)
        bench.wrapped.train()

    return call


def first_columns(batch: Batch, width: int) -> Batch:
    """The first ``width`` tokens of every row, which hold the image."""
    rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)[:, None]
    return replace(
        batch,
        input_ids=batch.input_ids[:, :width],
        segment_ids=batch.segment_ids[:, :width],
        position_ids=batch.position_ids[:, :width],
        image_tokens=batch.image_tokens - rows * (batch.input_ids.shape[1] - width),
    )
