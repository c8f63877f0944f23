"""What every dataset reader shares: errors, files, images, masks, the check of a sample."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from model.processing.tokens import SEG
from model.structures import EvalSample, Sample
from utils.datasets.spec import Spec

logger = logging.getLogger(__name__)

T = TypeVar("T")


class DataError(ValueError):
    """Something about the data on disk is missing or wrong; the message names it and the way out."""


class MissingDataError(DataError):
    """A file, a folder or a split is not there at all; what is damaged is a plain ``DataError``."""


class TrainDataset(Protocol):
    """Images to train on. ``sample(index, rng)`` depends on nothing but its arguments and the files."""

    name: str

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample: ...

    def describe(self) -> dict[str, int]: ...


class EvalDataset(Protocol):
    """A benchmark's split: one ``EvalSample`` per image, always in the same order.

    Attributes:
        skipped: records that the split itself leaves without a target, and that nobody can evaluate.
        unusable: records that this copy of the data cannot give (damaged, or without their image); left out.
        not_found: images of the others that are not there; reading them fails.
    """

    spec: Spec
    skipped: list[str]
    unusable: list[str]
    not_found: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EvalSample: ...

    @property
    def num_queries(self) -> int: ...


@dataclass(frozen=True)
class DataOptions:
    """How samples are built, for all types.

    Attributes:
        questions_per_image: at most so many conversations share one image.
        explanatory: ReasonSeg's explanations. For an image that has one: probability of a text answer alone,
            otherwise half [SEG] alone and half [SEG] followed by the explanation. -1 = not used.
        joint_probability: gRefCOCO, Ref-ZOM: probability that the image's expressions are asked about in ONE question
            whose answer lists them ("Sure, A:[SEG], B:[REJ]."), as the teacher-forced protocol does.
        negative_sampling_weight: sem_seg: probability that a class which is NOT in the image is asked about instead.
        dialogue_probability: that the questions about an image follow each other in one conversation, each seen by the
            next, as in a chat; otherwise each stands by itself.
    """

    questions_per_image: int = 3
    explanatory: float = -1.0
    joint_probability: float = 0.0
    negative_sampling_weight: float = 0.0
    dialogue_probability: float = 0.0

    def __post_init__(self) -> None:
        if self.questions_per_image < 1:
            raise ValueError(f"questions_per_image is {self.questions_per_image}; it must be at least 1")
        if self.explanatory != -1 and not 0 <= self.explanatory <= 1:
            raise ValueError(f"explanatory is {self.explanatory}; it must be a probability, or -1 to turn it off")
        for name in ("joint_probability", "negative_sampling_weight", "dialogue_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")


@dataclass(frozen=True)
class DatasetRow:
    """One data set: a row of ``utils.datasets.DATASETS``. All paths are relative to the dataset directory.

    Attributes:
        type: the type it belongs to, a key of ``TYPES``.
        path: its folder, or its one file.
        images: folders that may hold its images.
        annotations: names of its annotation file in ``path``, tried in turn; ``{split_by}`` is filled in.
        split_by: who made the splits ("unc", "umd"), where the name does not say.
        train_split_by: the same for training, where it is another one.
        false_premises: whether its sentences say themselves if they are true (docs/data.md).
        joint: whether one question may list all sentences of an image (``DataOptions.joint_probability``).
    """

    type: str
    path: str
    images: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()
    split_by: str = ""
    train_split_by: str = ""
    false_premises: bool = False
    joint: bool = False


# -- names and files ---------------------------------------------------------------------------------------------------


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest one, and all of them."""
    known = list(known)
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}"


def coco(folder: str) -> tuple[str, str]:
    """Both common homes, under the dataset directory, of a folder of COCO images such as ``train2014``."""
    return f"refer_seg/images/mscoco/images/{folder}", f"coco/{folder}"


def find_paths(name: str, wanted: dict[str, Sequence[Path]], way_out: str = "check --dataset_dir") -> list[Path]:
    """For each thing wanted the first of its places that exists.

    Raises:
        MissingDataError: naming everything that is missing and every place looked in.
    """
    found = {what: next((place for place in places if place.exists()), None) for what, places in wanted.items()}
    missing = [
        f"no {what} (looked in {', '.join(map(str, wanted[what]))})" for what, path in found.items() if path is None
    ]
    if missing:
        raise MissingDataError(f"{name}: {'; '.join(missing)}; {way_out}")
    return [path for path in found.values() if path is not None]


