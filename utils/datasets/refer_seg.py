"""refer_seg: referring expressions for one object, several (one merged mask) or none, on COCO or SAIAPR images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from model.processing.tokens import REJ, SEG
from model.structures import Conversation, EvalQuery, EvalSample, Sample, Turn
from utils.datasets.base import (
    DataError,
    DataOptions,
    DatasetRow,
    check_sample,
    find_paths,
    pick,
    sample_indices,
    warn_unusable,
)
from utils.datasets.images import find_image, missing_images, read_annotated
from utils.datasets.masks import decode_union, stack_masks
from utils.datasets.refer_api import Ref, load_refs
from utils.datasets.spec import Spec
from utils.datasets.templates import joint_turn, sample_answer, sample_question


class ReferSplit:
    """A split of a data set, and the folders of its images.

    Attributes:
        images, problems, counts: of ``load_refs``.
    """

    def __init__(self, name: str, row: DatasetRow, split_by: str, split: str, dataset_dir: Path) -> None:
        self.name = "|".join(part for part in (name, split_by, split) if part)
        folder = dataset_dir / row.path
        refs, instances = find_paths(
            self.name,
            {
                "refs": [folder / file.replace("{split_by}", split_by) for file in row.annotations],
                "instances": [folder / "instances.json"],
            },
            f"check --dataset_dir, and the name: {name}|SPLIT_BY|SPLIT, for example refcoco|unc|val",
        )
        self.folders = [dataset_dir / images for images in row.images]
        self.images, notes = load_refs(self.name, refs, instances, split, row.false_premises)
        self.problems, self.counts = notes["problems"], notes["counts"]

    def image_path(self, record: dict[str, Any]) -> Path:
        return find_image(self.name, record["file_name"], self.folders)

    def image(self, record: dict[str, Any]) -> np.ndarray:
        source = f"{self.name}, {record['file_name']}"
        return read_annotated(self.image_path(record), source, record["height"], record["width"])

    def refs(self, record: dict[str, Any]) -> list[Ref]:
        return [Ref(**ref) for ref in record["refs"]]

    def mask(self, record: dict[str, Any], ref: Ref) -> np.ndarray:
        """Decodes the union of the ref's annotations as uint8 [H, W]."""
        segmentations = ((ann_id, record["segmentations"][str(ann_id)]) for ann_id in ref.ann_ids)
        source = f"{self.name}, {record['file_name']}"
        return decode_union(segmentations, record["height"], record["width"], source)


class ReferSegTrain:
    """Training data of referring segmentation; a sample is an image with some of its expressions.

    Args:
        spec: ``refcocog``, or ``refcocog|google`` to choose the author of the splits; always split ``train``.
        row: the data set's row.
        dataset_dir: the root of all data.
        options: ``questions_per_image`` and ``joint_probability``.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path, options: DataOptions) -> None:
        if len(spec.parts) > 1:
            raise DataError(f"{str(spec)!r}: for training write {spec.name!r} or '{spec.name}|SPLIT_BY'")
        self.name, self.options = str(spec), options
        self.joint = row.joint
        split_by = spec.parts[0] if spec.parts else row.train_split_by or row.split_by
        self.split = ReferSplit(spec.name, row, split_by, "train", dataset_dir)
        self.split.image_path(self.split.images[0])  # fail at the start if the folder is wrong
        warn_unusable(self.name, self.split.problems)

    def __len__(self) -> int:
        return len(self.split.images)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Samples up to ``questions_per_image`` refs of the image and one sentence per ref."""
        record = self.split.images[index]
        refs = self.split.refs(record)
        chosen = [refs[i] for i in sample_indices(self.options.questions_per_image, len(refs), rng)]
        sentences = [pick(ref.sentences, rng) for ref in chosen]
        targets = [ref.targets(sentence) for ref, sentence in zip(chosen, sentences)]
        if self.joint and rng.random() < self.options.joint_probability:
            tokens = [SEG if ids else REJ for ids in targets]
            texts = [sentence["sent"] for sentence in sentences]
            conversations: list[Conversation] = [(joint_turn(texts, tokens),)]
        else:
            conversations = [(self.turn(s, len(ids), rng),) for s, ids in zip(sentences, targets)]
        masks = [self.split.mask(record, ref) for ref, ids in zip(chosen, targets) if ids]
        return check_sample(
            Sample(
                source=f"{self.name}/{record['file_name']}",
                image=self.split.image(record),
                conversations=conversations,
                masks=stack_masks(masks, record["height"], record["width"]),
            )
        )

    def turn(self, sentence: dict[str, Any], targets: int, rng: np.random.Generator) -> Turn:
        """Samples a question about a sentence and its answer; ``targets`` is the number of objects it refers to."""
        return Turn(sample_question("phrase", sentence["sent"], rng), sample_answer(targets, rng))

    def describe(self) -> dict[str, int]:
        return {**self.split.counts, "unusable": len(self.split.problems)}


class ReferSegEval:
    """Evaluation data: all sentences of all refs of a split, grouped by image; one merged mask per sentence, or none.

    Args:
        spec: ``refcoco|unc|val``, ``refcoco|val`` or ``refzom|test``.
        row: the data set's row.
        dataset_dir: the root of all data.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path) -> None:
        self.spec = spec
        if not 1 <= len(spec.parts) <= 2:
            raise DataError(f"{str(spec)!r}: write '{spec.name}|SPLIT' or '{spec.name}|SPLIT_BY|SPLIT'")
        self.split = ReferSplit(spec.name, row, spec.split_by or row.split_by, spec.split, dataset_dir)
        self.skipped: list[str] = []
        self.unusable = self.split.problems
        self.not_found = missing_images(self.split.image_path, self.split.images)

    def __len__(self) -> int:
        return len(self.split.images)

    @property
    def num_queries(self) -> int:
        return self.split.counts["expressions"]

    def __getitem__(self, index: int) -> EvalSample:
        record = self.split.images[index]
        image = self.split.image(record)
        queries = []
        for ref in self.split.refs(record):
            merged = [self.split.mask(record, ref)] if ref.ann_ids else []
            for sentence in ref.sentences:
                targets = len(ref.targets(sentence))
                masks = stack_masks(merged if targets else [], record["height"], record["width"])
                query_id = f"{ref.ref_id}_{sentence['sent_id']}"
                meta = {key: value for key, value in sentence.items() if key not in ("sent", "sent_id")}
                meta["targets"] = targets
                queries.append(EvalQuery(query_id, sentence["sent"], masks, meta=meta))
        return EvalSample(f"{self.spec}/{record['file_name']}", str(record["id"]), image, queries)
