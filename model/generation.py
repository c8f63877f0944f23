"""Answers: where the [SEG] tokens of given answers are, or writing answers freely.

Generation stays packed: each row keeps ONE cache in which the image stands once, and a step feeds one new token per
question of the row; the mask of ``packed_mask`` keeps the questions apart. Padded patches stay masked in every step.

Legend: B rows, K questions per row at most, Q questions in all, N [SEG] tokens, L hidden states, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from model.llava import LanguageOutput
from utils.types import Batch

Place = tuple[int, int]  # (row, question)


@dataclass
class Answers:
    """What was said, and the states to draw masks from.

    Attributes:
        token_ids: [row][question] tokens of the answer.
        places: per [SEG], in ascending order, where it stands.
        states: [N, L, D], read one position before each [SEG].
        rejected: per [SEG], whether [REJ] was more likely there.
    """

    token_ids: list[list[list[int]]]
    states: torch.Tensor
    places: list[Place] = field(default_factory=list)
    rejected: list[bool] = field(default_factory=list)


def read_given(model, batch: Batch, output: LanguageOutput) -> Answers:
    """Teacher forced: reads the [SEG] states of the answers in the batch."""
    config, device = model.config, model.device
    segments = batch.segments.flatten()
    token_ids: list[list[list[int]]] = [[[] for _ in range(count)] for count in batch.questions]
    rows = (batch.label_positions // batch.segments.shape[1]).tolist()
    for row, segment, token in zip(rows, segments[batch.label_positions].tolist(), batch.label_ids.tolist()):
        token_ids[row][segment - 1].append(token)
    states = torch.stack([layer.flatten(0, 1)[batch.seg_positions] for layer in output.hidden], dim=1)
    places = list(zip(batch.seg_rows.tolist(), (segments[batch.seg_positions] - 1).tolist()))
    if config.rej_token_id is None:  # a model that knows no [REJ]
        return Answers(token_ids, states, places, [False] * len(places))
    pair = torch.tensor([config.seg_token_id, config.rej_token_id], device=device)
    scores = torch.nn.functional.linear(states[:, -1], model.lm_head.weight[pair]).float()
    return Answers(token_ids, states, places, (scores[:, 1] > scores[:, 0]).tolist())


def write_answers(
    model,
    batch: Batch,
    output: LanguageOutput,
    max_new_tokens: int,
    on_token: Callable[[list[int]], None] | None = None,
) -> Answers:
    """Continues every question greedily until its end token or ``max_new_tokens``.

    Args:
        output: of ``read_batch(batch, use_cache=True)``.
        on_token: gets the newest token of each question (the end token again once a question has ended).
    """
    config, device = model.config, model.device
    b_size, k_size = len(batch.questions), max(batch.questions)
    slots = torch.arange(1, k_size + 1, device=device).expand(b_size, -1)
    segments = torch.where(slots <= torch.tensor(batch.questions, device=device)[:, None], slots, -1)  # [B, K]
    last, position = _last_tokens(batch, segments)
    row = torch.arange(b_size, device=device)[:, None]
    states = torch.stack([layer[row, last] for layer in output.hidden], dim=2)  # [B, K, L, D]
    token_ids: list[list[list[int]]] = [[[] for _ in range(count)] for count in batch.questions]
    found: list[tuple[Place, int, torch.Tensor]] = []
    alive = (segments >= 0).tolist()  # read once per step: each look at the device waits for it
    for step in range(max_new_tokens):
        tokens = model.lm_head(states[:, :, -1]).argmax(-1)  # [B, K]
        tokens = tokens.masked_fill(segments < 0, config.eos_token_id)
        rows = tokens.tolist()
        for b, said in enumerate(token_ids):
            for k, answer in enumerate(said):
                if alive[b][k]:
                    answer.append(rows[b][k])
                    if rows[b][k] == config.seg_token_id:
                        found.append(((b, k), step, states[b, k]))
        if on_token is not None:
            on_token([rows[b][k] for b, count in enumerate(batch.questions) for k in range(count)])
        segments = segments.masked_fill(tokens == config.eos_token_id, -1)
        alive = (segments >= 0).tolist()
        if step + 1 == max_new_tokens or not any(map(any, alive)):
            break
        position = position + 1
        embeddings = model.get_input_embeddings()(tokens)
        output = model.read(embeddings, segments, position, segments >= 0, past=output, use_cache=True)
        states = torch.stack(output.hidden, dim=2)
    found.sort(key=lambda item: item[:2])
    width = config.num_hidden_layers + 1, config.hidden_size
    seg_states = torch.stack([state for *_, state in found]) if found else states.new_zeros(0, *width)
    return Answers(token_ids, seg_states, [place for place, *_ in found], [False] * len(found))


def _last_tokens(batch: Batch, segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place of each question's last token in its row and that token's position id, both [B, K]."""
    place = torch.arange(batch.segments.shape[1], device=segments.device)
    mine = batch.segments[:, None, :] == segments.clamp(min=0)[:, :, None]  # [B, K, T]
    last = torch.where(mine, place, -1).amax(-1)
    return last, torch.gather(batch.position_ids, 1, last)
