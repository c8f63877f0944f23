"""Queries that need a step: their targets against what the masks show, their thoughts, their file, and the study."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from tiny_run import ROOT

from scripts.dev import study_thoughts
from scripts.dev.study_thoughts import Thought
from utils.config import load_config
from utils.datasets import DataOptions, get_eval_dataset, get_train_dataset
from utils.datasets.spec import Spec
from utils.demo.scenes import sample_scene
from utils.demo.two_steps import FAMILIES, two_step_queries, write_two_steps


@pytest.fixture(scope="module")
def asked():
    """(scene, query) of some hundred scenes."""
    scenes = ((sample_scene(rng), rng) for rng in map(np.random.default_rng, range(150)))
    return [(scene, query) for scene, rng in scenes for query in two_step_queries(scene, rng)]


def name_of(scene, index: int) -> str:
    return f"the {scene.shapes[index].color} {scene.shapes[index].kind}"


def centers(scene) -> np.ndarray:
    return np.array([np.argwhere(mask).mean(0)[::-1] for mask in scene.masks])


def test_every_family_occurs_and_the_thought_ends_with_the_target(asked):
    assert set(Counter(query.family for _, query in asked)) == set(FAMILIES)
    for scene, query in asked:
        last = query.thought.removesuffix(".").rpartition(". ")[2]
        if query.family.startswith("most"):
            attribute = query.family.split()[-1]
            assert last == f"it is all {getattr(scene.shapes[query.targets[0]], attribute)} shapes"
        else:
            assert last.endswith(name_of(scene, query.targets[0]))


def test_nearest_and_farthest_are_so_from_what_the_thought_names(asked):
    for scene, query in asked:
        if query.family not in ("nearest", "farthest"):
            continue
        first = query.thought.split(". ")[0]
        (reference,) = [i for i in range(len(scene.shapes)) if first.endswith(name_of(scene, i))]
        distances = np.linalg.norm(centers(scene) - centers(scene)[reference], axis=1)
        others = [i for i in range(len(distances)) if i != reference]
        choose = min if query.family == "nearest" else max
        assert query.targets == (choose(others, key=lambda i: distances[i]),)
        word = first.split()[1]
        assert word in query.text
        if word == "leftmost":
            assert reference == centers(scene)[:, 0].argmin()
        if word == "largest":
            assert reference == scene.masks.sum((1, 2)).argmax()


def test_the_second_comes_after_the_first(asked):
    orders = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}
    words = Counter()
    for scene, query in asked:
        if query.family == "second":
            word = query.text.removesuffix("?").split()[-1]
            words[word] += 1
            if word in orders:
                axis, sign = orders[word]
                values = centers(scene)[:, axis] * sign
            else:
                values = -np.array([shape.radius for shape in scene.shapes])
            assert query.targets == (values.argsort()[1],)
    assert set(words) == {*orders, "largest"}


def test_what_is_between_lies_between(asked):
    for scene, query in asked:
        if query.family == "between":
            named = [i for i in range(len(scene.shapes)) if name_of(scene, i) in query.text]
            a, b, x = (centers(scene)[i] for i in (*named, query.targets[0]))
            assert np.dot(x - a, x - b) < 0  # within the circle over the segment


def test_the_most_frequent_has_no_equal(asked):
    for scene, query in asked:
        if query.family.startswith("most"):
            values = [getattr(shape, query.family.split()[-1]) for shape in scene.shapes]
            (most, count), (_, second) = Counter(values).most_common(2)
            assert count > second
            assert query.targets == tuple(i for i, value in enumerate(values) if value == most)


def test_the_file_is_read_with_its_thoughts(tmp_path):
    write_two_steps(tmp_path, train=4, val=6)
    write_two_steps(tmp_path / "again", train=4, val=6)
    file = tmp_path / "two_steps.jsonl"
    assert file.read_text() == (tmp_path / "again/two_steps.jsonl").read_text()
    data = get_train_dataset(Spec.parse(f"custom|{file}"), tmp_path, DataOptions(thought_probability=1.0))
    assert len(data) == 4
    turns = [turn for i in range(4) for (turn,) in data.sample(i, np.random.default_rng(0)).conversations]
    assert all(turn.thought for turn in turns)
    val = get_eval_dataset(Spec.parse(f"custom|{file}|val"), tmp_path)
    assert [sample.queries[0].meta["family"] for sample in map(val.__getitem__, range(6))] == list(FAMILIES)


def test_thoughts_are_compared_with_the_datas(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("".join(f'{{"thought": "it is {k}. that is b."}}\n' for k in "ac"))
    answers = ((2, "it is c. that is b.", 1), (1, "it is b. that is b.", 2), (2, "", 0))
    records = [SimpleNamespace(query_id=str(n), thought=t, meta={"family": "f"}, I=i, U=2) for n, t, i in answers]
    monkeypatch.setattr(study_thoughts, "read_results", lambda _: (None, records))
    found = list(study_thoughts.read_thoughts(tmp_path, "custom|own|val", tmp_path / "data.jsonl"))
    assert found == [("f", True, True, True, 0.5), ("f", True, False, True, 1.0), ("f", False, False, False, 0.0)]


def test_the_study_trains_each_run_from_the_one_before(tmp_path, monkeypatch):
    calls = {}

    def train(folder, args, **settings):
        settings = {"config": ROOT / "configs/tiny.yaml", "dataset_dir": args.dataset_dir} | settings
        calls[folder.name] = load_config([w for k, v in settings.items() for w in (f"--{k}", str(v))])
        return folder / "merged"

    monkeypatch.setattr(study_thoughts, "train", train)
    monkeypatch.setattr(study_thoughts, "gious", lambda *_: [50.0, 60.0])
    monkeypatch.setattr(study_thoughts, "write_two_steps", lambda *_, **__: None)
    thoughts = [Thought("second", True, True, right, float(right)) for right in (True, True, False)]
    thoughts.append(Thought("second", False, False, False, 0.5))
    monkeypatch.setattr(study_thoughts, "read_thoughts", lambda *_: thoughts)
    monkeypatch.setattr(study_thoughts, "by_family", lambda *_: [1.0] * len(FAMILIES))
    monkeypatch.setattr(study_thoughts, "images_per_second", lambda _: 2.0)
    terms = ("reward", "reward_mask_iou", "tokens", "entropy", "kl")
    log = [{"kind": "train", "step": step} | {f"grpo_{name}": step / 10 for name in terms} for step in range(1, 11)]
    monkeypatch.setattr(study_thoughts, "read_log", lambda _: [{"kind": "start", "step": 0}, *log])
    figure = tmp_path / "curves.png"
    table = study_thoughts.study(SimpleNamespace(output=tmp_path, dataset_dir="data", seeds=2, figure=figure))
    assert len(calls) == 14
    assert calls["thoughts-grpo-1"].model.version == str(tmp_path / "thoughts-1/merged")
    assert calls["supervised-0"].total_steps == calls["thoughts-0"].total_steps
    assert calls["thoughts-both-0"].grpo.objective == "both"
    assert table.count("| second | 75 | 100 | 67 | 100 | 0 | 50 |") == 5
    assert table.count("| nearest | - | - | - | - | - | - |") == 5
    assert table.count("0.300 to 0.800") == 4 * 2 * len(terms)
    assert cv2.imread(str(figure)).std() > 0
