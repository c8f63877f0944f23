"""multi_reason_seg: MUSE and MMR, questions about several objects with one [SEG] per object (docs/data.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model.processing.conversation import escape
from model.processing.tokens import SEG
from model.structures import Conversation, EvalQuery, EvalSample, Sample, Turn
from utils.datasets.base import (
    DataError,
    DataOptions,
    DatasetRow,
    check_file_name,
    check_sample,
    coco_folders,
    find_paths,
    is_text,
    parse_items,
    sample_indices,
    single_split,
    unknown,
    warn_unusable,
)
from utils.datasets.coco_file import check_extent
from utils.datasets.images import missing_images, read_annotated
from utils.datasets.masks import decode_segmentation, stack_masks
from utils.datasets.records import Notes, load_records
from utils.datasets.spec import Spec
from utils.datasets.templates import instance_turn

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val",),
    "test_few": ("test_less",),  # name used in the paper's tables
    "test_less": ("test_less",),
    "test_many": ("test_many",),
    "test": ("test_less", "test_many"),
}
MMR_SPLITS: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("train", "val", "test_mixed", "test_obj_only", "test_part_only")
}
FILES = {"MUSE_{}.json": SPLITS, "MMR_{}.json": MMR_SPLITS}  # name of a set's files -> its splits, and their files
TEST_PARTS = {"MUSE_test_less": "few", "MUSE_test_many": "many"}  # parts that the paper's tables report separately
COCO_FOLDERS = ("train2014", "val2014", "train2017", "val2017")


Answers = Literal["ignored", "checked", "optional"]


class MuseSplit:
    """The records of one split.

    Args:
        answers: what becomes of the annotated texts: ``ignored``; ``checked``: a question with an invalid one is
            unusable; ``optional``: an invalid one is left out.

    Attributes:
        records: per image ``{"images", "height", "width", "part", "questions"}``: candidate paths of the image; its
            size; ``few`` or ``many`` in the test split; per question ``{"number", "text", "answer", "targets"}``,
            where each target is an encoded segmentation.
        problems: a message for each unusable item or question.
        counts: images, expressions, masks, multi.
    """

    def __init__(self, name: str, row: DatasetRow, split: str, dataset_dir: Path, answers: Answers) -> None:
        self.name, self.dataset_dir = f"{name}|{split}", dataset_dir
        [pattern] = row.annotations
        splits = FILES[pattern]
        if split not in splits:
            raise DataError(f"{self.name}: {unknown('split', split, splits)}")
        names = [pattern.format(part) for part in splits[split]]
        files: dict[str, Sequence[Path]] = {name: [dataset_dir / row.path / name] for name in names}
        paths = find_paths(self.name, files)
        self.records, notes = load_records(
            self.name, paths, answers, lambda: _read_questions(self.name, paths, answers)
        )
        self.problems, self.counts = notes["problems"], notes["counts"]
        warn_unusable(self.name, self.problems)

    def image_path(self, record: dict[str, Any]) -> Path:
        name = Path(record["images"][0]).name
        return find_paths(self.name, {f"image {name}": [self.dataset_dir / path for path in record["images"]]})[0]

    def image(self, record: dict[str, Any]) -> np.ndarray:
        path = self.image_path(record)
        return read_annotated(path, f"{self.name}, {path.name}", record["height"], record["width"])

    def masks(self, record: dict[str, Any], question: dict[str, Any]) -> list[np.ndarray]:
        """Decodes one uint8 mask [H, W] with 0 and 1 per target of the question."""
        masks = []
        for number, segmentation in enumerate(question["targets"]):
            try:
                masks.append(decode_segmentation(segmentation, record["height"], record["width"]))
            except DataError as error:
                source = f"{self.name}, {Path(record['images'][0]).name}, {question['text']!r}, target {number}"
                raise DataError(f"{source}: {error}") from error
        return masks


def _read_questions(name: str, paths: Sequence[Path], answers: Answers) -> tuple[list[dict[str, Any]], Notes]:
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    for path in paths:
        parsed, rejected = parse_items(name, path, lambda item: _parse_image_item(item, answers))
        problems += rejected + [f"{path}, {text}" for record in parsed for text in record.pop("problems")]
        records += [record | {"part": TEST_PARTS.get(path.stem, "")} for record in parsed]
    questions = [question for record in records for question in record["questions"]]
    counts = {
        "images": len(records),
        "expressions": len(questions),
        "masks": sum(len(question["targets"]) for question in questions),
        "multi": sum(len(question["targets"]) > 1 for question in questions),
    }
    return records, {"problems": problems, "counts": counts}


def _parse_image_item(item: Any, use: Answers) -> dict[str, Any]:
    """Parses an item; an unusable question is reported in ``problems`` and the others are kept."""
    if not isinstance(item, dict):
        raise DataError(f"expected a dict, not a {type(item).__name__}")
    images = _image_candidates(item)
    height, width = check_extent(item.get("height"), item.get("width"), f"{Path(images[0]).name} has")
    questions, answers = item.get("questions"), item.get("answers")
    texts = item.get("text_answers") if use != "ignored" else None
    texts = texts or [None] * (len(questions) if isinstance(questions, list) else 0)
    if not (isinstance(questions, list) and isinstance(answers, list) and isinstance(texts, list)):
        raise DataError("'questions', 'answers' and 'text_answers' must be lists")
    if not len(questions) == len(answers) == len(texts):
        raise DataError(
            f"{len(questions)} questions, {len(answers)} answers and {len(texts)} text answers; the numbers must match"
        )
    valid, problems = [], []
    for number, (question, targets, text) in enumerate(zip(questions, answers, texts)):
        try:
            if use == "optional" and not _is_answer(text, targets):
                text = None
            valid.append({"number": number, **_parse_question(question, targets, text)})
        except DataError as error:
            problems.append(f"{Path(images[0]).name}, question {number}: {error}")
    if not valid:
        raise DataError((problems or ["it has no question"])[0])
    return {"images": images, "height": height, "width": width, "questions": valid, "problems": problems}


def _parse_question(question: Any, targets: Any, text: Any) -> dict[str, Any]:
    if not is_text(question):
        raise DataError(f"it must be a non-empty string, not {str(question)[:60]!r}")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, dict) for target in targets):
        raise DataError(f"its answer must be a list of annotations, not {str(targets)[:60]}")
    if not all(target.get("segmentation") for target in targets):
        raise DataError("a target has no segmentation")
    if text is not None and not _is_answer(text, targets):
        raise DataError(f"its text answer must contain {{seg}} {len(targets)} times: {str(text)[:80]!r}")
    segmentations = [target["segmentation"] for target in targets]
    return {"text": question.strip(), "answer": text or "", "targets": segmentations}


def _is_answer(text: Any, targets: Any) -> bool:
    return is_text(text) and isinstance(targets, list) and text.count("{seg}") == len(targets)


def _image_candidates(item: dict[str, Any]) -> list[str]:
    """Candidate paths of an item's image: in the folder of ``coco_url``; a bare ``file_name`` is in train2014."""
    url, name, candidates = item.get("coco_url"), item.get("file_name"), []
    if isinstance(url, str) and url:
        folder, _, file = url.rpartition("/")
        if folder.rpartition("/")[2] not in COCO_FOLDERS:
            raise DataError(f"'coco_url' is {url!r}; expected .../FOLDER/NAME with FOLDER in {COCO_FOLDERS}")
        file = check_file_name(file, "'coco_url' ends in")
        candidates += [f"{root}/{file}" for root in coco_folders(folder.rpartition("/")[2])]
    if name or not candidates:
        name = Path(check_file_name(name, "'file_name' is")).name
        candidates += [f"{root}/{name}" for root in coco_folders("train2014")]
    return candidates


