"""Evaluates a trained model on benchmarks: a table on stdout, JSON, JSONL and pictures in a folder.

    python test.py --version runs/tiny/merged --dataset_dir data/demo --val_dataset "ReasonSeg|val||grefcoco|unc|val"

What the numbers mean is in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from model import Opened
from model.opened import cache_sam_features
from model.structures import MAX_NEW_TOKENS
from utils import distributed
from utils.command_line.parser import Parser
from utils.datasets import Spec, get_eval_dataset
from utils.datasets.base import EvalDataset, MissingDataError
from utils.evaluation.benchmarks import MODES, PROTOCOLS, SEVERAL_SEG, SUITES, benchmark_of
from utils.evaluation.controls import CONTROLS, query_agnostic_baselines
from utils.evaluation.metrics import Record, select
from utils.evaluation.panels import panels
from utils.evaluation.paper_tables import fill
from utils.evaluation.paper_tables import write as write_tables
from utils.evaluation.predictions import InferenceOptions
from utils.evaluation.result_text import format_table
from utils.evaluation.results import Journal, Result, result_path
from utils.inference import cli
from utils.plotting.overlays import Panel, save_picture, sheet
from utils.training.versions import package_versions
from utils.wording import counted

if TYPE_CHECKING:
    from utils.evaluation.engine import RunOptions


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        program="test.py",
        description="Evaluates a trained UGround model. Prints a table; writes BENCHMARK.MODE.json (metrics, "
        "intervals, counts, versions) and BENCHMARK.MODE.jsonl (one line per sample, masks as COCO RLE) to --output.",
        epilog="Processes share the images without padding or repeats: --processes N, deepspeed test.py, torchrun "
        "test.py. Counting is exact; the model's arithmetic depends a little on the batches.",
    )
    add = parser.add_argument
    cli.add_model_flags(parser)
    add("--dataset_dir", required=True, metavar="DIR", help="folder that holds reason_seg/, refer_seg/, coco/, ...")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--val_dataset",
        metavar="SPEC",
        help='what to evaluate: "ReasonSeg|val_short", "refcoco|unc|val", "grefcoco|unc|val"; several joined by "||"',
    )
    data.add_argument(
        "--suite",
        choices=tuple(SUITES),
        help="benchmarks of the paper's tables, or all, as far as their data are found",
    )
    add(
        "--mode",
        choices=("paper", *MODES, "both"),
        default="paper",
        help="generate: the answer is generated, and every [SEG] in it is decoded. teacher_forced: the answer template "
        "is given, and its [SEG] is decoded. paper: as the paper reports the benchmark (default)",
    )
    add(
        "--protocol",
        choices=PROTOCOLS,
        help="how benchmarks score that have several protocols (docs/evaluation.md). published: as the code behind the "
        "published numbers counts ReasonSeg, gRefCOCO and MUSE; strict: the default of ReasonSeg and MUSE. gRefCOCO "
        "also: gsva (default: a rejected target is scored by the mask that is decoded anyway), grefcoco (I = 0), rela "
        "(the same, and only [REJ] rejects). A generated rejection has no mask: --mode generate is grefcoco or rela",
    )
    add(
        "--several_seg",
        choices=SEVERAL_SEG,
        default="union",
        help="what is scored of an answer with several [SEG] where one mask is expected: the union of their masks "
        "(default), or the first (SESAME)",
    )
    layer_flags = parser.add_mutually_exclusive_group()
    cli.add_layer_flag(layer_flags, "default: as the model was trained; argmax with a policy")
    layer_flags.add_argument(
        "--layer",
        type=lambda text: f"fixed:{cli.whole(0)(text)}",
        dest="layer_policy",
        metavar="K",
        help="force hidden state K; short for --layer_policy fixed:K",
    )
    cli.add_think_flag(parser)
    add_running_flags(parser)
    return parser.parse_args(arguments)


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of how an evaluation runs, and of what it writes."""
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: eval/ in the --version folder; for a hub id runs/ORG--NAME/eval)",
    )
    add(
        "--save_overlays", type=cli.whole(0), default=0, metavar="N", help="also plot N samples, from worst to best IoU"
    )
    add(
        "--control",
        action="append",
        choices=CONTROLS,
        default=[],
        help="shuffled_prompts: evaluate again with the queries exchanged among the images; a model that ignores the "
        "text scores the same. The images are encoded once for both",
    )
    add(
        "--processes",
        type=cli.whole(1),
        default=1,
        metavar="N",
        help="share the images among N processes of this machine, one per GPU, or all on the CPU (default: 1)",
    )
    add("--resume", action="store_true", help="resume from the answers that an interrupted evaluation left in --output")
    add(
        "--allow_missing",
        action="store_true",
        help="leave out images that cannot be read, and print their number beside every result (default: they stop the "
        "evaluation)",
    )
    add("--limit", type=cli.whole(1), metavar="N", help="only the first N images of each benchmark")
    add("--batch_size", type=cli.whole(1), default=4, metavar="N", help="images per step (default: 4)")
    add(
        "--workers",
        type=cli.whole(0),
        metavar="N",
        help="processes that load images ahead (default: 2 with a GPU, else 0)",
    )
    add(
        "--sam_feature_cache",
        default="",
        metavar="DIR",
        help="cache SAM's image embeddings here, for other benchmarks, modes and checkpoints on the same images",
    )
    add(
        "--sam_feature_cache_gb",
        type=float,
        default=100.0,
        metavar="GB",
        help="maximum size of the cache; the least recently used embeddings are deleted first (default: 100)",
    )
    add("--compile_sam", action="store_true", help="torch.compile SAM's image encoder: faster, after half a minute")
    length = "longest generated answer (default: %(default)s)"
    add("--max_new_tokens", type=cli.whole(1), default=MAX_NEW_TOKENS, metavar="N", help=length)
    add("--seed", type=int, default=0, metavar="S", help="of sampled layers and shuffling (default: 0)")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by the deepspeed launcher


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if args.processes > 1 and started == 1:
        open_datasets(args)  # what is missing is said once
        start_processes(args.processes, args.device, sys.argv[1:] if arguments is None else arguments)
    if args.processes not in (1, started):
        raise ValueError(f"--processes {args.processes}, but a launcher started {started}: leave one of the two out")

    from utils.evaluation.engine import evaluate, provenance_of

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    device = init_processes(args.device)
    datasets, unavailable = open_datasets(args)  # a typo fails before the model is loaded
    given = [str(dataset.spec) for dataset in datasets if "generate" not in modes_of(args.mode, dataset.spec)]
    if args.think != "auto" and given:
        raise ValueError(
            f"--think {args.think}: with --mode {args.mode} the answers to {', '.join(given)} are given; add --mode "
            "generate"
        )
    opened = cli.open_model(args, device)
    model, processor = opened.model, opened.processor
    if args.sam_feature_cache:
        cache_sam_features(model, processor, args.sam_feature_cache, args.sam_feature_cache_gb)
    if args.compile_sam:
        model.visual_model.compile_encoder()
    args.layer_policy = args.layer_policy or model.config.layer_policy
    opened.processor.opening(args.think)  # raises if the model writes no thoughts
    output = args.output or output_of(args.version)
    output.mkdir(parents=True, exist_ok=True)  # fails, if at all, before hours of work
    run_info = describe_run(args, opened)
    jobs = [
        (dataset, *options_of(args, dataset, mode, output, opened.fingerprint))
        for dataset in datasets
        for mode in modes_of(args.mode, dataset.spec)
    ]
    for dataset, options, run in jobs:  # a journal of another evaluation is rejected now, not hours later
        if run.resume and run.journal:
            run.journal.read(provenance_of(model, dataset, options, run))

    summaries, files = [], []
    for dataset, options, run in jobs:
        result = evaluate(model, processor, dataset, options, run)
        result.summary = replace(result.summary, **run_info)
        result.summary.controls |= query_agnostic_baselines(Path(args.dataset_dir), dataset.spec)
        summaries.append(result.summary)
        if distributed.is_main():
            files.append(result.save(output))
            if count := args.save_overlays:
                protocol = result.provenance.protocol
                scored = select(result.records, protocol, args.several_seg)
                what = dataset, scored, count, options, protocol, args.batch_size
                sample_panels = panels(model, processor, *what)
                files.append(save_overlays(output, result, sample_panels, args.version))
    if distributed.is_main():
        tables = fill(args.version, summaries) if args.suite or len(summaries) > 1 else []
        notes = [f"Not evaluated, data not found: {', '.join(unavailable)}"] if unavailable else []
        files += write_tables(output, tables, notes) if tables else []
        wrapped = (textwrap.fill(note, 110, break_on_hyphens=False) for note in notes)
        print(f"{args.version} (fingerprint {opened.fingerprint}), {opened.precision} on {device}\n")
        print("\n\n".join([format_table(summaries), *(table.text() for table in tables), *wrapped]))
        print("\n" + "\n".join(f"wrote {path}" for path in files))
    distributed.shutdown()
    return 0


