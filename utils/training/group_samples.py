"""Groups of answers, sampled from the model as it is, for the group-relative objective (``model.group_policy``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from model.generation import Sampling, generate_answers, uniform_numbers
from model.grounding import GroundingModel
from model.group_policy import SampledAnswers
from model.processing.processor import UGroundProcessor
from model.processing.tokens import SEG
from model.settings import GrpoSettings
from model.structures import Batch, GroupPrompts
from utils.config import ConfigError


def check_room(settings: GrpoSettings, processor: UGroundProcessor) -> None:
    """Raises a ConfigError if sampled answers are too short for their opening, or too long for a row.

    Or if they shall begin with thoughts, and the model writes none.
    """
    if settings.objective == "supervised":
        return
    if settings.grpo_think == "on" and not processor.builder.marks:
        raise ConfigError(["--grpo_think on needs a model that writes thoughts: set --thought_format text or tokens"])
    opening = len(processor.opening(settings.grpo_think).forced)
    if not opening < settings.grpo_tokens < processor.room:
        raise ConfigError(
            [
                f"--grpo_tokens {settings.grpo_tokens}: must be above {opening}, the tokens that begin a thought, and "
                f"below {processor.room}, what fits beside the image; change it, or raise --model_max_length"
            ]
        )


def sample_answers(
    model: GroundingModel,
    processor: UGroundProcessor,
    batch: Batch,
    prompts: GroupPrompts,
    count: torch.Tensor,
    settings: GrpoSettings,
    seed: int,
) -> SampledAnswers:
    """``grpo_answers`` answers to each question. All answers about an image share its tokens and its cache.

    An answer is a function of the weights and of (seed, sample index, question, its number in the group): the same on
    any number of processes, and after a resumption.

    Args:
        batch: the images, on the model's device; its conversations are not read.
        count: mean number of answers per micro step and process, of ``SampledAnswers``.
    """
    return packed_answers(
        generated_answers(model, processor, batch, prompts, settings, seed), processor, batch, prompts, count, settings
    )


@torch.no_grad()
def generated_answers(
    model: GroundingModel,
    processor: UGroundProcessor,
    batch: Batch,
    prompts: GroupPrompts,
    settings: GrpoSettings,
    seed: int,
) -> list[list[list[int]]]:
    """Sampled tokens: [image][answer], those to a question side by side. The arguments are of ``sample_answers``."""
    if not any(prompts.questions):
        return [[] for _ in prompts.questions]
    group = range(settings.grpo_answers)
    asked = [[(ids, list[int]()) for ids in row for _ in group] for row in prompts.questions]
    keys = [
        [(seed, sample_id, question, number) for question in range(len(row)) for number in group]
        for sample_id, row in zip(prompts.sample_ids, prompts.questions)
    ]
    uniform = uniform_numbers(keys, settings.grpo_tokens).to(model.device)
    sampling = Sampling(settings.grpo_temperature, settings.grpo_top_p, uniform)
    rows = processor.continued(asked, batch).to(model.device)
    was_training = model.training
    model.eval()
    output = model.forward_language(rows, use_cache=True)
    opening = processor.opening(settings.grpo_think)
    answers = generate_answers(model, rows, output, settings.grpo_tokens, None, opening, sampling)
    model.train(was_training)
    return answers.token_ids


def packed_answers(
    answers: Sequence[Sequence[list[int]]],
    processor: UGroundProcessor,
    batch: Batch,
    prompts: GroupPrompts,
    count: torch.Tensor,
    settings: GrpoSettings,
) -> SampledAnswers:
    """Answers in tokens, [image][answer], as rows to learn from; the other arguments are of ``sample_answers``."""
    size, device = settings.grpo_answers, batch.input_ids.device
    asked = [[ids for ids in row for _ in range(size)] for row in prompts.questions]
    conversations = [list(zip(*row, strict=True)) for row in zip(asked, answers, strict=True)]
    flat = [answer for row in answers for answer in row]
    forced, given = len(processor.opening(settings.grpo_think).forced), set(processor.codebook[1:])
    tokens = [
        (k, token, i >= forced and token not in given) for k, ids in enumerate(flat) for i, token in enumerate(ids)
    ]
    more = len(processor.codebook) - 1  # a target's first token is the action; the others follow by themselves
    segs = [i - more for i, (_, token, _) in enumerate(tokens) if token == processor.tokens.seg]
    return SampledAnswers(
        batch=processor.continued(conversations, batch).to(device),
        targets=[target.to(device) for target in prompts.targets],
        owners=torch.tensor([k for k, _, _ in tokens], dtype=torch.int64, device=device),
        written=torch.tensor([chosen for *_, chosen in tokens], dtype=torch.bool, device=device),
        segs=torch.tensor(segs, dtype=torch.int64, device=device),
        details=[describe(answer, processor, settings) for answer in flat],
        count=count,
        settings=settings,
    )


def describe(ids: Sequence[int], processor: UGroundProcessor, settings: GrpoSettings) -> dict[str, Any]:
    """What rewards know of an answer's tokens (``SampledAnswer``).

    Beside that ``segs``, its [SEG], and ``in_thought``, those of them that are in its thought, and mark nothing.
    """
    text, marks = processor.decode(ids), processor.builder.marks
    tokens = processor.tokens
    ended = ids[-1] == tokens.eos
    thought, answer = processor.split_thought(text, complete=ended)
    segs = processor.in_answer(ids, tokens.seg)
    return {
        "thought": thought,
        "answer": answer,
        "length": len(ids),
        "longest": settings.grpo_tokens,
        "ended": ended,
        "thinks": settings.grpo_think == "on" or bool(marks and text.startswith(marks.opening)),
        "well_thought": bool(thought and answer and SEG not in thought),
        "rejects": any(processor.in_answer(ids, tokens.rej)),
        "segs": len(segs),
        "in_thought": segs.count(False),
    }
