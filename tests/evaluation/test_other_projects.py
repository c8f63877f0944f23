"""Answers in the layouts of other projects' scripts, written here as their code does, score as the masks in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from model.structures import EvalQuery, EvalSample
from scripts import convert_answers, score
from utils.datasets import get_eval_dataset
from utils.datasets.base import DataError
from utils.datasets.masks import encode_mask
from utils.evaluation import any_model, metrics
from utils.evaluation.answers import parse_answer
from utils.evaluation.benchmarks import BENCHMARKS

REFS, REASON = "grefcoco|unc|val", "ReasonSeg|val"


def answers_of(data: Path, spec: str) -> list[tuple[str, Any, dict[str, Any], np.ndarray | None]]:
    """Per query: image name, query, its names elsewhere, and a shifted target as its answer; None for every third."""
    dataset, answers = get_eval_dataset(spec, data), []
    for index in range(len(dataset)):
        sample = dataset[index]
        positions: dict[int, int] = {}
        for number, query in enumerate(sample.queries):
            ref = query.meta.get("ref", 0)
            names = {"image_id": sample.image_id, "number": number, "ref": ref, "position": positions.get(ref, 0)}
            positions[ref] = positions.get(ref, 0) + 1
            mask = np.roll(query.masks.max(axis=0, initial=0) == 1, 2, axis=1) if len(query.masks) else None
            if mask is None and number % 2:
                mask = np.zeros(sample.image.shape[:2], bool)
                mask[3:9, 4:9] = True
            answers.append((Path(sample.source).name, query, names, None if len(answers) % 3 == 2 else mask))
    return answers


def by_image(answers: list) -> dict[str, list]:
    grouped: dict[str, list] = {}
    for answer in answers:
        grouped.setdefault(answer[0], []).append(answer)
    return grouped


def expected(data: Path, spec: str, answers: list) -> dict[str, float]:
    """gIoU and cIoU of the masks, computed from pixels here."""
    ious, pairs = [], []
    for _, query, _, mask in answers:
        truth = query.masks.max(axis=0, initial=0) if len(query.masks) else np.zeros((1, 1), np.uint8)
        mask = np.zeros_like(truth, bool) if mask is None else mask & (truth != 255)
        i, u = int((mask & (truth == 1)).sum()), int((mask | (truth == 1)).sum())
        ious.append(i / u if u else 1.0)
        pairs.append((i, u))
    return {"gIoU": float(np.mean(ious)), "cIoU": sum(i for i, _ in pairs) / sum(u for _, u in pairs)}


def write_sa2va(folder: Path, answers: list) -> list[Path]:
    records = []
    for number, (image, rows) in enumerate(by_image(answers).items()):
        masks = [None if mask is None else [encode_mask(mask)] for *_, mask in rows]
        record = {"img_id": str(number), "gt_masks": [], "image_path": f"./data/coco2014/train2014/{image}"}
        records.append(record | {"prediction_masks": masks})
    (folder / "refs.json").write_text(json.dumps(records[::-1]))
    return [folder / "refs.json"]


def write_sesame(folder: Path, answers: list, of_refs: bool = True) -> list[Path]:
    """Two processes; ReasonSeg has a false premise as its second question, and ids of two questions."""
    (folder / "segmentation_mask").mkdir()
    parts: list[dict] = [{}, {}]
    for number, (image, rows) in enumerate(by_image(answers).items()):
        shape = next(mask for *_, mask in [*rows, (np.zeros((1, 1)),)] if mask is not None).shape
        masks = np.stack([np.zeros(shape, np.int32) if mask is None else mask.astype(np.int32) for *_, mask in rows])
        exists = [mask is not None and bool(mask.any()) for *_, mask in rows]
        texts = ["It is [SEG]." if there else "There is none." for there in exists]
        ids = [[names["ref"] for *_, names, _ in rows]], [[names["position"] for *_, names, _ in rows]]
        if not of_refs:
            masks, exists, texts, ids = (
                np.concatenate([masks, masks]),
                exists * 2,
                texts * 2,
                ([[number] * 2], [[0, 1]]),
            )
        name = f"segmentation_mask/{number % 2}_{number:04d}.npz"
        np.savez_compressed(folder / name, pred=masks, gt=masks)
        parts[number % 2][f"./dataset/images/{image}"] = {
            "conversation_list": ["..."] * len(masks),
            "pred_sent": texts,
            "gt_exists": exists,
            "ref_ids": ids[0],
            "sent_ids": ids[1],
            "pred_exists": exists,
            "segmentation_path": name,
        }
    files = [folder / f"preds_set|val_{rank}_of_2.json" for rank in range(2)]
    for file, part in zip(files, parts):
        file.write_text(json.dumps(part))
    return files


def write_text4seg(folder: Path, answers: list) -> list[Path]:
    for image, rows in by_image(answers).items():
        here = folder / "set" / Path(image).stem
        here.mkdir(parents=True)
        shape = next(mask for *_, mask in rows if mask is not None).shape
        for *_, names, mask in rows:
            values = np.zeros(shape, np.uint8) if mask is None else mask.astype(np.uint8) * 255
            cv2.imwrite(str(here / f"{names['number']}_sam_mask.png"), values)
            cv2.imwrite(str(here / f"{names['number']}_pred_mask.png"), 255 - values)
    return [folder / "set"]


def counts(query: Any, mask: np.ndarray | None) -> tuple[int, int]:
    truth = query.masks[0]
    intersection, union, _, _ = metrics.count_pixels(np.zeros(truth.shape, bool) if mask is None else mask, truth)
    return intersection, union


def write_visionreasoner(folder: Path, answers: list) -> list[Path]:
    records = []
    for image, query, _, mask in answers:
        intersection, union = counts(query, mask)
        record = {"image_id": Path(image).stem, "ann_id": Path(image).stem, "think": "The cup is ..."}
        records.append(record | {"intersection": intersection, "union": union, "bbox_iou": 1.0})
    files = [folder / f"output_{part}.json" for part in range(2)]
    for part, file in enumerate(files):
        file.write_text(json.dumps(records[part * 2 : part * 2 + 2] if part == 0 else records[2:], indent=2))
    return files


def write_unipixel(folder: Path, answers: list) -> list[Path]:
    records = []
    for image, query, _, mask in answers:
        intersection, union = counts(query, mask)
        for number in range(2):
            record = {"vid": Path(image).stem, "qid": number, "inter": intersection * (1 - number), "union": union}
            records.append(record | {"iou": 0.5, "hit": True})
    (folder / "output_0.json").write_text(json.dumps(records))
    return [folder / "output_0.json"]


@pytest.mark.parametrize(
    ("source", "spec", "write"),
    [
        ("sa2va", REFS, write_sa2va),
        ("sa2va", REASON, write_sa2va),
        ("sesame", REFS, write_sesame),
        ("sesame", REASON, lambda folder, answers: write_sesame(folder, answers, of_refs=False)),
        ("text4seg", REFS, write_text4seg),
        ("visionreasoner", REASON, write_visionreasoner),
        ("unipixel", REASON, write_unipixel),
    ],
)
def test_converted_answers_score_as_the_masks_in_them(
    source: str, spec: str, write: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    answers = answers_of(data, spec)
    assert len(answers) > 3
    where = ["--benchmark", spec, "--dataset_dir", str(data)]
    files, output = write(tmp_path, answers), tmp_path / "answers.jsonl"
    assert convert_answers.main([source, *map(str, files), *where, "--output", str(output)]) == 0
    assert f"{len(answers)} answers to {spec}" in capsys.readouterr().out
    assert score.main([*where, "--predictions", str(output), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert {name: found["metrics"][name] for name in ("gIoU", "cIoU")} == pytest.approx(expected(data, spec, answers))


def test_unipixels_sentences_are_those_of_the_data_set(data: Path, tmp_path: Path) -> None:
    answers = [answer for answer in answers_of(data, REFS) if len(answer[1].masks)]
    path = tmp_path / "output_0.json"
    record = {"vid": Path(answers[0][0]).stem, "qid": int(answers[0][1].query_id.split("_")[1]), "inter": 0, "union": 9}
    path.write_text(json.dumps([record]))
    where = ["--benchmark", REFS, "--dataset_dir", str(data), "--output", str(tmp_path / "answers.jsonl")]
    assert convert_answers.main(["unipixel", str(path), *where]) == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["query_id"] == answers[0][1].query_id


def edited(change: Callable[[list], object]) -> Callable[[list[Path]], None]:
    def edit(files: list[Path]) -> None:
        values = json.loads(files[0].read_text())
        change(values)
        files[0].write_text(json.dumps(values))

    return edit


def cut(folder: Path) -> None:
    for file in folder.glob("segmentation_mask/*"):
        file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize(
    ("source", "spec", "write", "damage", "message"),
    [
        (
            "sa2va",
            REFS,
            write_sa2va,
            edited(lambda v: v[0].pop("image_path")),
            "image_path is needed, which ST scripts",
        ),
        ("sa2va", REFS, write_sa2va, edited(lambda v: v[0]["prediction_masks"].pop()), "it read other annotations"),
        (
            "sa2va",
            REFS,
            write_sa2va,
            edited(lambda v: v[0].update(image_path="x.jpg")),
            "image x.jpg is not in grefcoco",
        ),
        ("sa2va", REFS, write_sa2va, edited(lambda v: v.append({})), "item .* has no 'prediction_masks'"),
        (
            "sesame",
            REFS,
            write_sesame,
            lambda files: files[0].write_text("[]"),
            "is a list, not an object with an image",
        ),
        (
            "sesame",
            REFS,
            write_sesame,
            lambda files: [file.unlink() for file in files[0].parent.glob("segmentation_mask/*")],
            "No such file",
        ),
        ("sa2va", REFS, write_sa2va, edited(lambda v: v[0].update(prediction_masks=None)), "is no list of lists"),
        (
            "sa2va",
            REFS,
            write_sa2va,
            lambda files: files[0].write_text("[]"),
            "no answer in .*: are they files of sa2va",
        ),
        ("sesame", REFS, write_sesame, lambda files: cut(files[0].parent), "BadZipFile"),
        ("sesame", REFS, write_sesame, edited(lambda v: next(iter(v.values()))["pred_sent"].pop()), "do not agree"),
        (
            "text4seg",
            REFS,
            write_text4seg,
            lambda files: next(files[0].glob("*/0_sam_mask.png")).rename(files[0] / "9_sam_mask.png"),
            "it read other annotations",
        ),
        (
            "visionreasoner",
            REASON,
            write_visionreasoner,
            lambda files: files[0].write_text(files[0].read_text()[:-20]),
            "is not valid JSON",
        ),
        (
            "visionreasoner",
            REASON,
            write_visionreasoner,
            edited(lambda v: v.append(v[0] | {"union": 0})),
            "different answers",
        ),
    ],
)
def test_files_that_do_not_fit_are_named(source, spec, write, damage, message, data, tmp_path) -> None:
    files = write(tmp_path, answers_of(data, spec))
    damage(files)
    where = ["--benchmark", spec, "--dataset_dir", str(data), "--output", str(tmp_path / "answers.jsonl")]
    with pytest.raises(DataError, match=message):
        convert_answers.main([source, *map(str, files), *where])
    assert not (tmp_path / "answers.jsonl").exists()


def test_counts_of_another_truth_are_refused(data: Path, tmp_path: Path) -> None:
    """Seg-Zero's data have ignored regions as targets."""
    answers = answers_of(data, REASON)
    lines = []
    for image, query, _, mask in answers:
        intersection, union = counts(query, mask)
        lines.append({"image": image, "query": query.text, "counts": [intersection, union]})
    path = tmp_path / "answers.jsonl"
    pixels = int((answers[1][1].masks[0] == 1).sum())
    for wrong in ([0, pixels - 1], [pixels + 1, pixels + 9]):
        changed = [lines[0], lines[1] | {"counts": wrong}, *lines[2:]]
        path.write_text("".join(json.dumps(line) + "\n" for line in changed))
        with pytest.raises(DataError, match=r"line 2: I \d+ and U \d+ are not of this target, which has \d+ pixels"):
            score.main(["--benchmark", REASON, "--dataset_dir", str(data), "--predictions", str(path)])


