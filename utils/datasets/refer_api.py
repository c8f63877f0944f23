"""Files of referring expressions: ``refs(...).p`` or ``.json`` with ``instances.json`` (docs/data.md).

One reader for refclef, refcoco(+/g), grefcoco and refzom, and for the false-premise sets, whose sentences have
additional keys (kept). There is one compact record per image, whose masks stay encoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.datasets.base import DataError, MissingDataError, is_text, read_json
from utils.datasets.coco_file import by_id, image_record, is_id, row_of, segmentation_of
from utils.datasets.records import Notes, PackedRecords, load_records
from utils.datasets.safe_pickle import read_pickle


@dataclass(frozen=True)
class Ref:
    """A referred target (or set of targets, or none) and its expressions.

    Attributes:
        ref_id: as in the file.
        ann_ids: the annotations whose union is the mask; empty = the target is absent.
        sentences: dicts with ``sent_id``, ``sent`` and all other keys of the data set; in false-premise data sets,
            ``false_premise`` is true if the target of this sentence is absent.
    """

    ref_id: int | str
    ann_ids: list[int | str]
    sentences: list[dict[str, Any]]

    def targets(self, sentence: dict[str, Any]) -> list[int | str]:
        """Ids of the annotations that a sentence of this ref refers to."""
        return [] if sentence.get("false_premise") else self.ann_ids


def load_refs(
    name: str, refs_path: Path, instances_path: Path, split: str, false_premises: bool = False
) -> tuple[PackedRecords, Notes]:
    """Reads the refs of a split, grouped by image, or loads them from the cache.

    Args:
        name: for messages (``"refcoco|unc|val"``).
        refs_path: the refs, pickle or JSON.
        instances_path: the annotations that the refs point to.
        split: the split of the refs.
        false_premises: whether each sentence has a flag that tells if it is true of the image.

    Returns:
        Per image ``{"id", "file_name", "height", "width", "refs": [...], "segmentations": {ann id: ...}}``, where a ref
        has the attributes of ``Ref``; and notes:

        - ``problems``, a message for each unusable record (which is not fatal), also for a ref whose id another ref of
          the image has: results are identified by it;
        - ``skipped``, a message for each ref without sentences (gRefCOCO has such refs; they ask nothing) or that is
          there twice;
        - ``counts`` of images, expressions, absent, multi.
    """
    settings = {"split": split, "false_premises": false_premises}
    return load_records(
        name,
        [refs_path, instances_path],
        settings,
        lambda: _read_refs(name, refs_path, instances_path, split, false_premises),
    )


def _read_refs(
    name: str, refs_path: Path, instances_path: Path, split: str, false_premises: bool
) -> tuple[Iterable[dict[str, Any]], Notes]:
    refs = read_pickle(refs_path) if refs_path.suffix == ".p" else read_json(refs_path, list)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise DataError(f"{refs_path} is not a list of dicts as a refs file must be")
    chosen = [ref for ref in refs if ref.get("split") == split]
    if not chosen:
        known = sorted({str(ref.get("split")) for ref in refs})
        raise MissingDataError(
            f"{name}: {refs_path} has no split {split!r}; it has: {', '.join(known) or 'no refs at all'}"
        )
    instances = read_json(instances_path)
    images, annotations = by_id(instances, "images", instances_path), by_id(instances, "annotations", instances_path)

    records: dict[Any, dict[str, Any]] = {}
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    problems: list[str] = []
    skipped: list[str] = []
    counts = {"images": 0, "expressions": 0, "absent": 0, "multi": 0}
    for ref in chosen:
        label = f"{name}, ref {ref.get('ref_id')}"
        if ref.get("sentences") == []:
            skipped.append(f"{label}: it has no sentence, and so asks nothing")
            continue
        try:
            parsed, dropped = _parse_ref(ref, false_premises)
            image = row_of(images, ref.get("image_id"), "image", instances_path)
            if (other := seen.setdefault((str(image["id"]), str(parsed.ref_id)), ref)) is not ref:
                if other != ref:
                    raise DataError(f"image {image['id']} has another ref with this ref_id")
                skipped.append(f"{label}: it is there twice, and counts once")
                continue
            rows = [row_of(annotations, ann_id, "annotation", instances_path) for ann_id in parsed.ann_ids]
            segmentations = {str(row["id"]): segmentation_of(row, image["id"]) for row in rows}
            if image["id"] not in records:
                records[image["id"]] = {**image_record(image), "refs": [], "segmentations": {}}
        except DataError as error:
            problems.append(f"{label}: {error}")
            continue
        problems += [f"{label}: {problem}" for problem in dropped]
        record = records[image["id"]]
        record["refs"].append(vars(parsed))
        record["segmentations"].update(segmentations)
        targets = [len(parsed.targets(sentence)) for sentence in parsed.sentences]
        counts["expressions"] += len(targets)
        counts["absent"] += sum(number == 0 for number in targets)
        counts["multi"] += sum(number > 1 for number in targets)
    counts["images"] = len(records)
    if not records:
        first = (problems + skipped)[0]
        raise DataError(f"{name}: no usable ref among {len(chosen)} of {refs_path}; the first problem: {first}")
    return records.values(), {"problems": problems, "skipped": skipped, "counts": counts}


def _parse_ref(ref: dict[str, Any], false_premises: bool) -> tuple[Ref, list[str]]:
    """Returns a ref with its valid sentences, and a message for each invalid one; ``DataError`` if none is valid."""
    ref_id, ann_ids = ref.get("ref_id"), ref.get("ann_id")
    if not is_id(ref_id):
        raise DataError(f"ref_id is {ref_id!r}; expected an id")
    ann_ids = ann_ids if isinstance(ann_ids, list) else [ann_ids]
    ann_ids = [] if ann_ids == [-1] else ann_ids
    if not all(is_id(ann_id) and ann_id != -1 for ann_id in ann_ids):
        raise DataError(f"ann_id is {ref.get('ann_id')!r}; expected an id, a list of ids, or [-1] for no target")
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
        raise DataError("'sentences' is not a list of dicts")
    kept, dropped = [], []
    for number, sentence in enumerate(sentences):
        if is_text(sentence.get("sent")):
            extra = {key: value for key, value in sentence.items() if key not in ("tokens", "raw")}
            kept.append({"sent_id": number, **extra})
        else:
            value = str(sentence.get("sent"))[:60]
            sent_id = str(sentence.get("sent_id", number))[:60]
            dropped.append(f"sentence {sent_id} must have a text in 'sent', not {value!r}")
    if not kept:
        raise DataError("no sentence with a text in 'sent'")
    if len({str(sentence["sent_id"]) for sentence in kept}) < len(kept):  # results are identified by it
        kept = [{**sentence, "sent_id": number} for number, sentence in enumerate(kept)]
    if false_premises:
        kept = [{**sentence, "false_premise": _is_false(sentence)} for sentence in kept]
        if all(sentence["false_premise"] for sentence in kept):
            ann_ids = []  # they belong to the true expressions that these were derived from
    return Ref(ref_id, ann_ids, kept), dropped


def _is_false(sentence: dict[str, Any]) -> bool:
    """Whether ``exist`` (R-RefCOCO) or ``is_false_premise`` (FP-RefCOCO) marks a false premise; without either, no."""
    for key, false in (("exist", False), ("is_false_premise", True)):
        value = sentence.get(key)
        if not (value is None or isinstance(value, bool)):
            raise DataError(f"sentence {sentence['sent']!r} has {key} {value!r}; expected true or false")
        if value is false:
            if not (sentence.get("gt_sent") in (None, "") or is_text(sentence["gt_sent"])):
                raise DataError(f"sentence {sentence['sent']!r} has gt_sent {sentence['gt_sent']!r}; expected a text")
            return True
    return False
