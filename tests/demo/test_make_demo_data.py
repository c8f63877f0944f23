"""The demo data on disk: layouts and keys of the real sets, exact masks, disjoint splits, query-agnostic baselines."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from transformers import AutoTokenizer

from model.backbones.llava import ClipReader
from model.processing.processor import UGroundProcessor
from scripts import make_demo_data as demo
from utils.config import load_config
from utils.datasets import DATASETS, TYPES, DataOptions, get_eval_dataset, get_train_dataset, trained_types
from utils.datasets.masks import decode_segmentation
from utils.datasets.mixture import make_mixture
from utils.datasets.reason_seg import rasterize_polygons
from utils.demo import other_sets, scenes
from utils.demo.evaluation_sets import EVALUATION_SETS
from utils.demo.files import Sizes, coco_segmentation, labelme_polygons
from utils.demo.refer_sets import REFER_SETS

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--seed", "7", "--train", "30", "--val", "20", "--test", "10"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    assert demo.main(["--out", str(out), *SMALL]) == 0
    return out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """All 24 data sets."""
    out = tmp_path_factory.mktemp("mixed") / "data"
    assert demo.main(["--out", str(out), *SMALL, "--all_types"]) == 0
    return out


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(root, tmp_path):
    assert demo.main(["--out", str(tmp_path / "again"), *SMALL]) == 0
    assert _files(tmp_path / "again") == _files(root)
    assert demo.main(["--out", str(tmp_path / "other"), *SMALL, "--seed", "8"]) == 0
    image = "reason_seg/ReasonSeg/val/val_00000.jpg"
    assert (tmp_path / "other" / image).read_bytes() != (root / image).read_bytes()


def _digest(folder: Path) -> str:
    """Hash of all annotations: JSON and pickles as bytes, label images as pixels (zlib output varies)."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.*")):
        if path.suffix in (".json", ".p", ".png") and path.name != demo.SUMMARY:
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.suffix == ".png" else path.read_bytes())
    return digest.hexdigest()


def test_generated_data_do_not_change(root, mixed):
    """Trained models depend on the data: an intended change must update ``VERSION`` and retrain them."""
    for folder, all_types in ((root, False), (mixed, True)):
        assert _digest(folder)[:12] == demo.VERSION[all_types]
    kept, more = _files(root), _files(mixed)
    assert all(more[path] == content for path, content in kept.items() if path != demo.SUMMARY)
    means = {
        "val_00000": (98.3, 101.3, 112.3),
        "train_00007": (127.4, 83.6, 90.7),
        "COCO_train2014_000000100001": (84.8, 84.0, 102.9),
        "000000500001": (110.4, 130.9, 102.0),
    }
    for stem, mean in means.items():
        (path,) = root.rglob(f"{stem}.jpg")
        assert cv2.imread(str(path))[:, :, ::-1].mean(axis=(0, 1)) == pytest.approx(mean, abs=0.5)


def test_a_larger_set_begins_with_the_smaller_one(root, tmp_path):
    assert demo.main(["--out", str(tmp_path / "more"), *SMALL, "--train", "34"]) == 0
    folder = Path("reason_seg/ReasonSeg")
    for split in ("train", "val", "test", "heldout"):
        small, large = _files(root / folder / split), _files(tmp_path / "more" / folder / split)
        assert small.items() <= large.items()


def test_reason_seg_layout(root):
    folder = root / "reason_seg" / "ReasonSeg"
    assert sorted(path.name for path in folder.iterdir()) == ["explanatory", "heldout", "test", "train", "val"]
    for split, short, long in (("train", 15, 15), ("val", 20, 20), ("test", 10, 10), ("heldout", 10, 0)):
        files = sorted((folder / split).glob("*.json"))
        assert [path.with_suffix(".jpg").name for path in files] == sorted(
            p.name for p in (folder / split).glob("*.jpg")
        )
        lengths = Counter()
        for path in files:
            annotation = _json(path)
            lengths[annotation["is_sentence"]] += 1
            assert 1 <= len(annotation["text"]) <= 3
            assert all(text.endswith("?") == annotation["is_sentence"] for text in annotation["text"])
            for shape in annotation["shapes"]:
                assert {"label", "labels", "shape_type", "image_name", "points", "group_id", "flags"} <= set(shape)
                assert shape["label"] == "target"
                assert len(shape["points"]) >= 3
            image = cv2.imread(str(path.with_suffix(".jpg")))
            assert image.shape[:2] == (annotation["imageHeight"], annotation["imageWidth"])
        assert (lengths[False], lengths[True]) == (short, long)
    explained = _json(folder / "explanatory" / "train.json")
    assert len(explained) == 7
    for item in explained:
        assert set(item) == {"query", "outputs", "image", "json"}
        assert item["query"] == _json(folder / "train" / item["json"])["text"][0]
        assert item["outputs"].startswith("it is the ")


