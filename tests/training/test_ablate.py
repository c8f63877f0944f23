"""Ablation tables: rows are valid settings, runs are done once, and the table says what the runs said."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
from drawn_records import SHAPE, make_record

from scripts import ablate
from utils.config import ConfigError, load_config
from utils.evaluation.results import Provenance, Result, summarize
from utils.plotting import charts
from utils.plotting.charts import layer_curves, running_mean, training_curves

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/tiny.yaml")
ROWS = [(table, row) for table, rows in ablate.TABLES.items() for row in rows]


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{table}-{ablate.slug(row.name)}" for table, row in ROWS])
def test_rows_are_settings_that_change_something(table, row):
    flags = [part for key, value in row.settings.items() for part in (f"--{key}", value)]
    config = load_config(["--config", TINY, *flags]).flat()
    for key, value in row.settings.items():
        read = "||".join(config[key]) if isinstance(config[key], tuple) else str(config[key]).lower()
        assert read in (value, f"{value}.0")


@pytest.mark.parametrize("table", ablate.TABLES)
def test_rows_of_a_table_differ(table):
    rows = ablate.TABLES[table]
    assert len({json.dumps(row.settings, sort_keys=True) for row in rows}) == len(rows)
    assert len({ablate.slug(row.name) for row in rows}) == len(rows)


def test_the_help_names_every_table_that_is_not_the_papers():
    assert [name for name in ablate.TABLES if not name.isdigit() and f"``{name}``" not in ablate.__doc__] == []


def test_methods_are_those_of_their_files():
    """Each of the six is in one row, with that file's prompts, constraints, decoder, and what it freezes."""
    rows = {name: row.settings for row in ablate.TABLES["methods"] for name in row.name.split(", ")}
    assert set(rows) == {path.stem for path in (ROOT / "configs/methods").glob("*.yaml")}
    for name, settings in rows.items():
        flags = [part for key, value in settings.items() for part in (f"--{key}", value)]
        config, expected = (
            load_config(["--config", TINY, *flags]),
            load_config(["--config", str(ROOT / f"configs/methods/{name}.yaml")]),
        )
        assert (config.ppm, config.loss) == (expected.ppm, expected.loss)
        assert (config.decoder, config.model.freeze) == (expected.decoder, expected.model.freeze)
        assert config.data == load_config(["--config", TINY]).data


def test_a_method_on_the_tiny_family_is_that_of_its_tiny_file():
    expected = load_config(["--config", str(ROOT / "configs/tiny_pixellm.yaml")])
    [row] = [row for row in ablate.TABLES["methods"] if row.name == "pixellm"]
    for base in ("tiny", "tiny_mixed", "tiny_depths"):
        args = argparse.Namespace(config=ROOT / f"configs/{base}.yaml")
        flags, config = ablate.settings_of(row, args, [])
        assert (config.ppm, config.loss, config.decoder) == (expected.ppm, expected.loss, expected.decoder)
        assert config.model.freeze == expected.model.freeze
        assert load_config(["--config", str(args.config), *flags]) == config
    _, config = ablate.settings_of(row, argparse.Namespace(config=ROOT / "configs/7b_reason_seg.yaml"), [])
    assert config.decoder == load_config(["--config", str(ROOT / "configs/methods/pixellm.yaml")]).decoder
    for row in ablate.TABLES["methods"]:
        if row.name != "pixellm":
            assert "freeze" not in row.settings


def write_results(folder: Path, hit: int) -> None:
    """Of two images, whose ten true pixels are found but for ten minus ``hit``."""
    target, records = np.zeros(SHAPE, np.uint8), []
    target[0, :10] = 1
    for index in range(2):
        predicted = np.zeros(SHAPE, bool)
        predicted[0, : hit - index] = True
        records.append(make_record(predicted, target, index))
    for split in ("val_short", "val_long"):
        provenance = Provenance(f"ReasonSeg|{split}", "generate", "argmax", 64, 0, "", "abc", "float32", 2, 2)
        Result(summarize(provenance, records), records, provenance).save(folder)


