"""scripts/bench.py measures everything that it promises, at a size that takes seconds."""

from __future__ import annotations

import cProfile
import json
import pstats
import queue
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.structures import Turn
from scripts import bench, make_demo_data
from utils.datasets import get_train_dataset, records
from utils.datasets.records import CACHE_VARIABLE, MappedRecords
from utils.demo.tiny_model import llama_settings
from utils.diagnostics import benchmark, growth, memory_model
from utils.inference import cli

ROOT = Path(__file__).resolve().parents[2]


def test_generated_files_are_what_the_readers_read(tmp_path: Path) -> None:
    bench.write_refs(tmp_path, refs=50, annotations=80, rng=np.random.default_rng(0))
    bench.write_parts(tmp_path, annotations=80, rng=np.random.default_rng(0))
    refs, parts = get_train_dataset("refcoco", tmp_path), get_train_dataset("paco_lvis", tmp_path)
    assert refs.describe() | {"expressions": 0} == {
        "images": 20,
        "expressions": 0,
        "absent": 0,
        "multi": 0,
        "unusable": 0,
    }
    assert 100 <= refs.describe()["expressions"] <= 150
    assert parts.describe() == {"images": 8, "masks": 80, "unusable": 0}
    split = refs.split
    assert split.mask(split.images[0], split.refs(split.images[0])[0]).sum() > 5000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_measure_start_reports_seconds_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")  # restored afterwards
    monkeypatch.setattr(records, "MIN_CACHED_BYTES", 0)
    monkeypatch.setattr(records, "MIN_SOURCE_AGE", 0)
    bench.write_refs(tmp_path, refs=1300, annotations=1300, rng=np.random.default_rng(0))
    results: queue.Queue = queue.Queue()
    for _ in range(2):
        bench.measure_start("refcoco", str(tmp_path), str(tmp_path / "cache"), 1, False, results)
    for seconds, peak, before, after in (results.get(), results.get()):
        assert seconds > 0
        assert bench.MB < after.private < after.resident <= peak + 50 * bench.MB
        assert after.private - before.private < 20 * bench.MB
    assert isinstance(get_train_dataset("refcoco", tmp_path).split.images, MappedRecords)


def test_loader_reports_time_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = str(tmp_path / "data")
    assert make_demo_data.main(["--out", data, "--train", "4", "--val", "1", "--test", "1"]) == 0
    capsys.readouterr()
    settings = ["--dataset_dir", data, "--dataset", "reason_seg||refer_seg", "--refer_seg_data", "refcoco"]
    sizes = ["--batches", "3", "--sam_side", "64", "--clip_side", "28", "--workers", "1"]
    assert bench.main(["loader", *sizes, *settings]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (.+?) +\| +([\d.,]+) \|", printed, re.MULTILINE))
    assert float(rows["0"]) > 0
    assert float(rows["1"]) > 0
    for stage in ("decode the photograph", "masks", "tokenise", "resize, normalise, pad"):
        assert float(rows[stage]) > 0, stage
    assert sum(float(rows[stage]) for stage in [*bench.STAGES, "the rest"]) == pytest.approx(
        float(rows["all"]), abs=0.6
    )


def test_stages_name_functions_that_exist() -> None:
    for functions in bench.STAGES.values():
        for file, function in functions:
            if file == "~":  # a profile's name for what is not Python
                continue
            (path,) = [*ROOT.glob(f"utils/datasets/{file}"), *ROOT.glob(f"model/processing/{file}")]
            assert f"def {function}(" in path.read_text(), (file, function)


def test_stages_count_nothing_twice(tmp_path: Path) -> None:
    """No function of a stage runs inside another one: their cumulative times would overlap."""
    bench.write_parts(tmp_path, annotations=20, rng=np.random.default_rng(0))
    for image in tmp_path.rglob("*.jpg"):
        Image.new("RGB", (640, 480)).save(image)
    dataset = get_train_dataset("paco_lvis", tmp_path)
    profile = cProfile.Profile()
    profile.runcall(dataset.sample, 0, np.random.default_rng(0))
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    listed = {function for functions in bench.STAGES.values() for function in functions}
    timed = {key for key in stats if (Path(key[0]).name, key[2]) in listed}
    assert {"decode_segmentation", "read_image"} <= {name for _, _, name in timed}
    for function in timed:
        above, callers = set(), set(stats[function][4])
        while callers:
            above |= callers
            callers = {caller for each in callers for caller in stats[each][4]} - above
        assert not above & timed, function


SMALL = replace(benchmark.PRESETS["tiny"], llama={"width": 32, "layers": 7, "heads": 2}, size=(48, 64), batch=1)


@pytest.mark.slow
def test_the_model_benchmark_writes_all_that_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark.PRESETS, "tiny", SMALL)
    file = tmp_path / "figures.json"
    assert bench.main(["--preset", "tiny", "--repeats", "1", "--device", "cpu", "--json", str(file)]) == 0
    figures, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert {"preset", "device", "commit", "ratios", "parts", "images_per_second", "tokens_per_second"} <= set(figures)
    wanted = {row.name: row.bar for row in benchmark.ratios() if "compiled" not in row.name}  # a minute, with --compile
    assert wanted.items() <= {name: row["bar"] for name, row in figures["ratios"].items()}.items()
    assert all(figures["answered_images_per_second"][images] > 0 for images in ("1", "8"))
    for name, row in figures["ratios"].items():
        assert 0 < row["min"] <= row["median"] <= row["max"], name
        assert f"| {name} " in printed
    parts = figures["parts"]
    whole = parts.pop("whole step without data")
    assert parts.pop("SAM encoder, an image") > 0
    assert sum(parts.values()) - parts["data"] == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize("name", ["7b", "13b"])
