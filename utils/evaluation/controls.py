"""What a score is compared with, to tell a model that reads the query from one that ignores it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from model.structures import EvalSample
from utils.datasets.base import EvalDataset
from utils.datasets.spec import Spec

CONTROLS = ("shuffled_prompts",)  # to be evaluated
HEADINGS = {  # of all controls in a summary
    "shuffled_prompts": "prompts shuffled",
    "text_blind_all_objects": "all objects",
    "text_blind_random_object": "random object",
}


class ShuffledPrompts:
    """A split in which each image is asked another image's queries, with its own truth kept.

    A model that ignores the text scores here as on the split itself. Who asks whom is one cycle through all images, so
    nobody keeps its own; an image with fewer queries than needed repeats them.
    """

    def __init__(self, dataset: EvalDataset, places: Sequence[int], seed: int = 0) -> None:
        if len(places) < 2:
            raise ValueError(
                f"{dataset.spec}: shuffled_prompts needs at least 2 images to exchange queries; there is {len(places)}"
            )
        self.dataset, self.skipped = dataset, dataset.skipped
        self.spec = Spec.parse(f"{dataset.spec}, shuffled prompts")
        self.unusable, self.not_found = dataset.unusable, dataset.not_found
        cycle = np.random.default_rng(seed).permutation(np.array(places))
        self.donor = dict(zip(cycle.tolist(), np.roll(cycle, -1).tolist()))

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_queries(self) -> int:
        return self.dataset.num_queries

    def __getitem__(self, index: int) -> EvalSample:
        sample, others = self.dataset[index], self.dataset[self.donor[index]].queries
        queries = [
            replace(query, text=other.text, is_sentence=other.is_sentence)
            for query, other in ((query, others[k % len(others)]) for k, query in enumerate(sample.queries))
        ]
        return replace(sample, queries=queries)


def query_agnostic_baselines(dataset_dir: Path, spec: Spec) -> dict[str, dict[str, float]]:
    """Scores of answers that ignore the query: ``{"text_blind_all_objects": {"gIoU": ...}, ...}``.

    Generated data come with these (``demo_data.json`` of scripts/make_demo_data.py); other data have none.
    """
    path = Path(dataset_dir) / "demo_data.json"
    if not path.is_file():
        return {}
    split, kinds = spec.split, {"all", "short", "long"}
    if split.endswith(("_short", "_long")):
        split, kind = split.rsplit("_", 1)
        kinds = {kind}
    rows = json.loads(path.read_text(encoding="utf-8"))["text_blind"]
    rows = [row for row in rows if (row["set"], row["split"]) == (spec.name, split) and row["kind"] in kinds]
    names = {"text_blind_all_objects": "all", "text_blind_random_object": "random"}
    if len(rows) == 1:
        return {control: dict(rows[0][column]) for control, column in names.items()}
    total = sum(row["queries"] for row in rows)  # a cIoU of parts says nothing about the whole
    sums = {control: sum(row[column]["gIoU"] * row["queries"] for row in rows) for control, column in names.items()}
    return {control: {"gIoU": value / total} for control, value in sums.items()} if total else {}
