"""Checks a GPU for training and inference, without downloads, in less than eight minutes:

    python scripts/gpu_check.py [--preset 7b|13b] [--json FILE]       on a machine with one GPU
    python scripts/gpu_check.py --device cpu --preset tiny            the same code on a CPU
    python scripts/gpu_check.py --parts steps benchmark               some parts again

Parts: versions; losses, gradients and answers of a tiny model against the CPU's; where a step and an answer wait for
the GPU; the programs (train_ds.py with DeepSpeed, resuming, merging, test.py, chat.py) on drawn scenes; two processes;
quantized layers; steps of a model of full size with random weights, with gradient checkpointing, offloading and cached
features: seconds, and memory beside the formula's; the tables of scripts/bench.py; what related methods cost, beside
Tables 10 and 11 of the paper. A part that fails, or that lacks a package, is named, and the next one runs.
Exit code: 0 = no problem, 1 = problems, 2 = invalid flags.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Only the standard library at import: missing libraries are what the first part reports.
from utils.command_line.parser import Parser
from utils.diagnostics.findings import Finding, Page, ok, problem, skipped

SCRIPTS = Path(__file__).resolve().parent
PARTS = ("numbers", "programs", "steps", "benchmark")  # after the installation
BENCHMARKS = {  # key in the JSON file -> flags of bench.py
    "bench": (),
    "table_10": ("--table", "10"),
    "table_11": ("--table", "11", "--limit", "8"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=("tiny", "medium", "7b", "13b"), default="7b", help="size of the measured model")
    add("--device", default="auto", help="cuda, cuda:1, cpu (default: the GPU if there is one)")
    add(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    add("--repeats", type=int, default=3, metavar="N", help="repeats of the benchmark (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write findings and figures to this file")
    args = parser.parse_args(arguments)
    page, figures = Page(), {name: dict[str, Any]() for name in BENCHMARKS}
    page.heading("Installation")
    page.run(check_installation)
    try:
        from model.loading.placement import pick_device
        from utils.diagnostics import device_checks as checks
    except ImportError as error:
        page.add(skipped("everything else", f"fix the installation first ({error})"))
    else:
        device = pick_device(args.device)
        if args.preset in ("7b", "13b") and not device.startswith("cuda"):
            raise ValueError(f"--preset {args.preset} needs a GPU, and this runs on {device}; use --preset tiny")
        if "numbers" in args.parts:
            page.heading("Numbers")
            for check in (checks.check_training_numbers, checks.check_answers, checks.check_synchronizations):
                page.run(check, device)
        if "programs" in args.parts:
            page.heading("Programs")
            for check in (checks.check_programs, checks.check_two_processes, checks.check_quantization):
                page.run(check, device)
        if "steps" in args.parts:
            page.heading(f"Steps of {args.preset}")
            page.run(checks.check_steps, device, args.preset)
        if "benchmark" in args.parts:
            page.heading("Benchmark")
            for name in BENCHMARKS:
                page.run(run_benchmark, device, args.preset, args.repeats, name, figures[name])
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in page.seconds.items())
    print(f"\n{parts}; {sum(page.seconds.values()) / 60:.1f} minutes\n{page.summary()}")
    if args.json:
        findings = [asdict(finding) for finding in page.findings]
        args.json.write_text(json.dumps({"findings": findings, "seconds": page.seconds, **figures}, indent=2) + "\n")
    return 1 if page.count("problem") else 0


def check_installation() -> Iterator[Finding]:
    """doctor.py, in a process of its own."""
    done = subprocess.run([sys.executable, str(SCRIPTS / "doctor.py")], stdout=subprocess.PIPE, text=True)
    print("\n".join(done.stdout.splitlines()[1:-2]))
    yield ok("doctor.py") if done.returncode == 0 else problem("doctor.py found problems", "see above")


def run_benchmark(device: str, preset: str, repeats: int, name: str, figures: dict[str, Any]) -> Iterator[Finding]:
    """bench.py with the flags of ``BENCHMARKS``, in a process of its own; adds its figures to ``figures``."""
    title = " ".join(("bench.py", *BENCHMARKS[name]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = ["bench.py", "--preset", preset, "--device", device, "--repeats", str(repeats), "--json", str(path)]
        command += BENCHMARKS[name]
        command += ["--compile"] if name == "bench" and device.startswith("cuda") else []
        start = time.perf_counter()
        code = subprocess.run([sys.executable, str(SCRIPTS / command[0]), *command[1:]]).returncode
        if code:
            yield problem(f"{title}: exit code {code}", "see above")
            return
        figures |= json.loads(path.read_text())
        used = figures.get("utilisation")
        utilisation = f"; model FLOPs utilization {used:.0%}" if used else ""
        yield ok(f"{title}: {time.perf_counter() - start:.0f} s{utilisation}")


if __name__ == "__main__":
    from utils.inference.cli import run

    sys.exit(run(main))
