"""Common parts of all dataset readers: protocols, options, errors, file lookup, JSON, and the check of a sample."""

from __future__ import annotations

import codecs
import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np

from model.processing.tokens import SEG
from model.structures import EvalSample, Sample
from utils.datasets.spec import Spec
from utils.wording import counted

logger = logging.getLogger(__name__)

T = TypeVar("T")

UNIT = "unit"  # key of a query's meta: what is drawn as a whole in a bootstrap, where that is more than its image
LONGEST_FILE_NAME = 255  # bytes
SURROGATES = re.compile("[\ud800-\udfff]")  # JSON may hold them, but no file or tokenizer takes them

BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class DataError(ValueError):
    """The data on disk are missing or invalid; the message names the file, the problem and the fix."""

    def __str__(self) -> str:
        return SURROGATES.sub("\N{REPLACEMENT CHARACTER}", super().__str__())  # a value in it may be anything


class MissingDataError(DataError):
    """A file, a folder or a split does not exist; damaged data raise a plain ``DataError``."""


class EmptyMaskError(DataError):
    """A mask without a pixel: damage in a target, an answer like others in a prediction."""


class TrainDataset(Protocol):
    """Images with questions for training. ``sample(index, rng)`` depends on its arguments and the files alone."""

    name: str

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample: ...

    def describe(self) -> dict[str, int]: ...


class EvalDataset(Protocol):
    """A split of a benchmark: one ``EvalSample`` per image, always in the same order.

    Attributes:
        skipped: records of the split itself without a target (ReasonSeg) or without a query (gRefCOCO); excluded in
            every copy of the data.
        unusable: records that are damaged or lack their image in this copy of the data; excluded.
        not_found: images that are missing for the remaining records; reading those records fails.

    A reader that has a choice of files also names the one that it read in ``annotations``, for the results.
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
        questions_per_image: maximum number of conversations per image.
        explanatory: ReasonSeg: for images with an explanation, the probability of a text-only answer; of the other
            answers, half are [SEG] alone and half are [SEG] followed by the explanation. -1 = no explanations.
        joint_probability: gRefCOCO, Ref-ZOM: probability of ONE question about all sampled expressions of the image,
            whose answer lists them ("Sure, A:[SEG], B:[REJ]."), as in the teacher-forced protocol.
        negative_sampling_weight: sem_seg: probability that a question is about a class that is NOT in the image.
        dialogue_probability: probability that all questions about an image form one conversation, in which each turn
            attends to the earlier ones, as in a chat; otherwise every question is a conversation of its own.
        thought_probability: probability that an answer comes after its thought, where there is one (``Turn.thought``):
            ReasonSeg's explanations, what LISA++'s chains of thought say before their first [SEG], ``thought`` of your
            own data.
    """

    questions_per_image: int = 3
    explanatory: float = -1.0
    joint_probability: float = 0.0
    negative_sampling_weight: float = 0.0
    dialogue_probability: float = 0.0
    thought_probability: float = 0.0

    def __post_init__(self) -> None:
        if self.questions_per_image < 1:
            raise ValueError(f"questions_per_image is {self.questions_per_image}; it must be at least 1")
        if self.explanatory != -1 and not 0 <= self.explanatory <= 1:
            raise ValueError(f"explanatory is {self.explanatory}; it must be a probability, or -1 to turn it off")
        for name in ("joint_probability", "negative_sampling_weight", "dialogue_probability", "thought_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")


@dataclass(frozen=True)
class DatasetRow:
    """One data set: a row of ``utils.datasets.DATASETS``. All paths are relative to the dataset directory.

    Attributes:
        type: the type of the data set, a key of ``TYPES``.
        path: its folder, or its file.
        images: candidate folders of its images.
        annotations: candidate names of the annotation file in ``path``; ``{split_by}``, or MUSE's split, is filled in.
            Of ``parquet``: the splits, folders in ``path``.
        split_by: default author of the splits ("unc", "umd").
        split_by_suffix: suffix of ``split_by`` in the name of the file that the benchmark's own code opens. Training
            reads that file alone; evaluation prefers it to the one without the suffix.
        false_premises: whether each sentence has a flag that tells if it is true of the image (docs/data.md).
        joint: whether one question may list all expressions of an image (``DataOptions.joint_probability``).
        gives_answers: whether teacher-forced evaluation gives the annotated answers.
    """

    type: str
    path: str
    images: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()
    split_by: str = ""
    split_by_suffix: str = ""
    false_premises: bool = False
    joint: bool = False
    gives_answers: bool = False


