"""The table of other projects' flags, held against the real parsers and defaults of this project's programs."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import load_script

from utils.command_line import other_trainers
from utils.command_line.other_trainers import THEIRS, Row, as_text, differences_from_lisa, markdown_tables
from utils.command_line.parser import LEAST_LETTERS, nearest
from utils.config import FIELDS, Config, ConfigError, load_config, make_parser
from utils.datasets import TYPES

ROOT = Path(__file__).resolve().parents[2]
LISA = ["--version", "v", "--vision_pretrained", "p", "--dataset_dir", "d", "--vision-tower", "t"]
NEEDED = {
    "train_ds.py": LISA,
    "test.py": ["--version", "v", "--dataset_dir", "d", "--val_dataset", "ReasonSeg|val"],
    "chat.py": ["--version", "v"],
    "app.py": ["--version", "v"],
    "scripts/merge_lora.py": ["--checkpoint", "c", "--output", "o"],
}
ROWS = [row for program in THEIRS for row in other_trainers.rows(program)]
BY_MEANING = {  # renamed, with other words for the same default
    "baseline_type": {"ema": "average"},
    "mode": {"3": "policy"},
    "eval_legacy": {"false": "empty"},
}


@functools.cache
def script(program: str) -> Any:
    return load_script(program.removesuffix(".py"))


@functools.cache
def parsed(program: str) -> dict[str, Any]:
    """Flag -> default, as the program's real parser gives it."""
    if program == "train_ds.py":
        return vars(make_parser().parse_args(NEEDED[program]))
    return vars(script(program).parse_arguments(NEEDED[program]))


def message(capsys: pytest.CaptureFixture[str], program: str, *arguments: str) -> str:
    """The error message of a command line."""
    if program == "train_ds.py":
        with pytest.raises(ConfigError) as error:
            load_config(list(arguments))
        return str(error.value)
    with pytest.raises(SystemExit) as end:
        script(program).parse_arguments(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


def default_here(row: Row) -> str:
    """The real default of the flag that a row names, as ``--help`` spells it."""
    name = row.answer.here
    if row.program != "train_ds.py":
        return as_text(parsed(row.program)[name])
    if name.endswith("_data") and name.removesuffix("_data") in TYPES:
        assert not Config().flat()[name]  # which stands for
        return TYPES[name.removesuffix("_data")].default
    return as_text(Config().flat()[name])


def is_same(theirs: str, here: str, row: Row) -> bool:
    meaning = BY_MEANING.get(row.flag, {}).get(theirs, theirs)
    return meaning == here or (bool(theirs) and theirs.replace(".", "").isdigit() and float(theirs) == float(here))


programs = pytest.mark.parametrize("program", THEIRS)
named = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.program}-{row.flag}")


def test_every_entry_is_a_row() -> None:
    for program, answers in other_trainers.ANSWERS.items():
        flags = {row.flag for row in other_trainers.rows(program)}
        assert not answers.keys() - flags - other_trainers._OF_THE_MODEL.keys(), program


@named
def test_targets_exist(row: Row) -> None:
    if row.answer.here and row.answer.here != "local_rank":  # hidden, for the launcher
        assert row.answer.here in parsed(row.program)


@programs
def test_same_flags_are_accepted_and_all_others_explained_at_once(program: str, capsys) -> None:
    rows = [row for row in other_trainers.rows(program) if (program, row.flag) != ("test.py", "mode")]
    text = message(
        capsys, program, *NEEDED[program], *(f"--{row.flag}=1" for row in rows if row.answer.here != row.flag)
    )
    lines = {line.partition("unknown flag --")[2].partition(" ")[0].rstrip(":;"): line for line in text.splitlines()}
    for row in rows:
        if row.answer.here == row.flag:
            assert row.flag not in lines
            assert row.flag in parsed(program) or row.flag == "local_rank"
            continue
        line = lines.pop(row.flag)
        assert (
            line.endswith(row.answer.note + (")" if row.answer.here and row.answer.note else "")) or not row.answer.note
        )
        assert (f"did you mean --{row.answer.here}?" in line) if row.answer.here else "did you mean" not in line
    assert set(lines) == {""}, "nothing else is unknown"


