"""The model zoo: its file, its page, and scripts/reproduce.py from a checkpoint to a recorded figure."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest
import yaml
from programs import ROOT, evaluation, load_script, run

from utils.evaluation import zoo

reproduce = load_script("scripts/reproduce")
ZOO = ROOT / "configs/zoo.yaml"
ROW = {
    "name": "tiny",
    "method": "UGround",
    "weights": "",
    "download": "https://example.org/tiny",
    "listed": "a page",
    "figures": [{"benchmark": "ReasonSeg|val", "published": {"gIoU": 50.0, "cIoU": 50.0}, "source": "nowhere"}],
}


@pytest.fixture
def file(tmp_path):
    """write(**changes) -> a zoo of one row."""

    def write(*rows, **changes):
        path = tmp_path / "zoo.yaml"
        path.write_text("# a comment\n" + yaml.safe_dump([*rows, ROW | changes], sort_keys=False))
        return path

    return write


@pytest.fixture
def reproduced(capsys, monkeypatch, version, val_data, tmp_path):
    """reproduced(zoo, *flags) -> exit code, stdout, stderr; test.py is called in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "git_commit", lambda: "0123456789abcdef")

    def call(command, env):
        assert command[1] == str(ROOT / "test.py")
        return SimpleNamespace(returncode=reproduce.cli.run(evaluation.main, command[2:]))

    monkeypatch.setattr(subprocess, "run", call)
    flags = ("--dataset_dir", val_data, "--version", version)
    return lambda path, *more: run(capsys, reproduce, "tiny", "--zoo", path, *flags, *more)


# -- the file and the page ---------------------------------------------------------------------------------------------


def test_the_zoo_is_written_as_a_recording_would_write_it(tmp_path):
    """So that a recording changes nothing but the figures, and the page is made from the file."""
    copy = tmp_path / "zoo.yaml"
    copy.write_text(ZOO.read_text())
    checkpoints = zoo.load(ZOO)
    zoo.save(copy, checkpoints)
    assert copy.read_text() == ZOO.read_text()
    assert (ROOT / "docs/zoo.md").read_text() == zoo.page(checkpoints), "run python scripts/reproduce.py --page"


def test_every_row_is_a_command_of_test_py():
    for checkpoint in zoo.load(ZOO):
        flags = {"version": checkpoint.version or "DIR", "vision_tower": checkpoint.vision_tower, **checkpoint.flags}
        words = [f"--{name}={value}" for name, value in flags.items()]
        specs = "||".join(figure.benchmark for figure in checkpoint.figures) or "ReasonSeg|val"
        evaluation.parse_arguments([*words, "--dataset_dir=D", f"--val_dataset={specs}"])


def test_the_papers_rows_are_there():
    """Tables 3 and 5, as rounded there."""
    figures = {each.name: each.figures[0].published for each in zoo.load(ZOO) if each.figures}
    for name, expected in (
        ("uground-7b-reasonseg-val", (66.1, 72.1)),
        ("uground-13b-reasonseg-val", (67.9, 74.9)),
        ("uground-13b-reasonseg-test", (65.0, 65.5)),
    ):
        assert tuple(round(figures[name][metric], 1) for metric in ("gIoU", "cIoU")) == expected
    assert figures["uground-7b-grefcoco"] == {"gIoU": 72.46, "cIoU": 65.56, "N-acc": 74.53}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"figure": []}, "unknown key 'figure'"),
        ({"weights": "no id"}, "'no id' is no id of the hub"),
        ({"download": ""}, "either weights"),
        ({"tolerance": "1"}, "tolerance is of another type"),
        ({"listed": None}, "listed is of another type"),
        ({"figures": []}, "a note says why"),
        ({"figures": {}}, "figures is no list"),
        ({"figures": [{"benchmark": "ReasonSeg|val"}]}, "tiny, figure 1: published is missing"),
        ({"figures": [ROW["figures"][0] | {"benchmark": "Reason|val"}]}, "Reason|val: unknown benchmark"),
        ({"figures": [ROW["figures"][0] | {"published": {"N-acc": 50.0}}]}, "ReasonSeg|val has no N-acc"),
        ({"figures": [ROW["figures"][0] | {"published": {"gIoU": 0.5}}]}, "in percent"),
        ({"figures": [ROW["figures"][0] | {"mode": "both"}]}, "mode 'both'"),
        ({"figures": [ROW["figures"][0] | {"obtained": {"metrics": {}}}]}, "obtained: commit is missing"),
        ({"figures": ROW["figures"] * 2}, "ReasonSeg|val, teacher_forced: twice"),
    ],
)
def test_what_is_wrong_is_named(file, changes, message):
    with pytest.raises(ValueError, match=r"zoo\.yaml") as error:
        zoo.load(file(**changes))
    assert message in str(error.value)


