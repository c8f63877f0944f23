"""Damages files at random and opens them as the programs do; counts what happens.

    OMP_NUM_THREADS=1 python scripts/dev/fuzz_files.py --count 1000   # of every kind
    OMP_NUM_THREADS=1 python scripts/dev/fuzz_files.py --what merged --count 5000 --seed 7
    OMP_NUM_THREADS=1 python scripts/dev/fuzz_files.py --what merged --seed 7 --trial 42

The last one shows a single trial, with its error.

A trial damages one file of a tiny folder (tests/damage.py) and opens the folder in a process with bounded time and
memory. It ends in one of these ways:

    same       what was read equals what was written: nothing reads the damage, or it is ignored
    changed    something else was read, and nothing was said
    counted    records were left out, and counted (data sets)
    named      an error names the file
    other      an error names another file of the folder, or an image that is looked for
    unnamed    an error names no file
    traceback  an exception that the programs do not catch
    hang       more than --seconds
    crash      the process was ended by a signal

Exit code 1 for any of the last four. docs/reliability.md has the figures.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
from conftest import build_tiny_model, build_tiny_processor, make_demo_data, save_model, write_jpg
from conversion.test_fuzz import H, W, coco, labelme
from damage import damaged
from programs import compare, evaluation, load_script, score
from small_data_sets import JSON_FILES, read_all, write_data_sets
from tiny_run import ROOT, write_base

from model.grounding import GroundingModel
from model.loading.pretrained import load, load_for_training
from utils.command_line.parser import Parser
from utils.config import load_config
from utils.evaluation.results import Journal, Summary, read_results
from utils.inference import cli
from utils.inference.folder import ANSWERS_FILE, Done, answer_all
from utils.training import checkpoint as checkpoints
from utils.training.engine import deepspeed_settings
from utils.training.run_report import write_report

convert_data = load_script("scripts/convert_data")
BEFORE = ROOT / "tests/fixtures/written_before"
BASE = {"base": "llava", "vision_tower": "clip", "vision_pretrained": "sam.pth"}
WAYS = ("same", "changed", "counted", "named", "other", "unnamed", "traceback", "hang", "crash")
COUNTED = "records left out: "
BAD = WAYS[5:]
MEMORY = 3 << 30  # bytes that a trial may take beyond what the process has mapped


@dataclass(frozen=True)
class Kind:
    """Files that belong together.

    Attributes:
        write: writes them into a folder.
        read: opens them as a program does; returns a fingerprint of what was read.
        names: pattern of the files that are damaged.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    names: tuple[str, ...] = ("**/*",)

    def files(self, folder: Path) -> list[Path]:
        return sorted({path for name in self.names for path in folder.glob(name) if path.is_file()})


# -- kinds -------------------------------------------------------------------------------------------------------------


def fingerprint(state: dict[str, torch.Tensor], *more: Any) -> str:
    digest = hashlib.sha256(repr(more).encode(errors="backslashreplace"))
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def of_model(model: GroundingModel, processor: Any) -> str:
    texts = ["where is the red star [SEG]", "<image> USER: please, segment"]
    settings = {key: value for key, value in vars(processor).items() if isinstance(value, (int, str, float))}
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    return fingerprint(model.state_dict(), [processor.tokenizer.encode(text) for text in texts], settings, config)


def read_model(folder: Path, **paths: str) -> str:
    opened = load(folder, device="cpu", **paths)
    return of_model(opened.model, opened.processor)


def read_adapter(folder: Path) -> str:
    return read_model(folder, **{name: str(BEFORE / "base" / file) for name, file in BASE.items()})


def write_merged(folder: Path) -> None:
    save_model(folder, build_tiny_processor(), talks=False)


def write_tiny_base(folder: Path) -> None:
    processor = build_tiny_processor()
    write_base(folder, build_tiny_model(processor), processor.tokenizer)


