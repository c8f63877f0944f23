"""Tables 10 and 11 of scripts/bench.py: the rows do the work that they are named after."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.lora import parameters_by_part
from scripts import bench as program
from utils.diagnostics import benchmark, costs, release_like

SMALL = replace(benchmark.PRESETS["tiny"], llama={"width": 32, "layers": 3, "heads": 2}, size=(48, 64), batch=1)
CASES = {case.name: case for case in costs.CASES}


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> costs.Benches:
    return costs.Benches(SMALL, "cpu", str(tmp_path_factory.mktemp("features")))


@pytest.fixture(scope="module")
def small(benches: costs.Benches) -> benchmark.Bench:
    return benches.sam


@pytest.fixture
def batches(small: benchmark.Bench, monkeypatch: pytest.MonkeyPatch) -> list:
    """The batches of training steps, which are not taken."""
    seen: list = []
    monkeypatch.setattr(small, "step", seen.append)
    return seen


def trained(small: benchmark.Bench, case: costs.Case) -> set[str]:
    costs.method_of(case.method).apply(small)
    return {name for name, parameter in small.wrapped.named_parameters() if parameter.requires_grad}


def test_methods_train_what_their_prompts_need(small: benchmark.Bench) -> None:
    names = {name: trained(small, CASES[name]) for name in ("UGround", "LISA", "SESAME", "GSVA", "READ")}
    parts = {
        name: {key for key in ("gate", "mask_downscaling", "no_mask_embed", "point_embed") if key in " ".join(each)}
        for name, each in names.items()
    }
    assert parts == {
        "UGround": {"gate", "mask_downscaling"},
        "LISA": {"no_mask_embed"},
        "SESAME": {"no_mask_embed"},
        "GSVA": {"no_mask_embed"},
        "READ": {"no_mask_embed", "point_embed"},
    }


@pytest.mark.parametrize("name", ["UGround", "LISA", "READ"])
def test_a_step_moves_what_the_method_trains_and_nothing_else(small: benchmark.Bench, name: str) -> None:
    """READ's points came after the optimizer was made."""
    call = costs.training_call(small, CASES[name], small.samples(2))
    moving, before = trained(small, CASES[name]), {k: v.clone() for k, v in small.wrapped.state_dict().items()}
    call()
    after = small.wrapped.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved - moving <= {key for key in after if "ppm.baseline" in key}
    key = {"UGround": "gate", "LISA": "no_mask_embed", "READ": "point_embeddings.0"}[name]
    assert [each for each in moved if key in each]
    assert all(parameter.grad is None for parameter in small.wrapped.parameters())


def test_parameters_are_counted(small: benchmark.Bench) -> None:
    costs.method_of("uground").apply(small)
    counts, parts = costs.parameter_counts(small.wrapped), parameters_by_part(small.wrapped).values()
    assert counts == {"trainable": sum(trains for _, trains in parts), "total": sum(size for size, _ in parts)}
    assert costs._counts(1e6, 8e6) == ["1.00M", "8.00M", "12.50%"]


@pytest.mark.parametrize("name", ["UGround", "LISA", "SESAME", "GSVA", "PixelLM"])
def test_parameters_at_7b_are_the_papers(name: str) -> None:
    """PixelLM's projector is LLaVA-1.5's here, where its own has twice the hidden units."""
    ours, paper = costs.counts_at_7b(CASES[name].method), costs.PAPER[name]
    wider = (1024 + 1 + 4096) * 4096 if name == "PixelLM" else 0
    assert ours["trainable"] + wider == pytest.approx(1e6 * paper.trainable, rel=1e-4)
    assert ours["total"] + wider == pytest.approx(1e6 * paper.total, rel=5e-3)
    assert 100 * (ours["trainable"] + wider) / (ours["total"] + wider) == pytest.approx(paper.share, abs=0.02)