def test_a_name_is_there_once(file, tmp_path):
    with pytest.raises(ValueError, match="tiny: the name is there twice"):
        zoo.load(file(ROW))
    (tmp_path / "zoo.yaml").write_text("name: [")
    with pytest.raises(ValueError, match="cannot be read"):
        zoo.load(tmp_path / "zoo.yaml")


# -- scripts/reproduce.py ----------------------------------------------------------------------------------------------


def test_a_figure_is_obtained_compared_and_recorded(file, reproduced, tmp_path):
    path, page = file(), tmp_path / "zoo.md"
    flags = ("--page", page, "--", "--max_new_tokens", 2)
    code, out, _ = reproduced(path, "--record", *flags)
    assert code == 1  # a random model reaches no 50%
    assert "OUTSIDE ±1" in out
    assert path.read_text().startswith("# a comment\n- name: tiny\n")
    [checkpoint] = zoo.load(path)
    obtained = checkpoint.figures[0].obtained
    assert (obtained.commit, obtained.device, obtained.precision) == ("0123456789abcdef", "cpu", "fp32")
    assert str(obtained) in page.read_text()
    assert f"| {zoo.NOT_RUN} |" not in page.read_text()
    before = path.read_text()
    code, out, _ = reproduced(path, "--limit", 2, *flags)
    assert (code, "not comparable" in out) == (0, True)
    assert path.read_text() == before


def test_figures_are_compared_within_a_tolerance():
    figure = zoo.Figure("ReasonSeg|val", {"gIoU": 66.13, "cIoU": 72.07}, "nowhere")
    checkpoint = zoo.Checkpoint("tiny", "UGround", "org/tiny", "a page", [figure], tolerance=0.5)
    rows, agree = zoo.compare(checkpoint, [(figure, {"gIoU": 65.63, "cIoU": 72.0})])
    assert agree
    assert rows[1] == ["ReasonSeg|val", "teacher_forced", "gIoU", "66.13", "65.63", "-0.50", "within ±0.5"]
    assert not zoo.compare(checkpoint, [(figure, {"gIoU": 65.62})])[1]
    rows, agree = zoo.compare(checkpoint, [(zoo.Figure("ReasonSeg|test", {}, "none"), {"gIoU": 1.0})])
    assert (agree, rows[1][-1]) == (True, "nothing to compare with")


def test_what_is_missing_is_named_before_the_model_is_loaded(file, reproduced, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "evaluate", lambda *_: pytest.fail("too late"))
    elsewhere = [ROW["figures"][0] | {"benchmark": "refcoco|unc|val"}]
    code, _, err = reproduced(file(figures=elsewhere))
    assert code == 2
    assert "holds no benchmark of tiny" in err
    assert "refer_seg" in err
    code, _, err = run(capsys, reproduce, "tiny", "--zoo", file(), "--dataset_dir", tmp_path)
    assert (code, "not on the hub: download it from https://example.org/tiny" in err) == (2, True)
    assert "'small' in" in run(capsys, reproduce, "small", "--zoo", file(), "--dataset_dir", tmp_path)[2]
    refused = file(refused="on LLaMA-2")
    assert (
        "tiny is not supported: on LLaMA-2"
        in run(capsys, reproduce, "tiny", "--zoo", refused, "--dataset_dir", tmp_path)[2]
    )
    monkeypatch.setattr(reproduce, "git_commit", lambda: "0123-dirty")
    assert "commit the changes first" in reproduced(file(), "--record")[2]
    assert "figures of a part" in reproduced(file(), "--record", "--limit", 3)[2]
    for flags, word in ((("--mode", "generate"), "--mode"), (("--limit=3",), "--limit=3")):  # else another figure
        assert f"{word} after --: the zoo's file" in reproduced(file(), "--", *flags)[2]
    assert "--layer_policy after --" in reproduced(file(), "--record", "--", "--layer_policy", "last")[2]
    assert "--dataset_dir is missing" in run(capsys, reproduce, "tiny")[2]
    assert "NAME of a checkpoint" in run(capsys, reproduce)[2]


def test_an_evaluation_that_fails_ends_it(file, reproduced, tmp_path):
    code, _, err = reproduced(file(), "--vision_tower", tmp_path, "--", "--layer_policy", "best")
    assert (code, "test.py ended with exit code 2; its message is above" in err) == (2, True)


def test_benchmarks_without_data_are_left_out_by_name(file, reproduced):
    both = [*ROW["figures"], ROW["figures"][0] | {"benchmark": "refcoco|unc|val"}]
    code, out, err = reproduced(file(figures=both), "--limit", 1)
    assert code == 0, err
    assert "not evaluated: refcoco|unc|val: " in out


def test_all_is_listed(file, capsys):
    code, out, _ = run(capsys, reproduce, "--list")
    assert code == 0
    assert sum("not supported" in line for line in out.splitlines()) == 4  # LISA's on LLaMA-2
    assert {line.split()[0] for line in out.splitlines()[1:]} == {each.name for each in zoo.load(ZOO)}
