"""The specs that name data: ``ReasonSeg|val_short``, ``refcoco|unc|testA``, ``custom|own.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """The name of a data set and of a part of it.

    Attributes:
        name: a key of ``utils.datasets.DATASETS``.
        parts: the remaining fields, which the reader interprets: SPLIT, SPLIT_BY|SPLIT, or FILE|SPLIT.
    """

    name: str
    parts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Parses any text, with ``str(Spec.parse(text)) == text``; the reader checks whether such data exist."""
        name, *parts = text.split("|")
        return cls(name, tuple(parts))

    @classmethod
    def parse_list(cls, text: str) -> list[Spec]:
        """Parses a list: ``"ReasonSeg|val||grefcoco|unc|val"`` -> two specs."""
        return [cls.parse(part.strip()) for part in text.split("||") if part.strip()]

    def __str__(self) -> str:
        return "|".join([self.name, *self.parts])

    @property
    def split_by(self) -> str:
        """The author of the splits ("unc"); empty if omitted."""
        return self.parts[0] if len(self.parts) > 1 else ""

    @property
    def split(self) -> str:
        return self.parts[-1] if self.parts else ""

    @property
    def slug(self) -> str:
        """The spec as part of a file name: ``refcoco_unc_testA``."""
        return str(self).replace("|", "_").replace("/", "_")
