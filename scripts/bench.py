"""Measures time and memory of model and data, and prints tables for docs/benchmarks.md:

    python scripts/bench.py --preset medium [--json FILE]   training steps, generation, evaluation
    python scripts/bench.py --preset medium --table 10      the paper's cost tables 10 and 11
    python scripts/bench.py growth --preset medium          ... by questions, [SEG], size, layers
    python scripts/bench.py data                            start-up with large annotation files
    python scripts/bench.py loader --config C [--lr 1 ...]  samples per second, and time by stage

A preset is a model with random weights: ``tiny`` and ``medium``, small shapes for a CPU, or LLaVA-1.5 ``7b`` and
``13b`` with SAM ViT-H, for a GPU.

Baselines (the fixed last layer, a row per question, no KV cache) alternate with what they are compared with. ``data``
writes annotation files of real size (random polygons, no images) into a temporary folder and opens them as training
does: without the cache, for the first time, and again; each in a fresh process, with DataLoader workers that read every
record. ``loader`` samples the mixture of a configuration (``--dataset_dir``, ``--dataset``, ... as for train_ds.py) and
collates batches, without a model.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import os
import pickle
import platform
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.config import load_config, make_parser
from utils.datasets import get_train_dataset
from utils.datasets.records import CACHE_VARIABLE
from utils.diagnostics import process_memory
from utils.inference import cli
from utils.plotting.text_tables import markdown
from utils.training.versions import git_commit
from utils.wording import counted

if TYPE_CHECKING:
    from model.processing.processor import UGroundProcessor
    from utils.datasets.mixture import Mixture

ROOT = Path(__file__).resolve().parents[1]
MB = 2**20
CHUNK = 500  # records that a worker reads between two measurements of its memory


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(program="train_ds.py", description=__doc__)
    _add_preset(parser, required=False)
    parser.add_argument("--compile", action="store_true", help="also time SAM's encoder with torch.compile")
    parser.add_argument("--table", type=int, choices=(10, 11), help="costs of related methods, as the paper's table")
    parser.add_argument(
        "--questions", type=cli.whole(1), metavar="N", help="per image of a step, for --table 10 (default: 3)"
    )
    parser.add_argument(
        "--limit",
        type=cli.whole(8),
        metavar="N",
        help="images to answer, for --table 11 (default: 8 on a CPU, 32 on a GPU; paper: 799)",
    )
    commands = parser.add_subparsers(dest="command")
    _add_preset(commands.add_parser("growth", help="scaling of a training step"), required=True)
    data = commands.add_parser("data", help="start-up and memory of large annotation files")
    data.add_argument("--refs", type=int, default=150_000, help="refs in the generated file (default: %(default)s)")
    data.add_argument("--annotations", type=int, default=200_000, help="annotations in it (default: %(default)s)")
    data.add_argument("--workers", type=int, default=2, help="worker processes (default: %(default)s)")
    loader = commands.add_parser("loader", help="samples per second of a configuration, and time by stage")
    loader.add_argument("--clip_side", type=int, default=336, help="CLIP's input in pixels (default: %(default)s)")
    loader.add_argument("--clip_patch", type=int, default=14, help="its patch (default: %(default)s)")
    loader.add_argument("--sam_side", type=int, default=1024, help="SAM's input in pixels (default: %(default)s)")
    loader.add_argument("--batches", type=int, default=40, help="batches to time (default: %(default)s)")
    loader.add_argument("--tokenizer", default=str(ROOT / "assets/tiny/llava"), help="folder of a LLaVA tokenizer")
    words = sys.argv[1:] if arguments is None else arguments
    if "loader" in words:
        args, settings = parser.parse_with_settings(make_parser(), words)
        print("\n".join(bench_loader(args, settings)))
        return 0
    args = parser.parse_args(words)
    if args.command is None and args.preset is None:
        parser.error("nothing to measure: give --preset, growth, data or loader (see --help)")
    _check_table(parser, args)
    if args.command == "data":
        lines = bench_data(args)
    elif args.command == "growth":
        lines = bench_growth(args)
    else:
        lines = bench_costs(args) if args.table else bench_model(args)
    print("\n".join(lines))
    return 0


def _add_preset(parser: argparse.ArgumentParser, required: bool) -> None:
    add = parser.add_argument
    add("--preset", choices=("tiny", "medium", "7b", "13b"), required=required, help="the model's size")
    add("--repeats", type=cli.whole(1), default=5, metavar="N", help="repeats after the warm-up (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--json", type=Path, metavar="FILE", help="also write all numbers to this file")


def _check_table(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """An error for flags that would have no effect."""
    if args.table and (args.command or args.compile):
        parser.error(f"--table {args.table} cannot be combined with {args.command or '--compile'}; leave one out")
    for flag, table in (("questions", 10), ("limit", 11)):
        if getattr(args, flag) is not None and args.table != table:
            parser.error(f"--{flag} is for --table {table} alone; leave it out")


def header() -> str:
    """What the numbers depend on besides the options: commit, versions, machine, load."""
    import torch

    busy = os.getloadavg()[0]
    return (
        f"commit {git_commit()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{os.cpu_count()} cores, load {busy:.1f} at the start"
    )


# -- the model ---------------------------------------------------------------------------------------------------------


def _preset(args: argparse.Namespace) -> tuple[Any, str]:
    """The preset, and the device to run it on.

    Raises:
        ValueError: if the preset needs a GPU and there is none.
    """
    # here, so that the processes that ``data`` measures do not import it
    from model.loading.placement import pick_device
    from utils.diagnostics.benchmark import PRESETS

    device, preset = pick_device(args.device), PRESETS[args.preset]
    if preset.gpu and not device.startswith("cuda"):
        raise ValueError(f"--preset {args.preset} needs a GPU, and runs on {device} here; use tiny or medium")
    return preset, device


def bench_model(args: argparse.Namespace) -> list[str]:
    from utils.diagnostics import benchmark

    preset, device = _preset(args)
    with tempfile.TemporaryDirectory(prefix="uground-bench-") as folder:
        bench = benchmark.Bench(preset, device, folder)
        samples = bench.samples(preset.questions)
        batch = bench.batch(samples)
        parts = bench.parts(batch, samples, args.repeats)
        rows, times = benchmark.compare_cases(bench, args.repeats, args.compile)
        step, tokens = times["UGround"]["median"], int((batch.segment_ids >= 0).sum())
        utilisation = benchmark.utilisation(bench, step)
    parts["SAM encoder, an image"] = times["SAM encoder"]["median"]
    figures = {
        "preset": args.preset,
        "device": _device_name(device),
        "commit": git_commit(),
        "ratios": {row.name: row.summary() for row in rows},
        "parts": parts,
        "seconds": times,
        "images_per_second": preset.batch / step,
        "tokens_per_second": tokens / step,
        "answered_images_per_second": {
            images: images / (times[case]["median"] + images * times["SAM encoder"]["median"])
            for images, case in ((1, "1 question"), (8, "8 images"))
        },
        "utilisation": utilisation,
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return [header(), *_model_tables(args, figures, tokens)]


def bench_costs(args: argparse.Namespace) -> list[str]:
    """Table 10 or 11 of the paper."""
    from utils.diagnostics import costs

    preset, device = _preset(args)
    first_line, commit = header(), git_commit()
    with tempfile.TemporaryDirectory(prefix="uground-bench-") as folder:
        benches = costs.Benches(preset, device, folder)
        if args.table == 10:
            amount = args.questions or preset.questions
            rows = costs.training_costs(benches, args.repeats, amount)
            what = f"a training step: {counted(preset.batch, 'image')}, {counted(amount, 'question')} each"
        else:
            amount = args.limit or (32 if device.startswith("cuda") else 8)
            rows = costs.answering_costs(benches, args.repeats, amount)
            what = f"answers of 12 tokens with a mask: {counted(amount, 'image')}"
    figures = {"table": args.table, "preset": args.preset, "device": _device_name(device), "commit": commit}
    figures |= {"questions" if args.table == 10 else "images": amount, "rows": rows}
    figures |= {"paper": {"source": costs.SOURCE} | {name: vars(row) for name, row in costs.PAPER.items()}}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    tables = costs.training_tables(rows) if args.table == 10 else costs.answering_table(rows)
    name = figures["device"]
    setting = f"preset {args.preset} on {name}, {counted(args.repeats, 'repeat')}, {_clock(name)}"
    return [first_line, f"Table {args.table}, {what}; {setting}", *tables]


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def _clock(device_name: str) -> str:
    return "processor time" if device_name == "CPU" else "wall time"


def _model_tables(args: argparse.Namespace, figures: dict[str, Any], tokens: int) -> list[str]:
    whole = figures["parts"]["whole step without data"]
    parts = [[name, f"{1000 * value:,.0f}", f"{value / whole:.0%}"] for name, value in figures["parts"].items()]
    ratios = [
        [
            name,
            f"{row['median']:.2f}",
            f"{row['min']:.2f} to {row['max']:.2f}",
            f"{row['bar']:.2f}" if row["bar"] else "",
        ]
        for name, row in figures["ratios"].items()
    ]
    seconds = [
        [name, *(f"{row[key]:.3f}" for key in ("median", "min", "max")), _megabytes(row.get("peak_bytes"))]
        for name, row in figures["seconds"].items()
    ]
    clock = _clock(figures["device"])
    speed = f"{figures['images_per_second']:.2f} images/s and {figures['tokens_per_second']:,.0f} tokens/s"
    answered = ", ".join(f"{v:.2f} images/s at batch {k}" for k, v in figures["answered_images_per_second"].items())
    used = f", {figures['utilisation']:.0%} of the device's peak" if figures["utilisation"] else ""
    return [
        f"preset {args.preset} on {figures['device']}, {args.repeats} repeats, {clock}",
        f"UGround's step with cached SAM features: {tokens} tokens, {speed}{used}",
        f"a question per image, 12 tokens, a mask, with SAM's encoder: {answered}",
        "",
        markdown([["ratio", "median", "spread", "at most"], *ratios], "lr"),
        "",
        markdown([["part of a step", "ms", "share"], *parts], "lr"),
        "",
        markdown([["case", "seconds", "min", "max", "peak MB"], *seconds], "lr"),
    ]


def _megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / MB:,.0f}"


def bench_growth(args: argparse.Namespace) -> list[str]:
    from utils.diagnostics import growth

    preset, device = _preset(args)
    with tempfile.TemporaryDirectory(prefix="uground-bench-") as folder:
        rows = growth.growth(preset, device, folder, args.repeats)
    if args.json:
        figures = [dict(zip(("what", "value", "seconds", "peak_mb"), row, strict=True)) for row in rows]
        args.json.write_text(
            json.dumps({"preset": args.preset, "commit": git_commit(), "growth": figures}, indent=2) + "\n"
        )
    cells = [[what, str(value), f"{seconds:.2f}", f"{peak:,.0f}"] for what, value, seconds, peak in rows]
    return [header(), "", markdown([["training step against", "", "seconds", "peak MB"], *cells], "lr")]


# -- data: annotation files of real size -------------------------------------------------------------------------------


def write_refs(root: Path, refs: int, annotations: int, rng: np.random.Generator) -> None:
    """Writes ``refcoco`` with 2.5 refs per image and 2.8 sentences per ref, as in RefCOCO."""
    folder = root / "refer_seg/refcoco"
    instances = _instances(annotations, max(1, round(refs / 2.5)), "COCO_train2014_{:012d}.jpg", rng)
    words = [f"word{i}" for i in range(400)]
    rows = []
    for number in range(refs):
        annotation = instances["annotations"][number % annotations]
        sentences = []
        for k in range(2 + (rng.random() < 0.8)):
            text = " ".join(rng.choice(words, size=4))
            sentences.append({"sent_id": 3 * number + k, "sent": text, "raw": text, "tokens": text.split()})
        row = {"ref_id": number, "ann_id": annotation["id"], "category_id": 1, "image_id": annotation["image_id"]}
        rows.append({**row, "split": "train", "file_name": "x_1.jpg", "sentences": sentences, "sent_ids": []})
    _save(folder / "instances.json", instances)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(rows, protocol=2))
    _touch_first(root / "refer_seg/images/mscoco/images/train2014", instances)


def write_parts(root: Path, annotations: int, rng: np.random.Generator) -> None:
    """Writes ``paco_lvis`` with 10 annotations per image."""
    instances = _instances(annotations, max(1, annotations // 10), "train2017/{:012d}.jpg", rng)
    instances["categories"] = [{"id": i + 1, "name": f"object{i // 6}:part{i % 6}"} for i in range(500)]
    _save(root / "vlpart/paco/annotations/paco_lvis_v1_train.json", instances)
    _touch_first(root / "coco", instances)


def _instances(annotations: int, images: int, name: str, rng: np.random.Generator) -> dict[str, Any]:
    """Random polygons with two decimals and about as many points as COCO's (740 bytes per annotation)."""
    rows = []
    for number in range(annotations):
        angles = np.linspace(0, 2 * np.pi, int(rng.integers(16, 65)), endpoint=False)
        radii = 60 * (1 + 0.3 * rng.standard_normal(len(angles)).clip(-2, 2))
        points = np.stack([320 + radii * np.cos(angles), 240 + radii * np.sin(angles)], axis=1)
        row = {"id": number + 1, "image_id": 1 + number % images, "category_id": 1 + number % 500, "iscrowd": 0}
        rows.append({**row, "bbox": [200.5, 120.25, 240.0, 240.0], "segmentation": [points.round(2).ravel().tolist()]})
    pictures = [{"id": i + 1, "file_name": name.format(i + 1), "height": 480, "width": 640} for i in range(images)]
    return {"images": pictures, "annotations": rows, "categories": [{"id": 1, "name": "thing"}]}


