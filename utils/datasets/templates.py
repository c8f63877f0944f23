"""The project's own wording of questions and answers, and the fixed ones used at evaluation.

The FIRST word of an answer decides: positive answers begin with "Sure", "It", "They" or "Yes", denials with "No",
"There" or "Nothing". Few templates of few words: a tiny language model has to learn them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from utils.conversation import escape
from utils.types import EvalQuery, Turn

# {query} is the data set's expression, inserted as it is.
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
    "joint": ("Please segment {query} in this image, one by one.",),
    "explain": ("Please explain why.", "Tell me why, too.", "Give a reason.", "Say why it is so."),  # appended
}

ANSWERS: dict[str, tuple[str, ...]] = {
    "target": ("Sure, it is [SEG].", "It is [SEG].", "Yes, here it is: [SEG]."),
    "merged": ("Sure, they are [SEG].", "They are [SEG].", "Yes, here they are: [SEG]."),  # several objects, one mask
    "absent": ("No, it is not here: [REJ].", "There is no such thing here: [REJ].", "Nothing here fits: [REJ]."),
    "joint": ("Sure, {list}.",),  # {list} is "A:[SEG], B:[REJ]"
}


def template_corpus() -> Iterator[str]:
    """Every template with its placeholders removed, for training a tokenizer."""
    for templates in (*QUESTIONS.values(), *ANSWERS.values()):
        for template in templates:
            yield template.replace("{query}", "").replace("{list}", "A:[SEG], B:[REJ]").strip()


def question(kind: str, query: str, which: int = 0) -> str:
    """Question template ``which`` of ``kind`` ("phrase", "sentence", "joint") about ``query``."""
    return QUESTIONS[kind][which].replace("{query}", query)


def joint_turn(queries: Sequence[str], tokens: Sequence[str]) -> Turn:
    """All expressions of an image in one question, all in one answer; ``tokens`` holds "[SEG]" or "[REJ]" for each.

    An expression's literal special tokens are defused in the answer; the prompt builder does so in questions.
    """
    if len(queries) != len(tokens) or not queries:
        raise ValueError(f"{len(queries)} expressions but {len(tokens)} tokens")
    listed = ", ".join(f"{escape(query)}:{token}" for query, token in zip(queries, tokens, strict=True))
    return Turn(question("joint", ", ".join(queries)), ANSWERS["joint"][0].replace("{list}", listed))


def eval_question(query: EvalQuery, benchmark: str) -> str:
    """The fixed question about ``query``; the same for every benchmark so far."""
    return question("sentence" if query.is_sentence else "phrase", query.text)


def eval_answer(query: EvalQuery, benchmark: str) -> str:
    """The fixed answer of the teacher-forced protocol. It never depends on the ground truth."""
    return ANSWERS["target"][0]


def eval_joint_turn(queries: Sequence[EvalQuery]) -> Turn:
    """gRefCOCO, teacher-forced: all sentences of an image in one answer, "Sure, A:[SEG], B:[SEG]."

    The protocol is evaluation.md's ("Two ways of asking"). The answer holds [SEG] for each, present or not, so that no
    earlier sentence gives the ground truth away; present or absent is read from the logits of [SEG] against [REJ] at
    the position before each.
    """
    return joint_turn([query.text for query in queries], ["[SEG]"] * len(queries))
