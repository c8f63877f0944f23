"""Generates the demo's data sets and writes them as a ``--dataset_dir`` in the layouts of the real ones.

    python scripts/make_demo_data.py --out data/demo --seed 0

Scenes and texts come from ``utils/demo/scenes.py`` and ``scene_texts.py``. Output:

- ``reason_seg/ReasonSeg/{train,val,test,heldout}``: one image, one target, one to three queries per file; half of the
  files have short phrases, half have questions; ``explanatory/train.json`` has text answers for some. ``heldout`` has
  short queries about pairs of color and kind that occur in no other split.
- ``refer_seg/refcoco`` and ``refer_seg/grefcoco``: COCO-style, the latter with several, one and no targets.
- ``llava_dataset/llava_instruct_150k.json``: captions and question answering in several turns.

``--all_types`` adds small versions of the other 20 data sets, for all eight types (``utils/demo/refer_sets.py`` and
``utils/demo/other_sets.py``), and of six more benchmarks (``utils/demo/evaluation_sets.py``); the files listed above
stay identical.

``--two_steps`` adds ``two_steps/two_steps.jsonl`` for ``--dataset custom``: queries that need a step, with thoughts
(``utils/demo/two_steps.py``).

Each scene has its own random stream (seed, set and split, index), so no two splits share a scene. Stream numbers are
below 1000; pre-training uses larger ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.datasets.base import pick
from utils.demo import scene_texts, scenes
from utils.demo.evaluation_sets import EVALUATION_SETS, write_evaluation_set
from utils.demo.files import SUMMARY, Ledger, Sizes, labelme_polygons, streams, write_jpeg, write_json
from utils.demo.other_sets import WRITERS, write_set
from utils.demo.refer_sets import REFER_SETS, write_refer_set
from utils.demo.scene_texts import Query
from utils.demo.scenes import Scene
from utils.demo.two_steps import write_two_steps
from utils.plotting import text_tables

# First digits of a hash of the generated data, without and with --all_types (tests/demo/test_make_demo_data.py).
# Update them when the generated data change, so that data of an older version are rejected.
VERSION = {False: "4527a8ebdff7", True: "d58561cd6708"}
REASON_STREAMS = {"train": 1, "val": 2, "test": 3, "heldout": 4}
LLAVA_STREAM, LLAVA_FIRST_IMAGE = 31, 500_001
LONG_FAMILIES = ("relation", "superlative", "commonsense")
MAX_IMAGES = 100_000
TWO_STEPS = "two_steps"


# ---------------------------------------------------------------------------------------------------------- ReasonSeg


def _reason_scene(rng: np.random.Generator, family: str, held_out: bool) -> tuple[Scene, list[Query], list]:
    """Samples a scene, up to three queries for one shape (the first of ``family``), and the polygons of the shape."""
    generate = scene_texts.attribute_queries if family == "attribute" else scene_texts.reasoning_queries
    while True:
        scene = scenes.sample_scene(rng, held_out)
        queries = generate(scene, rng)
        first = next((query for query in queries if query.family == family), None)
        if first is None:
            continue
        polygons = labelme_polygons(scene.masks[first.targets[0]])
        if polygons is None:
            continue
        same = [query for query in queries if query.targets == first.targets and query is not first]
        return scene, [first, *same[:2]], polygons


def _reason_json(queries: list[Query], polygons: list, image_name: str, size: tuple[int, int]) -> dict[str, Any]:
    shape = {"label": "target", "labels": ["target"], "shape_type": "polygon", "image_name": image_name}
    return {
        "text": [query.text for query in queries],
        "is_sentence": queries[0].is_sentence,
        "shapes": [{**shape, "points": p, "group_id": None, "group_ids": [None], "flags": {}} for p in polygons],
        "imagePath": image_name,
        "imageHeight": size[0],
        "imageWidth": size[1],
        "meta": {"family": queries[0].family},  # not in the real files; reports group by it
    }


def write_reason_seg(root: Path, sizes: Sizes, ledger: Ledger) -> None:
    folder = root / "reason_seg" / "ReasonSeg"
    counts = {"train": sizes.train, "val": 2 * sizes.val, "test": 2 * sizes.test, "heldout": sizes.test}
    explanations = []
    for split, count in counts.items():
        for index, rng in streams(sizes.seed, REASON_STREAMS[split], count):
            is_long = split != "heldout" and index % 2 == 1
            family = LONG_FAMILIES[index // 2 % 3] if is_long else "attribute"
            scene, queries, polygons = _reason_scene(rng, family, split == "heldout")
            name = f"{split}_{index:05d}"
            write_jpeg(folder / split / f"{name}.jpg", scene.image)
            annotation = _reason_json(queries, polygons, f"{name}.jpg", scene.image.shape[:2])
            write_json(folder / split / f"{name}.json", annotation)
            kind = "long" if is_long else "short"
            ledger.count("ReasonSeg", split, images=1, queries=len(queries), **{f"{kind}_images": 1})
            kinds = (kind, f"long: {family}") if is_long else (kind,)
            ledger.query("ReasonSeg", split, kinds, scene, queries[0].targets)
            if split == "train" and index % 4 == 3:
                outputs = scene_texts.explanation(scene, queries[0])
                explained = {
                    "query": queries[0].text,
                    "outputs": outputs,
                    "image": f"{name}.jpg",
                    "json": f"{name}.json",
                }
                explanations.append(explained)
    write_json(folder / "explanatory" / "train.json", explanations)
    ledger.count("ReasonSeg", "train", explanations=len(explanations))


# -------------------------------------------------------------------------------------------------------------- LLaVA


def _conversation(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """Samples (question, answer) turns: a caption with probability 0.4, otherwise two to four short answers."""
    if rng.random() < 0.4:
        request = pick(scene_texts.CAPTION_REQUESTS, rng)
        return [(request, scene_texts.caption(scene, rng))]
    return scene_texts.questions(scene, rng)[: int(rng.integers(2, 5))]


def write_llava(root: Path, sizes: Sizes, ledger: Ledger) -> None:
    dataset, folder = "llava_instruct_150k", root / "coco" / "train2017"
    records = []
    for index, rng in streams(sizes.seed, LLAVA_STREAM, max(1, sizes.train * 4 // 15)):
        scene = scenes.sample_scene(rng)
        stem = f"{LLAVA_FIRST_IMAGE + index:012d}"
        write_jpeg(folder / f"{stem}.jpg", scene.image)
        turns = _conversation(rng, scene)
        first = turns[0][0]
        values = [f"<image>\n{first}" if rng.random() < 0.5 else f"{first}\n<image>", *(q for q, _ in turns[1:])]
        conversation = []
        for question, (_, answer) in zip(values, turns):
            conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": stem, "image": f"{stem}.jpg", "conversations": conversation})
        ledger.count(dataset, "train", images=1, turns=len(turns))
    write_json(root / "llava_dataset" / "llava_instruct_150k.json", records)


# --------------------------------------------------------------------------------------------------------------- main


def existing_summary(out: Path, sizes: Sizes) -> dict[str, Any] | None:
    """The summary of complete data in ``out`` with the same arguments; None if ``out`` is empty or missing.

    Raises:
        ValueError: if ``out`` contains anything else.
    """
    if out.is_file():
        raise ValueError(f"--out {out} is a file; give a folder")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / SUMMARY).is_file():
        raise ValueError(f"--out {out} exists and was not written by this script; give another folder")
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        actual = {**summary["arguments"], "version": summary.get("version")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out / SUMMARY} cannot be read ({error!r}); remove {out} and run again") from error
    expected = {**asdict(sizes), "version": VERSION[sizes.all_types]}
    if actual != expected:
        differing = ", ".join(f"{k} {actual.get(k)} (now {v})" for k, v in expected.items() if actual.get(k) != v)
        raise ValueError(f"{out} contains data made with other settings: {differing}; remove it or give another --out")
    return summary


def write_data_sets(out: Path, sizes: Sizes) -> dict[str, Any]:
    """Writes all data to a folder beside ``out``, then renames it, so that ``out`` is complete or absent."""
    unfinished = out.with_name(out.name + ".tmp")
    if unfinished.exists():
        if not (unfinished / SUMMARY).is_file():
            raise ValueError(f"{unfinished} exists and is not a leftover of this script; remove it")
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    write_json(unfinished / SUMMARY, {"complete": False})
    ledger = Ledger()
    parts: dict[str, Callable[[], None]] = {
        "ReasonSeg": partial(write_reason_seg, unfinished, sizes, ledger),
        "refcoco": partial(write_refer_set, unfinished, "refcoco", sizes, ledger),
        "grefcoco": partial(write_refer_set, unfinished, "grefcoco", sizes, ledger),
        "llava_instruct_150k": partial(write_llava, unfinished, sizes, ledger),
    }
    if sizes.all_types:
        others = {name: write_refer_set for name in REFER_SETS if name not in parts}
        others |= dict.fromkeys(WRITERS, write_set) | dict.fromkeys(EVALUATION_SETS, write_evaluation_set)
        parts |= {name: partial(write_one, unfinished, name, sizes, ledger) for name, write_one in others.items()}
    for name, write in parts.items():
        start = time.perf_counter()
        write()
        images = sum(split["images"] for split in ledger.counts[name].values())
        print(f"{name}: {images} images in {time.perf_counter() - start:.1f} s", flush=True)
    summary = {
        "complete": True,
        "arguments": asdict(sizes),
        "version": VERSION[sizes.all_types],
        "counts": ledger.counts,
        "text_blind": ledger.rows(),
    }
    (unfinished / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    unfinished.replace(out)
    return summary


def add_two_steps(out: Path, sizes: Sizes) -> None:
    """Adds queries that need a step to the finished data of these sizes, in one piece, unless they are there.

    Raises:
        ValueError: if something else is in their place.
    """
    folder, unfinished = out / TWO_STEPS, out.with_name(f"{out.name}.{TWO_STEPS}.tmp")
    if (folder / "two_steps.jsonl").is_file():
        return
    if folder.exists():
        raise ValueError(f"{folder} exists and has no two_steps.jsonl; remove it")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_two_steps(unfinished, 2 * sizes.train, sizes.val, sizes.test, sizes.seed)
    unfinished.replace(folder)
    print(f"wrote {folder}")


def summary_tables(summary: dict[str, Any]) -> str:
    """Tables of the counts per set and split, and of the query-agnostic baselines."""
    counts_table = []
    for dataset, splits in summary["counts"].items():
        for split, counts in splits.items():
            numbers = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
            counts_table.append([dataset, split, numbers])
    scores = [["set", "split", "kind", "queries", "all objects: gIoU", "cIoU", "random object: gIoU", "cIoU"]]
    for row in summary["text_blind"]:
        cells = [f"{row[answer][metric]:.2f}" for answer in ("all", "random") for metric in ("gIoU", "cIoU")]
        scores.append([row["set"], row["split"], row["kind"], str(row["queries"]), *cells])
    lines = ["", "Data sets", *text_tables.aligned(counts_table, "l")]
    lines += ["", "Query-agnostic baselines: scores of answers that ignore the text"]
    return "\n".join([*lines, *text_tables.aligned(scores, "lllr")])


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Generates small synthetic scenes with exact masks, as a --dataset_dir in the layouts of "
        "ReasonSeg, RefCOCO, gRefCOCO and LLaVA-Instruct, or of all 29 data sets. The same seed and sizes give the "
        "same files. Existing data with the same settings are kept; an interrupted run leaves nothing incomplete in "
        "--out.",
        epilog="Then: python train_ds.py --config configs/tiny.yaml --dataset_dir DIR",
    )
    size = _number(1, MAX_IMAGES)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; use it as --dataset_dir"
    )
    parser.add_argument(
        "--seed", type=_number(0, 2**32 - 1), default=0, metavar="S", help="seed of all scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--train",
        type=size,
        default=1500,
        metavar="N",
        help="training images in each of ReasonSeg, RefCOCO and gRefCOCO, and 4/15 as many for LLaVA-Instruct "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--val",
        type=size,
        default=320,
        metavar="N",
        help="queries per validation split: N short and N long ones in ReasonSeg, at least N expressions in RefCOCO, "
        "1.2 N in gRefCOCO, a third each with several, one and no targets (default: %(default)s)",
    )
    parser.add_argument(
        "--test",
        type=size,
        default=320,
        metavar="N",
        help="the same for ReasonSeg's test, testA and testB; also short queries of ReasonSeg's heldout split, about "
        "pairs of color and kind that occur in no other split (default: %(default)s)",
    )
    parser.add_argument(
        "--all_types",
        action="store_true",
        help="also small versions of the other 25 data sets, N / 15 training images each (N of --train; at least 6), "
        "for configs/tiny_mixed.yaml",
    )
    parser.add_argument(
        "--two_steps",
        action="store_true",
        help=f"also queries that need a step, with thoughts, for --dataset custom --custom_data "
        f"DIR/{TWO_STEPS}/two_steps.jsonl: 2 N training images (N of --train)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    sizes = Sizes(args.seed, args.train, args.val, args.test, args.all_types)
    out = args.out.absolute()
    try:
        summary = existing_summary(out, sizes)
        if summary:
            print(f"{args.out} already contains these data (seed {args.seed}); nothing to do for them")
        else:
            summary = write_data_sets(out, sizes)
            print(f"wrote {args.out}")
        if args.two_steps:
            add_two_steps(out, sizes)
    except (ValueError, OSError) as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 1
    print(summary_tables(summary))
    return 0


if __name__ == "__main__":
    cv2.setNumThreads(1)
    sys.exit(main())