def open_datasets(args: argparse.Namespace) -> tuple[list[EvalDataset], list[str]]:
    """The data sets to evaluate, and the names of a suite's benchmarks whose data are not found.

    Raises:
        ValueError: if a benchmark of --val_dataset or all of a suite are not found, or for incomplete or damaged data.
    """
    if args.suite is None:
        specs = Spec.parse_list(args.val_dataset)
        if not specs:
            raise ValueError('--val_dataset names nothing; give for example "ReasonSeg|val_short"')
        return [get_eval_dataset(spec, args.dataset_dir, args.allow_missing) for spec in specs], []
    datasets: list[EvalDataset] = []
    unavailable: dict[str, str] = {}
    for spec in SUITES[args.suite]:
        try:
            datasets.append(get_eval_dataset(spec, args.dataset_dir, args.allow_missing))
        except MissingDataError as error:
            unavailable[str(spec)] = str(error)
    if not datasets:
        raise ValueError(
            "--suite {}: {} holds none of its benchmarks\n  {}".format(
                args.suite, args.dataset_dir, "\n  ".join(unavailable.values())
            )
        )
    if distributed.is_main():
        print(*(f"not evaluated: {reason}" for reason in unavailable.values()), sep="\n", file=sys.stderr)
    return datasets, list(unavailable)


