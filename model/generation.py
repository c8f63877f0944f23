"""Answers: where the [SEG] tokens of given answers are, or writing answers freely.

Generation stays packed: each row keeps ONE cache in which the image stands once, and a step feeds one new token per
question of the row; the mask of ``packed_mask`` keeps the questions apart. Padded patches stay masked in every step.
Where a conversation goes on (``ConversationCache``), the cache stays, and a question costs its own tokens.

Legend: B rows, K questions per row at most, Q questions in all, N [SEG] tokens, L hidden states, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from model.llava import LanguageOutput
from model.structures import Batch

QuestionIndex = tuple[int, int]  # (row, question)


@dataclass
class GenerationOutput:
    """What was said, and the states to draw masks from.

    Attributes:
        token_ids: [row][question] tokens of the answer.
        seg_questions: per [SEG], in ascending order, the question that it answers.
        states: [N, L, D], read one position before each [SEG].
        rejected: per [SEG], whether [REJ] was more likely there.
    """

    token_ids: list[list[list[int]]]
    states: torch.Tensor
    seg_questions: list[QuestionIndex] = field(default_factory=list)
    rejected: list[bool] = field(default_factory=list)


def teacher_forced_answers(model, batch: Batch, output: LanguageOutput) -> GenerationOutput:
    """Teacher forced: reads the [SEG] states of the answers in the batch."""
    config, device = model.config, model.device
    segment_ids = batch.segment_ids.flatten()
    token_ids: list[list[list[int]]] = [[[] for _ in range(count)] for count in batch.questions]
    rows = (batch.label_positions // batch.segment_ids.shape[1]).tolist()
    for row, segment, token in zip(rows, segment_ids[batch.label_positions].tolist(), batch.label_ids.tolist()):
        token_ids[row][segment - 1].append(token)
    states = torch.stack([layer.flatten(0, 1)[batch.seg_positions] for layer in output.hidden], dim=1)
    seg_questions = list(zip(batch.seg_rows.tolist(), (segment_ids[batch.seg_positions] - 1).tolist()))
    if config.rej_token_id is None:  # a model that knows no [REJ]
        return GenerationOutput(token_ids, states, seg_questions, [False] * len(seg_questions))
    pair = torch.tensor([config.seg_token_id, config.rej_token_id], device=device)
    scores = torch.nn.functional.linear(states[:, -1], model.lm_head.weight[pair]).float()
    return GenerationOutput(token_ids, states, seg_questions, (scores[:, 1] > scores[:, 0]).tolist())


def generate_answers(
    model,
    batch: Batch,
    output: LanguageOutput,
    max_new_tokens: int,
    on_token: Callable[[list[int]], None] | None = None,
) -> GenerationOutput:
    """Continues every question greedily until its end token or ``max_new_tokens``.

    Args:
        output: of ``forward_language(batch, use_cache=True)``.
        on_token: gets the newest token of each question (the end token again once a question has ended).
    """
    b_size, k_size = len(batch.questions), max(batch.questions)
    slots = torch.arange(1, k_size + 1, device=model.device).expand(b_size, -1)
    segment_ids = torch.where(slots <= torch.tensor(batch.questions, device=model.device)[:, None], slots, -1)  # [B, K]
    last, position = _last_tokens(batch, segment_ids)
    row = torch.arange(b_size, device=model.device)[:, None]
    ends = DecodeState(tuple(layer[row, last] for layer in output.hidden), segment_ids, position)
    return generate_from(model, batch.questions, output, ends, max_new_tokens, on_token)


@dataclass
class DecodeState:
    """The newest token of every question.

    Attributes:
        hidden: L tensors [B, K, D].
        segment_ids: [B, K] int64; -1 where a row has fewer questions.
        position: [B, K] int64 position ids.
    """

    hidden: tuple[torch.Tensor, ...]
    segment_ids: torch.Tensor
    position: torch.Tensor


def generate_from(
    model,
    questions: list[int],
    past: LanguageOutput,
    ends: DecodeState,
    max_new_tokens: int,
    on_token: Callable[[list[int]], None] | None = None,
) -> GenerationOutput:
    """``generate_answers`` from any state of the cache.

    Args:
        questions: per row.
        past: what was read so far; its cache is extended in place by all tokens written but the last.
    """
    config = model.config
    hidden, segment_ids, position = ends.hidden, ends.segment_ids, ends.position
    token_ids: list[list[list[int]]] = [[[] for _ in range(count)] for count in questions]
    columns = [[k if k < count else None for k in range(max(questions))] for count in questions]  # None = has ended
    found: list[tuple[QuestionIndex, int, torch.Tensor]] = []
    for step in range(max_new_tokens):
        tokens = model.lm_head(hidden[-1]).argmax(-1)  # [B, K]
        written = tokens.tolist()  # the one look at the device in a step: it waits for it
        for b, row in enumerate(columns):
            for k, question in enumerate(row):
                if question is None:
                    continue
                token_ids[b][question].append(token := written[b][k])
                if token == config.seg_token_id:
                    found.append(((b, question), step, torch.stack([layer[b, k] for layer in hidden])))
                if token == config.eos_token_id:
                    row[k] = None
        if on_token is not None:
            on_token([answer[-1] for answers in token_ids for answer in answers])
        alive = max(len(row) - row.count(None) for row in columns)
        if step + 1 == max_new_tokens or not alive:
            break
        segment_ids, position = segment_ids.masked_fill(tokens == config.eos_token_id, -1), position + 1
        if alive < len(columns[0]):  # questions that have ended cost nothing more
            kept = [_alive_first(row)[:alive] for row in columns]
            columns = [[row[k] for k in places] for row, places in zip(columns, kept)]
            index = torch.tensor(kept, device=tokens.device)
            tokens, segment_ids, position = (
                torch.gather(values, 1, index) for values in (tokens, segment_ids, position)
            )
        embeddings = model.get_input_embeddings()(tokens)
        past = model.forward_packed(embeddings, segment_ids, position, segment_ids >= 0, past=past, use_cache=True)
        hidden = past.hidden
    found.sort(key=lambda item: item[:2])
    width = config.num_hidden_layers + 1, config.hidden_size
    seg_states = torch.stack([state for *_, state in found]) if found else hidden[-1].new_zeros(0, *width)
    return GenerationOutput(token_ids, seg_states, [place for place, *_ in found], [False] * len(found))


def _alive_first(row: list[int | None]) -> list[int]:
    """[None, 1, None, 3] -> [1, 3, 0, 2]: places of questions, then of those that have ended."""
    return sorted(range(len(row)), key=lambda place: row[place] is None)


class ConversationCache:
    """An image that is read once, and a conversation about it that grows, or is taken back and goes on differently.

    Args:
        batch: one row of the prefix alone (``UGroundProcessor.prefix``).

    Attributes:
        hidden: L tensors [1, T, D] of the prefix; valid: [1, P] patches that show the image.
        ids: the tokens behind the prefix that the cache holds.
    """

    @torch.inference_mode()
    def __init__(self, model, batch: Batch) -> None:
        self.model = model
        output, self.valid = model.forward_language(batch, use_cache=True)
        self.hidden, self.keys, self.cache = output.hidden, output.keys, output.cache
        self.ids: list[int] = []

    @torch.inference_mode()
    def answer(
        self, ids: list[int], max_new_tokens: int, on_token: Callable[[list[int]], None] | None = None
    ) -> GenerationOutput:
        """Writes the answer to the conversation ``ids``, the tokens behind the prefix.

        Tokens that it begins with in common with the conversation before are not read again.
        """
        output = self._read(ids)
        last = torch.tensor([[self.keys.segment_ids.shape[1] + len(ids) - 1]], device=self.model.device)
        ends = DecodeState(tuple(layer[:, -1:] for layer in output.hidden), torch.ones_like(last), last)
        answers = generate_from(self.model, [1], output, ends, max_new_tokens, on_token)
        self.ids = ids + answers.token_ids[0][0][:-1]
        return answers

    def _read(self, ids: list[int]) -> LanguageOutput:
        same = (i for i, (old, new) in enumerate(zip(self.ids, ids)) if old != new)
        kept = min(next(same, min(len(self.ids), len(ids))), len(ids) - 1)  # the last token's states are needed
        self._keep(kept)
        prefix = self.keys.segment_ids.shape[1]
        tokens = torch.tensor([ids[kept:]], device=self.model.device)
        position = torch.arange(prefix + kept, prefix + len(ids), device=self.model.device)[None]
        segment_ids, before = torch.ones_like(tokens), tokens.new_ones(1, kept)
        past = LanguageOutput((), self.keys.extend(before, before.bool()), self.cache)
        embeddings = self.model.get_input_embeddings()(tokens)
        output = self.model.forward_packed(
            embeddings, segment_ids, position, segment_ids.bool(), past=past, use_cache=True
        )
        self.ids = ids
        return output

    def _keep(self, count: int) -> None:
        """Cuts the cache to the prefix and ``count`` tokens.

        Not with ``Cache.crop``, which takes the same number from all layers and from keys and values: where a question
        was interrupted, they differ.
        """
        self.ids = self.ids[:count]
        length = self.keys.segment_ids.shape[1] + count
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _last_tokens(batch: Batch, segment_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Place of each question's last token in its row and that token's position id, both [B, K]."""
    place = torch.arange(batch.segment_ids.shape[1], device=segment_ids.device)
    mine = batch.segment_ids[:, None, :] == segment_ids.clamp(min=0)[:, :, None]  # [B, K, T]
    last = torch.where(mine, place, -1).amax(-1)
    return last, torch.gather(batch.position_ids, 1, last)