class MultiReasonSegTrain:
    """Training data of MUSE or MMR; a sample is an image with some of its questions.

    The answer is the annotated text, or a template if there is none; its [SEG] tokens are in the order of the targets.

    Args:
        spec: ``MultiReasonSeg``, ``MultiReasonSeg|train`` or ``MMR``.
        row: the data set's row.
        dataset_dir: the root of all data.
        options: ``questions_per_image``.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path, options: DataOptions) -> None:
        if len(spec.parts) > 1:
            raise DataError(f"{str(spec)!r}: for training write '{spec.name}|train'")
        self.options = options
        self.split = MuseSplit(spec.name, row, spec.split or "train", dataset_dir, "checked")
        self.name = self.split.name
        self.split.image_path(self.split.records[0])  # fail at the start if the folder is wrong

    def __len__(self) -> int:
        return len(self.split.records)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        record = self.split.records[index]
        image = self.split.image(record)
        conversations: list[Conversation] = []
        masks: list[np.ndarray] = []
        for i in sample_indices(self.options.questions_per_image, len(record["questions"]), rng):
            question = record["questions"][i]
            conversations.append((_answered_turn(question, rng),))
            masks += self.split.masks(record, question)
        source = f"{self.name}/{Path(record['images'][0]).name}"
        return check_sample(Sample(source, image, conversations, stack_masks(masks, *image.shape[:2])))

    def describe(self) -> dict[str, int]:
        return {**self.split.counts, "unusable": len(self.split.problems)}


def _answered_turn(question: dict[str, Any], rng: np.random.Generator) -> Turn:
    turn = instance_turn(question["text"], len(question["targets"]), rng)
    return Turn(turn.question, _own_answer(question)) if question["answer"] else turn


def _own_answer(question: dict[str, Any]) -> str:
    """The annotated text with a [SEG] per target; empty if there is none."""
    return SEG.join(escape(part) for part in question["answer"].split("{seg}"))


class MultiReasonSegEval:
    """A split of MUSE or MMR: each query has one mask per target. MUSE's are matched with the predicted masks.

    Args:
        spec: ``MultiReasonSeg|val``, ``|test_few``, ``|test_many`` or ``|test`` (both); ``MMR|val``, ``|test_mixed``,
            ``|test_obj_only`` or ``|test_part_only``.
        row: the data set's row.
        dataset_dir: the root of all data.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path) -> None:
        self.spec = spec
        answers: Answers = "optional" if row.gives_answers else "ignored"
        self.split = MuseSplit(spec.name, row, single_split(spec, "val"), dataset_dir, answers)
        self.skipped: list[str] = []
        self.unusable = self.split.problems
        self.not_found = missing_images(self.split.image_path, self.split.records)

    def __len__(self) -> int:
        return len(self.split.records)

    @property
    def num_queries(self) -> int:
        return self.split.counts["expressions"]

    def __getitem__(self, index: int) -> EvalSample:
        record = self.split.records[index]
        name = Path(record["images"][0]).name
        queries = []
        for question in record["questions"]:
            masks = stack_masks(self.split.masks(record, question), record["height"], record["width"])
            meta = {"targets": len(masks)} | ({"part": record["part"]} if record["part"] else {})
            query_id, answer = f"{index}_{question['number']}", _own_answer(question)
            queries.append(EvalQuery(query_id, question["text"], masks, True, meta, answer=answer))
        return EvalSample(f"{self.spec}/{name}", Path(name).stem, self.split.image(record), queries)
