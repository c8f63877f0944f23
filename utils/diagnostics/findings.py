"""Findings of doctor.py and gpu_check.py. Imports no library, so that it works where libraries are broken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from utils.wording import counted

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        level: ok, skipped, warning or problem. text: what was observed. fix: how to fix it, or to have it checked.
    """

    level: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<8} {' '.join(self.text.split())}"
        return f"{line} -> {' '.join(self.fix.split())}" if self.fix else line


def ok(text: str) -> Finding:
    return Finding("ok", text)


def skipped(text: str, fix: str) -> Finding:
    return Finding("skipped", text, fix)


def warning(text: str, fix: str) -> Finding:
    return Finding("warning", text, fix)


def problem(text: str, fix: str) -> Finding:
    return Finding("problem", text, fix)


class Page:
    """Findings under headings, printed as they are added.

    Attributes:
        findings: all so far.
        seconds: of each heading's checks, by heading.
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.seconds: dict[str, float] = {}

    def heading(self, title: str) -> None:
        print(f"{chr(10) if self.findings else ''}{title}")
        self.seconds[title] = 0.0

    def add(self, finding: Finding) -> None:
        self.findings.append(finding)
        print(f"  {finding}")

    def run(self, check: Callable[..., Iterable[Finding]], *args: Any) -> bool:
        """Adds the findings of a check; returns whether none of them is a problem."""
        before, start = len(self.findings), time.perf_counter()

        def add_all() -> None:
            for finding in check(*args):
                self.add(finding)

        self.attempt(add_all, name=check.__name__)
        if self.seconds:
            self.seconds[next(reversed(self.seconds))] += time.perf_counter() - start
        return all(finding.level != "problem" for finding in self.findings[before:])

    def attempt(self, function: Callable[..., T], *args: Any, name: str = "") -> T | None:
        """Calls the function and returns its result. If it fails, adds a problem and returns None."""
        try:
            return function(*args)
        except Exception as error:  # of any kind: it is reported, and the other checks run
            known = isinstance(error, (ValueError, OSError))
            prefix = "" if known else f"{name or function.__name__}: {type(error).__name__}: "
            for line in getattr(error, "problems", None) or [str(error) or "no reason given"]:
                self.add(problem(prefix + line, "" if known else "unexpected: please report it"))
            return None

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def summary(self) -> str:
        problems, warnings = (counted(self.count(level), level) for level in ("problem", "warning"))
        return f"{problems}, {warnings}, {self.count('skipped')} skipped"
