"""Templates of questions and answers for training, and the fixed ones for evaluation.

The FIRST word of an answer tells if the target is present: "Sure", "It", "They" or "Yes"; rejections start with "No",
"There" or "Nothing". Templates are few and short because a tiny language model has to learn them all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from model.processing.conversation import escape
from model.processing.tokens import SEG
from model.structures import EvalQuery, Turn
from utils.datasets.base import pick

# {query} is replaced by the data set's expression, verbatim.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "phrase": (
        "Please segment {query} in this image.",
        "Where is {query}? Show the mask.",
        "Can you find {query} here?",
        "Mark {query} in the picture.",
    ),
    "sentence": (
        "{query} Please segment it.",
        "{query} Show the mask.",
        "{query} Can you find it here?",
        "{query} Mark it in the picture.",
    ),
    "part": (
        "Please segment only {query}.",
        "Which part is {query}? Show the mask.",
        "Can you find {query} here?",
        "Mark the part that is {query}.",
    ),
    "instances": (
        "{query} Please segment each of them.",
        "{query} Show one mask for each.",
        "{query} Can you find them one by one?",
        "{query} Mark each of them in the picture.",
    ),
    "joint": ("Please segment {query} in this image, one by one.",),
    "explain": ("Please explain why.", "Tell me why, too.", "Give a reason.", "Say why it is so."),  # appended
}

ANSWERS: dict[str, tuple[str, ...]] = {
    "target": ("Sure, it is [SEG].", "It is [SEG].", "Yes, here it is: [SEG]."),
    "merged": ("Sure, they are [SEG].", "They are [SEG].", "Yes, here they are: [SEG]."),  # several objects, one mask
    "instances": (
        "Sure, they are {list}.",
        "They are {list}.",
        "Yes, here they are: {list}.",
    ),  # one mask for each: "[SEG] and [SEG]"
    "absent": ("No, it is not here: [REJ].", "There is no such thing here: [REJ].", "Nothing here fits: [REJ]."),
    "denial": (  # names the absent target
        "No, {query} is not here: [REJ].",
        "There is nothing like {query} here: [REJ].",
        "Nothing here is {query}: [REJ].",
    ),
    "correction": (  # also names what is present
        "No, {query} is not here: [REJ]. Did you mean {correction}?",
        "There is nothing like {query} here: [REJ]. But there is {correction}.",
        "Nothing here is {query}: [REJ]. It may be {correction}.",
    ),
    "joint": ("Sure, {list}.",),  # {list} is "A:[SEG], B:[REJ]"
}


def fill_template(template: str, **values: str) -> str:
    """Replaces the placeholders of a template; braces within the values are kept.

    Raises:
        KeyError: for a placeholder without a value.
    """
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def enumerate_words(words: Sequence[str]) -> str:
    """Joins words: ``["a", "b", "c"]`` -> ``"a, b and c"``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def question(kind: str, query: str) -> str:
    """The first question template of ``kind`` (a key of ``QUESTIONS``), filled with ``query``."""
    return fill_template(QUESTIONS[kind][0], query=query)


def sample_question(kind: str, query: str, rng: np.random.Generator) -> str:
    """Samples a question template of ``kind`` (a key of ``QUESTIONS``), filled with ``query``."""
    return fill_template(pick(QUESTIONS[kind], rng), query=query)


def sample_answer(targets: int, rng: np.random.Generator) -> str:
    """Samples an answer about a number of targets: a rejection, or [SEG] for the one or for all of them together."""
    return pick(ANSWERS[("absent", "target", "merged")[min(targets, 2)]], rng)


def denial(query: str, correction: str, rng: np.random.Generator) -> str:
    """Samples a rejection of ``query`` that offers ``correction``, unless that is empty."""
    template = pick(ANSWERS["correction" if correction else "denial"], rng)
    return fill_template(template, query=escape(query), correction=escape(correction))


def instance_turn(query: str, count: int, rng: np.random.Generator) -> Turn:
    """Samples a turn about ``count`` instances, answered by one [SEG] per instance."""
    if count == 1:
        return Turn(sample_question("sentence", query, rng), sample_answer(1, rng))
    answer = fill_template(pick(ANSWERS["instances"], rng), list=enumerate_words([SEG] * count))
    return Turn(sample_question("instances", query, rng), answer)


def joint_turn(queries: Sequence[str], tokens: Sequence[str]) -> Turn:
    """Returns a joint question about all expressions of an image; ``tokens`` has "[SEG]" or "[REJ]" for each.

    Literal special tokens in expressions are escaped in the answer; the prompt builder escapes them in questions.
    """
    if len(queries) != len(tokens) or not queries:
        raise ValueError(f"{len(queries)} expressions but {len(tokens)} tokens")
    listed = ", ".join(f"{escape(query)}:{token}" for query, token in zip(queries, tokens, strict=True))
    return Turn(question("joint", ", ".join(queries)), ANSWERS["joint"][0].replace("{list}", listed))


def eval_turn(query: EvalQuery, instances: bool = False) -> Turn:
    """Returns the fixed evaluation question about ``query`` and the answer of the teacher-forced protocol.

    Args:
        query: the expression and its masks.
        instances: ask for all instances; the answer has one [SEG] per target (MUSE), or is the benchmark's own, which
            names them (MMR). It leaks the number of targets, so such answers are generated by default. Without
            ``instances``, the answer does not depend on the ground truth.
    """
    if instances:
        answer = fill_template(ANSWERS["instances"][0], list=enumerate_words([SEG] * len(query.masks)))
        return Turn(question("instances", query.text), query.answer or answer)
    return Turn(question("sentence" if query.is_sentence else "phrase", query.text), ANSWERS["target"][0])


def eval_joint_turn(queries: Sequence[EvalQuery]) -> Turn:
    """Returns the joint question of the teacher-forced protocol for gRefCOCO: "Sure, A:[SEG], B:[SEG]."

    Protocol: docs/evaluation.md ("How a model is asked"). The answer has [SEG] for every expression,
    present or absent, so that no ground truth leaks; rejection is decided from the logits of [SEG] and [REJ] at the
    position before each.
    """
    return joint_turn([query.text for query in queries], ["[SEG]"] * len(queries))