def _save(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(value))


def _touch_first(folder: Path, instances: dict[str, Any]) -> None:
    """Creates the first image, which a reader looks for when it is opened."""
    path = folder / instances["images"][0]["file_name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


# -- data: start-up and memory -----------------------------------------------------------------------------------------


@dataclass
class Memory:
    """Memory of a process in bytes: resident, and the part that it does not share."""

    resident: int
    private: int

    @classmethod
    def now(cls) -> Memory:
        sizes = process_memory.read_proc("self/smaps_rollup")
        return cls(sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"])


class ChunkReader:
    """Item i reads chunk i of the records, and returns the process and its memory before and after."""

    def __init__(self, records: Any) -> None:
        self.records = records

    def __len__(self) -> int:
        return -(-len(self.records) // CHUNK)

    def __getitem__(self, chunk: int) -> tuple[int, Memory, Memory]:
        before = Memory.now()
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.records))):
            dict(self.records[i])
        return os.getpid(), before, Memory.now()


def measure_start(name: str, folder: str, setting: str, workers: int, as_objects: bool, results: Any) -> None:
    """In a fresh process: opens the data set, then lets workers read all of it."""
    from torch.utils.data import DataLoader

    os.environ[CACHE_VARIABLE] = setting
    start = time.perf_counter()
    dataset: Any = get_train_dataset(name, folder)
    seconds = time.perf_counter() - start
    peak = process_memory.peak_resident()
    records = dataset.split.images if hasattr(dataset, "split") else dataset.reader.records
    if as_objects:
        records = list(records)
    first: dict[int, Memory] = {}
    last: dict[int, Memory] = {}
    # a spawned process would spawn its workers, too; training forks them
    reader: Any = ChunkReader(records)
    loader = DataLoader(reader, batch_size=None, num_workers=workers, multiprocessing_context="fork")
    for process, before, after in loader:
        first.setdefault(process, before)
        last[process] = after
    worst = max(last, key=lambda process: last[process].private - first[process].private)
    results.put((seconds, peak, first[worst], last[worst]))