@pytest.fixture
def commands(monkeypatch):
    """What would have been run; results depend on the seed, and the first row's are better."""
    seen = []

    def call(folder: Path, command: list[str]) -> None:
        seen.append(command)
        name, seed = folder.name.rsplit("-", 1)
        if command[0] == "train_ds.py":
            gradients = {"gate": 0.1} if name == "policy" else {}
            line = {"kind": "train", "entropy": 1 + 0.5 * int(seed), "gradients": gradients}
            line["map_loss_by_layer"] = [1.4, 1.3, 1.2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.jsonl").write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in (1, 9)))
        if command[0] == "test.py":
            write_results(Path(command[command.index("--output") + 1]), 6 + int(seed) + (name == "policy"))
        if command[0] == "scripts/analyze.py":
            output = Path(command[command.index("--output") + 1])
            output.mkdir()
            for split in ("val_short", "val_long"):
                lines = [f"x,{layer},0.{5 + int(seed)},{1.4 - 0.1 * layer}" for layer in range(3)]
                head = "checkpoint,layer,cIoU,map_loss"
                (output / f"ReasonSeg_{split}.layers.csv").write_text("\n".join([head, *lines]) + "\n")
            (output / "index.md").write_text("")

    monkeypatch.setattr(ablate, "call", call)
    return seen


def test_a_table_is_trained_evaluated_and_printed(commands, tmp_path, capsys):
    arguments = ["--table", "layers", "--config", TINY, "--seeds", "2", "--output", str(tmp_path), "--lr", "1e-4"]
    assert ablate.main(arguments) == 0
    programs = ["train_ds.py", "scripts/merge_lora.py", "test.py"]
    assert [command[0] for command in commands] == programs * 2 * len(ablate.TABLES["layers"])
    train = commands[len(commands) // 2]  # seed 1 begins when the whole table is done
    assert train[train.index("--seed") + 1] == "1"
    assert train[train.index("--lr") + 1] == "1e-4"
    assert train[train.index("--layer_selection") + 1] == "policy"
    printed = capsys.readouterr().out
    assert "| policy | 70.0 ± 7.1 | 70.0 ± 7.1 | 70.0 ± 7.1 | 70.0 ± 7.1 | 3 | 1.25 ± 0.35 | 66.13 | 72.07 |" in printed
    assert "| last | 60.0 ± 7.1 | 60.0 ± 7.1 | 60.0 ± 7.1 | 60.0 ± 7.1 | 3 | - | 64.06 | 67.05 |" in printed
    assert "Difference to policy" in printed
    assert "| last | -10.0 [-10.0, -10.0] | -10.0 [-10.0, -10.0] |" in printed
    assert printed.split("\nwrote ")[0].endswith((tmp_path / "layers/table.md").read_text())
    done = len(commands)
    assert ablate.main(arguments) == 0  # nothing is done twice
    assert len(commands) == done


def test_curves_are_drawn_from_logs_and_forced_layers(commands, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(charts, "layer_curves", lambda *lines: drawn.setdefault("fig2", lines) and layer_curves(*lines))
    arguments = ["--table", "baselines", "--config", TINY, "--seeds", "2", "--output", str(tmp_path)]
    names = [row.name for row in ablate.TABLES["baselines"]]
    for _ in range(2):
        assert ablate.main([*arguments, "--curves", "||".join(names[:2])]) == 0
        assert [command[0] for command in commands].count("scripts/analyze.py") == 4  # nothing is done twice
    ciou, loss = drawn["fig2"]
    assert ciou == {name: pytest.approx([0.55] * 3) for name in names[:2]}
    assert loss[names[0]] == pytest.approx([1.4, 1.3, 1.2])
    written = {path.name for path in (tmp_path / "baselines").glob("*.png")}
    assert written == {"ReasonSeg_val_short.fig2.png", "ReasonSeg_val_long.fig2.png", "training.png"}


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("layers", "polisy"),
        ("layers", "||".join(row.name for row in ablate.TABLES["layers"])),
        ("choice_answers", "objective grpo"),  # it computes no losses of maps
    ],
)
def test_curves_of_rows_that_cannot_be_drawn(commands, tmp_path, table, rows):
    arguments = ["--table", table, "--config", TINY, "--output", str(tmp_path), "--curves", rows]
    with pytest.raises(SystemExit) as stop:
        ablate.main(arguments)
    assert stop.value.code == 2
    assert not commands


def test_training_curves_have_a_line_per_layer():
    tables = {name: np.linspace(1.4, 1.2, 21)[:, None] + np.arange(4) / 100 for name in ("policy", "last")}
    chart = training_curves(tables, {"policy": np.linspace(2, 0, 21)}, range(0, 210, 10))
    first, second, colors, entropy = chart.axes[0], chart.axes[1], chart.axes[3], chart.axes[2]
    assert [len(axes.lines) for axes in (first, second, entropy)] == [4, 4, 1]
    assert colors.get_ylabel() == "layer"
    assert running_mean(np.array([1.0, 2.0, 3.0, 4.0, 10.0]), 3) == pytest.approx([1.5, 2, 3, 17 / 3, 7])


def test_the_policys_entropy_is_that_of_sampled_answers_where_there_are_no_others():
    line = {"step": 10, "gradients": {"gate": 0.1}, "grpo_layer_entropy": 1.5}
    assert ablate.policy_entropies([line]) == {10: 1.5}
    assert ablate.policy_entropies([line | {"entropy": 2.0}]) == {10: 2.0}
    assert ablate.policy_entropies([{"step": 5, "gradients": {}}, line]) == {10: 1.5}  # no [SEG] was written
    assert ablate.policy_entropies([line | {"gradients": {"lora": 0.1}}]) == {}


def test_a_wrong_setting_ends_before_the_first_run(commands, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--table", "6", "--config", TINY, "--output", str(tmp_path), "--lrr", "1"])
    assert "unknown flag --lrr" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--lr: 'x' is not a number"):
        ablate.main(["--table", "6", "--config", TINY, "--output", str(tmp_path), "--lr", "x"])
    assert not commands


def test_results_of_other_settings_are_refused(commands, tmp_path):
    arguments = ["--table", "8", "--config", TINY, "--seeds", "1", "--output", str(tmp_path)]
    assert ablate.main(arguments) == 0
    assert ablate.main(arguments) == 0  # done, and the same
    with pytest.raises(ValueError, match=r"bce-0 holds a run of other settings(?s:.*)now: .*--lr 0.5"):
        ablate.main([*arguments, "--lr", "0.5"])
    with pytest.raises(ValueError, match=r"refzom\|test has no gIoU and cIoU"):
        ablate.main([*arguments, "--val_dataset", "refzom|test"])


def test_a_program_that_fails_is_quoted(tmp_path):
    with pytest.raises(ValueError, match=r"train_ds.py failed .*(?s:.*)--nonsense"):
        ablate.call(tmp_path, ["train_ds.py", "--nonsense", "1"])


def test_settings_for_all_rows_are_left_out_where_a_row_switches_them_off():
    args = argparse.Namespace(config=ROOT / "configs/tiny.yaml")
    common = ["--baseline", "critic", "--epochs", "1"]
    fixed, policy = ablate.AblationRow("last", {"layer_selection": "last"}), ablate.AblationRow("policy", {})
    assert ablate.settings_of(policy, args, common)[0] == common
    assert ablate.settings_of(fixed, args, common)[0] == ["--epochs", "1", "--layer_selection", "last"]


def test_every_row_accepts_the_settings_that_the_changelog_recommends():
    args = argparse.Namespace(config=ROOT / "configs/tiny.yaml")
    for table in ablate.TABLES.values():
        for row in table:
            ablate.settings_of(row, args, ["--baseline_start", "first", "--entropy_bonus", "0.01"])


@pytest.mark.parametrize(
    ("common", "kept"),
    [
        (["--freeze", "lm_head||embed_tokens"], "lm_head||embed_tokens||image_neck||sam_prompt_encoder"),
        (["--sam_feature_cache", "features"], "image_neck||sam_prompt_encoder"),
    ],
)
def test_settings_for_all_rows_meet_those_of_pixellm(common, kept):
    args = argparse.Namespace(config=ROOT / "configs/tiny.yaml")
    rows = {row.name: row for row in ablate.TABLES["methods"]}
    flags, config = ablate.settings_of(rows["pixellm"], args, common)
    assert config.model.freeze == tuple(kept.split("||"))
    assert "--sam_feature_cache" not in flags
    assert ablate.settings_of(rows["uground"], args, common)[0][:2] == common


def test_a_row_that_cannot_start_from_the_model_is_left_out(commands, monkeypatch, tmp_path, capsys):
    def adopt(config):
        if config.decoder.mask_decoder == "pixel_decoder":
            raise ConfigError(["mask_decoder contradicts --version"])

    monkeypatch.setattr(ablate, "adopt", adopt)
    assert ablate.main(["--table", "methods", "--config", TINY, "--seeds", "1", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"pixellm is left out: .*\n.*mask_decoder contradicts --version", out)
    assert "| uground |" in out
    assert "| pixellm |" not in out