def only_split(spec: Spec, example: str) -> str:
    """The split in ``BENCHMARK|SPLIT``; a ``DataError`` that shows the form if there is not this one part alone."""
    if len(spec.parts) != 1:
        raise DataError(f"{str(spec)!r}: write '{spec.name}|SPLIT', for example '{spec.name}|{example}'")
    return spec.split


def without_split(spec: Spec) -> str:
    """The name of a data set that has no splits; a ``DataError`` if something follows it."""
    if spec.parts:
        raise DataError(f"{str(spec)!r}: {spec.name!r} has no splits")
    return spec.name


def check_file_name(value: Any, what: str) -> str:
    """``value``, if it is a relative path that stays within its folder; ``what`` begins the message ("'image' is")."""
    if not isinstance(value, str) or not 0 < len(value) < 256 or "\0" in value:
        raise DataError(f"{what} {str(value)[:80]!r}, which is no file name")
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise DataError(f"{what} {value!r}, which is no file name within its folder")
    return value


def read_json(path: Path, expected: type = dict) -> Any:
    """JSON in UTF-8 (with or without BOM) or cp1252, whose top level must be of type ``expected``."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = raw.decode("cp1252")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is neither UTF-8 nor cp1252 text ({error}); download it again") from error
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); it may be cut off: download it again") from error
    if not isinstance(value, expected):
        raise DataError(f"{path} holds a {type(value).__name__} at its top level; expected a {expected.__name__}")
    return value


def parse_items(name: str, path: Path, parse: Callable[[Any], dict]) -> tuple[list[dict], list[str]]:
    """The items of a JSON list as ``parse`` returns them, and a message for each that it refuses.

    Raises:
        DataError: if the file cannot be read or nothing in it is usable.
    """
    records, problems = [], []
    for number, item in enumerate(read_json(path, list)):
        try:
            records.append(parse(item))
        except DataError as error:
            problems.append(f"{path}, item {number}: {error}")
    if not records:
        raise DataError(f"{name}: nothing usable in {path}: {(problems or ['the list is empty'])[0]}")
    return records, problems


def warn_of(name: str, problems: Sequence[str]) -> None:
    """One line in the log for all records that cannot be used."""
    if problems:
        logger.warning("%s: %d records cannot be used, the first: %s", name, len(problems), problems[0])


def check_complete(dataset: EvalDataset) -> None:
    """Refuses to evaluate a split of which this copy of the data lacks anything."""
    problems = [*dataset.unusable, *dataset.not_found]
    if problems:
        shown = "\n  ".join(problems[:5])
        raise DataError(
            f"{dataset.spec}: {len(problems)} records cannot be evaluated, which would change the benchmark; complete "
            f"the download (test.py --allow_missing leaves them out and says how many). The first:\n  {shown}"
        )


# -- samples -----------------------------------------------------------------------------------------------------------


def draw(number: int, size: int, rng: np.random.Generator) -> list[int]:
    """``number`` different indices below ``size`` (all of them if there are not so many), in random order."""
    return rng.permutation(size)[:number].tolist()


def pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


def check_sample(sample: Sample) -> Sample:
    """The promises that a training sample makes to the model; a broken one raises ``DataError`` with its source."""
    masks, size = sample.masks, sample.image.shape[:2]
    wanted = sum(turn.answer.count(SEG) for conversation in sample.conversations for turn in conversation)
    if not sample.conversations or not all(sample.conversations):
        raise DataError(f"{sample.source}: no question to ask about this image")
    if any(not turn.question.strip() or not turn.answer.strip() for talk in sample.conversations for turn in talk):
        raise DataError(f"{sample.source}: a question or an answer is empty")
    if masks.ndim != 3 or len(masks) != wanted:
        raise DataError(f"{sample.source}: {wanted} [SEG] in the answers but masks of shape {masks.shape}")
    if masks.dtype != np.uint8 or masks.shape[1:] != size:
        raise DataError(f"{sample.source}: masks are {masks.dtype} {masks.shape[1:]}, the image is {size}")
    for number, mask in enumerate(masks):
        if not (mask == 1).any():
            raise DataError(f"{sample.source}: the mask of [SEG] number {number + 1} is empty")
    return sample
