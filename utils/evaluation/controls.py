"""Controls: scores to compare with, which expose a model that ignores the query."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.structures import EvalQuery, EvalSample
from utils.datasets.base import UNIT, EvalDataset
from utils.datasets.reason_seg import split_length
from utils.datasets.spec import Spec

CONTROLS = ("shuffled_prompts",)  # those that are evaluated with the model
HEADINGS = {  # key in a summary's "controls" -> heading in tables
    "shuffled_prompts": "prompts shuffled",
    "text_blind_all_objects": "all objects",
    "text_blind_random_object": "random object",
}


class ShuffledPrompts:
    """A split in which each image gets the queries of another image, but keeps its own ground truth.

    A model that ignores the text scores the same as on the split itself. The donors form one cycle through all images,
    so no image keeps its own queries; a donor with too few queries repeats them. An image and its edit, which are asked
    the same (HalluSegBench), do not donate to each other as long as there are others.
    """

    def __init__(self, dataset: EvalDataset, indices: Sequence[int], seed: int = 0) -> None:
        if len(indices) < 2:
            raise ValueError(
                f"{dataset.spec}: shuffled_prompts needs at least 2 images to exchange queries; there is {len(indices)}"
            )
        self.dataset, self.skipped = dataset, dataset.skipped
        self.spec = Spec.parse(f"{dataset.spec}, shuffled prompts")
        self.unusable, self.not_found = dataset.unusable, dataset.not_found
        cycle = np.random.default_rng(seed).permutation(np.array(indices))
        self.donor = dict(zip(cycle.tolist(), np.roll(cycle, -1).tolist()))

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_queries(self) -> int:
        return self.dataset.num_queries

    def __getitem__(self, index: int) -> EvalSample:
        return self.exchanged(index, self.dataset[index])

    def exchanged(self, index: int, sample: EvalSample) -> EvalSample:
        """``sample``, image ``index`` of the split itself, with the queries of its donor.

        Raises:
            ValueError: if the donor cannot be read.
        """
        donated = self._donated(index, {query.meta.get(UNIT) for query in sample.queries} - {None})
        queries = [
            replace(query, text=donor.text, is_sentence=donor.is_sentence, answer=donor.answer)
            for query, donor in ((query, donated[k % len(donated)]) for k, query in enumerate(sample.queries))
        ]
        return replace(sample, queries=queries)

    def _donated(self, index: int, units: set[Any]) -> list[EvalQuery]:
        """The queries of the next image in the cycle that is not of these units, or of the next if all others are."""
        first = queries = self.dataset[donor := self.donor[index]].queries
        while units and any(query.meta.get(UNIT) in units for query in queries):
            if (donor := self.donor[donor]) == index:
                return first
            queries = self.dataset[donor].queries
        return queries


def query_agnostic_baselines(dataset_dir: Path, spec: Spec) -> dict[str, dict[str, float]]:
    """Scores of the query-agnostic baselines: ``{"text_blind_all_objects": {"gIoU": ...}, ...}``.

    They come with generated data (``demo_data.json`` of scripts/make_demo_data.py); empty for other data.
    """
    path = Path(dataset_dir) / "demo_data.json"
    if not path.is_file():
        return {}
    split, length = split_length(spec.split)
    kinds = {length} if length else {"all", "short", "long"}
    rows = json.loads(path.read_text(encoding="utf-8"))["text_blind"]
    rows = [row for row in rows if (row["set"], row["split"]) == (spec.name, split) and row["kind"] in kinds]
    names = {"text_blind_all_objects": "all", "text_blind_random_object": "random"}
    if len(rows) == 1:
        return {control: dict(rows[0][column]) for control, column in names.items()}
    total = sum(row["queries"] for row in rows)  # cIoU cannot be pooled from the parts
    sums = {control: sum(row[column]["gIoU"] * row["queries"] for row in rows) for control, column in names.items()}
    return {control: {"gIoU": value / total} for control, value in sums.items()} if total else {}