def test_long_queries_are_balanced_over_families(root):
    families = Counter(
        annotation["meta"]["family"]
        for path in (root / "reason_seg" / "ReasonSeg" / "val").glob("*.json")
        if (annotation := _json(path))["is_sentence"]
    )
    assert set(families) == set(demo.LONG_FAMILIES)
    assert max(families.values()) - min(families.values()) <= 1


def test_polygons_give_the_exact_masks_back():
    reason, coco = [], []
    for index in range(80):
        scene = scenes.sample_scene(np.random.default_rng([3, index]))
        for mask in scene.masks:
            height, width = mask.shape
            polygons = labelme_polygons(mask)
            if polygons:
                rasterized = rasterize_polygons(
                    [{"label": "target", "points": points} for points in polygons], height, width
                )
                reason.append(_iou(rasterized == 1, mask))
            segmentation = coco_segmentation(mask, as_rle=False)
            coco.append(_iou(decode_segmentation(segmentation, height, width) == 1, mask))
            exact = decode_segmentation(coco_segmentation(mask, as_rle=True), height, width)
            assert np.array_equal(exact == 1, mask)
    assert len(reason) > 0.98 * len(coco)
    assert np.mean(reason) > 0.999
    assert min(reason) > 0.95
    assert np.mean(coco) > 0.97
    assert min(coco) > 0.9


def test_masks_in_parts_and_with_holes():
    mask = np.zeros((40, 50), bool)
    mask[5:15, 5:15] = mask[20:35, 20:45] = True
    assert len(labelme_polygons(mask)) == 2
    assert len(coco_segmentation(mask, as_rle=False)) == 2
    mask[25:30, 25:30] = False
    assert labelme_polygons(mask) is None
    segmentation = coco_segmentation(mask, as_rle=False)
    assert np.array_equal(decode_segmentation(segmentation, 40, 50) == 1, mask)


def test_refcoco_layout(root):
    folder = root / "refer_seg" / "refcoco"
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    instances = _json(folder / "instances.json")
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    assert {category["name"] for category in instances["categories"]} == set(scenes.KINDS)
    forms = Counter(type(annotation["segmentation"]) for annotation in annotations.values())
    assert forms[list] > forms[dict] > 0
    assert Counter(image["file_name"] for image in images.values()).most_common(1)[0][1] == 1
    expressions = Counter()
    for ref in refs:
        annotation = annotations[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"]
        assert annotation["category_id"] == ref["category_id"]
        name = images[ref["image_id"]]["file_name"]
        assert re.fullmatch(r"COCO_train2014_\d{12}\.jpg", name)
        assert (root / "refer_seg/images/mscoco/images/train2014" / name).is_file()
        assert re.fullmatch(name[:-4] + r"_\d+\.jpg", ref["file_name"])
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        assert all(set(sentence) == {"sent_id", "sent", "raw", "tokens"} for sentence in ref["sentences"])
        assert len(ref["sentences"]) == 2
        expressions[ref["split"]] += 2
        mask = decode_segmentation(annotation["segmentation"], *_size(images[ref["image_id"]]))
        x, y, width, height = (int(value) for value in annotation["bbox"])
        assert mask[y : y + height, x : x + width].sum() == mask.sum() == pytest.approx(annotation["area"], rel=0.03)
    assert expressions["val"] == 20
    assert set(expressions) == {"train", "val", "testA", "testB"}


def _size(image: dict) -> tuple[int, int]:
    return image["height"], image["width"]


def test_grefcoco_layout(root):
    folder = root / "refer_seg" / "grefcoco"
    refs = _json(folder / "grefs(unc).json")
    annotations = {annotation["id"]: annotation for annotation in _json(folder / "instances.json")["annotations"]}
    kinds = {split: Counter() for split in ("train", "val", "testA", "testB")}
    for ref in refs:
        assert isinstance(ref["ann_id"], list)
        none = ref["ann_id"] == [-1]
        assert ref["no_target"] is none
        assert all(sentence["exist"] is not none for sentence in ref["sentences"])
        if not none:
            assert {annotations[i]["image_id"] for i in ref["ann_id"]} == {ref["image_id"]}
        kinds[ref["split"]]["none" if none else "multi" if len(ref["ann_id"]) > 1 else "single"] += 1
    assert kinds["val"] == {"none": 8, "multi": 8, "single": 8}
    assert kinds["train"] == {"none": 60, "multi": 60, "single": 60}


def test_llava_layout(root):
    records = _json(root / "llava_dataset" / "llava_instruct_150k.json")
    assert len(records) == 8
    for record in records:
        assert record["image"] == record["id"] + ".jpg"
        assert (root / "coco" / "train2017" / record["image"]).is_file()
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].count("<image>") == 1
        assert not any("<image>" in turn["value"] for turn in turns[1:])
    assert max(len(record["conversations"]) for record in records) > 2


