"""Messages about flags that do not exist, the same in every program."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from programs import load_script

from utils.command_line.parser import Parser, nearest
from utils.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]


def make(program: str = "") -> Parser:
    parser = Parser(program=program)
    parser.add_argument("--version", required=True)
    parser.add_argument("--vision_tower")
    parser.add_argument("--batch_size", type=int)
    return parser


def refused(parser: Parser, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments)
    assert end.value.code == 2
    return ""


def test_all_unknown_flags_at_once_before_what_is_missing(capsys) -> None:
    refused(
        make("test.py"), "--pretrained_model_path", "x", "--model_key=UGround", "--batchsize", "1", "--nothing", "7"
    )
    text = capsys.readouterr().err
    assert "4 problems in the command line" in text
    assert "unknown flag --pretrained_model_path; did you mean --version?" in text
    assert "unknown flag --model_key: the model's folder tells" in text
    assert "unknown flag --batchsize; did you mean --batch_size?" in text
    assert "unknown flag --nothing; see --help" in text
    assert "required" not in text


def test_one_problem_is_one_line(capsys) -> None:
    refused(make(), "--version", "x", "--nothing", "7")
    assert capsys.readouterr().err.endswith("error: unknown flag --nothing; see --help\n")
    refused(make(), "--version", "x", "stray")
    assert capsys.readouterr().err.endswith("error: unexpected argument 'stray'; see --help\n")
    refused(make(), "--version", "x", "-q")
    assert capsys.readouterr().err.endswith("error: unknown flag -q; see --help\n")


def test_words_may_be_joined_by_dashes() -> None:
    assert make().parse_args(["--version", "x", "--vision-tower=a-b"]).vision_tower == "a-b"
    assert make().parse_args(["--version", "x", "--vision-tower", "c"]).vision_tower == "c"


def test_a_flag_is_not_short_for_another(capsys) -> None:
    refused(make(), "--version", "x", "--vision", "t")
    assert "unknown flag --vision; see --help" in capsys.readouterr().err


def test_help_comes_before_unknown_flags(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        make().parse_args(["--nothing", "--help"])
    assert end.value.code == 0
    assert "--vision_tower" in capsys.readouterr().out


def test_flags_of_a_command(capsys) -> None:
    parser = Parser()
    parser.add_argument("--top")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("one").add_argument("--number_of_circles")
    commands.add_parser("two").add_argument("--number_of_squares")
    assert parser.parse_args(["one", "--number-of-circles", "3"]).number_of_circles == "3"
    refused(parser, "one", "--number_of_circle", "3")
    assert "did you mean --number_of_circles?" in capsys.readouterr().err
    refused(parser, "one", "--number_of_squares", "3")
    assert "unknown flag --number_of_squares" in capsys.readouterr().err


def test_a_refused_value_gets_the_note_of_the_table(capsys) -> None:
    load_train = ["--config", str(ROOT / "configs/tiny.yaml"), "--precision", "fp16", "--dice_loss_weight", "-1"]
    with pytest.raises(ConfigError) as error:
        load_script("train_ds").load_config(load_train)
    assert "'fp16' is not one of fp32, bf16 (fp16 does not exist in training: use bf16 or fp32)" in str(error.value)
    assert "at least 0 (also weighs the loss of the similarity maps)" in str(error.value)
    evaluation = ["--version", "a", "--dataset_dir", "b", "--val_dataset", "c"]
    for more, expected in (
        (["--mode", "3"], "did you mean --layer_policy? (the release's mode 1: last"),
        (["--precision", "half"], "invalid choice: 'half'"),
        (["--resume", "x"], "unexpected argument 'x' after --resume (without a value: it resumes the evaluation in"),
    ):
        with pytest.raises(SystemExit):
            load_script("test").main([*evaluation, *more])
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["inspect_data", "ablate", "doctor", "bench", "dev/study_policy"])
def test_programs_that_take_settings_know_both_kinds_of_flags(name: str, capsys) -> None:
    own = {"inspect_data": "picture", "ablate": "tabel", "doctor": "ofload", "bench": "batchess"}.get(name, "seedss")
    flags = [f"--{own}", "6", "--batchsize", "2", "--lr", "1", "--ce_loss_weight", "1"]
    with pytest.raises(SystemExit):
        load_script(f"scripts/{name}").main([*["loader"] * (name == "bench"), *flags])
    text = capsys.readouterr().err
    assert f"unknown flag --{own}; did you mean --" in text
    assert "unknown flag --batchsize; did you mean --batch_size?" in text
    assert "unknown flag --ce_loss_weight; did you mean --text_loss_weight?" in text
    assert "--lr" not in text


def test_doctor_needs_a_configuration_for_settings(capsys) -> None:
    with pytest.raises(SystemExit):
        load_script("scripts/doctor").main(["--lr", "1"])
    assert "--lr: a setting of train_ds.py needs --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("weight", None),  # LISA's, which is not --weighting
        ("mode", None),
        ("batchsize", "batch_size"),
        ("epoch", "epochs"),
        ("trian", "train"),
        ("gausian_kernel", "gaussian_kernel"),
        ("r", None),
        ("no_resume", None),
        ("ce_loss_weight", None),
    ],
)
def test_near_is_a_misspelling_only(typed: str, expected: str | None) -> None:
    known = ["weighting", "weight_decay", "model", "batch_size", "epochs", "train", "gaussian_kernel", "lr", "resume"]
    known += ["bce_loss_weight"]
    assert nearest(typed, known) == expected


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_has_this_parser(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "argparse.ArgumentParser(" not in text
    assert "formatter_class" not in text
    assert issubclass(Parser, argparse.ArgumentParser)


def test_help_wraps_paragraphs_and_lists_and_keeps_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "32")
    text = "One paragraph of words\nin two lines.\n\n    a   command\n    another\n\n- an item that is too long\n- b"
    assert Parser(prog="p", add_help=False, description=text).format_help().split("\n", 2)[2] == (
        "One paragraph of words in two\nlines.\n\n    a   command\n    another\n\n- an item that is too long\n- b\n"
    )


ARGUMENTS = {  # program -> what it needs before it looks at settings
    "scripts/ablate": ["--table", "6", "--config", str(ROOT / "configs/tiny.yaml")],
    "scripts/convert_data": ["check"],
    "scripts/bench": ["data"],
}
NAMES = ("test", "chat", "app", *(f"scripts/{path.stem}" for path in sorted((ROOT / "scripts").glob("*.py"))))


@pytest.mark.parametrize("name", NAMES)
def test_no_program_shows_argparses_message(name: str, capsys) -> None:
    with pytest.raises((SystemExit, ConfigError)) as error:
        load_script(name).main([*ARGUMENTS.get(name, []), "--zebra", "1"])
    text = capsys.readouterr().err + str(error.value)
    assert "unknown flag --zebra; see --help" in text
    assert "unrecognized" not in text