def test_counts_about_ignored_regions_are_refused() -> None:
    """UniPixel counts them as background, Seg-Zero as target; both fit the target's size."""
    truth = np.zeros((1, 10, 10), np.uint8)
    truth[0, :4], truth[0, 4:6] = 1, 255
    sample = EvalSample("a.jpg", "a", np.zeros((10, 10, 3), np.uint8), [EvalQuery("1", "it", truth)])
    for counts in ([40, 60], [40, 40]):
        answer, _ = parse_answer(json.dumps({"image": "a.jpg", "query": "it", "counts": counts}), "line 1")
        with pytest.raises(DataError, match="line 1: the target has ignored regions"):
            any_model._record(0, sample, sample.queries[0], answer, Path(), BENCHMARKS["ReasonSeg"])


def test_a_seg_with_an_empty_mask_does_not_reject(data: Path, tmp_path: Path) -> None:
    """SESAME's pred_exists is false for it, too."""
    files = write_sesame(tmp_path, answers_of(data, REFS))
    for file in files:
        values = json.loads(file.read_text())
        for record in values.values():
            record["pred_sent"] = ["Sure [SEG]."] * len(record["pred_sent"])
            record["pred_exists"] = [False] * len(record["pred_sent"])
        file.write_text(json.dumps(values))
    where = ["--benchmark", REFS, "--dataset_dir", str(data), "--output", str(tmp_path / "answers.jsonl")]
    assert convert_answers.main(["sesame", *map(str, files), *where]) == 0
    result = any_model.score_file(get_eval_dataset(REFS, data), tmp_path / "answers.jsonl", "rela")
    assert (result.metrics["N-acc"], result.metrics["T-acc"]) == (0, 1)


def test_the_listed_sources_are_the_readers() -> None:
    from utils.evaluation.other_projects import READERS

    assert tuple(READERS) == convert_answers.SOURCES
