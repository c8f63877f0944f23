"""The readers on small files in the real layouts."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from disk import REALDATA, H, W, box, square, write_image, write_json
from PIL import Image
from pycocotools import mask as coco_mask

from model.structures import EvalQuery, Sample, Turn
from utils.datasets import DATASETS, DataError, DataOptions, get_eval_dataset, get_train_dataset
from utils.datasets.base import check_sample, read_json
from utils.datasets.images import read_image
from utils.datasets.masks import decode_segmentation
from utils.datasets.reason_seg import rasterize_polygons
from utils.datasets.safe_pickle import read_pickle
from utils.datasets.templates import (
    ANSWERS,
    QUESTIONS,
    denial,
    enumerate_words,
    eval_joint_turn,
    eval_turn,
)
from utils.demo.tiny_model import template_corpus


def write_reason(
    folder: Path, stem: str, texts: list[str], is_sentence: bool, shapes: list, suffix: str = ".jpg"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (W, H)).save(folder / (stem + suffix), "JPEG")
    rows = [{"label": label, "points": points, "group_id": None} for label, points in shapes]
    write_json(folder / f"{stem}.json", {"text": texts, "is_sentence": is_sentence, "shapes": rows}, "cp1252")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset directory with ReasonSeg, the RefCOCO family and LLaVA-Instruct; COCO images in both folders."""
    reason = tmp_path / "reason_seg/ReasonSeg"
    for split in ("train", "val", "heldout"):
        write_reason(reason / split, "a", ["the café", "the inn", "the bar"], False, [("target", square(5, 5))], ".JPG")
        shapes = [("ignore", square(20, 20, 5)), ("target", square(15, 15, 20)), ("flag", [[0, 0], [1, 1]])]
        write_reason(reason / split, "b", ["Which one rolls?"], True, shapes)
    write_reason(reason / "val", "c", ["nothing"], True, [("flag", [[0, 0], [1, 1]])])
    write_json(reason / "explanatory/train.json", [{"image": "b.jpg", "query": "?", "outputs": "Balls [SEG] roll."}])

    write_image(tmp_path / "coco/train2014/COCO_train2014_000000000001.jpg")
    write_image(tmp_path / "refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000002.jpg")
    images = [{"id": i, "file_name": f"COCO_train2014_00000000000{i}.jpg", "height": H, "width": W} for i in (1, 2)]
    full = np.zeros((H, W), np.uint8, order="F")
    full[5:15, 30:45] = 1
    rle = coco_mask.encode(full)
    crowd = {"counts": [H * 10, H * 5, H * (W - 15)], "size": [H, W]}
    segmentations = [[box(2, 2)], [box(30, 20), box(45, 20)], {**rle, "counts": rle["counts"].decode()}, crowd]
    annotations = [
        {"id": 10 + i, "image_id": 1 + i // 2, "category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": segmentation}
        for i, segmentation in enumerate(segmentations)
    ]
    instances = {"images": images, "annotations": annotations, "categories": []}

    def ref(ref_id: int, ann: object, image: int, split: str, *sents: str) -> dict:
        sentences = [
            {"sent_id": ref_id * 10 + i, "sent": s, "raw": s, "tokens": s.split()} for i, s in enumerate(sents)
        ]
        name = f"COCO_train2014_00000000000{image}_{ref_id}.jpg"
        return {
            "ref_id": ref_id, "ann_id": ann, "image_id": image, "category_id": 1, "file_name": name, "split": split,
            "sent_ids": [s["sent_id"] for s in sentences], "sentences": sentences,
        }  # fmt: skip

    for split in ("train", "val"):
        offset = 100 * (split == "val")
        refcoco = [ref(1 + offset, 10, 1, split, "left box", "first one"), ref(2 + offset, 11, 1, split, "the pair")]
        refcoco += [ref(3 + offset, 12, 2, split, "right box"), ref(4 + offset, np.int64(13), 2, split, "the bar")]
        grefs = [ref(1 + offset, [10, 11], 1, split, "all boxes"), ref(2 + offset, [-1], 1, split, "the dog")]
        grefs += [ref(3 + offset, [12], 2, split, "right box")]
        for name, rows in (("refcoco", refcoco), ("grefcoco", grefs)):
            folder = tmp_path / "refer_seg" / name
            folder.mkdir(parents=True, exist_ok=True)
            old = pickle.loads((folder / "refs(unc).p").read_bytes()) if name == "refcoco" and offset else []
            if name == "refcoco":
                (folder / "refs(unc).p").write_bytes(pickle.dumps(old + rows, protocol=2))
            else:
                path = folder / "grefs(unc).json"
                write_json(path, (json.loads(path.read_text()) if offset else []) + rows)
            write_json(folder / "instances.json", instances)

    write_image(tmp_path / "coco/train2017/000000000009.jpg")
    turns = [
        ("human", "<image>\nWhat is it?"),
        ("gpt", "A [SEG] box."),
        ("human", "Its color?"),
        ("gpt", "Blue."),
    ]
    turns = [{"from": speaker, "value": value} for speaker, value in turns]
    write_json(
        tmp_path / "llava_dataset/llava_instruct_150k.json",
        [{"id": "9", "image": "000000000009.jpg", "conversations": turns}],
    )
    return tmp_path


def samples(dataset: object, count: int = 20) -> list[Sample]:
    return [dataset.sample(i % len(dataset), np.random.default_rng(i)) for i in range(count)]


# -- ReasonSeg ---------------------------------------------------------------------------------------------------------


def test_reason_seg_train(root: Path) -> None:
    dataset = get_train_dataset("ReasonSeg|train", root)
    assert dataset.describe() == {"images": 2, "expressions": 4, "explained": 0, "unusable": 0}
    short = dataset.sample(0, np.random.default_rng(0))
    assert len(short.conversations) == 3
    assert short.masks.shape == (3, H, W)
    assert short.masks[0].sum() == 121  # an 11 x 11 square: the outline belongs to it
    questions = " ".join(turns[0].question for turns in short.conversations)
    assert all(text in questions for text in ("the café", "the inn", "the bar"))
    long = dataset.sample(1, np.random.default_rng(0))
    assert long.conversations[0][0].question.startswith("Which one rolls? ")
    assert set(np.unique(long.masks)) == {0, 1, 255}
    assert (long.masks[0, 20:26, 20:26] == 255).all()


def test_reason_seg_does_not_choose_between_two_images(root: Path) -> None:
    """A mask that was saved beside the photograph, under its name, is not the photograph."""
    for split in ("train", "val"):
        write_image(root / f"reason_seg/ReasonSeg/{split}/b.png")
    assert len(get_train_dataset("ReasonSeg|train", root)) == 1
    with pytest.raises(DataError, match=r"b\.json may be of b\.jpg or b\.png; keep the photograph alone"):
        get_eval_dataset("ReasonSeg|val", root)


def test_reason_seg_several_splits_and_any_folder(root: Path) -> None:
    assert len(get_train_dataset("ReasonSeg|train_val", root)) == 4
    assert (
        get_train_dataset("ReasonSeg|train_val", root).sample(3, np.random.default_rng(0)).source
        == "ReasonSeg|val/b.jpg"
    )
    assert len(get_eval_dataset("ReasonSeg|heldout", root)) == 2
    with pytest.raises(DataError, match="Did you mean 'heldout'"):
        get_eval_dataset("ReasonSeg|heldot", root)


def test_reason_seg_eval_asks_the_first_query_and_names_what_it_skips(root: Path) -> None:
    whole, short, long = (get_eval_dataset(f"ReasonSeg|val{part}", root) for part in ("", "_short", "_long"))
    assert [len(d) for d in (whole, short, long)] == [2, 1, 1]
    assert whole.num_queries == 2
    assert len(whole.skipped) == 1
    assert "c.jpg" in whole.skipped[0]
    query = short[0].queries[0]
    assert (query.text, query.is_sentence, query.masks.shape) == ("the café", False, (1, H, W))
    assert long[0].queries[0].is_sentence
    assert long[0].queries[0].meta == {"length": "long"}


def test_reason_seg_eval_stops_on_a_broken_file_and_training_goes_on(root: Path) -> None:
    for split in ("train", "val"):
        (root / f"reason_seg/ReasonSeg/{split}/a.json").write_text('{"text": ["cut off')
    assert len(get_train_dataset("ReasonSeg|train", root)) == 1
    with pytest.raises(DataError, match=r"a\.json is not valid JSON"):
        get_eval_dataset("ReasonSeg|val", root)


@pytest.mark.parametrize(
    ("query", "encoding", "is_read"),
    [
        ("the “café” – isn’t it…”", "cp1252", True),  # as some published files
        ("the “café”", "utf-8", True),
        ("the “café”", "utf-16", True),
        ("红色的杯子", "gbk", False),
        ("красная чашка", "cp1251", False),
        ("赤いコップ", "shift_jis", False),
        ("紅色的杯子", "big5", False),
        ("빨간 컵", "euc_kr", False),
    ],
)
def test_encodings_of_reason_seg(
    root: Path, query: str, encoding: str, is_read: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No other encoding than UTF is taken for cp1252, and cp1252 is named once."""
    path = root / "reason_seg/ReasonSeg/val/a.json"
    write_json(path, {**json.loads(path.read_bytes().decode("cp1252")), "text": [query]}, encoding)
    if is_read:
        for _ in range(2):
            assert get_eval_dataset("ReasonSeg|val", root)[0].queries[0].text == query
        named = [record.message for record in caplog.records if "are read as cp1252" in record.message]
        assert len(named) == (encoding == "cp1252")
    else:
        with pytest.raises(DataError, match=r"a\.json is not utf-8.* text \(byte .*save it as UTF-8"):
            get_eval_dataset("ReasonSeg|val", root)


def test_explanations(root: Path) -> None:
    dataset = get_train_dataset("ReasonSeg|train", root, DataOptions(explanatory=0.3))
    turns = [dataset.sample(1, np.random.default_rng(i)).conversations[0][0] for i in range(60)]
    text_only = [t for t in turns if "[SEG]" not in t.answer]
    with_text = [t for t in turns if t.answer.endswith("Balls [ SEG ] roll.") and "[SEG]" in t.answer]
    assert 8 < len(text_only) < 30
    assert 10 < len(with_text) < 35
    assert len(turns) - len(text_only) - len(with_text) > 10
    assert all(t == Turn("Which one rolls?", "Balls [ SEG ] roll.") for t in text_only)
    os.remove(root / "reason_seg/ReasonSeg/explanatory/train.json")
    with pytest.raises(DataError, match="set explanatory to -1"):
        get_train_dataset("ReasonSeg|train", root, DataOptions(explanatory=0.3))


def test_draw_mask_order_and_truncation() -> None:
    small, large = square(10.9, 10.9, 4), square(5, 5, 20)
    mask = rasterize_polygons([{"label": "Ignore me", "points": small}, {"label": "target", "points": large}], H, W)
    assert (mask[10:15, 10:15] == 255).all()
    assert (mask == 255).sum() == 25
    assert (mask == 1).sum() == 21 * 21 - 25
    covered = rasterize_polygons([{"label": "target", "points": small}, {"label": "ignore", "points": large}], H, W)
    assert (covered == 1).sum() == 25  # the smaller one is drawn last, whatever its label


@pytest.mark.skipif(not REALDATA.is_dir(), reason="no real data beside the checkout")
def test_real_reason_seg() -> None:
    train = get_train_dataset("ReasonSeg|train", REALDATA, DataOptions(explanatory=0.1))
    sample = train.sample(0, np.random.default_rng(0))
    assert len(train) == 1
    assert len(sample.conversations) == 3
    item = get_eval_dataset("ReasonSeg|val_short", REALDATA)[0]
    assert item.queries[0].text == "the places where the driver can observe the speed"
    mask = item.queries[0].masks[0]
    assert mask.shape == item.image.shape[:2]
    assert set(np.unique(mask)) == {0, 1, 255}
    annotation = json.loads((REALDATA / "reason_seg/ReasonSeg/val" / f"{item.image_id}.json").read_text())
    polygons = [np.float32(s["points"]) for s in annotation["shapes"] if s["label"] == "target"]
    assert (mask == 1).sum() == pytest.approx(sum(map(cv2.contourArea, polygons)), rel=0.1)


# -- RefCOCO family ----------------------------------------------------------------------------------------------------


def test_refcoco_train(root: Path) -> None:
    dataset = get_train_dataset("refcoco", root)
    assert dataset.describe() == {"images": 2, "expressions": 5, "absent": 0, "multi": 0, "unusable": 0}
    seen = set()
    for sample in samples(dataset):
        assert len(sample.conversations) == len(sample.masks) == 2
        for (turn,), mask in zip(sample.conversations, sample.masks):
            text = next(t for t in ("left box", "first one", "the pair", "right box", "the bar") if t in turn.question)
            seen.add(text)
            column = {"left box": 5, "first one": 5, "the pair": 50, "right box": 40, "the bar": 12}[text]
            assert mask[:, column].any()
    assert len(seen) == 5
    assert (
        len(
            get_train_dataset("refcoco", root, DataOptions(questions_per_image=1))
            .sample(0, np.random.default_rng(0))
            .masks
        )
        == 1
    )


def test_grefcoco_train_merges_targets_and_rejects_absent_ones(root: Path) -> None:
    dataset = get_train_dataset("grefcoco", root)
    assert dataset.describe()["absent"] == dataset.describe()["multi"] == 1
    for sample in samples(dataset):
        for (turn,) in sample.conversations:
            kind = "absent" if "the dog" in turn.question else "merged" if "all boxes" in turn.question else "target"
            assert turn.answer in ANSWERS[kind]
        if len(sample.conversations) == 2:
            assert len(sample.masks) == 1
            assert sample.masks[0, 5, 5] == sample.masks[0, 25, 35] == sample.masks[0, 25, 50] == 1


def test_grefcoco_joint(root: Path) -> None:
    dataset = get_train_dataset("grefcoco", root, DataOptions(joint_probability=1.0))
    turn = dataset.sample(0, np.random.default_rng(1)).conversations[0][0]
    assert turn.answer in ("Sure, all boxes:[SEG], the dog:[REJ].", "Sure, the dog:[REJ], all boxes:[SEG].")


def test_refer_eval_groups_all_sentences_of_an_image(root: Path) -> None:
    dataset = get_eval_dataset("refcoco|unc|val", root)
    assert (len(dataset), dataset.num_queries, dataset.spec.name) == (2, 5, "refcoco")
    assert [q.text for q in dataset[0].queries] == ["left box", "first one", "the pair"]
    ids = [q.query_id for i in range(2) for q in dataset[i].queries]
    assert len(set(ids)) == 5
    general = get_eval_dataset("grefcoco|val", root)
    assert [len(q.masks) for q in general[0].queries] == [1, 0]
    with pytest.raises(DataError, match="it has: train, val"):
        get_eval_dataset("refcoco|unc|testA", root)


def test_refer_eval_refuses_a_missing_image_and_training_a_missing_folder(root: Path) -> None:
    os.remove(root / "coco/train2014/COCO_train2014_000000000001.jpg")
    with pytest.raises(
        DataError, match=r"1 record cannot be evaluated(.|\n)*mscoco/images/train2014(.|\n)*coco/train2014"
    ):
        get_eval_dataset("refcoco|unc|val", root)
    assert len(get_eval_dataset("refcoco|unc|val", root, allow_missing=True).not_found) == 1


def test_refs_that_point_nowhere_are_counted(root: Path) -> None:
    path = root / "refer_seg/grefcoco/grefs(unc).json"
    rows = json.loads(path.read_text())
    rows[0]["ann_id"], rows[1]["sentences"] = [99], []
    write_json(path, rows)
    assert get_train_dataset("grefcoco", root).describe()["unusable"] == 1
    size = json.loads((root / "refer_seg/grefcoco/instances.json").read_text())
    size["images"][1]["height"] = H + 1
    write_json(root / "refer_seg/grefcoco/instances.json", size)
    with pytest.raises(DataError, match=r"(RLE|annotation)"):
        get_train_dataset("grefcoco", root).sample(0, np.random.default_rng(0))


@pytest.mark.parametrize("sentence", [{"sent": " ", "sent_id": 70}, {"sent": 3, "sent_id": 70}, {"sent_id": 70}])
def test_sentences_without_a_text_are_counted(root: Path, sentence: dict) -> None:
    sentences = [{"sent": "x", "sent_id": 69}, sentence]
    path = root / "refer_seg/grefcoco/grefs(unc).json"
    write_json(path, [{**GOOD_REF, "split": "val", "sentences": sentences}])
    message = "grefcoco|unc|val, ref 1: sentence 70 must have a text in 'sent', not "
    with pytest.raises(DataError, match=f"1 record cannot be evaluated(.|\n)*{re.escape(message)}"):
        get_eval_dataset("grefcoco|unc|val", root)
    assert get_eval_dataset("grefcoco|unc|val", root, allow_missing=True).num_queries == 1


def test_refs_without_sentences_ask_nothing(root: Path) -> None:
    """gRefCOCO's published file has such refs, in val too (github.com/henghuiding/gRefCOCO, issues 3 and 8)."""
    path = root / "refer_seg/grefcoco/grefs(unc).json"
    rows = json.loads(path.read_text())
    empty = [
        {**GOOD_REF, "ref_id": 90 + k, "split": split, "sentences": []} for k, split in enumerate(("train", "val"))
    ]
    write_json(path, rows + empty)
    dataset = get_eval_dataset("grefcoco|unc|val", root)
    assert dataset.skipped == ["grefcoco|unc|val, ref 91: it has no sentence, and so asks nothing"]
    assert (dataset.unusable, dataset.num_queries, len(dataset)) == ([], 3, 2)
    assert get_train_dataset("grefcoco", root).describe()["unusable"] == 0
    write_json(path, empty)
    with pytest.raises(DataError, match=r"no usable ref among 1 of .*refs.*: .*ref 91: it has no sentence"):
        get_eval_dataset("grefcoco|unc|val", root)


def test_refs_that_are_there_twice(root: Path) -> None:
    path = root / "refer_seg/grefcoco/grefs(unc).json"
    other = {"sentences": [{"sent": "y"}]}
    refs = [GOOD_REF, GOOD_REF, {**GOOD_REF, "ann_id": [12], "image_id": 2}, {**GOOD_REF, **other}]
    write_json(path, [{**ref, "split": "val"} for ref in refs])
    dataset = get_eval_dataset("grefcoco|unc|val", root, allow_missing=True)
    assert dataset.skipped == ["grefcoco|unc|val, ref 1: it is there twice, and counts once"]
    assert dataset.unusable == ["grefcoco|unc|val, ref 1: image 1 has another ref with this ref_id"]
    assert [[query.text for query in dataset[i].queries] for i in range(2)] == [["x"], ["x"]]


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_different_rows_with_one_id_are_named(root: Path, key: str) -> None:
    """Merged files: an annotation would be lost, or would be that of another image (cvat-ai/datumaro, issue 56)."""
    path = root / "refer_seg/grefcoco/instances.json"
    instances = json.loads(path.read_text())
    instances[key].append(dict(instances[key][0]))
    write_json(path, instances)
    assert get_eval_dataset("grefcoco|unc|val", root).num_queries == 3  # the same row twice
    for row_id in (instances[key][0]["id"], str(instances[key][0]["id"])):
        instances[key][-1] |= {"id": row_id, "height": H + 1, "bbox": [1, 1, 1, 1]}
        write_json(path, instances)
        with pytest.raises(DataError, match=rf"instances\.json: 1 ids in '{key}' stand for different rows, such as 1"):
            get_eval_dataset("grefcoco|unc|val", root)


GOOD_REF = {"ref_id": 1, "ann_id": [10], "image_id": 1, "split": "train", "sentences": [{"sent": "x"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 7}, "image 7 is not in"),
        ({"image_id": [1]}, r"image \[1\] is not in"),
        ({"ref_id": None}, "ref_id is None"),
        ({"ann_id": None}, "ann_id is None"),
        ({"ann_id": [-1, 10]}, "ann_id is"),
        ({"ann_id": [99]}, "annotation 99 is not in"),
        ({"ann_id": [12]}, "annotation 12 belongs to image 2"),
        ({"sentences": "x"}, "not a list of dicts"),
        ({"sentences": [{"sent": " "}]}, "no sentence"),
        ({"sentences": [{"sent": 3}]}, "no sentence"),
    ],
)
def test_bad_refs_are_named(root: Path, change: dict, message: str) -> None:
    write_json(root / "refer_seg/grefcoco/grefs(unc).json", [{**GOOD_REF, **change}])
    with pytest.raises(DataError, match=f"no usable ref among 1 of .*; the first problem: .*{message}"):
        get_train_dataset("grefcoco", root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no list 'images'"),
        ({"annotations": [{"id": []}]}, "no list 'annotations'"),
        ({"images": [{"id": 1, "file_name": "../x.jpg", "height": H, "width": W}]}, "has file_name"),
        ({"images": [{"id": 1, "file_name": "x.jpg", "height": None, "width": W}]}, "has height None"),
        ({"annotations": [{"id": 10, "image_id": 1}]}, "has no segmentation"),
    ],
)
def test_bad_instances_are_named(root: Path, change: dict, message: str) -> None:
    write_json(root / "refer_seg/grefcoco/grefs(unc).json", [GOOD_REF])
    path = root / "refer_seg/grefcoco/instances.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(DataError, match=message):
        get_train_dataset("grefcoco", root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": []}, "'text' must be"),
        ({"text": ["ok", 3]}, "'text' must be"),
        ({"text": ["  "]}, "'text' must be"),
        ({"is_sentence": 1}, "'is_sentence' must be"),
        ({"shapes": {}}, "'shapes' must be"),
        ({"shapes": [{"label": "target", "points": None}]}, "'shapes' must be"),
        ({"shapes": []}, "no target polygon"),
        ({"shapes": [{"label": "ignore", "points": square(1, 1)}]}, "no target polygon"),
        ({"shapes": [{"label": "target", "points": [[1, 1], [2, 2]]}]}, "no target polygon"),
        ({"shapes": [{"label": "target", "points": [[1, 1], [2, 2], [float("nan"), 3]]}]}, "NaN"),
        ({"shapes": [{"label": "target", "points": [[1, 1], [2, 2], [1e8, 3]]}]}, "far outside"),
        ({"shapes": [{"label": "target", "points": [[1, 1], [2, 2], "x"]}]}, "not a list of numbers"),
        ({"shapes": [{"label": "target", "points": square(W + 5, 5)}]}, "is empty"),
    ],
)
def test_bad_reason_seg_files_are_named(root: Path, change: dict, message: str) -> None:
    folder = root / "reason_seg/ReasonSeg/heldout"
    for path in folder.iterdir():
        if path.stem == "b":
            path.unlink()
    good = {"text": ["x"], "is_sentence": False, "shapes": [{"label": "target", "points": square(1, 1)}]}
    write_json(folder / "a.json", {**good, **change})
    with pytest.raises(DataError, match=message):
        get_train_dataset("ReasonSeg|heldout", root).sample(0, np.random.default_rng(0))