# -- names and files ---------------------------------------------------------------------------------------------------


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Error message for an unknown name: suggests the closest known name and lists all of them."""
    known = list(known)
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" Did you mean {lower[near[0]]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}"


def coco_folders(folder: str) -> tuple[str, str]:
    """Candidate locations, under the dataset directory, of a folder of COCO images such as ``train2014``."""
    return f"refer_seg/images/mscoco/images/{folder}", f"coco/{folder}"


def find_paths(name: str, candidates: dict[str, Sequence[Path]], fix: str = "check --dataset_dir") -> list[Path]:
    """Returns the first existing path for each entry of ``candidates`` (description -> paths to try in order).

    Raises:
        MissingDataError: naming everything that is missing, every path tried, and the ``fix``.
    """
    existing = {label: next((path for path in paths if path.exists()), None) for label, paths in candidates.items()}
    missing = [
        f"no {label} (looked in {', '.join(map(str, candidates[label]))})"
        for label, path in existing.items()
        if path is None
    ]
    if missing:
        raise MissingDataError(f"{name}: {'; '.join(missing)}; {fix}")
    return [path for path in existing.values() if path is not None]


def single_split(spec: Spec, example: str) -> str:
    """Returns SPLIT of ``BENCHMARK|SPLIT``; any other form raises a ``DataError`` that shows an ``example``."""
    if len(spec.parts) != 1:
        raise DataError(f"{str(spec)!r}: write '{spec.name}|SPLIT', for example '{spec.name}|{example}'")
    return spec.split


def splitless_name(spec: Spec) -> str:
    """Returns the name of a data set without splits; raises ``DataError`` if a split is given."""
    if spec.parts:
        raise DataError(f"{str(spec)!r}: {spec.name!r} has no splits")
    return spec.name


def read_object(line: str) -> dict[str, Any]:
    """The JSON object of a line; any other content raises a ``DataError``."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise DataError(f"not valid JSON ({error}); each line must be one complete object") from error
    if not isinstance(values, dict):
        raise DataError(f"a {type(values).__name__}; each line must be one JSON object")
    return values


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a text with more than blanks, and without halves of characters (lone surrogates)."""
    return isinstance(value, str) and not value.isspace() and value != "" and not SURROGATES.search(value)


def check_file_name(value: Any, what: str) -> str:
    """Returns ``value`` if it is a relative path within its folder; ``what`` starts the message ("'image' is")."""
    if not is_text(value) or len(value.encode()) > LONGEST_FILE_NAME or "\0" in value:
        raise DataError(f"{what} {str(value)[:80]!r}, which is not a file name")
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise DataError(f"{what} {value!r}, which is not a file name within its folder")
    return value


def read_text(path: Path, encoding: str | None = None) -> str:
    """A text file in UTF-8 or, if its byte order mark says so, UTF-16 or UTF-32; no other encoding is guessed.

    Args:
        path: the file.
        encoding: of a file that is not UTF-8, such as "gbk"; None = that is an error.

    Raises:
        DataError: if the file cannot be read, or a byte does not belong to the encoding.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    marked = next((name for mark, name in BYTE_ORDER_MARKS if raw.startswith(mark)), None)
    text = _decode(path, raw, [marked] if marked else ["utf-8", *([encoding] if encoding else [])])
    if "\0" in text:
        raise DataError(
            f"{path} has a NUL at character {text.index(chr(0))}; it is UTF-16 or no text: save it as UTF-8"
        )
    return text


