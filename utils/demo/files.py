"""Writers shared by the demo's data sets: polygons and RLE, images, statistics and query-agnostic baselines.

Polygons follow two conventions. ReasonSeg fills outline and interior, so the vertices are border pixels of the region:
one polygon per connected part, and none for a region with a hole, which polygons cannot represent. Rasterizing them
gives the region back (IoU 0.99999 on average, at least 0.98: parts of one or two pixels are lost). COCO's polygons run
along the outer edge of the pixels (IoU 1); a region with a hole becomes RLE.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.datasets.masks import encode_mask
from utils.demo.scenes import Scene

SUMMARY = "demo_data.json"  # of a folder of drawn data


@dataclass(frozen=True)
class Sizes:
    """Arguments that determine the data: seed, images per training set, queries per evaluation split, which sets."""

    seed: int
    train: int
    val: int
    test: int
    all_types: bool = False

    def small_split(self, split: str) -> int:
        """Number of images in a split of the sets that only ``all_types`` adds."""
        train = max(6, self.train // 15)
        return train if split == "train" else max(2, train // 3)


# -- query-agnostic baselines ------------------------------------------------------------------------------------------


@dataclass
class QueryAgnosticBaseline:
    """Scores of answers that ignore the query, for one kind of query in one split.

    "all" answers with all shapes; "random" with one shape, as an expectation over the shapes. Absent targets count as
    in gRefCOCO: a non-empty answer has IoU 0 and adds its pixels to the union.
    """

    queries: int = 0
    iou: dict[str, float] = field(default_factory=lambda: {"all": 0.0, "random": 0.0})
    inter: dict[str, float] = field(default_factory=lambda: {"all": 0.0, "random": 0.0})
    union: dict[str, float] = field(default_factory=lambda: {"all": 0.0, "random": 0.0})

    def add(self, scene: Scene, targets: tuple[int, ...]) -> None:
        # The visible regions are disjoint, so areas suffice.
        areas = scene.masks.sum(axis=(1, 2)).astype(np.float64)
        is_target = np.isin(np.arange(len(areas)), targets)
        target_area = areas[is_target].sum()
        inter = np.where(is_target, areas, 0.0)
        union = areas + target_area - inter
        self.queries += 1
        self.iou["all"] += target_area / areas.sum()
        self.inter["all"] += target_area
        self.union["all"] += areas.sum()
        self.iou["random"] += float((inter / union).mean())
        self.inter["random"] += float(inter.mean())
        self.union["random"] += float(union.mean())

    def scores(self) -> dict[str, dict[str, float]]:
        return {
            answer: {
                "gIoU": round(self.iou[answer] / self.queries, 4),
                "cIoU": round(self.inter[answer] / self.union[answer], 4),
            }
            for answer in ("all", "random")
        }


class Ledger:
    """Counts and query-agnostic baselines of all data written."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
        self.baselines: dict[tuple[str, str, str], QueryAgnosticBaseline] = defaultdict(QueryAgnosticBaseline)

    def count(self, dataset: str, split: str, **numbers: int) -> None:
        for name, number in numbers.items():
            self.counts[dataset][split][name] += number

    def query(self, dataset: str, split: str, kinds: tuple[str, ...], scene: Scene, targets: tuple[int, ...]) -> None:
        for kind in kinds:
            self.baselines[dataset, split, kind].add(scene, targets)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"set": key[0], "split": key[1], "kind": key[2], "queries": baseline.queries, **baseline.scores()}
            for key, baseline in self.baselines.items()
        ]


# -- masks -------------------------------------------------------------------------------------------------------------


def _contours(mask: np.ndarray) -> tuple[list[np.ndarray], bool]:
    """Outer border pixels (x, y) [K, 2] of each connected part of a mask [H, W], and whether the mask has a hole."""
    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer = [points[:, 0] for points, node in zip(contours, tree[0]) if node[3] < 0]
    return outer, len(outer) < len(contours)


def labelme_polygons(mask: np.ndarray) -> list[list[list[int]]] | None:
    """Polygons in ReasonSeg's convention (outline and interior are filled); None if they cannot represent the mask."""
    outer, has_hole = _contours(mask)
    polygons = [points.tolist() for points in outer if len(points) >= 3]
    return None if has_hole or not polygons else polygons


def coco_segmentation(mask: np.ndarray, as_rle: bool) -> list[list[float]] | dict[str, Any]:
    """Polygons along the outer pixel edges, in COCO's continuous coordinates, or compressed RLE."""
    fine = 4
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    window = mask[y : y + height, x : x + width]
    outer, has_hole = _contours(window.repeat(fine, axis=0).repeat(fine, axis=1))
    simple = [cv2.approxPolyDP(points[:, None], fine / 3, closed=True)[:, 0] for points in outer]
    polygons = [((p + 0.5) / fine + (x, y)).round(2).ravel().tolist() for p in simple if len(p) >= 3]
    if as_rle or has_hole or not polygons:
        return encode_mask(mask)
    return polygons


def coco_annotation(number: int, image_id: int, category_id: int, mask: np.ndarray) -> dict[str, Any]:
    """A row of ``annotations``; every eighth uses RLE."""
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(value) for value in cv2.boundingRect(mask.astype(np.uint8))],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": coco_segmentation(mask, as_rle=number % 8 == 0),
    }


# -- files -------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")), encoding="utf-8")


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """Writes a JPEG of quality 95 without chroma subsampling, which would blur shapes of 20 pixels."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    _, data = cv2.imencode(".jpg", image[:, :, ::-1], options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


def streams(seed: int, stream: int, count: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Yields (index, generator) per image of a split; each split has its own stream."""
    for index in range(count):
        yield index, np.random.default_rng([seed, stream, index])
