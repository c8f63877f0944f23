"""Referring expressions on disk: ``refs(...).p`` or ``.json`` with ``instances.json`` (formats.md, B to D).

One reader for refclef, refcoco(+/g), grefcoco and refzom, and for the false-premise sets, whose sentences carry more
keys (they are kept). The index holds one compact record per image; masks are decoded when they are asked for.
"""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.datasets.base import DataError, PackedRecords, decode_segmentation, read_json

# -- pickles without code ----------------------------------------------------------------------------------------------


class _ScalarType:
    """Stands in for ``numpy.dtype`` in a pickle: remembers what a scalar's bytes mean, and can do nothing else."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code, self.order = _text(code), "<"

    def __setstate__(self, state: tuple) -> None:
        order = _text(state[1])
        self.order = order if order in "<>" else "<"


def _scalar(kind: _ScalarType, data: bytes | str) -> int | float | bool | str | bytes:
    if not isinstance(kind, _ScalarType) or not re.fullmatch(r"[biufSU]\d+", kind.code):
        raise pickle.UnpicklingError("a numpy scalar of an unknown kind")
    data = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype=np.dtype(kind.order + kind.code), count=1)[0].item()


def _encode(text: str, codec: str | bytes = "latin-1") -> bytes:
    if _text(codec) not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in codec {codec!r}")
    return text.encode("latin-1")


def _text(value: str | bytes) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("cp1252", "replace")
    return value


_ALLOWED = {
    ("numpy", "dtype"): _ScalarType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,  # written by Python 2
    ("__builtin__", "frozenset"): frozenset,
    ("collections", "OrderedDict"): dict,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"asks for {module}.{name}, which could run code")
        return _ALLOWED[module, name]


def read_pickle(path: Path) -> Any:
    """A pickle of plain containers, numbers, strings and numpy scalars; everything else is refused by name.

    Such files come from the internet, and an ordinary unpickler runs whatever they say. Files written by Python 2 are
    read; numpy scalars come back as Python numbers.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return _plain(_PlainUnpickler(io.BytesIO(raw), encoding="bytes").load())
    except DataError as error:
        raise DataError(f"{path} is refused: it {error}; expected plain lists, dicts, numbers and strings") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is not a readable pickle ({error}); it may be cut off: download it again") from error


_ATOMS = frozenset((str, int, float, bool, type(None)))


def _plain(value: Any) -> Any:
    """Sets and tuples as lists, Python 2's byte strings as text. Runs over millions of values, hence the short cuts."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in (list, tuple, set, frozenset):
        return [item if type(item) in _ATOMS else _plain(item) for item in value]
    if kind is dict:
        return {_plain(key): item if type(item) in _ATOMS else _plain(item) for key, item in value.items()}
    if kind is bytes:
        return _text(value)
    raise DataError(f"holds a {kind.__name__}")


# -- the index ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ref:
    """One annotated target (or set of targets, or none) and the expressions for it.

    Attributes:
        ref_id: as in the file.
        ann_ids: the annotations whose union is the mask; empty = nothing in the image fits.
        sentences: dicts with ``sent_id``, ``sent`` and whatever else the data set says of a sentence.
    """

    ref_id: int | str
    ann_ids: list[int]
    sentences: list[dict[str, Any]]


@dataclass
class ReferIndex:
    """The refs of one split, by image.

    Attributes:
        name: for messages (``"refcoco|unc|val"``).
        images: per image ``{"id", "file_name", "height", "width", "refs": [...], "segmentations": {ann id: ...}}``.
        problems: records that cannot be used, and why.
        counts: images, expressions, absent, multi.
    """

    name: str
    images: PackedRecords
    problems: list[str]
    counts: dict[str, int] = field(default_factory=dict)

    def refs(self, record: dict[str, Any]) -> list[Ref]:
        return [Ref(**ref) for ref in record["refs"]]

    def mask(self, record: dict[str, Any], ref: Ref) -> np.ndarray:
        """The union of the ref's annotations as uint8 [H, W]."""
        mask = np.zeros((record["height"], record["width"]), dtype=np.uint8)
        for ann_id in ref.ann_ids:
            try:
                mask |= decode_segmentation(record["segmentations"][str(ann_id)], *mask.shape)
            except DataError as error:
                raise DataError(f"{self.name}, {record['file_name']}, annotation {ann_id}: {error}") from error
        return mask


