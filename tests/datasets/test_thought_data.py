"""Thoughts in the data: ReasonSeg's explanations, LISA++'s chains of thought, your own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model.structures import Turn
from utils.config import load_config
from utils.datasets import DataOptions, get_train_dataset
from utils.datasets.base import DataError
from utils.datasets.reason_seg_plus import _with_thought

ALWAYS = DataOptions(thought_probability=1.0)


def turns_of(dataset, index: int, seed: int = 0) -> list[Turn]:
    sample = dataset.sample(index, np.random.default_rng(seed))
    return [turn for conversation in sample.conversations for turn in conversation]


def test_explanations_of_reasonseg_come_before_seg(data: Path) -> None:
    explained = json.loads((data / "reason_seg/ReasonSeg/explanatory/train.json").read_text())
    texts = {row["outputs"] for row in explained}
    always, half, never = (
        get_train_dataset("ReasonSeg|train", data, DataOptions(thought_probability=share)) for share in (1, 0.5, 0)
    )
    thoughts = [turn for index in range(len(always)) for turn in turns_of(always, index) if turn.thought]
    assert {turn.thought for turn in thoughts} <= texts
    assert len({turn.thought for turn in thoughts}) == len(texts)
    assert all("[SEG]" in turn.answer for turn in thoughts)
    some = [bool(turn.thought) for seed in range(40) for i in range(len(half)) for turn in turns_of(half, i, seed)]
    every = [bool(turn.thought) for seed in range(40) for i in range(len(half)) for turn in turns_of(always, i, seed)]
    assert sum(some) / sum(every) == pytest.approx(0.5, abs=0.15)
    assert not any(turn.thought for index in range(len(never)) for turn in turns_of(never, index))


def test_explanations_are_also_answers_if_asked_for(data: Path) -> None:
    dataset = get_train_dataset("ReasonSeg|train", data, DataOptions(thought_probability=0.5, explanatory=1.0))
    turns = [turn for seed in range(20) for index in range(len(dataset)) for turn in turns_of(dataset, index, seed)]
    assert any(turn.thought for turn in turns)
    assert any("[SEG]" not in turn.answer for turn in turns)


@pytest.mark.parametrize(
    ("answer", "thought", "rest"),
    [
        ("A phone rings. So it is [SEG].", "A phone rings.", "So it is [SEG]."),
        ("One. Two! Three [SEG] and [SEG]. Four.", "One. Two!", "Three [SEG] and [SEG]. Four."),
        ("It is [SEG]. It rings.", "", "It is [SEG]. It rings."),
        ("At 3.5 m it is [SEG].", "", "At 3.5 m it is [SEG]."),
        ("No target. None.", "", "No target. None."),
    ],
)
def test_sentences_before_the_first_seg_are_the_thought(answer: str, thought: str, rest: str) -> None:
    assert _with_thought(Turn("q", answer)) == Turn("q", rest, thought)


def test_chains_of_thought_keep_their_masks(tmp_path: Path) -> None:
    from scripts import make_demo_data

    sizes = ("--train", "60", "--val", "2", "--test", "2")
    assert make_demo_data.main(["--out", str(tmp_path / "d"), "--all_types", *sizes]) == 0
    dataset = get_train_dataset("cot", tmp_path / "d", ALWAYS)
    turns = [turn for index in range(len(dataset)) for turn in turns_of(dataset, index)]
    assert any(turn.thought for turn in turns)  # sample() checks [SEG] against masks
    assert all(turn.answer.count("[SEG]") for turn in turns)


def test_own_thoughts(tmp_path: Path, image_file: Path) -> None:
    lines = [
        {"image": image_file.name, "query": "the cup", "masks": [[1, 1, 9, 1, 9, 9]], "thought": "It is white."},
        {"image": image_file.name, "query": "the dog", "masks": [], "thought": "I see no animal."},
        {"image": image_file.name, "query": "the table", "masks": [[1, 1, 9, 1, 9, 9]]},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {turn.thought: turn.answer for turn in turns_of(get_train_dataset(f"custom|{path}", tmp_path, ALWAYS), 0)}
    assert set(found) == {"It is white.", "I see no animal.", ""}
    assert "[REJ]" in found["I see no animal."]
    never = get_train_dataset(f"custom|{path}", tmp_path, DataOptions())
    assert not any(turn.thought for turn in turns_of(never, 0))
    path.write_text(json.dumps(lines[0] | {"thought": " "}) + "\n")
    with pytest.raises(DataError, match="'thought' must be a non-empty string"):
        get_train_dataset(f"custom|{path}", tmp_path, ALWAYS)
    del lines[0]["query"]
    talk = [{"from": "human", "value": "where"}, {"from": "gpt", "value": "[SEG]"}]
    path.write_text(json.dumps(lines[0] | {"conversations": talk}) + "\n")
    with pytest.raises(DataError, match="'thought' is of a 'query'"):
        get_train_dataset(f"custom|{path}", tmp_path, ALWAYS)


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_settings_that_do_not_fit_are_refused() -> None:
    needed = ["--version", "x", "--vision_tower", "x", "--vision_pretrained", "x", "--dataset_dir", "x", "--no_eval"]
    with pytest.raises(ValueError, match=r"thought_probability.* needs thought_format text or tokens"):
        load_config([*needed, "--thought_probability", "0.5"])
    with pytest.raises(ValueError, match=r"thought_loss_weight.* has no effect without thoughts"):
        load_config([*needed, "--thought_loss_weight", "0.5"])
    config = load_config([*needed, "--thought_probability", "0.5", "--thought_format", "text"])
    assert config.method["thought_format"] == "text"
