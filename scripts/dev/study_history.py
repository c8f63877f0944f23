"""Measures what it does to a model's answers that it sees the earlier questions of a conversation.

    python scripts/dev/study_history.py --version runs/tiny/merged --dataset_dir data/demo \
        --val_dataset "grefcoco|unc|val"

Every image's questions are asked twice, one after the other (chat.py --history on) and each by itself. The first ones,
which have nothing before them, are left out. Prints the benchmark's metrics and their paired differences.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from model import Opened
from model.structures import EvalSample
from utils.datasets import Spec, get_eval_dataset
from utils.evaluation import metrics
from utils.evaluation.benchmarks import Benchmark, benchmark_of
from utils.evaluation.metrics import Record
from utils.evaluation.predictions import by_query, score, turns_of
from utils.inference import cli
from utils.inference.session import ImageSession
from utils.plotting import text_tables


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    specs = Spec.parse_list(args.val_dataset)
    datasets = [get_eval_dataset(spec, args.dataset_dir) for spec in specs]  # a typing error shows before the loading
    opened = cli.open_model(args)
    for dataset in datasets:
        benchmark = benchmark_of(dataset.spec)
        apart: list[Record] = []
        together: list[Record] = []
        places = range(min(args.limit, len(dataset)))
        for place in tqdm(places, desc=str(dataset.spec), unit="image", disable=None):
            for remember, records in ((False, apart), (True, together)):
                records += later_answers(opened, place, dataset[place], benchmark, args.questions, remember)
        if not apart:
            raise ValueError(f"{dataset.spec} has one question per image: none has an earlier one")
        print("\n".join(lines(dataset.spec, benchmark, apart, together)))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cli.add_model_flags(parser)
    add("--dataset_dir", required=True, metavar="DIR", help="folder that holds refer_seg/, reason_seg/, ...")
    add("--val_dataset", required=True, metavar="SPEC", help='"grefcoco|unc|val"; several joined by "||"')
    add("--limit", type=int, default=100, metavar="N", help="the first N images (default: 100)")
    add("--questions", type=int, default=4, metavar="K", help="the first K of each image (default: 4)")
    args = parser.parse_args(argv)
    if args.limit < 1 or args.questions < 2:
        parser.error("--limit must be at least 1, --questions at least 2")
    return args


def later_answers(
    opened: Opened, place: int, sample: EvalSample, benchmark: Benchmark, most: int, remember: bool
) -> list[Record]:
    """The scored answers to all but the first of an image's questions."""
    [turns] = turns_of([sample], benchmark, "generate")
    session = ImageSession(opened.model, opened.processor, sample.image)
    predictions = [session.ask(turn.question, remember=remember) for turn in turns[:most]]
    queries, turns = sample.queries[:most], turns[:most]
    sample.queries = queries
    [answers] = by_query([sample], [turns], [predictions], benchmark, "generate")
    scored = [score(place, sample, query, answer, benchmark) for query, answer in zip(queries, answers, strict=True)]
    return scored[1:]


def lines(spec: Spec, benchmark: Benchmark, apart: list[Record], together: list[Record]) -> list[str]:
    """A line per metric: by itself, after the others, and the difference with its 95% interval."""
    alone, after = metrics.compute(apart, benchmark), metrics.compute(together, benchmark)
    differences = metrics.difference(apart, together, benchmark)
    rows = [["metric", "by itself", "after others", "difference"]]
    for name, (change, (low, high)) in differences.items():
        rows.append([name, f"{alone[name]:.3f}", f"{after[name]:.3f}", f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"])
    return [f"{spec}, {len(apart)} answers", *text_tables.aligned(rows, "lrrl")]


if __name__ == "__main__":
    sys.exit(cli.run(main))