def build_index(name: str, refs_path: Path, instances_path: Path, split: str) -> ReferIndex:
    """Reads both files and keeps what the split needs. Unusable records are listed, not fatal."""
    refs = read_pickle(refs_path) if refs_path.suffix == ".p" else read_json(refs_path, list)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise DataError(f"{refs_path} is not a list of dicts as a refs file must be")
    chosen = [ref for ref in refs if ref.get("split") == split]
    if not chosen:
        known = sorted({str(ref.get("split")) for ref in refs})
        raise DataError(f"{name}: {refs_path} has no split {split!r}; it has: {', '.join(known) or 'no refs at all'}")
    instances = read_json(instances_path)
    images, annotations = _by_id(instances, "images", instances_path), _by_id(instances, "annotations", instances_path)

    records: dict[Any, dict[str, Any]] = {}
    problems: list[str] = []
    counts = {"images": 0, "expressions": 0, "absent": 0, "multi": 0}
    for ref in chosen:
        label = f"{name}, ref {ref.get('ref_id')}"
        try:
            parsed = _parse_ref(ref)
            image_id = ref.get("image_id")
            image = images.get(image_id) if _is_id(image_id) else None
            if image is None:
                raise DataError(f"image {image_id!r} is not in {instances_path}")
            segmentations = {str(ann_id): _segmentation(annotations, ann_id, image) for ann_id in parsed.ann_ids}
            if image["id"] not in records:
                records[image["id"]] = _image_record(image)
        except DataError as error:
            problems.append(f"{label}: {error}")
            continue
        record = records[image["id"]]
        record["refs"].append(vars(parsed))
        record["segmentations"].update(segmentations)
        counts["expressions"] += len(parsed.sentences)
        counts["absent"] += len(parsed.sentences) * (not parsed.ann_ids)
        counts["multi"] += len(parsed.sentences) * (len(parsed.ann_ids) > 1)
    counts["images"] = len(records)
    if not records:
        raise DataError(f"{name}: no usable ref among {len(chosen)}; the first problem: {problems[0]}")
    return ReferIndex(name, PackedRecords(records.values()), problems, counts)


def _by_id(instances: dict, key: str, path: Path) -> dict[Any, dict]:
    rows = instances.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_id(row.get("id")) for row in rows):
        raise DataError(f"{path} has no list {key!r} of dicts with an 'id'")
    return {row["id"]: row for row in rows}


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _parse_ref(ref: dict[str, Any]) -> Ref:
    ann_ids = ref.get("ann_id")
    ann_ids = ann_ids if isinstance(ann_ids, list) else [ann_ids]
    ann_ids = [] if ann_ids == [-1] else ann_ids
    if not all(_is_id(ann_id) and ann_id != -1 for ann_id in ann_ids):
        raise DataError(f"ann_id is {ref.get('ann_id')!r}; expected an id, a list of ids, or [-1] for no target")
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
        raise DataError("'sentences' is not a list of dicts")
    kept = []
    for number, sentence in enumerate(sentences):
        if isinstance(sentence.get("sent"), str) and sentence["sent"].strip():
            extra = {key: value for key, value in sentence.items() if key not in ("tokens", "raw")}
            kept.append({"sent_id": number, **extra})
    if not kept:
        raise DataError("no sentence with a text in 'sent'")
    return Ref(ref.get("ref_id"), ann_ids, kept)


def _segmentation(annotations: dict[Any, dict], ann_id: int, image: dict[str, Any]) -> Any:
    annotation = annotations.get(ann_id)
    if annotation is None:
        raise DataError(f"annotation {ann_id} is not in the annotations")
    if annotation.get("image_id", image["id"]) != image["id"]:
        raise DataError(f"annotation {ann_id} belongs to image {annotation['image_id']}, the ref to {image['id']}")
    if not annotation.get("segmentation"):
        raise DataError(f"annotation {ann_id} has no segmentation")
    return annotation["segmentation"]


def _image_record(image: dict[str, Any]) -> dict[str, Any]:
    height, width, file_name = image.get("height"), image.get("width"), image.get("file_name")
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise DataError(f"image {image['id']} has height {height!r} and width {width!r}")
    if (
        not isinstance(file_name, str)
        or not file_name
        or Path(file_name).is_absolute()
        or ".." in Path(file_name).parts
    ):
        raise DataError(f"image {image['id']} has file_name {file_name!r}")
    return {
        "id": image["id"], "file_name": file_name, "height": height, "width": width, "refs": [], "segmentations": {},
    }  # fmt: skip
