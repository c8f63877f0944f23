"""The new shape: scenes that no other data have, queries that need its word, and the study that teaches it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from scripts.dev import study_start
from utils.config import load_config
from utils.datasets.jsonl import scan
from utils.demo import new_shape, scenes

RECIPE = str(Path(__file__).resolve().parents[2] / study_start.RECIPE)


def test_queries_name_one_new_shape_and_are_ambiguous_without_its_word():
    for index in range(20):
        scene, queries = new_shape.new_scene(np.random.default_rng([7, index]))
        for query in queries:
            words = set(query.text.split()) - {"the"}
            fitting = [i for i, shape in enumerate(scene.shapes) if words <= set(shape.attributes)]
            assert fitting == list(query.targets)
            assert scene.shapes[fitting[0]].kind == new_shape.KIND
            assert sum(words - {new_shape.KIND} <= set(shape.attributes) for shape in scene.shapes) > 1


def test_no_other_scene_holds_it():
    assert not {new_shape.KIND} & set(scenes.KINDS)
    drawn = [scenes.sample_scene(np.random.default_rng([8, index])) for index in range(20)]
    assert new_shape.KIND not in {shape.kind for scene in drawn for shape in scene.shapes}


def test_smaller_training_sets_are_part_of_larger_ones(tmp_path):
    new_shape.write_new_shape(tmp_path, train=(2, 3), val=4)
    two, three, val = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("new-2.jsonl", "new-3.jsonl", "new.jsonl")
    )
    assert three[: len(two)] == two
    assert len(three) > len(two)
    assert [len({line["image"] for line in lines}) for lines in (two, three, val)] == [2, 3, 4]
    assert len(val) == 4
    assert all((tmp_path / line["image"]).is_file() for line in three + val)
    for path in tmp_path.glob("*.jsonl"):
        scan(path)  # raises where a line is wrong


def test_the_recipe_starts_from_no_model_but_the_one_given():
    with pytest.raises(ValueError, match="--version"):
        load_config(["--config", RECIPE, "--custom_data", "own.jsonl"])


def test_study_trains_by_the_recipe_and_reports_every_run(tmp_path, monkeypatch):
    calls = []

    def train(folder, args, **settings):
        settings = {"config": study_start.CONFIG, "dataset_dir": args.dataset_dir} | settings
        settings["config"] = Path(RECIPE).parents[1] / settings["config"]
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        calls.append((folder.name, load_config(words)))
        return folder / "merged"

    monkeypatch.setattr(study_start, "train", train)
    monkeypatch.setattr(study_start, "gious", lambda merged, *_: [float(len(calls)), 90.0])
    monkeypatch.setattr(study_start, "write_new_shape", lambda *_: None)
    args = SimpleNamespace(output=tmp_path, version="finished", dataset_dir="data", seeds=2)
    table = study_start.new_shape(args)

    configs = dict(calls)
    recipe, alone, base = (configs[f"{kind}-50-1"] for kind in ("recipe", "alone", "base"))
    assert len(calls) == len(configs) == 24
    assert {config.total_steps for config in configs.values()} == {study_start.STEPS}
    assert (recipe.data.dataset, recipe.data.sample_rates) == (base.data.dataset, base.data.sample_rates)
    assert alone.data.dataset == ("custom",)
    assert recipe.model == alone.model
    assert recipe.model.version == "finished"
    assert recipe.model.freeze
    assert not base.model.freeze
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:7]] == [
        "before",
        "the recipe, 20 images",
        "the recipe, embeddings in full, 20 images",
        "the new images alone, 20 images",
        "from the base, 20 images",
    ]