def read_base(folder: Path) -> str:
    torch.manual_seed(0)  # of the new parts
    llava, clip, sam = (str(folder / file) for file in BASE.values())
    model, processor, _ = load_for_training(llava, clip, sam, "fp32")
    return of_model(model, processor)


def write_old_checkpoint(folder: Path) -> None:
    """The checkpoint of the fixtures, which has no checksums."""
    shutil.copytree(BEFORE / "run", folder, dirs_exist_ok=True)


def write_checkpoint(folder: Path) -> None:
    """The same with checksums, as today's checkpoints have them."""
    write_old_checkpoint(folder)
    checkpoint = checkpoints.find_checkpoint(folder)
    meta = checkpoints.read_meta(checkpoint)
    (checkpoint / checkpoints.META).unlink()
    checkpoints.write_meta(checkpoint, meta)


def read_checkpoint(folder: Path) -> str:
    """As ``merge_lora.py`` reads it; a run is resumed through the same checks."""
    checkpoint = checkpoints.find_checkpoint(folder, "best")
    meta = checkpoints.read_meta(checkpoint)
    checkpoints.check_same_run(checkpoint, meta)
    return fingerprint(checkpoints.trained_weights(checkpoint), checkpoint.name, meta)


def write_log(folder: Path) -> None:
    for name in ("config.yaml", "log.jsonl"):
        shutil.copy(BEFORE / "run" / name, folder)


def read_log(folder: Path) -> str:
    report = write_report(folder)
    text = report.read_text()
    report.unlink()
    return text


def called(program: Any, *arguments: object) -> str:
    """What a program printed; raises a ValueError with its message where it ends with exit code 2."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = cli.run(program.main, [str(argument) for argument in arguments])
    if code:
        raise ValueError(errors.getvalue())
    return printed.getvalue()


ANSWERS = {"checkpoint": "x", "precision": "float32", "layer_policy": "argmax", "max_new_tokens": 2, "seed": 0}


def write_answers(folder: Path) -> None:
    opened = load(save_model(folder / "model", build_tiny_processor(), talks=True), device="cpu")
    images = [folder / "images/a.jpg", folder / "images/b.jpg"]
    for seed, path in enumerate(images):
        write_jpg(path, seed)
    answer_all(opened, images, ["the star", "the cup"], folder, ANSWERS, lambda text: None)
    shutil.rmtree(folder / "model")


def read_answers(folder: Path) -> str:
    done = Done.read(folder / ANSWERS_FILE, ANSWERS)
    return repr(sorted((Path(image).name, prompt, state) for (image, prompt), state in done.answers.items()))


def write_results(folder: Path) -> None:
    version = save_model(folder / "model", build_tiny_processor(), talks=True)
    called(make_demo_data, "--out", folder / "data", "--train", 1, "--val", 3, "--test", 1)
    flags = ["--version", version, "--dataset_dir", folder / "data", "--max_new_tokens", 2, "--output", folder]
    called(evaluation, *flags, "--val_dataset", "ReasonSeg|val")
    for name in ("model", "data"):
        shutil.rmtree(folder / name)


def read_result_files(folder: Path) -> str:
    """As score.py, compare.py, analyze's tables and ``test.py --resume`` read them."""
    [path] = folder.glob("*.jsonl")
    provenance, records = read_results(path)
    printed = called(score, path), called(compare, folder, folder)
    return repr((provenance, records, Summary.load(path.with_suffix(".json")), Journal(path).read(provenance), printed))


def write_settings(folder: Path) -> None:
    shutil.copy(ROOT / "configs/tiny.yaml", folder)
    shutil.copy(ROOT / "configs/base.yaml", folder)
    shutil.copy(ROOT / "configs/deepspeed/zero2.json", folder)


def read_settings(folder: Path) -> str:
    config = load_config(["--config", str(folder / "tiny.yaml"), "--deepspeed_config", str(folder / "zero2.json")])
    return repr((config, deepspeed_settings(config, 1)))