def test_large_presets_have_the_shapes_of_the_memory_table(name: str) -> None:
    preset, shape = benchmark.PRESETS[name], memory_model.preset(name)
    settings = llama_settings(memory_model.VOCABULARY, **preset.llama)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert settings[key] == getattr(shape, key), key
    assert (preset.clip.hidden_size, preset.clip.num_hidden_layers, preset.clip.intermediate_size) == (1024, 24, 4096)
    assert preset.sam.to_dict() == shape.sam_config


def test_large_presets_need_a_gpu(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(bench.main, ["--preset", "7b", "--device", "cpu"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main([])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> benchmark.Bench:
    return benchmark.Bench(SMALL, "cpu", str(tmp_path_factory.mktemp("features")))


def test_baselines_are_the_same_work(small: benchmark.Bench) -> None:
    """Unpacked rows have the same loss; the LISA-style baseline has neither maps nor a policy."""
    samples = small.samples(3)
    small.wrapped.eval()
    small.configure(benchmark.UGROUND | {"layer_selection": "fixed:2"})
    packed, unpacked = (small.model(small.batch(samples, packed=packed)).loss for packed in (True, False))
    torch.testing.assert_close(packed, unpacked, rtol=1e-4, atol=1e-4)
    assert small.batch(samples).input_ids.shape[0] * 3 == small.batch(samples, packed=False).input_ids.shape[0]
    small.configure(benchmark.LISA_STYLE)
    assert "policy" not in small.model(small.batch(samples)).terms
    assert not small.model.ppm.gate.requires_grad
    small.configure(benchmark.UGROUND)
    small.wrapped.train()


def test_answers_have_the_length_and_the_masks_that_are_timed(small: benchmark.Bench) -> None:
    sample = small.samples(2, images=1)[0]
    batch = small.processor.prompts([sample.image], [[Turn("where is it"), Turn("and this")]])
    small.wrapped.eval()
    for _ in range(2):
        with small.scripted_answers(segs=2):
            answers = small.model.answer(batch, max_new_tokens=12).answers
        assert [len(answer) for answer in answers.token_ids[0]] == [12, 12]
        assert len(answers.seg_questions) == 4
    small.wrapped.train()


@pytest.mark.slow
def test_growth_measures_every_axis(small: benchmark.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "GROWTH", dict.fromkeys(growth.GROWTH, (1,)) | {"megapixels on disk": (0.01,)})
    rows = growth.growth(small.preset, "cpu", str(tmp_path), 1)
    assert {what for what, *_ in rows} == set(growth.GROWTH)
    assert all(seconds > 0 for *_, seconds, _ in rows)
