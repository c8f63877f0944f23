"""The parser of every program: it explains all unknown flags of a command line at once."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from utils.command_line.other_trainers import answer_of

MOST_CHANGES = 2  # letters added or dropped in a misspelling; a wrong or swapped letter counts as one of each
LEAST_LETTERS = 5  # of a misspelled word: one letter makes another word of a short one (ce, bce; mode, model)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` is a misspelling of, or None.

    A longer or another word is no misspelling (``weight`` is not ``weighting``): a wrong hint is worse than none.
    """
    words = name.lower().split("_")
    found = {_changes(words, other.lower().split("_")): other for other in known}
    fewest = min(found, default=MOST_CHANGES + 1)
    return found[fewest] if fewest <= MOST_CHANGES else None


def _changes(words: list[str], others: list[str]) -> int:
    """Letters that are added or dropped to make one name of the other; more than ``MOST_CHANGES`` for other words."""
    if "".join(words) == "".join(others):
        return 0
    total = 0 if len(words) == len(others) else MOST_CHANGES + 1
    for word, other in zip(words, others):
        if word != other:
            match = difflib.SequenceMatcher(None, word, other, autojunk=False)
            letters = sum(block.size for block in match.get_matching_blocks())
            short = min(len(word), len(other)) < LEAST_LETTERS
            total += MOST_CHANGES + 1 if short else len(word) + len(other) - 2 * letters
    return total


def hint(name: str, known: Iterable[str], program: str = "", dashes: str = "--") -> str:
    """What follows ``unknown flag NAME`` in a message: from the table of other projects, else a near spelling, else "".

    Args:
        name: without dashes, words joined by underscores.
        known: the names that exist.
        program: whose rows of the table are meant; "" = none.
        dashes: before a name in the message; "" for keys of a YAML file.
    """
    answer = answer_of(program, name)
    if answer and not answer.here:
        return f": {answer.note}"
    if answer and answer.here != name:
        return f"; did you mean {dashes}{answer.here}?" + (f" ({answer.note})" if answer.note else "")
    near = nearest(name, known)
    return f"; did you mean {dashes}{near}?" if near else ""


def value_hint(name: str, program: str) -> str:
    """What follows a message about the value of a flag that other projects have, too; else ""."""
    answer = answer_of(program, name)
    if answer and answer.here == name:
        return f" ({answer.note})" if answer.note else ""
    return hint(name, (), program)


class Formatter(argparse.HelpFormatter):
    """Wraps the paragraphs and lists of a docstring; blocks that are indented, such as commands, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        def wrapped(item: str) -> str:
            more = indent + "  " * item.startswith("- ")
            words = " ".join(item.split())
            return textwrap.fill(words, width, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False)

        return "\n\n".join(
            block if block.startswith(" ") else "\n".join(map(wrapped, re.split(r"\n(?=- )", block)))
            for block in text.strip("\n").split("\n\n")
        )


class Parser(argparse.ArgumentParser):
    """``argparse``'s parser, with messages that help a user of another project.

    A flag must be written in full, and its words may be joined by - as well as by _ (LISA's --vision-tower).

    Args:
        program: whose rows of ``other_trainers`` explain unknown flags; "" = none.
    """

    def __init__(self, *args: Any, program: str = "", **kwargs: Any) -> None:
        defaults: dict[str, Any] = {"allow_abbrev": False, "formatter_class": Formatter}
        super().__init__(*args, **defaults | kwargs)
        self.program = program
        self.settings: Parser | None = None

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        arguments = self._checked(args)
        parsed, rest = self.parse_known_args(arguments, namespace)
        if rest:
            self.error(listed(self.explain(rest, arguments)))
        return parsed

    def parse_with_settings(self, settings: Parser, args: Sequence[str] | None = None) -> tuple[Any, list[str]]:
        """The values of this parser's flags, and the other words: flags of ``settings`` with their values.

        A flag that neither has is explained by both.
        """
        self.settings = settings
        return self.parse_known_args(self._checked(args))

    def _checked(self, args: Sequence[str] | None) -> list[str]:
        """The words of a command line; exits with all unknown flags, which parsing would call missing ones."""
        arguments = list(sys.argv[1:] if args is None else args)
        if not {"-h", "--help"} & set(arguments) and (problems := self.unknown_flags(arguments)):
            self.error(listed(problems))
        return arguments

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._joined(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """Exits with the message; a wrong value gets the table's hint if the flag means another one elsewhere."""
        flag = re.match(r"argument --(\w+): invalid", message)
        super().error(message + (value_hint(flag[1], self.program) if flag else ""))

    def unknown_flags(self, arguments: Sequence[str]) -> list[str]:
        """A message for every word of a command line that looks like a flag and is none."""
        known, flags = self._known(arguments), []
        for word in arguments:
            if word == "--":
                break
            flag = word.partition("=")[0]
            if word.startswith("--") and not {flag, f"--{flag[2:].replace('-', '_')}"} & known:
                flags.append(word)
        return self.explain(flags, arguments)

    def explain(self, unknown: Sequence[str], arguments: Sequence[str] | None = None) -> list[str]:
        """A message for every argument that was not understood; the value of an unknown flag gets none of its own.

        Args:
            arguments: the whole command line, which may name a command with flags of its own (``bench.py data``);
                None = the process's.
        """
        words = sys.argv[1:] if arguments is None else arguments
        names = [flag.lstrip("-") for flag in self._known(words) if flag.startswith("--")]
        return [
            self._message(text, names, words)
            for before, text in zip(["", *unknown], unknown)
            if text.startswith("-") or not before.startswith("-")
        ]

    def _message(self, text: str, names: Sequence[str], words: Sequence[str]) -> str:
        if not text.startswith("-"):
            before = words[words.index(text) - 1] if text in words[1:] else ""
            note = value_hint(before[2:], self.program) if before[2:] in names else ""
            return f"unexpected argument {text!r}{f' after {before}{note}' if note else ''}; see --help"
        flag = text.partition("=")[0]
        close = hint(flag.lstrip("-").replace("-", "_"), names, self.program)
        return f"unknown flag {flag}{close or '; see --help'}"

    def _joined(self, word: str) -> str:
        """``--vision-tower=DIR`` as ``--vision_tower=DIR``, if there is that flag."""
        flag, equals, value = word.partition("=")
        joined = f"--{flag[2:].replace('-', '_')}"
        known = self._option_string_actions
        return f"{joined}{equals}{value}" if word.startswith("--") and flag not in known and joined in known else word

    def _known(self, arguments: Sequence[str] = ()) -> set[str]:
        """The flags, with those of ``settings`` and of the commands that ``arguments`` name."""
        known = set(self._option_string_actions) | (self.settings._known() if self.settings else set())
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in set(arguments) & set(action.choices):
                    known |= action.choices[command]._known(arguments)
        return known


def listed(problems: Sequence[str]) -> str:
    """One problem as it is; several below each other."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the command line:\n" + "\n".join(f"  - {line}" for line in problems)