def test_splits_share_no_image_and_only_heldout_names_held_out_pairs(mixed):
    images = Counter(path.read_bytes() for path in mixed.rglob("*.jpg"))
    assert images.most_common(1)[0][1] == 1
    numbers = [*demo.REASON_STREAMS.values(), demo.LLAVA_STREAM]
    numbers += [layout.stream + i for layout in REFER_SETS.values() for i in range(len(layout.files))]
    numbers += [number for splits in other_sets.STREAMS.values() for number in splits.values()]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < 1000
    pairs = re.compile("|".join(f"{color} {kind}" for color, kind in sorted(scenes.HELD_OUT)), re.IGNORECASE)
    held_out, others = [], []
    for path in [*mixed.rglob("*.json"), *mixed.rglob("*.p")]:
        (held_out if path.parent.name == "heldout" else others).append(path.read_bytes().decode("latin-1"))
    assert not any(pairs.search(text) for text in others)
    assert all(pairs.search(text) for text in held_out)


def test_image_ids_have_room_for_the_largest_sets():
    """COCO's sets share folders: names are unique for any number of images."""
    most = Sizes(0, demo.MAX_IMAGES, demo.MAX_IMAGES, demo.MAX_IMAGES, all_types=True)
    ranges = []
    for layout in REFER_SETS.values():
        if layout.image_name.startswith("COCO"):
            count = sum(layout.count(split, most) for split in layout.files)
            ranges.append((layout.images, layout.first_image, layout.first_image + count))
    ranges.append(("train2017", demo.LLAVA_FIRST_IMAGE, demo.LLAVA_FIRST_IMAGE + demo.MAX_IMAGES * 4 // 15))
    for dataset in other_sets.FIRST_IMAGE:
        for split in other_sets.STREAMS[dataset]:
            first = int(other_sets.coco_name(dataset, split, 0).removesuffix(".jpg"))
            ranges.append(("train2017", first, first + most.small_split(split)))
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(sorted(ranges)))


def test_the_readers_of_the_real_sets_read_them(root):
    expected = {
        "ReasonSeg|val_short": 20,
        "ReasonSeg|val_long": 20,
        "ReasonSeg|test": 20,
        "ReasonSeg|heldout": 10,
        "refcoco|unc|val": 20,
        "refcoco|unc|testA": 12,
        "grefcoco|unc|val": 24,
        "grefcoco|unc|testB": 12,
    }
    for spec, queries in expected.items():
        dataset = get_eval_dataset(spec, root)
        assert dataset.num_queries == sum(len(dataset[i].queries) for i in range(len(dataset))) == queries, spec
    for spec in ("ReasonSeg|train", "refcoco", "grefcoco", "llava_instruct_150k"):
        dataset = get_train_dataset(spec, root)
        assert len(dataset) == (8 if spec == "llava_instruct_150k" else 30)
        sample = dataset.sample(0, np.random.default_rng(0))
        assert sample.conversations
        assert max(sample.image.shape) == 120


SPECS = [spec for kind in TYPES.values() for spec in kind.default.split("||") if spec] + ["grefcoco", "refzom"]


@pytest.mark.parametrize("spec", SPECS)
def test_every_reader_reads_its_set(spec, mixed):
    """Every record of all 24 data sets gives a valid sample."""
    dataset = get_train_dataset(spec, mixed, DataOptions(negative_sampling_weight=0.3, joint_probability=0.3))
    assert len(dataset) == {"ReasonSeg|train": 30, "refcoco": 30, "grefcoco": 30, "llava_instruct_150k": 8}.get(spec, 6)
    described = dataset.describe()
    assert described.get("unusable", 0) == 0
    num_masks = 0
    for index in range(len(dataset)):
        sample = dataset.sample(index, np.random.default_rng(index))
        assert max(sample.image.shape) == 120
        num_masks += len(sample.masks)
    assert num_masks > 0 or spec == "llava_instruct_150k"


def test_all_24_sets_are_written_and_no_reader_is_left_out():
    names = {spec.split("|")[0] for spec in SPECS}
    assert names | set(EVALUATION_SETS) == set(DATASETS) - {"custom"}
    assert len(names) == 24


EVALUATED = {
    "refclef|testA": 8,
    "refcoco+|val": 8,
    "refcocog|umd|test": 8,
    "refzom|test": 6,
    "R-refcoco|val": 8,
    "R-refcoco+|testB": 8,
    "R-refcocog|test": 8,
    "fprefcoco|val": 8,
    "fprefcoco+|test": 8,
    "fprefcocog|test": 8,
}


@pytest.mark.parametrize("spec", EVALUATED)
def test_every_benchmark_reads_its_set(spec, mixed):
    dataset = get_eval_dataset(spec, mixed)
    queries = [query for i in range(len(dataset)) for query in dataset[i].queries]
    assert len(queries) == dataset.num_queries == EVALUATED[spec]
    absent = sum(len(query.masks) == 0 for query in queries)
    assert absent == len(queries) * (1 / 3 if "zom" in spec else 1 / 2 if spec.startswith(("R-", "fp")) else 0)


@pytest.mark.parametrize(("split", "fewest"), [("val", 2), ("test_few", 2), ("test_many", 3), ("test", 2)])
def test_muse_asks_for_several(split, fewest, mixed):
    dataset = get_eval_dataset(f"MultiReasonSeg|{split}", mixed)
    counts = [len(query.masks) for i in range(len(dataset)) for query in dataset[i].queries]
    assert len(dataset) == (4 if split == "test" else 2)
    assert min(counts) >= fewest


def test_a_correction_names_what_is_there(mixed):
    """FP-RefCOCO: the false sentence differs from the true one in a color that is absent from the image."""
    refs = pickle.loads((mixed / "refer_seg/fprefcoco/refs(berkeley_exclude_unified).p").read_bytes())
    for ref in refs:
        true, false = ref["sentences"]
        assert (true["is_false_premise"], false["is_false_premise"]) == (False, True)
        assert false["gt_sent"] == true["sent"] != false["sent"]
        changed = [pair for pair in zip(true["tokens"], false["tokens"]) if pair[0] != pair[1]]
        assert changed
        assert all(word in scenes.COLORS for pair in changed for word in pair)


def test_the_mixed_configuration_draws_from_all_sets(mixed):
    """configs/tiny_mixed.yaml: all 24 sets, every sample valid, no answer truncated."""
    config = load_config(["--config", str(ROOT / "configs/tiny_mixed.yaml"), "--dataset_dir", str(mixed)])
    mixture = make_mixture(config)
    assert len(mixture.datasets) == 24
    assert set(mixture.types) == set(trained_types()) - {"custom"}
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny/llava")
    processor = UGroundProcessor(tokenizer, ClipReader(120, 10), 64, "", config.model.model_max_length)
    longest = 0
    for number in range(150):
        sample = mixture[number]
        batch = processor.collate([sample])
        assert len(batch.seg_positions) == len(sample.masks), "no [SEG] is lost"
        ends = [processor.builder.encode(conversation).ids for conversation in sample.conversations]
        longest = max(longest, len(processor.builder.prefix) + processor.reader.most_tokens + max(map(len, ends)))
    assert longest < config.model.model_max_length
    assert int(mixture.skipped.sum()) == 0


def test_query_agnostic_baselines_match_the_written_masks(root):
    """Recomputed for gRefCOCO's val split from the files alone."""
    folder = root / "refer_seg" / "grefcoco"
    instances = _json(folder / "instances.json")
    sizes = {image["id"]: _size(image) for image in instances["images"]}
    masks: dict[int, dict[int, np.ndarray]] = {}
    for annotation in instances["annotations"]:
        mask = decode_segmentation(annotation["segmentation"], *sizes[annotation["image_id"]]).astype(bool)
        masks.setdefault(annotation["image_id"], {})[annotation["id"]] = mask
    whole, one, inter, union = [], [], 0, 0
    for ref in _json(folder / "grefs(unc).json"):
        if ref["split"] != "val":
            continue
        shapes = masks[ref["image_id"]]
        everything = np.any(list(shapes.values()), axis=0)
        target_area = np.any([np.zeros_like(everything), *(shapes[i] for i in ref["ann_id"] if i > 0)], axis=0)
        whole.append(_iou(everything, target_area))
        one.append(np.mean([_iou(mask, target_area) for mask in shapes.values()]))
        inter, union = inter + (everything & target_area).sum(), union + (everything | target_area).sum()
    rows = {(row["set"], row["split"], row["kind"]): row for row in _json(root / demo.SUMMARY)["text_blind"]}
    row = rows["grefcoco", "val", "all"]
    assert row["queries"] == len(whole) == 24
    assert row["all"] == pytest.approx({"gIoU": np.mean(whole), "cIoU": inter / union}, abs=2e-3)
    assert row["random"]["gIoU"] == pytest.approx(np.mean(one), abs=2e-3)
    assert rows["grefcoco", "val", "no target"]["all"] == {"gIoU": 0, "cIoU": 0}
    shown = [row for row in rows.values() if row["set"] != "grefcoco" and row["queries"] >= 20]
    assert all(row[answer]["gIoU"] < 0.4 for row in shown for answer in ("all", "random"))


def test_finished_data_are_left_alone(root, capsys):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert demo.main(["--out", str(root), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "random object" in out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_queries_that_need_a_step_are_added_to_finished_data(tmp_path, capsys):
    out, sizes = tmp_path / "demo", ["--train", "3", "--val", "2", "--test", "2"]
    arguments = ["--out", str(out), *sizes]
    assert demo.main(arguments) == 0
    assert not (out / "two_steps").exists()
    (out / "two_steps").mkdir()
    assert demo.main([*arguments, "--two_steps"]) == 1
    assert "has no two_steps.jsonl; remove it" in capsys.readouterr().err
    (out / "two_steps").rename(tmp_path / "demo.two_steps.tmp")  # as left by an interrupted run
    for _ in range(2):
        assert demo.main([*arguments, "--two_steps"]) == 0
    lines = [json.loads(line) for line in (out / "two_steps/two_steps.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "val", "test"}
    assert len({line["image"] for line in lines if line["split"] == "train"}) == 6
    assert all(line["thought"] and (out / "two_steps" / line["image"]).is_file() for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_other_settings_are_refused(root, capsys):
    assert demo.main(["--out", str(root), *SMALL, "--train", "31"]) == 1
    assert "train 30 (now 31)" in capsys.readouterr().err


def test_foreign_folders_are_not_touched(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert demo.main(["--out", str(tmp_path / "mine"), *SMALL]) == 1
    assert "not written by this script" in capsys.readouterr().err
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "thesis.txt").write_text("years of work")
    assert demo.main(["--out", str(tmp_path / "new"), *SMALL]) == 1
    assert "not a leftover" in capsys.readouterr().err
    assert (tmp_path / "new.tmp" / "thesis.txt").exists()
    assert demo.main(["--out", str(tmp_path / "mine" / "thesis.txt"), *SMALL]) == 1
    assert "is a file" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing_and_the_next_one_finishes(tmp_path, monkeypatch):
    out = tmp_path / "data"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_llava", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.main(["--out", str(out), "--train", "2", "--val", "2", "--test", "2"])
    assert not out.exists()
    out.mkdir()  # an empty folder is as good as none
    assert demo.main(["--out", str(out), "--train", "2", "--val", "2", "--test", "2"]) == 0
    assert (out / demo.SUMMARY).is_file()
    assert not (tmp_path / "data.tmp").exists()


@pytest.mark.parametrize("wrong", [["--train", "0"], ["--val", "many"], ["--seed", "-1"]])
def test_wrong_numbers_are_refused(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path / "data"), *wrong])
    assert "is not a whole number from" in capsys.readouterr().err