def write_annotations(folder: Path) -> None:
    for seed, name in enumerate("ab"):
        write_jpg(folder / f"{name}.jpg", seed, (H, W))
        (folder / f"{name}.json").write_text(json.dumps(labelme(f"{name}.jpg")))
    (folder / "coco").mkdir()
    (folder / "coco/coco.json").write_text(json.dumps(coco()))


def read_annotations(folder: Path) -> str:
    """As convert_data.py reads the files of LabelMe and of COCO; what it wrote is checked by its own ``check``."""
    written = []
    for flags in (["labelme", folder], ["coco", folder / "coco/coco.json", "--images", folder]):
        output = folder / "out/own.jsonl"
        called(convert_data, *flags, "--output", output, "--pictures", 0)
        written.append(output.read_text())
        try:
            called(convert_data, "check", output)
        except ValueError as error:
            raise RuntimeError(f"{output} was written, and is refused: {error}") from error
        shutil.rmtree(output.parent)
    return repr(written)


def read_data(folder: Path) -> str:
    read = [read_all(name, folder) for name in (*JSON_FILES, "refclef")]
    if lost := sum(count for _, count in read):
        raise ValueError(f"{COUNTED}{lost}")
    return repr(read)


KINDS = {
    "merged": Kind(write_merged, read_model),
    "adapter": Kind(lambda folder: shutil.copytree(BEFORE / "adapter", folder, dirs_exist_ok=True), read_adapter),
    "base": Kind(write_tiny_base, read_base),
    "checkpoint": Kind(write_checkpoint, read_checkpoint, ("checkpoints/**/*",)),
    "old_checkpoint": Kind(write_old_checkpoint, read_checkpoint, ("checkpoints/**/*",)),
    "data": Kind(write_data_sets, read_data),
    "annotations": Kind(write_annotations, read_annotations),
    "results": Kind(write_results, read_result_files, ("*.json*",)),
    "answers": Kind(write_answers, read_answers, ("*.jsonl",)),
    "log": Kind(write_log, read_log),
    "settings": Kind(write_settings, read_settings),
}


# -- trials ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What happened: the damaged file, one of ``WAYS``, and the error."""

    file: str
    way: str
    error: str = ""
    trace: str = ""


