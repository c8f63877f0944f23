"""What a check of scripts/doctor.py found, in a line; needs no library, so that it works where they are broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
LEVELS = ("ok", "skipped", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """level: one of ``LEVELS``; text: what was seen; way_out: how to mend it, or to have it checked."""

    level: str
    text: str
    way_out: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<8} {' '.join(self.text.split())}"
        return f"{line} -> {' '.join(self.way_out.split())}" if self.way_out else line


def ok(text: str) -> Finding:
    return Finding("ok", text)


def skipped(text: str, way_out: str) -> Finding:
    return Finding("skipped", text, way_out)


def warning(text: str, way_out: str) -> Finding:
    return Finding("warning", text, way_out)


def problem(text: str, way_out: str) -> Finding:
    return Finding("problem", text, way_out)


class Page:
    """Findings under headings, printed as they come.

    Attributes:
        findings: all so far.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.findings: list[Finding] = []
        self._say = say

    def heading(self, title: str) -> None:
        self._say(f"{chr(10) if self.findings else ''}{title}")

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self._say(f"  {finding}")

    def run(self, check: Callable[..., Iterable[Finding]], *args: Any) -> bool:
        """Adds what a check finds; whether none of it is a problem."""
        before = len(self.findings)

        def add_all() -> None:
            for finding in check(*args):
                self.add(finding)

        self.attempt(add_all, name=check.__name__)
        return all(finding.level != "problem" for finding in self.findings[before:])

    def attempt(self, function: Callable[..., T], *args: Any, name: str = "") -> T | None:
        """What the function returns; None if it fails, which is a problem then and hides no other."""
        try:
            return function(*args)
        except Exception as error:  # whatever it is, the user is told, and the other checks run
            known = isinstance(error, (ValueError, OSError))
            prefix = "" if known else f"{name or function.__name__}: {type(error).__name__}: "
            for line in getattr(error, "problems", None) or [str(error) or "no reason is given"]:
                self.add(problem(prefix + line, "" if known else "unexpected: please report it"))
            return None

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def summary(self) -> str:
        return f"{self.count('problem')} problems, {self.count('warning')} warnings, {self.count('skipped')} skipped"
