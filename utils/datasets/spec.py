"""What users write to name data: ``ReasonSeg|val_short``, ``refcoco|unc|testA``, ``custom|own.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """A data set and a part of it.

    Attributes:
        name: a key of ``utils.datasets.DATASETS``.
        parts: what follows it, as the data set's reader takes it: SPLIT, SPLIT_BY|SPLIT, or FILE|SPLIT.
    """

    name: str
    parts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        """``str(Spec.parse(text)) == text``, whatever the text: whether there are such data, the reader says."""
        name, *parts = text.split("|")
        return cls(name, tuple(parts))

    @classmethod
    def parse_list(cls, text: str) -> list[Spec]:
        """``"ReasonSeg|val||grefcoco|unc|val"`` -> both."""
        return [cls.parse(part.strip()) for part in text.split("||") if part.strip()]

    def __str__(self) -> str:
        return "|".join([self.name, *self.parts])

    @property
    def split_by(self) -> str:
        """Who made the splits; empty where the text leaves it out."""
        return self.parts[0] if len(self.parts) > 1 else ""

    @property
    def split(self) -> str:
        return self.parts[-1] if self.parts else ""

    @property
    def slug(self) -> str:
        """For file names: ``refcoco_unc_testA``."""
        return str(self).replace("|", "_").replace("/", "_")