STARTS = ("no cache", "first start", "next start", "next start, from disk", "no cache, Python objects")


def bench_data(args: argparse.Namespace) -> list[str]:
    lines = [header(), ""]
    columns = ["", "seconds", "of first", "peak MB", "worker RSS MB", "its own MB", "+ RSS MB", "+ own MB"]
    with tempfile.TemporaryDirectory(prefix="uground-bench-") as folder:
        rng = np.random.default_rng(0)
        write_refs(Path(folder), args.refs, args.annotations, rng)
        write_parts(Path(folder), args.annotations, rng)
        time.sleep(2.5)  # files written just now are not cached
        for name, what in (("refcoco", f"{args.refs:,} refs, "), ("paco_lvis", "")):
            measured = {start: _in_fresh_process(name, Path(folder), start, args.workers) for start in STARTS}
            rows = [columns]
            for start, (seconds, peak, before, after) in measured.items():
                share = (
                    f"1/{measured['first start'][0] / seconds:.0f}" if seconds < measured["first start"][0] / 2 else ""
                )
                growth = after.resident - before.resident, after.private - before.private
                sizes = [value / MB for value in (peak, after.resident, after.private, *growth)]
                rows.append([start, f"{seconds:.2f}", share, *(f"{size:,.0f}" for size in sizes)])
            files = sum(path.stat().st_size for path in _annotation_files(Path(folder), name)) / MB
            entries = sum(path.stat().st_size for path in (Path(folder) / f"cache-{name}").glob("*.index")) / MB
            lines += [f"{name}: {what}{args.annotations:,} annotations, {files:.0f} MB; its index {entries:.0f} MB", ""]
            lines += [markdown(rows, "lr"), ""]
    return lines