def test_a_flag_that_means_another_here(capsys) -> None:
    """The release's --mode 3 for test.py, whose --mode is how the answer is made."""
    text = message(capsys, "test.py", *NEEDED["test.py"], "--mode", "3")
    assert "invalid choice: '3'" in text
    assert "did you mean --layer_policy? (the release's mode 1: last" in text
    assert "did you mean" not in message(capsys, "test.py", *NEEDED["test.py"], "--precision", "half")


@named
def test_quoted_defaults_are_the_real_ones(row: Row) -> None:
    if not row.answer.here or row.flag.startswith("load_in_"):
        return
    quoted = [row.answer.default] if row.answer.default else [value for value in row.theirs.values() if value]
    wrong = [value for value in quoted if not is_same(value, default_here(row), row)]
    assert not wrong, default_here(row)


def test_no_flag_of_another_project_gets_a_wrong_hint() -> None:
    """Without the table, spelling alone: difflib's cut-off may find the right flag, never another one."""
    wrong = {}
    for row in ROWS:
        near = nearest(row.flag, parsed(row.program))
        if near not in (None, row.flag, row.answer.here):
            wrong[row.program, row.flag] = near
    assert not wrong


def test_flags_of_every_setting_are_found_with_a_slip() -> None:
    """The cut-off is not too strict: a letter left out, doubled, or swapped in a long word; underscores forgotten."""
    for name in FIELDS:
        slips = [name.replace("_", "")]
        if len(name.partition("_")[0]) > LEAST_LETTERS:
            slips += [name[:2] + name[3:], name[:3] + name[2:], name[0] + name[2] + name[1] + name[3:]]
        assert [nearest(slip, FIELDS) for slip in slips] == [name] * len(slips)


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
    assert page.endswith(markdown_tables()), "python -m utils.command_line.other_trainers prints the end of the page"


def test_the_messages_that_the_page_quotes_are_these(capsys) -> None:
    page = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
    [(command, quoted)] = re.findall(r"^\$ python test\.py (.*)\ntest\.py: error: ((?:.*\n)+?)```", page, re.MULTILINE)
    assert message(capsys, "test.py", *shlex.split(command)) == quoted


def test_the_table_is_light() -> None:
    code = "import sys, utils.command_line.parser; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


# -- other defaults ----------------------------------------------------------------------------------------------------


def told(*arguments: str) -> str:
    return " ".join(" ".join(differences_from_lisa(arguments, load_config(list(arguments)).flat())).split())


def test_a_run_with_lisas_flags_tells_the_other_defaults() -> None:
    text = told(*LISA, "--exp_name", "lisa-7b", "--dice_loss_weight", "0.5")
    for change in (
        "dataset sem_seg||refer_seg||vqa||reason_seg -> refer_seg||reason_seg",
        "model_max_length 512 -> 2048",
        "val_batch_size 1 -> 4",
        "explanatory 0.1 -> -1",
        "gradient_checkpointing true -> false",
        "auto_resume true -> false",
        "log_every 1 -> 10",
    ):
        assert change in text
    for same_or_given in (
        "dice_loss_weight",
        "exp_name",
        "bce_loss_weight",
        "lora_r",
        "sem_seg_data",
        "version",
        " lr ",
    ):
        assert same_or_given not in text
    assert len(differences_from_lisa(LISA, load_config(LISA).flat())) <= 5


def test_a_run_in_this_projects_flags_is_told_nothing() -> None:
    tiny = ["--config", str(ROOT / "configs/tiny.yaml")]
    assert not told(*tiny, "--exp_name", "x", "--local_rank=0")
    assert not told(*tiny, "--local-rank=0")
    assert not told(*LISA[:-2], "--vision_tower", "t", "--map_loss_weight", "1")
    assert "dice_loss_weight 0.5 -> 4" in told(*tiny, "--vision-tower", "t")  # as only LISA's users spell it


def test_everything_given_as_in_lisa_leaves_nothing_to_tell() -> None:
    flags = {
        name: row.theirs["LISA"]
        for row in other_trainers.rows("train_ds.py")
        if "LISA" in row.theirs
        for name in [row.answer.here]
        if name and row.theirs["LISA"]
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    assert told(*LISA, *given) == ""


def test_train_ds_prints_it_at_the_start(capsys) -> None:
    train = script("train_ds.py")
    assert train.main(LISA) == 2  # the folders do not exist
    shown = capsys.readouterr()
    assert "flags of LISA" in shown.out
    assert "no such folder" in shown.err
