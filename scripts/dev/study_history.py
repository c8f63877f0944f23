r"""Measures the effect of a conversation's history on a model's answers.

    python scripts/dev/study_history.py --version runs/tiny/merged --dataset_dir data/demo \
        --val_dataset "grefcoco|unc|val"

Every image's questions are asked twice: as one conversation (chat.py --history on) and independently. First questions,
which have no history, are not scored. Prints the benchmark's metrics and their paired differences.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from model import Opened
from model.structures import EvalSample
from utils.command_line.parser import Parser
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
    datasets = [get_eval_dataset(spec, args.dataset_dir) for spec in specs]  # a typo fails before the model is loaded
    opened = cli.open_model(args)
    for dataset in datasets:
        benchmark = benchmark_of(dataset.spec)
        independent: list[Record] = []
        conversation: list[Record] = []
        indices = range(min(args.limit, len(dataset)))
        for index in tqdm(indices, desc=str(dataset.spec), unit="image", disable=None):
            for remember, records in ((False, independent), (True, conversation)):
                records += later_answers(opened, index, dataset[index], benchmark, args.questions, remember)
        if not independent:
            raise ValueError(f"{dataset.spec} has one question per image, so no question has a history")
        print("\n".join(lines(dataset.spec, benchmark, independent, conversation)))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser)
    add("--dataset_dir", required=True, metavar="DIR", help="folder that holds refer_seg/, reason_seg/, ...")
    add("--val_dataset", required=True, metavar="SPEC", help='"grefcoco|unc|val"; several joined by "||"')
    add("--limit", type=cli.whole(1), default=100, metavar="N", help="the first N images (default: 100)")
    add("--questions", type=cli.whole(2), default=4, metavar="K", help="the first K of each image (default: 4)")
    return parser.parse_args(argv)


def later_answers(
    opened: Opened, index: int, sample: EvalSample, benchmark: Benchmark, limit: int, remember: bool
) -> list[Record]:
    """The scored answers to all but the first of an image's questions."""
    [turns] = turns_of([sample], benchmark, "generate")
    session = ImageSession(opened.model, opened.processor, sample.image)
    predictions = [session.ask(turn.question, remember=remember) for turn in turns[:limit]]
    queries, turns = sample.queries[:limit], turns[:limit]
    sample.queries = queries
    [answers] = by_query([sample], [turns], [predictions], benchmark, "generate")
    scored = [score(index, sample, query, answer, benchmark) for query, answer in zip(queries, answers, strict=True)]
    return scored[1:]


def lines(spec: Spec, benchmark: Benchmark, independent: list[Record], conversation: list[Record]) -> list[str]:
    """A table of metrics: independent questions, conversations, and their difference with its 95% interval."""
    alone, after = metrics.compute(independent, benchmark), metrics.compute(conversation, benchmark)
    differences = metrics.difference(independent, conversation, benchmark)
    rows = [["metric", "by itself", "after others", "difference"]]
    for name, (change, (low, high)) in differences.items():
        rows.append([name, f"{alone[name]:.3f}", f"{after[name]:.3f}", f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"])
    return [f"{spec}, {len(independent)} answers", *text_tables.aligned(rows, "lrrl")]


if __name__ == "__main__":
    sys.exit(cli.run(main))
