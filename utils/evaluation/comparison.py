"""What a comparison page shows: models side by side, per benchmark and group, and the answers that differ most.

All follows from files of answers; images and ground truth are added where the data set is at hand.
"""

from __future__ import annotations

import base64
import colorsys
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from utils.datasets.base import EvalDataset
from utils.datasets.masks import decode_mask
from utils.evaluation import metrics
from utils.evaluation.benchmarks import Benchmark, benchmark_of
from utils.evaluation.metrics import Record
from utils.evaluation.results import Provenance, Summary, check_has_logits, read_results
from utils.plotting.overlays import PALETTE, TRUTH_COLOR

QUOTED = Path(__file__).resolve().parents[2] / "configs/quoted.yaml"
TEMPLATE = Path(__file__).with_name("comparison.html")
SIDE = 320  # longest side in pixels of the page's images
ALPHA = 130  # of masks, of 255
COCO_SIZES = {"small": 32**2, "medium": 96**2}  # areas in pixels that COCO calls so; above: large
BINS = 10  # of the reliability view, with equally many answers
MEASURES = {  # of an answer's uncertainty: name -> Record -> value, of answers that have it
    "ambiguity": lambda record: max(record.ambiguity, default=None),
    "1 - predicted IoU": lambda record: max(0, 1 - min(record.predicted_iou)) if record.predicted_iou else None,
    "disagreement of layers": lambda record: max(record.uncertainty, default=None),
}


@dataclass(frozen=True)
class Answers:
    """A model's answers to a benchmark, as its protocol counts them."""

    name: str
    summary: Summary
    provenance: Provenance
    records: list[Record]


