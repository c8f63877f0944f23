"""MUSE: questions about several objects, one [SEG] per object (docs/data.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from disk import H, W, box, write_image, write_json

from model.structures import Sample
from utils.datasets import DataError, DataOptions, get_eval_dataset, get_train_dataset
from utils.datasets.templates import ANSWERS, eval_turn

FOLDER = "multi_reason_seg/MultiReasonSeg"
LEFT, RIGHT = {"segmentation": [box(2, 2)], "category_name": "cup"}, {"segmentation": [box(40, 20)]}
RLE = {"segmentation": {"size": [H, W], "counts": [H * 55, H * 5]}}
GOOD = {
    "coco_url": "http://images.cocodataset.org/train2017/000000000001.jpg",
    "height": H,
    "width": W,
    "ann_list": [],
    "questions": ["Which can be eaten?", "What rolls?", "Who {seg} sits?"],
    "answers": [[RIGHT, LEFT], [RLE], [LEFT, RLE]],
    "text_answers": ["The {food} is {seg} and {seg}, not [SEG].", None, None],
}
BARE = {**{key: value for key, value in GOOD.items() if key != "coco_url"}, "file_name": "COCO_train2014_2.jpg"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_image(tmp_path / "coco/train2017/000000000001.jpg")
    write_image(tmp_path / "coco/val2017/000000000003.jpg")
    write_image(tmp_path / "refer_seg/images/mscoco/images/train2014/COCO_train2014_2.jpg")
    write_json(tmp_path / FOLDER / "MUSE_train.json", [GOOD, BARE])
    few = {**GOOD, "coco_url": "val2017/000000000003.jpg", "file_name": "x.jpg", "text_answers": None}
    write_json(tmp_path / FOLDER / "MUSE_val.json", [GOOD])
    write_json(tmp_path / FOLDER / "MUSE_test_less.json", [few])
    write_json(tmp_path / FOLDER / "MUSE_test_many.json", [few, BARE])
    return tmp_path


def first(root: Path, seed: int = 0, **options: int) -> Sample:
    return get_train_dataset("MultiReasonSeg|train", root, DataOptions(**options)).sample(
        0, np.random.default_rng(seed)
    )


def test_train(root: Path) -> None:
    dataset = get_train_dataset("MultiReasonSeg|train", root)
    assert dataset.describe() == {"images": 2, "expressions": 6, "masks": 10, "multi": 4, "unusable": 0}
    assert dataset.sample(1, np.random.default_rng(0)).source == "MultiReasonSeg|train/COCO_train2014_2.jpg"
    assert len(first(root, questions_per_image=1).conversations) == 1
    for seed in range(5):
        sample = first(root, seed)
        masks = list(sample.masks)
        assert len(sample.conversations) == 3
        for (turn,) in sample.conversations:  # the masks follow the answers
            count = turn.answer.count("[SEG]")
            own, masks = masks[:count], masks[count:]
            if "eaten" in turn.question:
                assert turn.answer == "The {food} is [SEG] and [SEG], not [ SEG ]."
                assert [int(mask[8, 8]) for mask in own] == [0, 1]  # the right one is named first
            elif "rolls" in turn.question:
                assert turn.answer in ANSWERS["target"]
                assert own[0][:, 55:].all()
            else:
                assert turn.question.startswith("Who {seg} sits? ")
                assert turn.answer in {a.replace("{list}", "[SEG] and [SEG]") for a in ANSWERS["instances"]}


def test_evaluation(root: Path) -> None:
    sizes = {
        split: len(get_eval_dataset(f"MultiReasonSeg|{split}", root)) for split in ("val", "test_few", "test_less")
    }
    assert sizes == {"val": 1, "test_few": 1, "test_less": 1}
    dataset = get_eval_dataset("MultiReasonSeg|test", root)
    assert (len(dataset), dataset.num_queries, dataset.skipped) == (3, 9, [])
    assert dataset.spec.name == "MultiReasonSeg"
    assert len(get_eval_dataset("MultiReasonSeg|test_many", root)) == 2
    samples = [dataset[i] for i in range(3)]
    assert samples[0].image_id == "000000000003"
    assert len({query.query_id for sample in samples for query in sample.queries}) == 9
    queries = samples[0].queries
    assert [len(query.masks) for query in queries] == [2, 1, 2]
    assert [query.meta["targets"] for query in queries] == [2, 1, 2]
    assert [sample.queries[0].meta["part"] for sample in samples] == ["few", "many", "many"]
    assert "part" not in get_eval_dataset("MultiReasonSeg|val", root)[0].queries[0].meta
    assert queries[0].masks[:, 8, 8].tolist() == [0, 1]
    assert eval_turn(queries[0], instances=True).question == "Which can be eaten? Please segment each of them."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"coco_url": "http://x/train2018/1.jpg"},
            "'coco_url' is 'http://x/train2018/1.jpg'; expected .../FOLDER/NAME",
        ),
        ({"coco_url": "train2017/"}, "'coco_url' ends in '', which is not a file name"),
        ({"coco_url": None}, "'file_name' is 'None', which is not a file name"),
        ({"coco_url": None, "file_name": "../x.jpg"}, "'file_name' is '../x.jpg', which is not a file name within"),
        ({"height": "40"}, "000000000001.jpg has height '40'"),
        ({"width": 10**9}, "that is too large for a photograph"),
        ({"questions": "x"}, "must be lists"),
        ({"questions": []}, "0 questions, 3 answers and 3 text answers"),
        ({"answers": None}, "must be lists"),
        ({"questions": [], "answers": [], "text_answers": []}, "it has no question"),
        ({"questions": [" ", 3, None]}, "question 0: it must be a non-empty string, not ' '"),
        ({"answers": [[], {}, [3]]}, r"question 0: its answer must be a list of annotations, not \[\]"),
        ({"answers": [[{}], [{}], [{"segmentation": []}]]}, "question 0: a target has no segmentation"),
    ],
)
def test_bad_items_are_named(root: Path, change: dict, message: str) -> None:
    path = root / FOLDER / "MUSE_train.json"
    write_json(path, [{**GOOD, **change}])
    with pytest.raises(DataError, match=rf"nothing usable in .*MUSE_train\.json: .*item 0: .*{message}"):
        get_train_dataset("MultiReasonSeg", root)
    write_json(path, [{**GOOD, **change}, BARE, 7])
    assert get_train_dataset("MultiReasonSeg", root).describe()["unusable"] == 2
    write_json(root / FOLDER / "MUSE_val.json", [{**GOOD, **change}, BARE])
    with pytest.raises(DataError, match="1 record cannot be evaluated, which would change the benchmark"):
        get_eval_dataset("MultiReasonSeg|val", root)


@pytest.mark.parametrize("answers", [["{seg}", 3, "{}"], ["{seg} {seg}"], "x"])
def test_text_answers_matter_to_training_only(root: Path, answers: object) -> None:
    for part in ("train", "val"):
        write_json(root / FOLDER / f"MUSE_{part}.json", [{**GOOD, "text_answers": answers}])
    message = r"question 0: its text answer must contain \{seg\} 2 times: '\{seg\}'|1 text answers|must be lists"
    with pytest.raises(DataError, match=rf"nothing usable in .*MUSE_train\.json: .*item 0: .*({message})"):
        get_train_dataset("MultiReasonSeg", root)
    assert get_eval_dataset("MultiReasonSeg|val", root).num_queries == 3


def test_one_bad_question_costs_no_other(root: Path) -> None:
    write_json(root / FOLDER / "MUSE_train.json", [{**GOOD, "questions": ["a", " ", "b"]}])
    counts = get_train_dataset("MultiReasonSeg", root).describe()
    assert (counts["expressions"], counts["unusable"]) == (2, 1)
    write_json(root / FOLDER / "MUSE_val.json", [{**GOOD, "questions": ["a", " ", "b"]}])
    with pytest.raises(DataError, match="question 1: it must be a non-empty string"):
        get_eval_dataset("MultiReasonSeg|val", root)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1]], "empty mask"),
        ([[1, 1, 5, 5]], "empty mask"),
        ([[1, 1, 9, 1, float("nan"), 9]], "NaN"),
        ([[1, 1, 9, 1, 1e9, 9]], "far outside"),
        ([[-1e9, 1, 9, 1, 9, 9]], "far outside"),
        ({"size": [H, W + 1], "counts": [5]}, "an RLE has size"),
        ({"size": [H, W], "counts": "abc"}, "covers|middle"),
        ("polygon", "neither polygons nor RLE"),
    ],
)
def test_bad_masks_are_named(root: Path, segmentation: object, message: str) -> None:
    item = {**GOOD, "answers": [[LEFT, {"segmentation": segmentation}]] * 3, "text_answers": None}
    write_json(root / FOLDER / "MUSE_train.json", [item])
    with pytest.raises(DataError, match=rf"000000000001\.jpg, '.*\?', target 1: .*{message}"):
        first(root)


def test_bad_files_are_named(root: Path) -> None:
    path = root / FOLDER / "MUSE_train.json"
    for raw, message in ((b"[{", "not valid JSON"), (b"{}", "holds a dict"), (b"[]", "the list is empty")):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            get_train_dataset("MultiReasonSeg", root)
    text = json.dumps([{**GOOD, "questions": ["Café?"] * 3}], ensure_ascii=False, indent=1).replace("\n", "\r\n")
    path.write_bytes(text.encode("utf-16"))
    assert first(root).conversations[0][0].question.startswith("Café?")
    write_json(path, [{**GOOD, "width": W + 1}])
    with pytest.raises(DataError, match=r"000000000001\.jpg: the image is 60x40 but its annotation says 61x40"):
        first(root)
    (root / "coco/train2017/000000000001.jpg").unlink()
    with pytest.raises(DataError, match=r"no image 000000000001\.jpg \(looked in .*mscoco.*coco/train2017"):
        get_train_dataset("MultiReasonSeg", root)
    with pytest.raises(DataError, match=r"1 record cannot be evaluated(.|\n)*no image 000000000001\.jpg"):
        get_eval_dataset("MultiReasonSeg|val", root)
    incomplete = get_eval_dataset("MultiReasonSeg|val", root, allow_missing=True)
    assert (len(incomplete), len(incomplete.not_found), incomplete.unusable) == (1, 1, [])
    with pytest.raises(DataError, match=r"no image 000000000001\.jpg"):
        incomplete[0]
    (root / FOLDER / "MUSE_test_many.json").unlink()
    with pytest.raises(DataError, match=r"no MUSE_test_many\.json \(looked in"):
        get_eval_dataset("MultiReasonSeg|test", root)
    with pytest.raises(DataError, match=r"unknown split 'test_fex'. Did you mean 'test_few'\?"):
        get_eval_dataset("MultiReasonSeg|test_fex", root)
    with pytest.raises(DataError, match=r"write 'MultiReasonSeg\|SPLIT'"):
        get_eval_dataset("MultiReasonSeg", root)