def test_layouts(small: benchmark.Bench, batches: list) -> None:
    samples = small.samples(3, images=2)
    seen = {}
    for name in ("UGround", "UGround, unpacked", "GSVA", "release-like"):
        costs.training_call(small, CASES[name], samples)()
        seen[name] = batches[-1]
    assert {name: batch.questions for name, batch in seen.items()} == {
        "UGround": [3, 3],
        "UGround, unpacked": [1] * 6,
        "GSVA": [1, 1],
        "release-like": [1] * 6,
    }
    assert all(sum(map(len, batch.masks)) == len(batch.seg_positions) == 6 for batch in seen.values())
    cells = {name: batch.image_tokens.shape[1] for name, batch in seen.items()}
    assert cells["UGround"] == cells["UGround, unpacked"] < cells["release-like"] == seen["release-like"].valid.shape[1]
    assert not small.processor.keep_padding


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_release_like_step_has_ugrounds_loss(
    small: benchmark.Bench, batches: list, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    small.configure(costs.method_of("uground").settings | {"layer_selection": "fixed:2"})
    for module in small.wrapped.modules():
        if isinstance(module, torch.nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)
    samples, stacked = small.samples(3), []
    wanted = small.wrapped(small.batch(samples))
    wanted.loss.backward()
    gradients = {name: p.grad for name, p in small.wrapped.named_parameters() if p.grad is not None}
    small.optimizer.zero_grad()

    def step(batch):
        assert small.model.is_gradient_checkpointing == checkpointing
        output = small.wrapped(batch)
        output.loss.backward()
        stacked.append(output.loss)

    stack = torch.stack
    shapes = []
    monkeypatch.setattr(
        torch, "stack", lambda *args, **kwargs: shapes.append((out := stack(*args, **kwargs)).shape) or out
    )
    monkeypatch.setattr(small, "step", step)
    with small.checkpointing() if checkpointing else nullcontext():
        release_like.training(small, samples)()
    torch.testing.assert_close(stacked[0], wanted.loss, rtol=1e-5, atol=1e-5)
    for name, parameter in small.wrapped.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)
    small.optimizer.zero_grad()
    width = small.model.config.hidden_size
    assert [shape for shape in shapes if len(shape) == 4 and (shape[0], shape[1], shape[3]) == (4, 3, width)]
    assert not small.model.is_gradient_checkpointing
    assert "forward_packed" not in vars(small.model)