def read_folder(name: str, folder: Path) -> dict[tuple[str, str], Answers]:
    """(benchmark, mode) -> the answers in a folder of ``test.py`` or ``score.py --output``.

    Raises:
        ValueError: if it holds none.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):  # which only a finished evaluation has
        summary, answers = Summary.load(path), path.with_suffix(".jsonl")
        if not answers.is_file():
            raise ValueError(f"{answers} is missing beside {path.name}; give the folder as test.py wrote it")
        found[summary.benchmark, summary.mode] = Answers(name, summary, *read_results(answers))
    if not found:
        raise ValueError(f"{folder} holds no results of test.py (BENCHMARK.MODE.json)")
    return found


def compare(
    models: Mapping[str, Mapping[tuple[str, str], Answers]],
    count: int,
    open_dataset: Callable[[str], EvalDataset | None],
    quote: bool = True,
) -> list[dict[str, Any]]:
    """Per benchmark and mode that a model has: scores, groups, confusion, reliability and samples, for JSON.

    Args:
        models: name -> ``read_folder``. Differences are to the first.
        count: most samples of a benchmark.
        open_dataset: benchmark -> its data, or None.
        quote: add published figures.
    """
    keys = list(dict.fromkeys(key for answers in models.values() for key in answers))
    quoted = read_quoted(QUOTED) if quote else {}
    return [
        _section(key, [answers.get(key) for answers in models.values()], count, open_dataset, quoted) for key in keys
    ]


def page(title: str, about: str, names: Sequence[str], sections: Sequence[dict[str, Any]]) -> str:
    """The page: one file of HTML that needs no server."""
    models = [{"name": name, "color": ", ".join(map(str, model_color(k)))} for k, name in enumerate(names)]
    values = json.dumps({"about": about, "models": models, "sections": sections}, ensure_ascii=False, allow_nan=False)
    template = TEMPLATE.read_text(encoding="utf-8")
    head, tail = template.split("DATA")
    head = head.replace("TITLE", html.escape(title))
    return f"{head}{values.replace('<', chr(92) + 'u003c')}{tail}"  # no text of an answer ends the script


def read_quoted(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Benchmark -> published rows: ``method``, ``source``, ``scores`` (fractions), and ``protocol``, "" = any."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for table in yaml.safe_load(path.read_text(encoding="utf-8")):
        for method, values in table["rows"].items():
            scores = {n: round(v / 100, 6) for n, v in zip(table["metrics"], values, strict=True) if v is not None}
            row = {"method": method, "source": table["source"], "scores": scores}
            rows.setdefault(table["benchmark"], []).append(row | {"protocol": table.get("protocol", "")})
    return rows


def _section(
    key: tuple[str, str],
    columns: Sequence[Answers | None],
    count: int,
    open_dataset: Callable[[str], EvalDataset | None],
    quoted: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    there = [column for column in columns if column is not None]
    benchmark, run = benchmark_of(there[0].provenance.spec), there[0].provenance
    protocol = benchmark.protocol(run.protocol, run.mode)
    for column in there:
        check_has_logits(column.provenance, protocol)
    scored = [
        None if column is None else metrics.select(column.records, protocol, run.several_seg) for column in columns
    ]
    first = next(records for records in scored if records is not None)
    sizes = image_sizes([records for records in scored if records is not None])
    complete = all(record.index in sizes for record in first)  # else a group would depend on who drew a mask
    labels = {_key(record): _labels(record, sizes[record.index] if complete else None) for record in first}
    scores = [None if records is None else metrics.compute(records, benchmark, protocol) for records in scored]
    names = list(dict.fromkeys(name for values in scores if values for name in values))
    gains = [_gains(first, records, benchmark, protocol) for records in scored]
    return {
        "benchmark": key[0],
        "mode": key[1],
        "protocol": ", ".join(filter(None, [protocol, "first [SEG]" if run.several_seg == "first" else ""])),
        "metrics": names,
        "models": [
            None
            if column is None or records is None
            else {
                "scores": values,
                "intervals": metrics.intervals(records, benchmark, protocol),
                "gains": gain,
                "masks": metrics.count_masks(records, protocol),
                "images": metrics.count_records(records, protocol)["images"],
                "note": " ".join([f"(first {column.summary.limit} images)"] * bool(column.summary.limit))
                + column.summary.missing_note,
                "layers": column.provenance.layer_policy,
                "confusion": confusion(records, protocol) if benchmark.rejects else None,
                "reliability": reliability(records, protocol),
            }
            for column, records, values, gain in zip(columns, scored, scores, gains, strict=True)
        ],
        "groups": _groups(labels, scored, benchmark, protocol),
        "quoted": [row for row in quoted.get(key[0], []) if row["protocol"] in ("", protocol)],
        "samples": _samples(key[0], labels, scored, protocol, run.several_seg, count, open_dataset),
    }


def _key(record: Record) -> tuple[int, str]:
    return record.index, record.query_id


def _gains(first: list[Record], records: list[Record] | None, benchmark: Benchmark, protocol: str) -> Any:
    """Metric -> gain over the first model, with its paired interval; a reason where there is none."""
    if records is None or records is first:
        return None
    try:
        return metrics.difference(first, records, benchmark, protocol)
    except ValueError:
        return "answered other queries"


def image_sizes(columns: Sequence[Sequence[Record]]) -> dict[int, tuple[int, int]]:
    """Index -> (height, width), of images for which a model drew a mask."""
    return {
        record.index: (record.masks[0]["size"][0], record.masks[0]["size"][1])
        for records in columns
        for record in records
        if record.masks
    }


def _labels(record: Record, size: tuple[int, int] | None) -> dict[str, str]:
    """Key -> group of a query: what the data set says of it, the target's size, the image's shape."""
    labels = {key: str(record.meta[key]) for key in metrics.GROUP_KEYS if key in record.meta}
    area = next((name for name, most in COCO_SIZES.items() if most > record.G), "large")
    if not record.pairs:  # of matched masks, G is a sum
        labels["size of the target"] = "none" if record.expected_empty else area
    if size is not None:
        ratio = size[1] / size[0]
        labels["image"] = "wide" if ratio > 1.2 else "tall" if ratio < 1 / 1.2 else "square"
    return labels


def _groups(
    labels: Mapping[tuple[int, str], Mapping[str, str]],
    columns: Sequence[list[Record] | None],
    benchmark: Benchmark,
    protocol: str,
) -> list[dict[str, Any]]:
    """Rows of the breakdown; keys with one group are left out."""
    rows = []
    for key in dict.fromkeys(key for each in labels.values() for key in each):
        groups = sorted({each[key] for each in labels.values() if key in each})
        for group in groups if len(groups) > 1 else ():
            chosen = {query for query, each in labels.items() if each.get(key) == group}
            parts = [None if c is None else [record for record in c if _key(record) in chosen] for c in columns]
            scores = [metrics.compute(part, benchmark, protocol) if part else None for part in parts]
            rows.append({"key": key, "group": group, "queries": len(chosen), "scores": scores})
    return rows


def confusion(records: Sequence[Record], protocol: str) -> dict[str, int]:
    """Counts of present and absent targets that were answered or rejected."""
    counts = dict.fromkeys(("present answered", "present rejected", "absent answered", "absent rejected"), 0)
    for record in records:
        truth = "absent" if record.expected_empty else "present"
        counts[f"{truth} {'rejected' if metrics.rejects(record, protocol) else 'answered'}"] += 1
    return counts


def reliability(records: Sequence[Record], protocol: str) -> dict[str, list[list[float]]]:
    """Measure of uncertainty -> per bin of equally many answers: its mean, the mean IoU, and their number."""
    curves = {}
    for name, measure in MEASURES.items():
        values = [(measure(each), metrics.iou(each, protocol)) for each in records]
        pairs = [(value, iou) for value, iou in values if value is not None and math.isfinite(value)]
        if len(pairs) >= BINS:
            parts = np.array_split(np.array(sorted(pairs)), BINS)
            curves[name] = [[*part.mean(axis=0).round(4).tolist(), len(part)] for part in parts]
    return curves


# -- samples -----------------------------------------------------------------------------------------------------------


def _samples(
    spec: str,
    labels: Mapping[tuple[int, str], dict[str, str]],
    columns: Sequence[list[Record] | None],
    protocol: str,
    several_seg: str,
    count: int,
    open_dataset: Callable[[str], EvalDataset | None],
) -> list[dict[str, Any]]:
    """Those whose IoU differs most among the models; of one model, those with the least."""
    by_query: list[dict[tuple[int, str], Record]] = [{_key(record): record for record in c or ()} for c in columns]
    ious = {query: [metrics.iou(column[query], protocol) for column in by_query if query in column] for query in labels}
    several = sum(c is not None for c in columns) > 1
    spread = {query: (min(values) - max(values) if several else values[0]) for query, values in ious.items()}
    chosen = sorted(labels, key=lambda query: (spread[query], query))[:count]
    dataset = open_dataset(spec) if chosen else None
    samples = []
    for index, query_id in chosen:
        records = [column.get((index, query_id)) for column in by_query]
        known = next(record for record in records if record is not None)
        answers = [
            None
            if record is None
            else {
                "iou": round(metrics.iou(record, protocol), 4),
                "rejected": metrics.rejects(record, protocol),
                "text": record.answer,
                "mask": None if not record.masks else _mask(_drawn(record, several_seg), model_color(number)),
            }
            for number, record in enumerate(records)
        ]
        sample = {"image": known.image, "query": known.query, "absent": known.expected_empty, "answers": answers}
        sample |= {"labels": labels[index, query_id], "truth": None, "picture": None}
        samples.append(sample | ({} if dataset is None else _of_data(dataset, known)))
    return samples


def _of_data(dataset: EvalDataset, record: Record) -> dict[str, Any]:
    """The image and the target of an answer.

    Raises:
        ValueError: if the data are not those that were answered.
    """
    sample = dataset[record.index]
    query = next((query for query in sample.queries if query.query_id == record.query_id), None)
    if query is None or query.text != record.query:
        raise ValueError(f"--dataset_dir: {sample.source} has no query {record.query!r}; give the data of the results")
    truth = metrics.merge_targets(query.masks, *sample.image.shape[:2])
    image = Image.fromarray(sample.image)
    image.thumbnail((SIDE, SIDE))
    return {"picture": _url(image, "JPEG", quality=80), "truth": _mask(truth == 1, TRUTH_COLOR)}


def _drawn(record: Record, several_seg: str) -> np.ndarray:
    """The mask [H, W] that is scored, or the union of those that are matched."""
    masks = record.masks[:1] if several_seg == "first" else record.masks
    return np.any([decode_mask(mask) for mask in masks], axis=0)


def model_color(number: int) -> list[int]:
    """R, G, B of a model: of the palette without the target's color, then light and dark hues a golden angle apart."""
    own = [color for color in PALETTE.tolist() if tuple(color) != TRUTH_COLOR]
    if number < len(own):
        return own[number]
    rgb = colorsys.hsv_to_rgb((0.83 + number * 0.618034) % 1, 0.9, (0.95, 0.5)[number % 2])
    return [round(255 * value) for value in rgb]


def _mask(mask: np.ndarray, color: Sequence[int]) -> str:
    """A picture of the page's size: the color where a mask [H, W] is, else transparent."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=None)
    image = image.point(lambda value: int(value > 0))  # thin objects stay
    image.putpalette([0, 0, 0, *color])
    return _url(image, "PNG", transparency=bytes([0, ALPHA]), bits=1)


def _url(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