def _annotation_files(root: Path, name: str) -> list[Path]:
    folder = root / ("refer_seg/refcoco" if name == "refcoco" else "vlpart")
    return [path for path in folder.rglob("*") if path.is_file()]


def _in_fresh_process(name: str, folder: Path, start: str, workers: int) -> tuple[float, int, Memory, Memory]:
    cache = folder / f"cache-{name}"
    if "disk" in start:
        for path in cache.glob("*.index"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    setting = "off" if start.startswith("no cache") else str(cache)
    arguments = (name, str(folder), setting, workers, "objects" in start, results)
    process = context.Process(target=measure_start, args=arguments)
    process.start()
    measured = results.get()
    process.join()
    return measured


# -- loader ------------------------------------------------------------------------------------------------------------

# Stage -> functions (file, name) whose cumulative time is the stage's; none of them calls another.
STAGES = {
    "decode the photograph": (("images.py", "read_image"),),
    "read the label image": (("images.py", "read_label_image"),),
    "annotations (JSON)": (("base.py", "read_json"), ("records.py", "__getitem__")),
    "masks": (
        ("masks.py", "decode_segmentation"),
        ("reason_seg.py", "rasterize_polygons"),
        ("sem_seg.py", "label_mask"),
        ("masks.py", "stack_masks"),
    ),
    "check the sample": (("base.py", "check_sample"),),
    "tokenise": (("conversation.py", "encode"),),
    "resize, normalise, pad": (("transforms.py", "resize_and_pad"),),
    "fresh memory for the batch": (("~", "<built-in method torch.zeros>"),),
}


def bench_loader(args: argparse.Namespace, settings: list[str]) -> list[str]:
    # here, so that the processes that ``data`` measures do not import these libraries
    from transformers import AutoTokenizer

    from model.backbones.llava import ClipReader
    from model.processing.processor import UGroundProcessor
    from train_ds import one_thread
    from utils.datasets.mixture import make_mixture

    config = load_config(settings, needs=("data",))
    mixture = make_mixture(config)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    processor = UGroundProcessor(tokenizer, ClipReader(args.clip_side, args.clip_patch), args.sam_side)
    batch = config.train.batch_size
    one_thread(0)
    lines = [
        header(),
        f"CLIP {args.clip_side} px, SAM {args.sam_side} px, batches of {batch}",
        "",
        mixture.table(),
        "",
    ]
    rows = [["workers", "samples/s"]]
    for workers in (0, config.data.workers):
        speed = throughput(mixture, processor, batch, args.batches, workers, one_thread)
        rows.append([str(workers), f"{speed:,.1f}"])
    profile = cProfile.Profile(time.process_time)  # processor time: other programs do not count
    profile.runcall(
        lambda: [processor.collate([mixture[i * batch + j] for j in range(batch)]) for i in range(args.batches)]
    )
    return [*lines, markdown(rows, "lr"), "", markdown(stages(pstats.Stats(profile), args.batches * batch), "lr")]


def throughput(
    mixture: Mixture, processor: UGroundProcessor, batch: int, batches: int, workers: int, init: Callable[[int], None]
) -> float:
    """Samples per second after the workers have started."""
    from torch.utils.data import DataLoader

    from utils.datasets.mixture import MixtureSampler

    warm = 2 * workers + 1
    loader = DataLoader(
        mixture,
        batch_sampler=MixtureSampler(batch, 0, warm + batches),
        collate_fn=processor.collate,
        num_workers=workers,
        worker_init_fn=init,
    )
    start = 0.0
    for number, _ in enumerate(loader, start=1):
        if number == warm:
            start = time.perf_counter()
    return batch * batches / (time.perf_counter() - start)


def stages(stats: pstats.Stats, samples: int) -> list[list[str]]:
    """Milliseconds of processor time per sample in each stage, in one process."""
    total: float = stats.total_tt  # type: ignore[attr-defined]
    times = {}
    for stage, functions in STAGES.items():
        cumulative = [
            row[3]
            for (file, _, name), row in stats.stats.items()  # type: ignore[attr-defined]
            if (Path(file).name, name) in functions
        ]
        times[stage] = sum(cumulative)
    times["the rest"] = total - sum(times.values())
    rows = [["stage", "CPU ms per sample", "share"]]
    for stage, seconds in sorted(times.items(), key=lambda item: -item[1]):
        rows.append([stage, f"{1000 * seconds / samples:,.1f}", f"{seconds / total:.0%}"])
    return [*rows, ["all", f"{1000 * total / samples:,.1f}", ""]]


if __name__ == "__main__":
    sys.exit(cli.run(main))
