"""Ablation tables: rows are valid settings, runs are done once, and the table says what the runs said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import ablate
from utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture
def commands(monkeypatch):
    """What would have been run; evaluation writes a result that depends on the seed."""
    seen = []

    def call(folder: Path, command: list[str]) -> None:
        seen.append(command)
        if command[0] == "test.py":
            output = Path(command[command.index("--output") + 1])
            output.mkdir(parents=True)
            value = 0.5 + 0.1 * int(folder.name[-1])
            result = {"metrics": {"gIoU": value, "cIoU": value / 2}, "layers": {"4": 3, "2": 1}}
            for split in ("val_short", "val_long"):
                (output / f"ReasonSeg_{split}.generate.json").write_text(json.dumps(result))

    monkeypatch.setattr(ablate, "call", call)
    return seen


def test_a_table_is_trained_evaluated_and_printed(commands, tmp_path, capsys):
    arguments = ["--table", "layers", "--config", TINY, "--seeds", "2", "--output", str(tmp_path), "--lr", "1e-4"]
    assert ablate.main(arguments) == 0
    assert [command[0] for command in commands] == ["train_ds.py", "scripts/merge_lora.py", "test.py"] * 6
    train = commands[3]
    assert train[train.index("--seed") + 1] == "1"
    assert train[train.index("--lr") + 1] == "1e-4"
    assert train[train.index("--layer_selection") + 1] == "policy"
    assert (
        "| last | 55.0 ± 7.1 | 27.5 ± 3.5 | 55.0 ± 7.1 | 27.5 ± 3.5 | 2, 4 | 64.06 | 67.05 |" in capsys.readouterr().out
    )
    done = len(commands)
    assert ablate.main(arguments) == 0  # nothing is done twice
    assert len(commands) == done


def test_a_wrong_setting_ends_before_the_first_run(commands, tmp_path):
    with pytest.raises(ValueError, match="--lrr"):
        ablate.main(["--table", "6", "--config", TINY, "--output", str(tmp_path), "--lrr", "1"])
    assert not commands


def test_a_program_that_fails_is_quoted(tmp_path):
    with pytest.raises(ValueError, match=r"train_ds.py failed .*(?s:.*)--nonsense"):
        ablate.call(tmp_path, ["train_ds.py", "--nonsense", "1"])