def _decode(path: Path, raw: bytes, encodings: Sequence[str]) -> str:
    """Decodes with the first encoding that fits."""
    problem: Exception = ValueError()
    for encoding in encodings:
        try:
            text = raw.decode(encoding)
            if "\0" not in text or encoding == encodings[-1]:
                return text
        except UnicodeDecodeError as error:
            problem = error
            place = f"byte {error.start} is 0x{raw[error.start]:02x}"
        except LookupError as error:
            raise DataError(f"{encoding!r} is not an encoding that Python knows, such as gbk or cp1252") from error
    raise DataError(
        f"{path} is not {' or '.join(encodings)} text ({place}); save it as UTF-8 (convert_data.py also takes its "
        "encoding: --encoding gbk)"
    ) from problem


def read_json(path: Path, expected: type = dict, encoding: str | None = None) -> Any:
    """Parses the JSON of ``read_text``; its top level must be of type ``expected``."""
    return parse_json(read_text(path, encoding), path, expected)


def parse_json(text: str, path: Path, expected: type = dict) -> Any:
    """Parses the text of a JSON file; ``DataError`` naming the file if it is none, or not of type ``expected``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise DataError(
            f"{path} is not valid JSON ({error}); it may be truncated: download or export it again"
        ) from error
    if not isinstance(value, expected):
        raise DataError(f"{path} holds a {type(value).__name__} at its top level; expected a {expected.__name__}")
    return value


def parse_items(name: str, path: Path, parse: Callable[[Any], dict]) -> tuple[list[dict], list[str]]:
    """Parses each item of a JSON list; returns the results, and a message for each item that ``parse`` rejects.

    Raises:
        DataError: if the file cannot be read or no item is valid.
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


def warn_unusable(name: str, problems: Sequence[str]) -> None:
    """Logs one warning with the number of unusable records and the first problem."""
    if problems:
        logger.warning("%s: %d records cannot be used, the first: %s", name, len(problems), DataError(problems[0]))


def check_complete(dataset: EvalDataset) -> None:
    """Raises ``DataError`` if records of the split are unusable or lack their images."""
    problems = [*dataset.unusable, *dataset.not_found]
    if problems:
        shown = "\n  ".join(problems[:5])
        raise DataError(
            f"{dataset.spec}: {counted(len(problems), 'record')} cannot be evaluated, which would change the "
            f"benchmark; complete the download (test.py --allow_missing skips and counts them). The first:\n  {shown}"
        )


# -- samples -----------------------------------------------------------------------------------------------------------


def sample_indices(count: int, size: int, rng: np.random.Generator) -> list[int]:
    """Samples ``min(count, size)`` distinct indices below ``size``, in random order."""
    return rng.permutation(size)[:count].tolist()


def pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    """Samples one of ``choices`` uniformly."""
    return choices[int(rng.integers(len(choices)))]


def check_sample(sample: Sample) -> Sample:
    """Returns the sample if it is valid.

    Raises:
        DataError: naming the source, if a question or answer is empty, if the number of [SEG] tokens differs from the
            number of masks, or if a mask is empty or not uint8 of the image's size.
    """
    masks, size = sample.masks, sample.image.shape[:2]
    num_seg = sum(turn.answer.count(SEG) for conversation in sample.conversations for turn in conversation)
    if not sample.conversations or not all(sample.conversations):
        raise DataError(f"{sample.source}: no question to ask about this image")
    if not all(
        is_text(text) for turns in sample.conversations for turn in turns for text in (turn.question, turn.answer)
    ):
        raise DataError(f"{sample.source}: a question or an answer is empty, or has halves of characters")
    if masks.ndim != 3 or len(masks) != num_seg:
        raise DataError(f"{sample.source}: {num_seg} [SEG] in the answers but masks of shape {masks.shape}")
    if masks.dtype != np.uint8 or masks.shape[1:] != size:
        raise DataError(f"{sample.source}: masks are {masks.dtype} {masks.shape[1:]}, the image is {size}")
    for number, mask in enumerate(masks):
        if not (mask == 1).any():
            raise DataError(f"{sample.source}: the mask of [SEG] number {number + 1} is empty")
    return sample
