"""Thoughts: reasoning text that the model writes before its answer, between two marks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

THINK = ("auto", "on", "off")  # at inference: as the model likes, always, never
NO_THOUGHTS = "none"


@dataclass(frozen=True)
class Marks:
    """What stands before and after a thought, and whether these are special tokens."""

    opening: str
    closing: str
    special: bool = False

    @property
    def tokens(self) -> tuple[str, ...]:
        return (self.opening, self.closing) if self.special else ()

    def marked(self, thought: str) -> str:
        """The text of a thought, which stands before the answer's. Marks in it lose their colon or brackets."""
        return f"{self.opening} {self.plain(thought)} {self.closing}"

    def plain(self, text: str) -> str:
        """A text without the marks, of which their word alone stays."""
        while found := [mark for mark in (self.opening, self.closing) if mark in text]:  # "Answer::" has two
            text = text.replace(found[0], found[0].strip("</>:"))
        return text

    def split(self, text: str, complete: bool = False) -> tuple[str, str]:
        """Thought and answer of a generated text.

        One that was cut off within its thought has no answer; nor, unless it is ``complete``, within its mark.
        """
        if not text.startswith(self.opening):
            return "", "" if self.opening.startswith(text) and not complete else text
        thought, _, answer = text.removeprefix(self.opening).partition(self.closing)
        return thought.strip(), answer.strip()


@dataclass(frozen=True)
class Opening:
    """How generated answers begin: with the tokens ``forced``; none of ``banned`` is among the first ``steps``."""

    forced: Sequence[int] = ()
    banned: Sequence[int] = ()
    steps: float = math.inf


MARKS = {"text": Marks("Thought:", "Answer:"), "tokens": Marks("<think>", "</think>", special=True)}
THOUGHT_FORMATS = (NO_THOUGHTS, *MARKS)