def options_of(
    args: argparse.Namespace, dataset: EvalDataset, mode: str, output: Path, checkpoint: str
) -> tuple[InferenceOptions, RunOptions]:
    """The options of one benchmark in one mode."""
    from utils.evaluation.engine import RunOptions

    options = InferenceOptions(mode, args.layer_policy, args.max_new_tokens, args.seed, args.think)
    run = RunOptions(
        batch_size=args.batch_size,
        workers=args.workers,
        limit=args.limit,
        protocol=args.protocol,
        several_seg=args.several_seg,
        controls=args.control,
        checkpoint=checkpoint,
        quantize=args.quantize or "",
        journal=Journal(result_path(output, dataset.spec, mode)),
        resume=args.resume,
        allow_missing=args.allow_missing,
        progress=True,
    )
    return options, run


def save_overlays(folder: Path, result: Result, sample_panels: list[tuple[Record, Panel]], model: str) -> Path:
    """Writes a picture per sample, and one sheet of all; returns the sheet's path."""
    provenance = result.provenance
    name = result_path(folder, provenance.spec, provenance.mode).stem
    for old in (folder / f"{name}.overlays").glob("*.png"):
        old.unlink()  # of an earlier run, possibly of another checkpoint
    for record, panel in sample_panels:
        file_name = f"{record.image_id}_{record.query_id}".replace("/", "_")
        save_picture(folder / f"{name}.overlays" / f"{file_name}.png", sheet([panel]))
    title = (
        f"{provenance.benchmark}, {provenance.mode}, layer {provenance.layer_policy}, {model}: {len(sample_panels)} of "
        f"{len(result.records)} samples, evenly spaced from the worst to the best IoU"
    )
    path = folder / f"{name}.overlays.png"
    save_picture(path, sheet([panel for _, panel in sample_panels], title))
    return path


def output_of(version: str) -> Path:
    """The folder of results without ``--output``: inside the model's, or ``runs/org--name`` for one of the hub."""
    folder = Path(version) if Path(version).is_dir() else Path("runs", version.removeprefix("hub:").replace("/", "--"))
    return folder / "eval"


def modes_of(mode: str, spec: Spec) -> tuple[str, ...]:
    if mode == "paper":
        return (benchmark_of(spec).mode,)
    return MODES if mode == "both" else (mode,)


def start_processes(count: int, device: str, arguments: Sequence[str]) -> NoReturn:
    """Becomes torch's launcher, which runs this program in several processes.

    Raises:
        ValueError: if there are fewer GPUs.
    """
    import torch

    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu and count > (gpus := torch.cuda.device_count()):
        raise ValueError(f"--processes {count}: this machine has {counted(gpus, 'GPU')}; each process needs one")
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads, **os.environ} | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    environment.pop("WORLD_SIZE", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    sys.stdout.flush()
    os.execve(sys.executable, [*command, __file__, *arguments], environment)


def init_processes(requested: str) -> str:
    """This process's device; initializes torch.distributed under a launcher."""
    from model.loading.placement import pick_device

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return str(distributed.init())
    return pick_device(requested)


def describe_run(args: argparse.Namespace, opened: Opened) -> dict[str, Any]:
    """Fields of a summary: checkpoint, command, precision, device, versions."""
    return {
        "checkpoint": {"folder": opened.folder, "fingerprint": opened.fingerprint},
        "command": shlex.join(sys.argv),
        "precision": opened.precision,
        "device": opened.device,
        "versions": package_versions("torch", "transformers", "segment-anything", "numpy", "pycocotools"),
    }


if __name__ == "__main__":
    distributed.exit_process(cli.run(main))