# -- vqa ---------------------------------------------------------------------------------------------------------------


def test_vqa(root: Path) -> None:
    sample = get_train_dataset("llava_instruct_150k", root).sample(0, np.random.default_rng(0))
    assert sample.conversations == [(Turn("What is it?", "A [ SEG ] box."), Turn("Its color?", "Blue."))]
    assert sample.masks.shape == (0, H, W)
    path = root / "llava_dataset/llava_instruct_150k.json"
    good = json.loads(path.read_text())
    turns = good[0]["conversations"]
    bad = [
        {**good[0], "conversations": part} for part in ([], turns[:1], turns[1:3], turns[:1] + turns[:1], [1, 2], None)
    ]
    write_json(path, good + bad + [{"id": 1}, "x", {**good[0], "image": "../x.jpg"}])
    assert get_train_dataset("llava_instruct_150k", root).describe() == {"images": 1, "expressions": 2, "unusable": 9}
    with pytest.raises(DataError, match="no evaluation"):
        get_eval_dataset("llava_instruct_150k|val", root)


# -- masks, pickles, files ---------------------------------------------------------------------------------------------


def test_all_forms_of_a_segmentation_agree() -> None:
    mask = np.zeros((H, W), np.uint8, order="F")
    mask[3:17, 5:40] = 1
    mask[30:33, 1:50:2] = 1
    packed = coco_mask.encode(mask)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel(order="F"), [2]])))
    lengths = np.diff(np.concatenate([[0], runs])).tolist()
    halves = [
        np.asfortranarray(mask * (np.arange(H)[:, None] < 20)),
        np.asfortranarray(mask * (np.arange(H)[:, None] >= 20)),
    ]
    forms = [
        packed,
        {"size": [H, W], "counts": packed["counts"].decode()},
        {"size": [H, W], "counts": lengths},
        [coco_mask.encode(half) for half in halves],
    ]
    for form in forms:
        np.testing.assert_array_equal(decode_segmentation(form, H, W), mask)
    polygons = [box(2, 2), [1, 1, 2, 2], box(30, 20, 9)]
    expected = coco_mask.decode(coco_mask.frPyObjects([polygons[0], polygons[2]], H, W)).max(axis=2)
    np.testing.assert_array_equal(decode_segmentation(polygons, H, W), expected)
    np.testing.assert_array_equal(decode_segmentation(box(2, 2), H, W), expected * (np.arange(W) < 20).astype(np.uint8))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1, 1, 2, 2]], "empty mask"),
        ([], "neither"),
        (None, "neither"),
        ([[1, 2, 3, 4, 5]], "not pairs"),
        ([[1, 2, 3, float("nan"), 5, 6]], "NaN"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "far outside"),
        ([["a", "b"]], "not a list of numbers"),
        ({"size": [H, W + 1], "counts": "abc"}, "size"),
        ({"size": [H, W], "counts": [10, 5]}, "covers 15 pixels"),
        ({"size": [H, W], "counts": ""}, "covers 0 pixels"),
        ({"size": [H, W], "counts": "ZZZ"}, "middle of a number|covers"),
        ({"size": [H, W], "counts": "\xff\xfe"}, "covers|character|middle"),
        ({"size": [H, W], "counts": 3}, "a int"),
        ({"size": [H, W], "counts": [H * W]}, "empty mask"),
    ],
)
def test_bad_segmentations_are_named(bad: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_segmentation(bad, H, W)


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("echo owned > owned.txt",)


def test_a_pickle_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "refs(unc).p"
    for payload in (pickle.dumps([_Evil()]), pickle.dumps([Path("x")]), pickle.dumps([eval]), b"cbuiltins\nexec\n."):
        path.write_bytes(payload)
        with pytest.raises(DataError, match=r"rejected: it refers to (posix|pathlib|builtins)"):
            read_pickle(path)
    assert not (tmp_path / "owned.txt").exists()
    for payload in (b"", pickle.dumps([1, 2])[:-3], b"\x80\x04garbage"):
        path.write_bytes(payload)
        with pytest.raises(DataError, match="not a readable pickle"):
            read_pickle(path)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    value = [{"a": np.int64(7), "b": np.float32(0.5), "c": "café", "d": (1, [2.5, None, True]), "e": {3}, "f": b"xy"}]
    path = tmp_path / "x.p"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert read_pickle(path) == [{"a": 7, "b": 0.5, "c": "café", "d": [1, [2.5, None, True]], "e": [3], "f": "xy"}]


def test_python_2_pickles_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.p"
    path.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'ref_id'\np4\nI5\nsa.")
    assert read_pickle(path) == [{"sent": "café", "ref_id": 5}]


def test_json_errors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for raw, message in (
        (b"[1, 2", "not valid JSON"),
        (b"[]", "holds a list"),
        (b'{"a": "\xba\xec"}', r"x\.json is not utf-8 text \(byte 7 is 0xba\); save it as UTF-8"),
        (b"\xff\xfe{", "x.json is not utf-16 text"),
        (b'{\0"\0a\0', "NUL at character 1"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            read_json(path)
    path.write_bytes('\ufeff{"a":\r\n "ü"}'.encode())
    assert read_json(path) == {"a": "ü"}
    path.write_bytes('{"a": "ü"}'.encode("utf-16"))
    assert read_json(path) == {"a": "ü"}
    path.write_bytes('{"a": "红"}'.encode("gbk"))
    assert read_json(path, encoding="gbk") == {"a": "红"}
    with pytest.raises(DataError, match="'gbq' is not an encoding"):
        read_json(path, encoding="gbq")
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path / "missing.json")


# -- images ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    cases = [
        (Image.new("L", (5, 4), 100), [100, 100, 100]),
        (Image.new("1", (5, 4), 1), [255, 255, 255]),
        (Image.new("RGBA", (5, 4), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("LA", (5, 4), (50, 255)), [50, 50, 50]),
        (Image.fromarray(np.full((4, 5), 100 * 256 + 9, np.uint16)), [100, 100, 100]),
        (Image.new("RGB", (5, 4), (1, 2, 3)).quantize(4), [1, 2, 3]),
    ]
    for image, color in cases:
        image.save(path)
        array = read_image(path)
        assert array.dtype == np.uint8
        assert array.shape == (4, 5, 3)
        assert array[0, 0].tolist() == color, image.mode
    Image.new("RGB", (5000, 1)).save(path)
    assert read_image(path).shape == (1, 5000, 3)
    Image.new("CMYK", (5, 4)).save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg")[0, 0].tolist() == [255, 255, 255]


def test_exif_rotation_is_a_choice(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (5, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (4, 5, 3)
    assert read_image(tmp_path / "x.jpg", apply_exif=True).shape == (5, 4, 3)


def test_undecodable_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    for raw in (b"", b"no image", whole[: len(whole) // 2]):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"x\.jpg cannot be decoded"):
            read_image(path)
    with pytest.raises(DataError, match="does not exist"):
        read_image(tmp_path / "y.jpg")
    with pytest.raises(DataError, match="not a file"):
        read_image(tmp_path)


# -- samples and templates ---------------------------------------------------------------------------------------------


def test_check_sample_finds_every_broken_promise() -> None:
    image = np.zeros((H, W, 3), np.uint8)
    full, turns = np.ones((1, H, W), np.uint8), [(Turn("q", "It is [SEG]."),)]
    check_sample(Sample("s", image, turns, full))
    for conversations, masks, message in [
        (turns, full[:0], r"1 \[SEG\] in the answers"),
        ([(Turn("q", "No [REJ]."),)], full, r"0 \[SEG\]"),
        (turns, full[:, 1:], "the image is"),
        (turns, full * 255, "is empty"),
        (turns, full.astype(bool), "bool"),
        ([], full[:0], "no question"),
        ([(Turn(" ", "It is [SEG]."),)], full, "a question or an answer is empty"),
    ]:
        with pytest.raises(DataError, match=message):
            check_sample(Sample("s", image, conversations, masks))


def test_templates_keep_their_rules() -> None:
    positive, negative = {"Sure", "It", "They", "Yes"}, {"No", "There", "Nothing"}
    denials = ("absent", "denial", "correction")
    for kind, answers in ANSWERS.items():
        first = {answer.split()[0].strip(",.") for answer in answers}
        assert first <= (negative if kind in denials else positive), kind
    assert all(a.count("[SEG]") == 1 and "[REJ]" not in a for kind in ("target", "merged") for a in ANSWERS[kind])
    assert all(a.count("[REJ]") == 1 and "[SEG]" not in a for kind in denials for a in ANSWERS[kind])
    assert all(len(answer.split()) <= 11 for answers in ANSWERS.values() for answer in answers)
    assert all("{query}" in q for kind, questions in QUESTIONS.items() if kind != "explain" for q in questions)
    several = [kind for kind in (*QUESTIONS.items(), *ANSWERS.items()) if kind[0] != "joint"]
    assert all(len(set(templates)) == len(templates) >= 3 for _, templates in several)
    corpus = list(template_corpus())
    assert len(corpus) == len(set(corpus)) == 23  # another number is another tokenizer of the demo
    assert not any("{" in line for line in corpus)


def test_denials_and_lists_say_what_they_are_given() -> None:
    rng = np.random.default_rng(0)
    texts = {denial("a {correction} [SEG]", "the {query}", rng) for _ in range(60)}
    assert len(texts) == len(ANSWERS["correction"])
    assert all("a {correction} [ SEG ]" in text and "the {query}" in text for text in texts)
    assert {denial("x", "", rng) for _ in range(60)} == {answer.replace("{query}", "x") for answer in ANSWERS["denial"]}
    listed = [enumerate_words(["a", "b", "c"][:n]) for n in range(4)]
    assert listed == ["", "a", "a and b", "a, b and c"]


def test_evaluation_templates_do_not_know_the_ground_truth() -> None:
    none, one = np.zeros((0, 2, 2), np.uint8), np.ones((1, 2, 2), np.uint8)
    absent, present = EvalQuery("1", "a {list} dog", none), EvalQuery("2", "a cat", one)
    assert eval_turn(absent).answer == eval_turn(present).answer == ANSWERS["target"][0]
    assert eval_turn(absent).question == "Please segment a {list} dog in this image."
    assert eval_turn(EvalQuery("3", "Who?", one, is_sentence=True)).question == "Who? Please segment it."
    assert eval_joint_turn([present, present]).answer == "Sure, a cat:[SEG], a cat:[SEG]."


def test_names_are_checked(root: Path) -> None:
    with pytest.raises(DataError, match=r"unknown data set 'RefCOCO'. Did you mean 'refcoco'\? Known: ade20k"):
        get_eval_dataset("RefCOCO|unc|val", root)
    with pytest.raises(DataError, match="not a folder"):
        get_train_dataset("refcoco", root / "nowhere")
    for spec in ("ReasonSeg", "refcoco", "refcoco|a|b|c", "ReasonSeg|val|x"):
        with pytest.raises(DataError, match="write"):
            get_eval_dataset(spec, root)
    with pytest.raises(DataError, match=r"no refs \(looked in (.|\n)*no instances"):
        get_train_dataset("refclef", root)
    assert {"refclef", "refzom"} <= set(DATASETS)
