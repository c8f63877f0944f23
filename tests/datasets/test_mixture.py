"""The mixture is a pure function of (seed, sample index)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import train_ds
from model.backbones.llava import ClipReader
from model.processing.processor import UGroundProcessor
from model.structures import Sample, Turn
from utils.datasets import DataError, DataOptions
from utils.datasets.mixture import MAX_IN_A_ROW, Mixture, MixtureSampler


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """12 ReasonSeg images, numbered by their brightness, and two conversations."""
    folder = tmp_path / "reason_seg/ReasonSeg/train"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (20, 16), (i * 10,) * 3).save(folder / f"{i:02}.jpg")
        shapes = [{"label": "target", "points": [[2, 2], [12, 2], [12, 12]]}]
        row = {"text": [f"thing {i}", f"item {i}"], "is_sentence": False, "shapes": shapes}
        (folder / f"{i:02}.json").write_text(json.dumps(row))
    images = tmp_path / "coco/train2017"
    images.mkdir(parents=True)
    Image.new("RGB", (20, 16)).save(images / "1.jpg")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A thing."}]
    path = tmp_path / "llava_dataset/llava_instruct_150k.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"id": 1, "image": "1.jpg", "conversations": turns}] * 2))
    return tmp_path


def key(sample: Sample) -> tuple:
    return sample.sample_id, sample.source, tuple(sample.conversations), sample.masks.tobytes()


def first(batch: list[Sample]) -> list[Sample]:
    return batch


def flat(batches: Iterable[list[tuple]]) -> list[tuple]:
    return [row for batch in batches for row in batch]


def test_sample_depends_on_seed_and_number_only(root: Path) -> None:
    mixture = Mixture(root, "reason_seg||vqa", "3,1")
    again = Mixture(root, ["reason_seg", "vqa"], [3, 1])
    forward = [key(mixture[i]) for i in range(30)]
    backward = [key(again[i]) for i in reversed(range(30))][::-1]
    assert forward == backward
    assert [row[0] for row in forward] == list(range(30))
    assert forward != [key(Mixture(root, "reason_seg||vqa", "3,1", seed=1)[i]) for i in range(30)]


def test_what_a_number_draws_stays(root: Path) -> None:
    """Published results depend on it: new types, data sets and templates must not change these samples."""
    mixture = Mixture(root, "reason_seg||vqa", "3,1")
    sampled = [(sample.source, sample.conversations[0][0]) for sample in (mixture[i] for i in range(4))]
    assert sampled == [
        ("ReasonSeg|train/06.jpg", Turn("Can you find thing 6 here?", "It is [SEG].")),
        ("llava_instruct_150k/1.jpg", Turn("What?", "A thing.")),
        ("ReasonSeg|train/03.jpg", Turn("Where is thing 3? Show the mask.", "It is [SEG].")),
        ("llava_instruct_150k/1.jpg", Turn("What?", "A thing.")),
    ]


def test_questions_may_follow_each_other(root: Path) -> None:
    """One conversation with the same turns and masks in the same order."""
    apart = Mixture(root, "reason_seg")
    sometimes, always = (Mixture(root, "reason_seg", options=DataOptions(dialogue_probability=p)) for p in (0.5, 1.0))
    for number in range(20):
        separate, joined = apart[number], always[number]
        assert joined.conversations == [tuple(turn for turns in separate.conversations for turn in turns)]
        assert np.array_equal(joined.masks, separate.masks)
    assert {len(sometimes[number].conversations) for number in range(20)} == {1, 2}


def test_workers_and_ranks_draw_the_same_numbers(root: Path) -> None:
    mixture = Mixture(root, "reason_seg||vqa", "3,1")
    alone = [key(mixture[i]) for i in range(16)]

    def run(workers: int, **sampler: int) -> list[list[tuple]]:
        loader = DataLoader(mixture, batch_sampler=MixtureSampler(**sampler), num_workers=workers, collate_fn=first)
        return [[key(sample) for sample in batch] for batch in loader]

    assert flat(run(2, batch_size=4, start=0, stop=4)) == alone
    ranks = [run(0, batch_size=2, start=0, stop=4, rank=rank, world_size=2) for rank in range(2)]
    assert flat(ranks[0][step] + ranks[1][step] for step in range(4)) == alone
    assert flat(run(0, batch_size=4, start=2, stop=4)) == alone[8:]


def test_rates_and_weighting(root: Path) -> None:
    mixture = Mixture(root, "reason_seg||vqa", "3,1", data={"reason_seg": "ReasonSeg|train"})
    share = np.mean([mixture[i].source.startswith("ReasonSeg") for i in range(400)])
    assert 0.68 < share < 0.82
    rows = mixture.describe(num_samples=160)
    assert [row["epochs"] for row in rows] == pytest.approx([10, 20])
    assert rows[0]["expressions"] == 24
    table = mixture.table(160).splitlines()
    assert len(table) == 3
    assert "75.0%" in table[1]
    assert Mixture(root, ("reason_seg", "vqa"), ()).shares.tolist() == [0.5, 0.5]
    never = Mixture(root, "reason_seg||vqa", [1, 0])
    assert all(never[i].source.startswith("ReasonSeg") for i in range(50))


def test_data_sets_of_a_type_by_size_or_uniform(root: Path) -> None:
    folder = root / "reason_seg/ReasonSeg"
    (folder / "val").mkdir()
    for suffix in (".jpg", ".json"):
        (folder / f"val/00{suffix}").write_bytes((folder / f"train/00{suffix}").read_bytes())
    data = {"reason_seg": "ReasonSeg|train||ReasonSeg|val"}
    assert Mixture(root, "reason_seg", data=data).shares.tolist() == pytest.approx([12 / 13, 1 / 13])
    assert Mixture(root, "reason_seg", data=data, weighting="uniform").shares.tolist() == [0.5, 0.5]


def test_a_broken_record_is_skipped_counted_and_logged_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    mixture = Mixture(root, "reason_seg")
    hit = next(i for i in range(100) if mixture[i].source.endswith("05.jpg"))
    (root / "reason_seg/ReasonSeg/train/05.jpg").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        sampled = [key(mixture[hit]) for _ in range(3)]
    assert sampled[0] == sampled[1] == sampled[2]
    assert "05.jpg" not in sampled[0][1]
    assert mixture.describe()[0]["skipped"] == 3
    assert sum("05.jpg" in record.message for record in caplog.records) == 1
    loader = DataLoader(mixture, batch_sampler=MixtureSampler(1, hit, hit + 1), num_workers=1, collate_fn=first)
    assert [key(batch[0]) for batch in loader] == sampled[:1]
    assert mixture.describe()[0]["skipped"] == 4  # the worker's count arrives here


def test_it_gives_up_when_nothing_can_be_used(root: Path) -> None:
    mixture = Mixture(root, "reason_seg")
    for path in (root / "reason_seg/ReasonSeg/train").glob("*.jpg"):
        path.unlink()
    with pytest.raises(
        DataError, match=rf"ReasonSeg\|train: {MAX_IN_A_ROW} records in a row .*\d\d\.jpg does not exist"
    ):
        mixture[0]


def test_a_data_set_of_which_little_can_be_read_is_named_at_the_start(root: Path) -> None:
    images = sorted((root / "reason_seg/ReasonSeg/train").glob("*.jpg"))
    mixture = Mixture(root, "reason_seg||vqa")
    for path in images[:6]:  # half of them
        path.write_bytes(b"broken")
    mixture.check_readable()
    images[6].write_bytes(b"broken")
    with pytest.raises(
        DataError, match=r"ReasonSeg\|train: 7 of 12 records cannot be used; the first: .*00\.jpg"
    ) as error:
        mixture.check_readable()
    assert "llava" not in str(error.value)


def test_a_workers_error_is_its_message_alone(root: Path, capsys: pytest.CaptureFixture) -> None:
    mixture = Mixture(root, "reason_seg")
    for path in (root / "reason_seg/ReasonSeg/train").glob("*.jpg"):
        path.write_bytes(b"broken")
    loader = DataLoader(mixture, batch_sampler=MixtureSampler(1, 0, 1), num_workers=1, collate_fn=first)
    with pytest.raises(DataError) as error:
        next(iter(loader))
    train_ds.print_error(error.value)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: ReasonSeg|train: {MAX_IN_A_ROW} records in a row are unusable; the last: image ")


def test_samples_that_are_cut_off_are_counted_and_named(
    root: Path, tiny_processor, caplog: pytest.LogCaptureFixture
) -> None:
    folder = root / "reason_seg/ReasonSeg/train"
    for path in folder.glob("*.json"):
        long = " ".join(["the red star"] * 40)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"text": [long]}))
    mixture = Mixture(root, "reason_seg")
    room = 60  # tokens beside the image
    processor = UGroundProcessor(
        tiny_processor.tokenizer, ClipReader(40, 10), 64, "", len(tiny_processor.builder.prefix) + 16 + room
    )
    collate = partial(processor.collate, on_truncated=mixture.count_truncated)
    loader = DataLoader(mixture, batch_sampler=MixtureSampler(2, 0, 2), collate_fn=collate)
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    assert int(mixture.truncated) == 4
    assert (
        f"the end of 1 of its 1 conversations is cut off, with its [SEG]: they are longer than the {processor.room}"
        in (caplog.text)
    )
    assert [len(batch.label_ids) for batch in batches] == [0, 0]
    with pytest.raises(DataError, match="step 3 has no answer to learn"):
        train_ds.check_answers(batches, torch.zeros(2), 3)
    train_ds.check_answers(batches, torch.ones(2), 3)  # another process has answers
    list(DataLoader(mixture, batch_sampler=MixtureSampler(2, 0, 1), collate_fn=tiny_processor.collate))
    assert int(mixture.truncated) == 4
    assert processor.group_prompts([mixture[0]], 30, mixture.count_left_out).questions == [[]]
    assert (int(mixture.left_out), int(mixture.truncated)) == (1, 4)
    assert "1 question not asked: with an answer of --grpo_tokens" in caplog.text


def test_all_problems_are_reported_at_once(root: Path) -> None:
    data = {"refer_seg": "refcoco||refcocoo", "reason_seg": "ReasonSeg|trian"}
    with pytest.raises(DataError) as error:
        Mixture(root, "reason_seg||refer_seg||vqaa", "1,2", data=data, weighting="sise")
    message = str(error.value)
    for part in ("'vqa'", "sample_rates", "'refcoco'", "'train'", "'size'", "instances.json", "refs(unc).p"):
        assert part in message
    for rates in ("1,x", "-1", "0", [float("nan")]):
        with pytest.raises(DataError, match="sample_rates"):
            Mixture(root, "reason_seg", rates)
    with pytest.raises(DataError, match="without duplicates"):
        Mixture(root, "vqa||vqa")


def test_sampler_refuses_nonsense() -> None:
    for bad in ({"batch_size": 0}, {"rank": 2, "world_size": 2}, {"start": 5, "stop": 4}):
        with pytest.raises(ValueError, match="out of range"):
            MixtureSampler(**{"batch_size": 1, "start": 0, "stop": 4, **bad})
    assert len(MixtureSampler(2, 3, 8)) == 5