class Fuzzer:
    """Trials of one kind, in a folder of its own.

    Args:
        seconds: limit of a trial.
    """

    def __init__(self, name: str, folder: Path, seconds: float = 30) -> None:
        self.name, self.kind, self.folder, self.seconds = name, KINDS[name], folder, seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.kind.write(folder)
        self.content = {path: path.read_bytes() for path in self.kind.files(folder)}
        self.whole = checksum(self.kind.read(folder))  # here, so that forked processes have all imports

    def trials(self, seed: int, numbers: Sequence[int], per_process: int = 1) -> list[Trial]:
        """Runs trials in forked processes: one for each is independent of the others, one for several is faster."""
        done: list[Trial] = []
        while len(done) < len(numbers):
            done += self._forked(seed, numbers[len(done) : len(done) + per_process])
        return done

    def _forked(self, seed: int, numbers: Sequence[int]) -> list[Trial]:
        """Trials in one forked process, up to the first that hangs or crashes."""
        receiver, sender = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(receiver)
            self._run_and_exit(sender, seed, numbers)
        os.close(sender)
        sent, ended = b"", False
        while not ended and select.select([receiver], [], [], self.seconds)[0]:
            part = os.read(receiver, 1 << 16)
            sent, ended = sent + part, not part
        os.close(receiver)
        if not ended:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        found = [Trial(**json.loads(line)) for line in sent.split(b"\n")[:-1]]
        if len(found) < len(numbers):
            path, _ = self.damage(seed, numbers[len(found)])
            path.write_bytes(self.content[path])
            found.append(Trial(self.relative(path), "crash" if ended else "hang", f"wait status {status}"))
        return found

    def _run_and_exit(self, sender: int, seed: int, numbers: Sequence[int]) -> None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            for number in numbers:
                os.write(sender, json.dumps(asdict(self.trial(seed, number))).encode() + b"\n")
        finally:
            os._exit(0)

    def damage(self, seed: int, number: int) -> tuple[Path, bytes]:
        """The file that a trial damages, and what becomes of it."""
        rng = random.Random(f"{self.name} {seed} {number}")
        path, other = rng.choice([*self.content]), rng.choice([*self.content])
        return path, damaged(self.content[path], rng, self.content[other])

    def trial(self, seed: int, number: int) -> Trial:
        """Damages a file, reads the folder in this process, and restores the file."""
        path, changed = self.damage(seed, number)
        if changed == self.content[path]:
            return Trial(self.relative(path), "same")
        path.write_bytes(changed)
        try:
            return self.judge(path, read=checksum(self.kind.read(self.folder)))
        except (ValueError, OSError) as error:  # what the programs print as a message
            return self.judge(path, error=str(error) or repr(error), trace=traceback.format_exc())
        except BaseException as error:
            return Trial(self.relative(path), "traceback", f"{type(error).__name__}: {error}", traceback.format_exc())
        finally:
            path.write_bytes(self.content[path])

    def relative(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def judge(self, path: Path, read: str = "", error: str = "", trace: str = "") -> Trial:
        """The trial that damaged ``path``, from the checksum of what was read, or the message of a program."""
        name = self.relative(path)
        if read:
            return Trial(name, "same" if read == self.whole else "changed", read)
        if error.startswith(COUNTED):
            return Trial(name, "counted", error)
        others = "no image " in error or any(file.name in error for file in self.content)
        return Trial(name, "named" if named(path.name, error) else "other" if others else "unnamed", error, trace)


def named(name: str, error: str) -> bool:
    """Whether a message has a file's name, and not only as the end of another's (``tokenizer_config.json``)."""
    return re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", error) is not None


# -- report ------------------------------------------------------------------------------------------------------------


def place_of(trial: Trial) -> str:
    """Groups trials: the last line of the project in the traceback, and the kind of exception."""
    lines = [line.strip() for line in trial.trace.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if str(ROOT) in line and "fuzz_files" not in line and ".venv" not in line]
    return f"{own[-1] if own else ''} {trial.error.splitlines()[0][:60] if trial.error else ''}"


def report(name: str, trials: list[Trial]) -> None:
    """Prints how often each way was, and an example of each place of what is not ``named`` or ``same``."""
    counts = Counter(trial.way for trial in trials)
    print(f"{name:10}", *(f"{way} {counts[way]:5}" for way in WAYS), flush=True)
    changed = Counter(trial.file for trial in trials if trial.way == "changed")
    if changed:
        print("   changed:", ", ".join(f"{file} {count}" for file, count in changed.most_common()))
    examples: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, trial in enumerate(trials):
        if trial.way in ("other", *BAD):
            examples[trial.way, f"{trial.file} {place_of(trial)}"].append(number)
    for (way, place), numbers in sorted(examples.items(), key=lambda item: -len(item[1])):
        print(f"   {way} x{len(numbers)}, first trial {numbers[0]}: {place[:300]}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    kinds = f"default: all ({', '.join(KINDS)})"
    parser.add_argument("--what", action="append", choices=KINDS, metavar="KIND", help=kinds)
    parser.add_argument("--count", type=int, default=200, metavar="N", help="trials of each kind (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--trial", type=int, metavar="N", help="only this one, with its error")
    parser.add_argument("--seconds", type=float, default=30, metavar="S", help="limit of a trial (default: 30)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.what or KINDS:
            fuzzer = Fuzzer(name, Path(temporary) / name, args.seconds)
            if args.trial is not None:
                [trial] = fuzzer.trials(args.seed, [args.trial])
                print(trial.file, trial.way, trial.error, trial.trace, sep="\n")
                continue
            trials = fuzzer.trials(args.seed, range(args.count))
            report(name, trials)
            bad += sum(trial.way in BAD for trial in trials)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
