"""test.py and chat.py as a user runs them, on a tiny random model and on files on disk."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import write_jpg
from forks import Program
from PIL import Image
from programs import ROOT, SHARED, ask, chat, compare, evaluate, run, score
from tiny_run import environment

import test as evaluation
from model.loading import pretrained
from utils.datasets.images import read_image
from utils.datasets.masks import decode_mask
from utils.evaluation import metrics
from utils.evaluation.benchmarks import BENCHMARKS
from utils.evaluation.metrics import Record
from utils.evaluation.results import Provenance, Result, read_results, summarize

# -- chat.py, one answer -----------------------------------------------------------------------------------------------


def test_one_answer(capsys, version, photo, tmp_path):
    code, out, err = ask(capsys, version, photo, tmp_path / "new" / "out")
    assert code == 0
    assert out.startswith("[SEG]")
    assert out.count("\n") == 1  # the answer alone
    values = json.loads((tmp_path / "new" / "out" / "photo.json").read_text())
    assert values["answer"] == out.strip()
    assert (values["width"], values["height"]) == (64, 48)
    assert len(values["masks"]) == out.count("[SEG]")
    for number, entry in enumerate(values["masks"], start=1):
        with Image.open(tmp_path / "new" / "out" / f"photo_mask_{number}.png") as mask:
            pixels = np.array(mask)
        assert pixels.shape == (48, 64)
        assert set(np.unique(pixels)) <= {0, 255}
        assert (pixels == 255).sum() == entry["pixels"]
        assert f"[SEG] {number}: layer {entry['layer']}, {entry['pixels']} pixels" in err
    assert read_image(tmp_path / "new" / "out" / "photo_overlay.png").shape == (48, 64, 3)


def test_layer_policy_is_obeyed(capsys, version, photo, tmp_path):
    assert ask(capsys, version, photo, tmp_path, "where is it", "--layer_policy", "fixed:2")[0] == 0
    assert {mask["layer"] for mask in json.loads((tmp_path / "photo.json").read_text())["masks"]} == {2}
    code, out, err = ask(capsys, version, photo, tmp_path, "where is it", "--layer_policy", "best")
    assert (code, out) == (2, "")
    assert "best" in err


def test_sampled_layers_come_with_a_map_of_their_uncertainty(capsys, version, photo, tmp_path):
    code, _, err = ask(capsys, version, photo, tmp_path, "where is it", "--layer_policy", "mc:8")
    assert code == 0
    masks = json.loads((tmp_path / "photo.json").read_text())["masks"]
    assert masks
    for entry in masks:
        uncertainty = entry["uncertainty"]
        assert sum(uncertainty["layers"].values()) == pytest.approx(1)
        assert f"uncertainty {uncertainty['score']:.2f}" in err
        assert read_image(tmp_path / uncertainty["file"]).shape == (48, 64, 3)
    assert ask(capsys, version, photo, tmp_path, "where is it")[0] == 0  # one layer: the maps of before are gone
    assert not list(tmp_path.glob("*_deviation_*"))
    assert "uncertainty" not in json.loads((tmp_path / "photo.json").read_text())["masks"][0]


def test_without_output_nothing_is_written(capsys, version, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, chat, "--version", version, "--image", photo, "--prompt", "a", "--max_new_tokens", 1)
    assert (code, out) == (0, "[SEG]\n")
    assert os.listdir(tmp_path) == ["photo.jpg"]


def test_an_answer_without_seg(capsys, version, mute_version, photo, tmp_path):
    """Masks that an earlier answer of the same name left behind go."""
    assert ask(capsys, version, photo, tmp_path)[0] == 0
    assert (tmp_path / "photo_mask_1.png").exists()
    code, _, err = ask(capsys, mute_version, photo, tmp_path)
    assert code == 0
    assert "no [SEG]" in err
    assert f"the image without masks -> {tmp_path / 'photo_overlay.png'}" in err
    assert not list(tmp_path.glob("photo_mask_*.png"))
    assert json.loads((tmp_path / "photo.json").read_text())["masks"] == []
    assert np.array_equal(read_image(tmp_path / "photo_overlay.png"), read_image(photo))


def test_an_answer_that_was_cut_says_so(capsys, version, mute_version, photo, tmp_path):
    """``version`` never ends an answer; ``mute_version`` ends at once."""
    _, _, err = ask(capsys, version, photo, tmp_path)
    assert "the answer was cut at" in err
    assert json.loads((tmp_path / "photo.json").read_text())["cut"] is True
    assert f"all masks over the image -> {tmp_path / 'photo_overlay.png'}" in err


# -- chat.py, a conversation -------------------------------------------------------------------------------------------


def converse(monkeypatch, capsys, version, lines, *arguments):
    lines = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    return run(capsys, chat, "--version", version, "--max_new_tokens", 1, *arguments)


def test_conversation(monkeypatch, capsys, version, photo, tmp_path):
    other = tmp_path / "other.png"
    write_jpg(other, 1, (30, 20))
    lines = [
        "nowhere.jpg",
        str(photo),
        "the red star",
        " ",
        "/help",
        "/fly",
        "/image",
        "/history",
        "and the blue one",
        f"/image {other}",
        "a",
    ]
    code, out, err = converse(monkeypatch, capsys, version, lines, "--output", tmp_path / "out")
    assert code == 0
    assert out == "[SEG]\n" * 3
    assert "nowhere.jpg does not exist" in err
    assert "unknown command /fly" in err
    assert f"image: {photo} (another one: /image PATH)" in err
    assert "(/history on changes that)" in err
    assert max(len(line) for line in chat.HELP.splitlines()) <= 80
    written = {path.name for path in (tmp_path / "out").glob("*.json")}
    assert written == {"photo_001.json", "photo_002.json", "other_001.json"}
    assert read_image(tmp_path / "out" / "other_001_overlay.png").shape == (30, 20, 3)
    converse(monkeypatch, capsys, version, ["again", "/quit", "never"], "--output", tmp_path / "out", "--image", photo)
    assert (tmp_path / "out" / "photo_003.json").exists()  # an earlier session's answers stay
    assert not (tmp_path / "out" / "photo_004.json").exists()


@pytest.mark.slow
def test_chat_is_a_unix_tool(version, photo, tmp_path):
    """As a process with piped questions: the answers alone on stdout, and nothing imported that answers do not need."""
    command = [sys.executable, "-X", "importtime", ROOT / "chat.py", "--version", version, "--image", photo]
    done = subprocess.run(
        [*command, "--max_new_tokens", "1"], cwd=tmp_path, capture_output=True, text=True, input="a\nb\n", check=False
    )
    assert (done.returncode, done.stdout) == (0, "[SEG]\n[SEG]\n"), done.stderr[-2000:]
    assert not re.findall(
        r"\| +(deepspeed|tensorboard|matplotlib|gradio|peft|pandas|sklearn)$", done.stderr, re.MULTILINE
    )
    assert (tmp_path / "answers" / "photo_002_mask_1.png").is_file()


# -- test.py -----------------------------------------------------------------------------------------------------------

KEYS = [  # of a result's JSON; a benchmark with a choice of annotations has one more
    "benchmark", "mode", "protocol", "layer_policy", "metrics", "intervals", "controls", "breakdown", "counts",
    "layers", "several_seg", "think", "skipped", "missing", "limit", "seconds", "settings", "checkpoint", "command",
    "precision", "device", "versions",
]  # fmt: skip


def test_evaluation_writes_what_it_prints(capsys, version, val_data, tmp_path):
    out_dir = tmp_path / "out"
    more = ("--mode", "both", "--save_overlays", 3, "--control", "shuffled_prompts")
    code, out, _ = evaluate(capsys, version, val_data, out_dir, "ReasonSeg|val_short||ReasonSeg|val_long", *more)
    assert code == 0
    names = {path.name for path in out_dir.iterdir()}
    for spec, count in (("ReasonSeg|val_short", 3), ("ReasonSeg|val_long", 2)):
        for mode in ("generate", "teacher_forced"):
            name = f"{spec.replace('|', '_')}.{mode}"
            assert {f"{name}.json", f"{name}.jsonl", f"{name}.overlays.png", f"{name}.overlays"} <= names
            summary = json.loads((out_dir / f"{name}.json").read_text())
            assert (summary["benchmark"], summary["mode"], summary["counts"]["masks"]) == (spec, mode, count)
            assert set(summary["controls"]) == {"shuffled_prompts"}
            assert len(summary["checkpoint"]["fingerprint"]) == 16
            assert list(summary) == KEYS
            _, records = read_results(out_dir / f"{name}.jsonl")
            assert metrics.compute(records, BENCHMARKS["ReasonSeg"]) == summary["metrics"]
            assert f" {summary['metrics']['gIoU']:.3f}  {summary['metrics']['cIoU']:.3f}\n" in out
            assert len(list((out_dir / f"{name}.overlays").iterdir())) == count
    assert "  prompts shuffled" in out


@pytest.mark.slow
def test_processes_share_the_images(version, val_data, tmp_path, monkeypatch):
    """By one flag; more of them than GPUs are refused before anything is loaded."""
    results = []
    for count in (1, 2):
        flags = ["--version", version, "--dataset_dir", val_data, "--val_dataset", "ReasonSeg|val", "--batch_size", 1]
        flags += ["--mode", "teacher_forced", "--processes", count, "--output", tmp_path / str(count)]
        command = [sys.executable, "test.py", *map(str, flags)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ReasonSeg|val") == 1  # one process prints
        results.append(read_results(tmp_path / str(count) / "ReasonSeg_val.teacher_forced.jsonl")[1])
    assert [r.image for r in results[0]] == [r.image for r in results[1]]
    assert [(r.I, r.U, r.layers) for r in results[0]] == [(r.I, r.U, r.layers) for r in results[1]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "1")  # as operators of clusters set it
    with pytest.raises(ValueError, match="--processes 2: this machine has 1 GPU; each process needs one"):
        evaluation.main([*map(str, flags)])
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="--processes 2, but a launcher started 4"):
        evaluation.main([*map(str, flags)])


def test_default_mode_and_limit(capsys, version, val_data, tmp_path):
    code, out, _ = evaluate(capsys, version, val_data, tmp_path / "out", "ReasonSeg|val", "--limit", 2)
    assert code == 0
    assert "teacher_forced" in out
    summary = json.loads((tmp_path / "out" / "ReasonSeg_val.teacher_forced.json").read_text())
    assert (summary["counts"]["images"], summary["limit"]) == (2, 2)


def test_images_without_a_target_are_answered_but_only_published_counts_them(capsys, version, val_data, tmp_path):
    annotation = val_data / "reason_seg/ReasonSeg/val/4.json"
    annotation.write_text(json.dumps(json.loads(annotation.read_text()) | {"shapes": []}))
    code, out, err = evaluate(capsys, version, val_data, tmp_path / "out")
    assert code == 0, err
    assert "ReasonSeg|val: 1 record skipped, left out" in out
    path = answers(tmp_path / "out")
    strict = json.loads(path.with_suffix(".json").read_text())
    assert (strict["counts"]["masks"], strict["counts"]["skipped"], strict["protocol"]) == (4, 1, "strict")
    _, records = read_results(path)
    assert [record.meta.get("without_target", False) for record in records] == [False] * 4 + [True]
    assert score.rescore(path).metrics == strict["metrics"]
    published = score.rescore(path, "published")
    assert (published.counts["masks"], published.counts["split_images"]) == (5, 5)
    assert published.metrics["cIoU"] == sum(r.I for r in records) / sum(r.U for r in records)
    assert published.metrics["gIoU"] == pytest.approx(strict["metrics"]["gIoU"] * 4 / 5)  # a random model draws
    code, out, _ = evaluate(capsys, version, val_data, tmp_path / "p", "ReasonSeg|val", "--protocol", "published")
    assert "teacher_forced, published" in out
    assert "ReasonSeg|val: 1 record skipped, scored as empty targets" in out
    assert json.loads(answers(tmp_path / "p").with_suffix(".json").read_text())["metrics"] == published.metrics


def test_breakdown_of_drawn_data(capsys, version, val_data, tmp_path):
    code, out, _ = evaluate(capsys, version, val_data, tmp_path / "out")
    assert code == 0
    summary = json.loads((tmp_path / "out" / "ReasonSeg_val.teacher_forced.json").read_text())
    assert {key: [g["masks"] for g in groups.values()] for key, groups in summary["breakdown"].items()} == {
        "length": [2, 3],
        "family": [2, 3],
    }
    assert "family: relation" in out


@pytest.mark.parametrize("mode", ["generate", "teacher_forced"])
def test_batch_size_alters_nothing_but_noise(capsys, version, val_data, tmp_path, mode):
    results = []
    for size in (1, 3, 8):
        more = ("--mode", mode, "--batch_size", size)
        assert evaluate(capsys, version, val_data, tmp_path / str(size), "ReasonSeg|val", *more)[0] == 0
        results.append(read_results(tmp_path / str(size) / f"ReasonSeg_val.{mode}.jsonl")[1])
    for one, *others in zip(*results, strict=True):
        for other in others:
            assert (one.query_id, one.answer, one.layers, one.G) == (
                other.query_id,
                other.answer,
                other.layers,
                other.G,
            )
            for mask, again in zip(one.masks, other.masks, strict=True):
                differing = decode_mask(mask) ^ decode_mask(again)
                assert differing.sum() <= 3  # logits that are zero up to the noise of float32


# -- test.py, several benchmarks, and what becomes of its files --------------------------------------------------------


def answers(folder: Path, mode="teacher_forced") -> Path:
    return folder / f"ReasonSeg_val.{mode}.jsonl"


def test_the_suite_is_printed_as_the_papers_tables(capsys, version, val_data, tmp_path):
    code, out, err = evaluate(capsys, version, val_data, tmp_path / "out", None, "--suite", "paper")
    assert code == 0, err
    summary = json.loads(answers(tmp_path / "out").with_suffix(".json").read_text())
    row = f"| {100 * summary['metrics']['gIoU']:.1f} | {100 * summary['metrics']['cIoU']:.1f} | - | - | - | - | - | - |"
    assert re.search(rf"val overall gIoU +{100 * summary['metrics']['gIoU']:.1f}\n", out)
    assert row in (tmp_path / "out" / "tables.md").read_text()
    assert (tmp_path / "out" / "table_3.csv").read_text().startswith("Method,asked,val overall gIoU")
    assert "Not evaluated, data not found: ReasonSeg|test, refcoco|unc|val" in out
    assert max(map(len, out.splitlines())) <= 120 + len(str(tmp_path))
    assert "not evaluated: refcoco|unc|val: no refs (looked in" in err  # why
    muse = val_data / "multi_reason_seg" / "MultiReasonSeg" / "MUSE_val.json"
    muse.parent.mkdir(parents=True)
    muse.write_text("[{")
    code, _, err = evaluate(capsys, version, val_data, tmp_path / "out", None, "--suite", "paper")
    assert (code, "MUSE_val.json is not valid JSON" in err) == (2, True)  # damaged is not absent
    muse.unlink()
    (val_data / "reason_seg" / "ReasonSeg" / "val" / "2.jpg").unlink()
    code, _, err = evaluate(capsys, version, val_data, tmp_path / "out", None, "--suite", "paper")
    assert (code, "2.json has no image" in err) == (2, True)  # data that are there must be whole
    code, _, err = evaluate(capsys, version, tmp_path / "out", tmp_path / "out", None, "--suite", "paper")
    assert (code, "holds none of its benchmarks" in err) == (2, True)


def test_missing_images_can_be_allowed(capsys, version, val_data, tmp_path):
    folder = val_data / "reason_seg" / "ReasonSeg" / "val"
    (folder / "2.jpg").unlink()
    (folder / "3.jpg").write_bytes(b"no image")
    code, out, err = evaluate(capsys, version, val_data, tmp_path / "out", "ReasonSeg|val", "--allow_missing")
    assert code == 0, err
    summary = json.loads(answers(tmp_path / "out").with_suffix(".json").read_text())
    assert (summary["counts"]["images"], summary["counts"]["missing"]) == (3, 2)
    assert all(name in " ".join(summary["missing"]) for name in ("2.json", "3.jpg"))
    assert "ReasonSeg|val (2 missing) " in out


def test_results_of_another_checkpoint_are_not_gone_on_from(capsys, version, mute_version, val_data, tmp_path):
    assert evaluate(capsys, version, val_data, tmp_path / "out")[0] == 0
    before = answers(tmp_path / "out").read_bytes()
    code, _, err = evaluate(capsys, mute_version, val_data, tmp_path / "out", "ReasonSeg|val", "--resume")
    assert code == 2
    assert re.search(r"holds results of another evaluation \(checkpoint: '\w{16}' there, '\w{16}' now\)", err)
    assert answers(tmp_path / "out").read_bytes() == before


@pytest.mark.slow
def test_answers_of_quantized_layers_are_not_gone_on_from(capsys, version, val_data, tmp_path, monkeypatch):
    assert evaluate(capsys, version, val_data, tmp_path / "out")[0] == 0
    monkeypatch.setattr(pretrained, "place", lambda *_: None)  # needs bitsandbytes
    code, _, err = evaluate(
        capsys, version, val_data, tmp_path / "out", "ReasonSeg|val", "--resume", "--quantize", "8bit"
    )
    assert (code, "precision: 'float32' there, 'float32, 8bit' now" in err) == (2, True)
    assert evaluate(capsys, version, val_data, tmp_path / "out", "ReasonSeg|val", "--quantize", "8bit")[0] == 0
    assert read_results(answers(tmp_path / "out"))[0].precision == "float32, 8bit"


def test_kill_and_resume(capsys, version, val_data, tmp_path):
    """kill -9 as soon as two batches are on disk, the last line cut; the files are as if nothing had happened."""
    more = ("--batch_size", 1, "--mode", "generate")
    assert evaluate(capsys, version, val_data, tmp_path / "whole", "ReasonSeg|val", *more)[0] == 0
    path = answers(tmp_path / "out", "generate")
    words = ["--version", version, "--dataset_dir", val_data, "--max_new_tokens", 2, "--val_dataset", "ReasonSeg|val"]
    words += ["--output", tmp_path / "out", *more]
    program = Program(ROOT / "test.py", *words, output=tmp_path / "printed.txt")
    while program.ends(0) is None and not (path.is_file() and path.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    program.process.kill()
    program.ends()
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"it is cut off: test\.py --resume continues"):
        read_results(path)
    assert evaluate(capsys, version, val_data, tmp_path / "out", "ReasonSeg|val", *more, "--resume")[0] == 0
    assert path.read_bytes() == answers(tmp_path / "whole", "generate").read_bytes()
    values, expected = (
        json.loads(answers(tmp_path / name, "generate").with_suffix(".json").read_text()) for name in ("out", "whole")
    )
    for key in expected.keys() - {"seconds", "command"}:
        assert values[key] == expected[key]


def test_scores_follow_from_the_answers_alone(capsys, version, val_data, tmp_path):
    assert evaluate(capsys, version, val_data, tmp_path / "out")[0] == 0
    beside = answers(tmp_path / "out").with_suffix(".json")
    summary = json.loads(beside.read_text())
    code, out, _ = run(capsys, score, answers(tmp_path / "out"), "--json")
    assert code == 0
    [again] = json.loads(out)
    for key in ("benchmark", "mode", "metrics", "intervals", "breakdown", "counts", "layers"):
        assert again[key] == summary[key]
    assert again["checkpoint"] == summary["checkpoint"]["fingerprint"]
    summary["metrics"]["gIoU"] += 1e-15
    beside.write_text(json.dumps(summary))
    code, _, err = run(capsys, score, answers(tmp_path / "out"))
    assert (code, "has other metrics than follow from ReasonSeg_val" in err) == (2, True)
    summary["metrics"], counts = again["metrics"], dict(summary["counts"])
    del summary["counts"]["answers_cut"]  # as older versions wrote it
    beside.write_text(json.dumps(summary))
    assert run(capsys, score, answers(tmp_path / "out"))[0] == 0
    for change, message in (
        ({"counts": {"missing": 0}}, "has other counts than follow"),
        ({"mode": "generate"}, "has other mode than follow"),
        ({"metrics": {"gIoU": "0.5"}}, "metrics: of another type"),
        ({"protocol": "voc"}, "protocol 'voc' is unknown"),
        ({"several_seg": "last"}, "several_seg 'last' is unknown"),
    ):
        beside.write_text(json.dumps(summary | {"counts": counts} | change))
        code, _, err = run(capsys, score, answers(tmp_path / "out"))
        assert (code, message in err, str(beside) in err) == (2, True, True), err
    beside.unlink()
    code, out, _ = run(capsys, score, answers(tmp_path / "out"))
    assert (code, f" {again['metrics']['gIoU']:.3f} " in out) == (0, True)


def test_thoughts_are_asked_for_where_answers_are_generated(capsys, version, val_data, tmp_path):
    more = ("--think", "off")
    code, _, err = evaluate(
        capsys, version, val_data, tmp_path, "ReasonSeg|val_short", "--mode", "teacher_forced", *more
    )
    assert (code, "the answers to ReasonSeg|val_short are given; add --mode generate" in err) == (2, True), err
    code, _, err = evaluate(
        capsys, version, val_data, tmp_path, "ReasonSeg|val_short", "--think", "on", "--mode", "generate"
    )
    assert (code, "trained without thoughts" in err) == (2, True), err
    done = evaluate(capsys, version, val_data, tmp_path, "ReasonSeg|val_short", "--mode", "generate", *more)
    assert done[0] == 0
    assert json.loads((tmp_path / "ReasonSeg_val_short.generate.json").read_text())["think"] == "off"


def test_a_pattern_that_matches_nothing_is_named(capsys, tmp_path):
    code, _, err = run(capsys, score, tmp_path / "*.jsonl")
    assert (code, f"no file matches {tmp_path}/*.jsonl" in err) == (2, True)


def make_result(protocol="gsva", mode="generate", **values) -> Result:
    """gRefCOCO, two images, each with a target of 5 pixels that was rejected although 4 of them were found."""
    provenance = replace(
        Provenance("grefcoco|unc|val", mode, "argmax", 64, 0, protocol, "abc", "float32", 2, 2), **values
    )
    found = 0 if mode == "generate" else 4
    records = [
        Record(k, f"{k}.jpg", f"{k}", "1", "x", "x?", "no", [], True, False, I=found, U=5, P=found, G=5, masks=[])
        for k in range(2)
    ]
    summary = summarize(provenance, records)
    summary.counts |= {"skipped": 0, "missing": 0}
    return Result(summary, records, provenance)


def test_written_rejections_that_an_older_version_labelled_gsva_are_read(capsys, tmp_path):
    path = make_result().save(tmp_path)
    again = score.rescore(path.with_suffix(".jsonl"))
    assert (again.protocol, again.metrics["gIoU"]) == ("grefcoco", 0)
    path.write_text(path.read_text().replace('"gIoU": 0.0', '"gIoU": 1.0'))
    with pytest.raises(ValueError, match="has other metrics than follow"):  # it is still checked
        score.rescore(path.with_suffix(".jsonl"))


def test_two_results_are_compared_sample_by_sample(capsys, version, val_data, tmp_path):
    for layer in (0, 3):
        assert evaluate(capsys, version, val_data, tmp_path / str(layer), "ReasonSeg|val", "--layer", layer)[0] == 0
    files = [f"{layer}={answers(tmp_path / str(layer))}" for layer in (0, 3)]
    picture = tmp_path / "changed.png"
    code, out, err = run(capsys, compare, *files, "--most", 2, "--sheet", picture, "--dataset_dir", val_data)
    assert code == 0, err
    records = [read_results(answers(tmp_path / str(layer)))[1] for layer in (0, 3)]
    gain, (low, high) = metrics.difference(*records, BENCHMARKS["ReasonSeg"])["gIoU"]
    assert re.search(rf"^gIoU .*{re.escape(f'{gain:+.4f}')} +\[{re.escape(f'{low:+.4f}, {high:+.4f}')}\]$", out, re.M)
    changes = sorted(abs(metrics.iou(b) - metrics.iou(a)) for a, b in zip(*records, strict=True))
    worst = [record for pair in compare.most_changed(*records, "", 2) for record in pair]
    assert [abs(metrics.iou(b) - metrics.iou(a)) for a, b in zip(worst[::2], worst[1::2])] == changes[:-3:-1]
    assert out.count("ReasonSeg|val/") == 2
    assert read_image(picture).shape[0] > 4 * 220  # two rows for each of two samples
    code, out, _ = run(capsys, compare, files[0], files[0])
    assert (code, "no sample changed" in out) == (0, True)


def test_results_that_were_asked_differently_are_compared_with_a_word(capsys, tmp_path):
    asked = {
        "a": {"protocol": "gsva", "layer_policy": "last", "precision": "bfloat16"},
        "b": {"protocol": "grefcoco"},
        "c": {"mode": "generate"},
    }
    files = {}
    for name, values in asked.items():
        path = make_result(**{"mode": "teacher_forced"} | values).save(tmp_path / name)
        files[name] = f"{name}={path.with_suffix('.jsonl')}"
    code, out, err = run(capsys, compare, files["a"], files["b"])
    assert code == 0, err
    assert "a: layer last, bfloat16\nb: layer argmax, float32\n" in out
    assert "a was evaluated by gsva, b by grefcoco; both are scored by grefcoco" in out
    assert re.search(r"^gIoU +0\.0000 +0\.0000", out, re.M)
    code, _, err = run(capsys, compare, files["a"], files["c"])
    assert (code, "is in mode teacher_forced" in err, "in mode generate; compare one mode" in err) == (2, True, True)


def test_folders_are_compared_with_what_was_asked_and_what_is_missing(capsys, tmp_path):
    for name, missing, limit in (("a", 3, None), ("b", 0, 8)):
        result = make_result(mode="teacher_forced", layer_policy="argmax" if name == "a" else "last")
        result.summary.counts["missing"], result.summary.limit = missing, limit
        result.save(tmp_path / name)
    code, out, err = run(capsys, compare, tmp_path / "a", tmp_path / "b")
    assert code == 0, err
    assert "grefcoco|unc|val (teacher_forced, gsva) " in out
    assert "Metrics are fractions, 0 to 1. Layers: a: argmax; b: last" in out
    assert re.search(r"gIoU +0\.800 \(3 missing\) +0\.800 \(first 8 images\)", out)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/eval/val.jsonl", "runs/b/eval/val.jsonl"], ["a", "b"]),
        (["runs/a/eval", "runs/a/untrained-eval"], ["eval", "untrained-eval"]),
        (["x/runs/eval", "runs/eval", "eval"], ["x/runs", "runs", "."]),
        (["a/x/1", "b/x/2", "c/y/2"], ["x/1", "x/2", "y/2"]),
        (["a", "LISA-style=b/a"], ["a", "LISA-style"]),
        (["a/x", "a/x"], ["x", "x"]),
    ],
)
def test_columns_are_told_apart_by_their_paths(paths, names):
    named = compare.with_names([compare.named_path(path) for path in paths])
    assert [name for name, _ in named] == names
    with pytest.raises(ValueError, match="two results are named 'x'"):
        compare.with_names([compare.named_path(path) for path in ("x=a", "b/x")])


def test_other_json_beside_results_is_named(capsys, tmp_path):
    make_result().save(tmp_path)
    for text, reason in (
        ('{"model_type": "uground"}', "it has no benchmark, mode"),
        ("[1]", "list"),
        ("{", "Expecting"),
    ):
        (tmp_path / "config.json").write_text(text)
        code, _, err = run(capsys, compare, tmp_path)
        assert (code, f"{tmp_path / 'config.json'} is no result of test.py" in err, reason in err) == (2, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}"], "give two JSONL files"),
        (["{}", "."], "give two JSONL files"),
        (["{}", "{}", "--sheet", "a.png"], "needs these and --dataset_dir"),
    ],
)
def test_wrong_comparisons(capsys, tmp_path, arguments, message):
    code, _, err = run(capsys, compare, *(text.format(tmp_path / "a.jsonl") for text in arguments))
    assert (code, message in err) == (2, True)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real photographs are not here")
def test_real_photographs(capsys, version, tmp_path):
    more = ("--mode", "both", "--save_overlays", 1)
    code, _, err = evaluate(capsys, version, SHARED, tmp_path / "out", "ReasonSeg|val", *more)
    assert code == 0, err
    summary = json.loads((tmp_path / "out" / "ReasonSeg_val.generate.json").read_text())
    assert summary["counts"]["images"] == len(list((SHARED / "reason_seg/ReasonSeg/val").glob("*.json")))
    image = next((SHARED / "reason_seg/ReasonSeg/val").glob("*.jpg"))
    code, _, err = ask(capsys, version, image, tmp_path / "out", "What shows the driver's hands the way?")
    assert code == 0, err
    mask = cv2.imread(str(tmp_path / "out" / f"{image.stem}_mask_1.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == read_image(image, apply_exif=True).shape[:2]
