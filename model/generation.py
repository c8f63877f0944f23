"""Answers of the language model, teacher-forced or generated, and the states of their [SEG] tokens.

Generation stays packed: each row keeps ONE cache in which the image is encoded once, and a step feeds one new token per
question of the row; the mask of ``packed_mask`` keeps the questions apart, and padded patches out, in every step.
``ConversationCache`` keeps the cache between the questions of a conversation, so that each costs its own tokens only.

Legend: B rows, K questions per row at most, N [SEG] tokens, L hidden states, D hidden size, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.backbones.base import KeySpace, LanguageOutput
from model.processing.thoughts import Opening
from model.structures import MAX_SEGS, Batch
from model.threads import fewer_threads

if TYPE_CHECKING:
    from model.grounding import GroundingModel

AS_IT_LIKES = Opening()


@dataclass
class Sampling:
    """How tokens are sampled: the likeliest tokens with probability ``top_p`` in all, at ``temperature``.

    Attributes:
        uniform: [B, K, steps] numbers in [0, 1), one for each token of each answer, on the model's device.
    """

    temperature: float
    top_p: float
    uniform: torch.Tensor

    def choose(self, logits: torch.Tensor, numbers: torch.Tensor, step: int) -> torch.Tensor:
        """Tokens [B, K'] from logits [B, K', V]; numbers: [B, K'], the answer of each slot."""
        probabilities, order = (
            (logits.float() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        )
        sums = probabilities.cumsum(-1)
        kept = (sums - probabilities < self.top_p) & (probabilities > 0)  # the likeliest token always
        mass = (probabilities * kept).sum(-1)
        drawn = self.uniform[..., step].gather(1, numbers) * mass
        place = torch.searchsorted(sums, drawn[..., None], right=True)
        last = kept.sum(-1, keepdim=True) - 1  # rounding: a number beside 1 may lie beyond the sum
        return order.gather(-1, torch.minimum(place, last))[..., 0]


def uniform_numbers(keys: Sequence[Sequence[Sequence[int]]], steps: int) -> torch.Tensor:
    """[B, K, steps] float32 in [0, 1): of each answer a function of its key alone, not of its place in the batch."""
    width = max(map(len, keys), default=0)
    numbers = torch.zeros(len(keys), width, steps)
    for b, row in enumerate(keys):
        for k, key in enumerate(row):
            state = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(state % 2**63)
            numbers[b, k] = torch.rand(steps, generator=generator)
    return numbers


QuestionIndex = tuple[int, int]  # (row, question)


@dataclass
class GenerationOutput:
    """Answers, and the states that their masks are decoded from.

    Attributes:
        token_ids: [row][question] tokens of the answer.
        states: [N, L, D] hidden states one position before each [SEG], where it is predicted; with a codebook, the
            mean over a target's tokens.
        seg_questions: per [SEG], ascending, the (row, question) whose answer holds it.
        rejected: per [SEG], whether [REJ] was more likely there.
        codebook: [N, K, L, D] of all of a target's tokens, if there are several; else None.
    """

    token_ids: list[list[list[int]]]
    states: torch.Tensor
    seg_questions: list[QuestionIndex]
    rejected: list[bool]
    codebook: torch.Tensor | None = None


def crop(cache: Any, length: int) -> None:
    """Crops a KV cache to its first ``length`` tokens, in place.

    ``Cache.crop`` removes the same number of tokens from all layers, keys and values. After an interrupted question
    their lengths differ.
    """
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def forward_questions(model: GroundingModel, past: LanguageOutput, batch: Batch) -> tuple[Batch, LanguageOutput]:
    """Forward pass over other questions about images that a cache holds.

    Args:
        past: of ``forward_language(..., use_cache=True)`` for the same images; its cache is cropped to the prefix,
            whatever has been asked since, and extended by the questions, in place.
        batch: the same images with the other questions.

    Returns:
        ``batch`` without the prefix, and the states of its tokens.
    """
    length = int((batch.segment_ids[0] == 0).sum())  # the same in all rows
    crop(past.cache, length)
    keys = KeySpace(past.keys.segment_ids[:, :length], past.keys.key_mask[:, :length])
    asked = batch.after_prefix(length)
    embeddings = model.get_input_embeddings()(asked.input_ids)
    rows = embeddings, asked.segment_ids, asked.position_ids, asked.segment_ids >= 0
    with _threads_for(model, asked.input_ids.numel()):
        return asked, model.forward_packed(*rows, past=LanguageOutput((), keys, past.cache), use_cache=True)


def _threads_for(model: GroundingModel, tokens: int) -> AbstractContextManager[None]:
    """``fewer_threads`` for so many tokens of the language model."""
    return fewer_threads(tokens, model.config.text.hidden_size * model.config.text.intermediate_size)


def codebook_positions(seg_positions: torch.Tensor, size: int) -> torch.Tensor:
    """Positions [N * K] before each of a target's K = ``size`` tokens, of those [N] before the last of them."""
    if size == 1:
        return seg_positions
    return (seg_positions[:, None] + torch.arange(1 - size, 1, device=seg_positions.device)).flatten()


def per_target(states: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States [N * K, L, D] as one per target, [N, L, D], and the codebook's [N, K, L, D]; None if K = ``size`` is 1."""
    if size == 1:
        return states, None
    codebook = states.view(len(states) // size, size, *states.shape[1:])
    return codebook.mean(1), codebook


def teacher_forced_answers(model: GroundingModel, batch: Batch, output: LanguageOutput) -> GenerationOutput:
    """The answers in the batch with the states of their [SEG] tokens (teacher-forced).

    Args:
        output: of ``forward_language(batch)``.

    Raises:
        ValueError: if states are NaN or infinite.
    """
    config, device = model.config, model.device
    segment_ids = batch.segment_ids.flatten()
    token_ids: list[list[list[int]]] = [[[] for _ in range(count)] for count in batch.questions]
    rows = (batch.label_positions // batch.segment_ids.shape[1]).tolist()
    for row, segment, token in zip(rows, segment_ids[batch.label_positions].tolist(), batch.label_ids.tolist()):
        token_ids[row][segment - 1].append(token)
    size = len(config.codebook)
    states = output.at(codebook_positions(batch.seg_positions, size))
    if not states.isfinite().all() or not output.hidden[-1].flatten(0, 1)[batch.label_positions].isfinite().all():
        raise not_finite(model)
    seg_questions = list(zip(batch.seg_rows.tolist(), (segment_ids[batch.seg_positions] - 1).tolist()))
    rejected = [False] * len(seg_questions)
    if config.rej_token_id is not None:  # else a model that knows no [REJ]
        pair = torch.tensor([config.codebook[0], config.rej_token_id], device=device)
        scores = torch.nn.functional.linear(states[::size, -1], model.lm_head.weight[pair]).float()
        rejected = (scores[:, 1] > scores[:, 0]).tolist()
    states, codebook = per_target(states, size)
    return GenerationOutput(token_ids, states, seg_questions, rejected, codebook)


def generate_answers(
    model: GroundingModel,
    batch: Batch,
    output: LanguageOutput,
    max_new_tokens: int,
    on_token: Callable[[list[int]], None] | None = None,
    opening: Opening = AS_IT_LIKES,
    sampling: Sampling | None = None,
) -> GenerationOutput:
    """Generates the answer to every question, until its end token, ``max_new_tokens`` or ``MAX_SEGS``.

    Args:
        output: of ``forward_language(batch, use_cache=True)``.
        opening: how each answer begins.
        sampling: how tokens are chosen; None = the likeliest.
        on_token: called after each step with the newest token of every question (the end token again once a question
            has ended).
    """
    num_rows, num_slots = len(batch.questions), max(batch.questions)
    slots = torch.arange(1, num_slots + 1, device=model.device).expand(num_rows, -1)
    questions = torch.tensor(batch.questions, device=model.device)
    segment_ids = torch.where(slots <= questions[:, None], slots, -1)  # [B, K]
    last, position_ids = _last_positions(batch, segment_ids)
    rows = torch.arange(num_rows, device=model.device)[:, None]
    hidden = tuple(layer[rows, last] for layer in output.hidden)
    start = output, hidden, segment_ids, position_ids
    with _threads_for(model, num_rows * num_slots):
        return generate_from(model, batch.questions, *start, max_new_tokens, on_token, opening, sampling)


def generate_from(
    model: GroundingModel,
    questions: list[int],
    past: LanguageOutput,
    hidden: tuple[torch.Tensor, ...],
    segment_ids: torch.Tensor,
    position_ids: torch.Tensor,
    max_new_tokens: int,
    on_token: Callable[[list[int]], None] | None = None,
    opening: Opening = AS_IT_LIKES,
    sampling: Sampling | None = None,
) -> GenerationOutput:
    """``generate_answers`` from any state of the cache.

    Args:
        questions: number of questions per row.
        past: output for all tokens so far; its cache is extended in place by all generated tokens but the last.
        hidden: L tensors [B, K, D], the states of the newest token of every question, the last ones in ``past``.
        segment_ids, position_ids: [B, K] int64 of these tokens; segment -1 where a row has fewer questions.

    Raises:
        ValueError: if states are NaN or infinite.
    """
    config, codebook = model.config, model.config.codebook
    token_ids: list[list[list[int]]] = [[[] for _ in range(count)] for count in questions]
    slots = [[k if k < count else None for k in range(max(questions))] for count in questions]  # None = has ended
    segs: list[tuple[QuestionIndex, int, torch.Tensor]] = []
    segs_of: Counter[QuestionIndex] = Counter()
    tokens = torch.full_like(position_ids, -1)
    numbers = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # of each slot's answer
    for step in range(max_new_tokens):
        logits = model.lm_head(hidden[-1])
        if opening.banned and step < opening.steps:
            logits[..., list(opening.banned)] = -torch.inf
        choose = None if sampling is None else partial(sampling.choose, numbers=numbers, step=step)
        tokens = next_tokens(logits, tokens, codebook, choose)  # [B, K]
        if step < len(opening.forced):
            tokens = torch.full_like(tokens, opening.forced[step])
        finite = hidden[-1].isfinite().all(-1)
        newest = torch.where(finite, tokens, -1).tolist()  # the only synchronization in a step where no answer ends
        some_ended = False
        for b, row in enumerate(slots):
            for k, question in enumerate(row):
                if question is None:
                    continue
                if (token := newest[b][k]) < 0:
                    raise not_finite(model)
                token_ids[b][question].append(token)
                if token in codebook:
                    segs.append(((b, question), step, torch.stack([layer[b, k] for layer in hidden])))
                    segs_of[b, question] += token == codebook[-1]
                if token == config.eos_token_id or segs_of[b, question] == MAX_SEGS:
                    row[k], some_ended = None, True
        if on_token is not None:
            on_token([answer[-1] for answers in token_ids for answer in answers])
        alive = max(len(row) - row.count(None) for row in slots)
        if step + 1 == max_new_tokens or not alive:
            break
        position_ids = position_ids + 1
        if some_ended:
            ended = torch.tensor([[slot is None for slot in row] for row in slots], device=tokens.device)
            segment_ids = segment_ids.masked_fill(ended, -1)
            if alive < len(slots[0]):
                values = tokens, segment_ids, position_ids, numbers
                slots, (tokens, segment_ids, position_ids, numbers) = _open(slots, alive, values)
        embeddings = model.get_input_embeddings()(tokens)
        past = model.forward_packed(embeddings, segment_ids, position_ids, segment_ids >= 0, past=past, use_cache=True)
        hidden = past.hidden
    segs.sort(key=lambda seg: seg[:2])
    size, seg_questions = len(codebook), [question for question in sorted(segs_of) for _ in range(segs_of[question])]
    seg_states = _stacked(_whole_targets(segs, segs_of, size), hidden)
    if not seg_states.isfinite().all():
        raise not_finite(model)
    states, of_codebook = per_target(seg_states, size)
    return GenerationOutput(token_ids, states, seg_questions, [False] * len(seg_questions), of_codebook)


def next_tokens(
    logits: torch.Tensor,
    previous: torch.Tensor,
    codebook: Sequence[int],
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Tokens [B, K] from logits [B, K, V], which are overwritten: those that ``choose`` gives, or the likeliest.

    A target's tokens are whole and in order: after one of the codebook the next one follows, whatever the logits, and
    nowhere else.

    Args:
        previous: [B, K] the tokens before; -1 = none.
    """
    for token in codebook[1:]:
        logits[..., token] = -torch.inf
    tokens = logits.argmax(-1) if choose is None else choose(logits)
    for earlier, later in pairwise(codebook):
        tokens = torch.where(previous == earlier, later, tokens)
    return tokens


def _whole_targets(
    segs: list[tuple[QuestionIndex, int, torch.Tensor]], counts: Counter[QuestionIndex], size: int
) -> list[torch.Tensor]:
    """States of the sorted ``segs`` without those of a target that was cut off before its last token."""
    states: list[torch.Tensor] = []
    for question, rows in groupby(segs, key=lambda seg: seg[0]):
        states += [row[2] for row in rows][: counts[question] * size]
    return states


def _stacked(states: list[torch.Tensor], hidden: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[N, L, D] of N states [L, D], which may be none; ``hidden``: L tensors [..., D] of their kind."""
    return torch.stack(states) if states else hidden[-1].new_zeros(0, len(hidden), hidden[-1].shape[-1])


def not_finite(model: GroundingModel) -> ValueError:
    """The error for states that are NaN or infinite, from which any token and any layer could follow."""
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    precision = str(model.dtype).removeprefix("torch.")
    reason = (
        f"its weight {broken} is NaN or infinite (in {precision}): convert or train the weights again"
        if broken
        else f"the numbers overflow in {precision}: use --precision fp32 or bf16"
    )
    return ValueError(f"the language model's hidden states are NaN or infinite; {reason}")


def _open(
    slots: list[list[int | None]], alive: int, values: tuple[torch.Tensor, ...]
) -> tuple[list[list[int | None]], list[torch.Tensor]]:
    """Keeps ``alive`` slots per row, those of open questions first; the same of ``values``, which are [B, K]."""
    kept = [sorted(range(len(row)), key=lambda k: row[k] is None)[:alive] for row in slots]
    index = torch.tensor(kept, device=values[0].device)
    slots = [[row[k] for k in indices] for row, indices in zip(slots, kept)]
    return slots, [torch.gather(each, 1, index) for each in values]


class ConversationCache:
    """The KV cache of one image's prefix and of a conversation about it, reused as far as the next prompt agrees.

    Args:
        batch: one row of the prefix alone (``UGroundProcessor.prefix``).

    Attributes:
        hidden: L tensors [1, T, D] of the prefix; clip_states: of ``LanguageOutput``.
        ids: tokens in the cache after the prefix.
    """

    @torch.inference_mode()
    def __init__(self, model: GroundingModel, batch: Batch) -> None:
        self.model = model
        output = model.forward_language(batch, use_cache=True)
        self.hidden, self.keys, self.clip_states = output.hidden, output.keys, output.clip_states
        self.next_position = int(batch.position_ids[0, -1].max()) + 1  # not the number of tokens
        self.cache: Any = output.cache  # transformers' annotation lacks the layers' keys and values
        self.ids: list[int] = []

    @torch.inference_mode()
    def answer(
        self,
        ids: list[int],
        max_new_tokens: int,
        on_token: Callable[[list[int]], None] | None = None,
        opening: Opening = AS_IT_LIKES,
    ) -> GenerationOutput:
        """Generates the answer to the conversation ``ids``, the tokens after the prefix.

        The longest common prefix with the cached conversation is not computed again.
        """
        output = self._forward(ids)
        last = torch.tensor([[self.next_position + len(ids) - 1]], device=self.model.device)
        hidden = tuple(layer[:, -1:] for layer in output.hidden)
        segment_ids = torch.ones_like(last)
        answers = generate_from(self.model, [1], output, hidden, segment_ids, last, max_new_tokens, on_token, opening)
        self.ids = ids + answers.token_ids[0][0][:-1]
        return answers

    def _forward(self, ids: list[int]) -> LanguageOutput:
        differing = (i for i, (cached, new) in enumerate(zip(self.ids, ids)) if cached != new)
        kept = min(next(differing, min(len(self.ids), len(ids))), len(ids) - 1)  # the last token's states are needed
        self._crop(kept)
        start = self.next_position
        tokens = torch.tensor([ids[kept:]], device=self.model.device)
        position_ids = torch.arange(start + kept, start + len(ids), device=self.model.device)[None]
        segment_ids, cached_ids = torch.ones_like(tokens), tokens.new_ones(1, kept)
        past = LanguageOutput((), self.keys.extend(cached_ids, cached_ids.bool()), self.cache)
        embeddings = self.model.get_input_embeddings()(tokens)
        output = self.model.forward_packed(
            embeddings, segment_ids, position_ids, segment_ids.bool(), past=past, use_cache=True
        )
        self.ids = ids
        return output

    def _crop(self, count: int) -> None:
        """Crops the cache to the prefix and ``count`` tokens."""
        self.ids = self.ids[:count]
        crop(self.cache, self.keys.segment_ids.shape[1] + count)


def _last_positions(batch: Batch, segment_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of each question's last token in its row, and that token's position id, both [B, K]."""
    positions = torch.arange(batch.segment_ids.shape[1], device=segment_ids.device)
    in_segment = batch.segment_ids[:, None, :] == segment_ids.clamp(min=0)[:, :, None]  # [B, K, T]
    last = torch.where(in_segment, positions, 0).amax(-1)  # 0: a row with fewer questions, without its prefix
    text = batch.position_ids if batch.position_ids.ndim == 2 else batch.position_ids[..., 0]  # text: equal on all axes
    return last, torch.gather(text, 1, last)
