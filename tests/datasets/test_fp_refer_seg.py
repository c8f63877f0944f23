"""R-RefCOCO and FP-RefCOCO: expressions with false premises (docs/data.md)."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from disk import H, W, box, write_image, write_json

from model.structures import Sample
from utils.datasets import DATASETS, DataError, get_eval_dataset, get_train_dataset
from utils.datasets.templates import ANSWERS

FALSE = {
    "R-refcoco": {"sent": "the blue dog", "exist": False},
    "fprefcoco": {"sent": "the blue dog", "is_false_premise": True, "gt_sent": "the red dog", "exist": None},
}


def ref(split: str, *sentences: dict, ann_id: object = 10) -> dict:
    return {"ref_id": 1, "ann_id": ann_id, "image_id": 1, "split": split, "sentences": list(sentences)}


def write_refs(root: Path, name: str, split_by: str, refs: object) -> Path:
    path = root / f"refer_seg/{name}/refs({split_by}).p"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(refs))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """All six sets, each with the one file that the benchmarks' own code opens."""
    write_image(tmp_path / "coco/train2014/a.jpg")
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": H, "width": W}],
        "annotations": [{"id": 10, "image_id": 1, "segmentation": [box(5, 5)]}],
    }
    for name, row in DATASETS.items():
        if row.false_premises:
            false = FALSE["R-refcoco" if name.startswith("R-") else "fprefcoco"]
            true = {"sent": "the red dog", "sent_id": 7}
            val = ref("val", true, {**false, "sent_id": 7}, {"sent": "a dog"})
            write_refs(tmp_path, name, row.split_by + row.split_by_suffix, [ref("train", true, false), val])
            write_json(tmp_path / f"refer_seg/{name}/instances.json", instances)
    return tmp_path


def samples_of(root: Path, name: str) -> list[Sample]:
    dataset = get_train_dataset(name, root)
    return [dataset.sample(0, np.random.default_rng(seed)) for seed in range(40)]


def test_all_six_are_there(root: Path) -> None:
    names = [name for name, row in DATASETS.items() if row.false_premises]
    assert names == ["R-refcoco", "R-refcoco+", "R-refcocog", "fprefcoco", "fprefcoco+", "fprefcocog"]
    counts = {"images": 1, "expressions": 2, "absent": 1, "multi": 0, "unusable": 0}
    assert all(get_train_dataset(name, root).describe() == counts for name in names)
    assert [DATASETS[name].split_by for name in names] == ["unc", "unc", "umd", *["berkeley"] * 3]


@pytest.mark.parametrize("name", ["R-refcoco", "fprefcoco"])
def test_a_false_premise_is_denied_without_a_mask(root: Path, name: str) -> None:
    answers = set()
    for sample in samples_of(root, name):
        ((turn,),) = sample.conversations
        if "blue" in turn.question:
            answers.add(turn.answer)
            assert len(sample.masks) == 0
        else:
            assert turn.answer in ANSWERS["target"]
            assert sample.masks[0, 8, 8] == 1
    correction = "the red dog" if name == "fprefcoco" else ""
    templates = ANSWERS["correction" if correction else "denial"]
    expected = {a.replace("{query}", "the blue dog").replace("{correction}", correction) for a in templates}
    assert answers == expected


@pytest.mark.parametrize("name", ["R-refcoco", "fprefcoco"])
def test_evaluation_has_every_sentence(root: Path, name: str) -> None:
    dataset = get_eval_dataset(f"{name}|{DATASETS[name].split_by}|val", root)
    assert (dataset.num_queries, dataset.spec.name) == (3, name)
    queries = dataset[0].queries
    assert [len(query.masks) for query in queries] == [1, 0, 1]
    assert [query.meta["false_premise"] for query in queries] == [False, True, False]
    assert queries[1].meta["targets"] == 0
    assert queries[1].meta.get("gt_sent", "") == ("the red dog" if name == "fprefcoco" else "")
    assert len({query.query_id for query in queries}) == 3  # although two sentences have one sent_id
    with pytest.raises(DataError, match=r"refs\(unc_x\)\.p"):
        get_eval_dataset(f"{name}|unc_x|val", root)


def test_evaluation_prefers_the_file_of_the_benchmarks_own_code(root: Path) -> None:
    """SESAME and the paper's release open refs(*_exclude_unified).p for val, too; the plain file is another one."""
    folder = "refer_seg/fprefcoco"
    both = write_refs(root, "fprefcoco", "berkeley", [ref("val", {"sent": "a dog"}), ref("train", {"sent": "a dog"})])
    dataset = get_eval_dataset("fprefcoco|berkeley|val", root)
    assert (dataset.annotations, dataset.num_queries) == (f"{folder}/refs(berkeley_exclude_unified).p", 3)
    named = get_eval_dataset("fprefcoco|berkeley_exclude_unified|val", root)
    assert (named.annotations, named.num_queries) == (dataset.annotations, 3)
    (root / folder / "refs(berkeley_exclude_unified).p").unlink()
    plain = get_eval_dataset("fprefcoco|berkeley|val", root)
    assert (plain.annotations, plain.num_queries) == (f"{folder}/{both.name}", 1)
    with pytest.raises(DataError, match=r"no refs \(looked in .*berkeley_exclude_unified"):
        get_train_dataset("fprefcoco", root)  # it must not train on the other file in silence
    assert len(get_train_dataset("fprefcoco|berkeley", root)) == 1  # unless it is named
    both.unlink()
    with pytest.raises(DataError, match=r"no refs \(looked in .*berkeley_exclude_unified.*refs\(berkeley\)\.p"):
        get_eval_dataset("fprefcoco|berkeley|val", root)


def test_what_a_false_sentence_was_derived_from_does_not_matter(root: Path) -> None:
    write_refs(root, "fprefcoco", "berkeley_exclude_unified", [ref("train", FALSE["fprefcoco"], ann_id=99)])
    assert get_train_dataset("fprefcoco", root).describe()["absent"] == 1
    write_refs(root, "fprefcoco", "berkeley_exclude_unified", [ref("train", {**FALSE["fprefcoco"], "gt_sent": None})])
    ((turn,),) = samples_of(root, "fprefcoco")[0].conversations
    assert turn.answer in {answer.replace("{query}", "the blue dog") for answer in ANSWERS["denial"]}


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ([ref("train", {"sent": "x", "exist": "no"})], "'x' has exist 'no'; expected true or false"),
        ([ref("train", {"sent": "x", "is_false_premise": 1})], "'x' has is_false_premise 1"),
        ([ref("train", {"sent": "x", "is_false_premise": True, "gt_sent": 3})], "'x' has gt_sent 3; expected a text"),
        ([ref("train", {"sent": "x"}, ann_id=99)], r"annotation 99 is not in .*instances\.json"),
        ([ref("val", {"sent": "x"})], "has no split 'train'; it has: val"),
        ([], "has no split 'train'; it has: no refs at all"),
        ({"refs": []}, "not a list of dicts"),
        ([Path("x")], "rejected: it refers to pathlib"),
    ],
)
def test_bad_files_are_named(root: Path, refs: object, message: str) -> None:
    write_refs(root, "fprefcoco", "berkeley_exclude_unified", refs)
    with pytest.raises(DataError, match=message):
        get_train_dataset("fprefcoco", root)
