"""Entry points, called in this process with a user's arguments."""

import importlib.util
import sys
from pathlib import Path

from tiny_run import ROOT

from utils.inference import cli

SHARED = ROOT.parent / "shared" / "realdata"


def load_script(name):
    """A program as a module, loaded by path: ``import test`` would find the standard library's package."""
    spec = importlib.util.spec_from_file_location(f"{Path(name).name}_script", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


chat, evaluation = load_script("chat"), load_script("test")
score, compare = load_script("scripts/score"), load_script("scripts/compare")


def run(capsys, script, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one call."""
    try:
        code = cli.run(script.main, [str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        code = end.code
    return code, *capsys.readouterr()


def ask(capsys, version, image, output, prompt="where is the red star", *more):
    paths = ("--version", version, "--image", image, "--output", output)
    return run(capsys, chat, *paths, "--prompt", prompt, "--max_new_tokens", 2, *more)


def evaluate(capsys, version, data, output, spec="ReasonSeg|val", *more):
    paths = ("--version", version, "--dataset_dir", data, "--output", output, "--max_new_tokens", 2)
    return run(capsys, evaluation, *paths, *(("--val_dataset", spec) if spec else ()), *more)