def test_the_release_like_answer_reads_the_whole_row_for_every_token(
    small: benchmark.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = costs.reason_samples(small, range(2))
    widths, images, predictions = [], [], []
    forward, encode, predict = small.model.forward_packed, small.model.encode_images, small.model.predict

    def spied_forward(embeddings, *args, **kwargs):
        widths.append(embeddings.shape[1])
        return forward(embeddings, *args, **kwargs)

    monkeypatch.setattr(small.model, "forward_packed", spied_forward)
    monkeypatch.setattr(small.model, "encode_images", lambda *args: images.append(len(args[0])) or encode(*args))
    monkeypatch.setattr(small.model, "predict", lambda batch: predictions.extend(predict(batch)))
    release_like.answering(small, samples)()
    assert len(widths) == len(images) == 12
    assert widths[:-1] == list(range(widths[0], widths[0] + 11))
    assert set(images) == {2}
    assert [len(row[0].mask_logits) for row in predictions] == [1, 1]
    assert all(len(row[0].token_ids) == 12 for row in predictions)


def test_pixellm_answers_without_sam_and_with_its_codebook(
    benches: costs.Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, predictions = benches.of(CASES["PixelLM"]), []
    assert bench is not benches.of(CASES["LISA"])
    predict = bench.model.predict
    monkeypatch.setattr(bench.model, "predict", lambda *a, **k: predictions.extend(predict(*a, **k)))
    costs.answering_seconds(bench, CASES["PixelLM"], costs.reason_samples(bench, range(2)))
    assert [len(row[0].mask_logits) for row in predictions] == [1, 1]
    assert [len(row[0].token_ids) for row in predictions] == [12 + 5] * 2
    assert (bench.model.visual_model.image_side, bench.model.config.clip_side) == (0, 160)
    names = {name for name, parameter in bench.wrapped.named_parameters() if parameter.requires_grad}
    assert {key for key in ("neck", "prompt_encoder", "out_mm_projector") if key in " ".join(names)} == {
        "out_mm_projector"
    }


def test_first_columns_keep_the_image(small: benchmark.Bench) -> None:
    batch = small.prompts(costs.reason_samples(small, range(3)))
    short = release_like.first_columns(batch, batch.input_ids.shape[1] - 4)
    for name in ("input_ids", "position_ids"):
        whole, part = (getattr(each, name).flatten()[each.image_tokens] for each in (batch, short))
        assert torch.equal(whole, part)


def test_the_questions_are_like_reasonsegs(small: benchmark.Bench) -> None:
    samples = costs.reason_samples(small, range(3, 8))
    assert [len(sample.conversations) for sample in samples] == [1] * 5
    assert len({sample.image.shape for sample in samples}) > 2
    assert len({sample.conversations[0][0].question for sample in samples}) == 2


def test_the_papers_columns_are_where_the_paper_has_the_method() -> None:
    row = {
        "seconds": {"median": 2.0, "min": 1.0, "max": 3.0},
        "to_lisa": {"median": 1.5},
        "to_lisa_with_encoder": {"median": 1.25},
        "peak_bytes": 3e6,
        "peak_to_lisa": 1.1,
        "parameters": {"trainable": 1e6, "total": 4e6, "at_7b": {"trainable": 3e8, "total": 6e9}},
    }
    *_, times, _, counts = costs.training_tables({"UGround": row, "READ": row})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in times.splitlines()]
    assert cells[2] == ["UGround", "2.000", "1.000 to 3.000", "1.50", "1.25", "2.36", "3", "1.10", "1.19"]
    assert [cells[3][column] for column in (0, 5, 8)] == ["READ", "", ""]
    sizes = [cell.strip() for cell in counts.splitlines()[2].split("|")[1:-1]]
    assert sizes[:4] == ["UGround", "1.00M", "4.00M", "25.00%"]
    assert sizes[4:] == ["300.00M", "6,000M", "5.00%", "288.40M", "7,750M", "3.72%"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, and the rows whose code differs."""
    monkeypatch.setitem(benchmark.PRESETS, "tiny", SMALL)
    chosen = tuple(CASES[name] for name in ("UGround", "LISA", "release-like", "PixelLM"))
    monkeypatch.setattr(costs, "CASES", chosen)
    monkeypatch.setattr(costs, "ANSWERING", chosen)


def test_table_10_is_printed_and_written(few: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--preset", "tiny", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "figures.json")]
    assert program.main(["--table", "10", "--questions", "2", *words]) == 0
    figures, printed = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert (figures["table"], figures["questions"], list(figures["rows"])) == (
        10,
        2,
        ["UGround", "LISA", "release-like", "PixelLM"],
    )
    assert figures["rows"]["LISA"]["to_lisa"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for row in figures["rows"].values():
        assert row["seconds"]["median"] > 0
        assert row["peak_bytes"] < 1e9  # may be below 0 here: memory that an earlier test has freed is not counted
    assert figures["paper"]["PixelLM"]["seconds"] == 1.22
    assert "Table 10, a training step: 1 image, 2 questions each; preset tiny on CPU, 1 repeat, proc" in printed
    assert len(re.findall(r"^\| release-like +\|", printed, re.MULTILINE)) == 2


def test_table_11_is_printed_and_written(
    few: None, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "BATCH_SIZES", (4, 8))
    words = ["--preset", "tiny", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "figures.json")]
    assert program.main(["--table", "11", "--limit", "8", *words]) == 0
    figures, printed = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert (figures["table"], figures["images"]) == (11, 8)
    for name, row in figures["rows"].items():
        for size in ("4", "8"):
            whole, without = (
                each["answers_per_second"]["median"] for each in (row[size], row[size]["without_encoder"])
            )
            assert 0 < whole == without if name == "PixelLM" else 0 < whole < without
    assert "| answers/s " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--questions", "2"], "--questions is for --table 10 alone; leave it out"),
        (["--table", "10", "--limit", "8"], "--limit is for --table 11 alone; leave it out"),
        (["--table", "10", "--compile"], "--table 10 cannot be combined with --compile; leave one out"),
        (["--table", "11", "data"], "--table 11 cannot be combined with data; leave one out"),
    ],
)
def test_flags_without_effect_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        program.main(["--preset", "tiny", *words])
    assert message in " ".join(capsys.readouterr().err.split())
