"""Scores answers, without a model: those that test.py wrote, or those of any other model.

    python scripts/score.py runs/tiny/eval/*.jsonl
    python scripts/score.py --benchmark SPEC --dataset_dir D --list_queries queries.jsonl
    python scripts/score.py --benchmark SPEC --dataset_dir D --predictions answers.jsonl
    python scripts/score.py --benchmark SPEC --dataset_dir D --callable my_model:answer --output out

The first form reads the answers alone; its numbers equal test.py's to the last bit, which is checked if the JSON is
beside them. The others read the ground truth, too. --predictions: a line per query, in the format of
docs/scoring.md, of which test.py's files are. --callable: a Python function, (image, query) -> (masks, text).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.evaluation.benchmarks import PROTOCOLS, SEVERAL_SEG, benchmark_of
from utils.evaluation.metrics import RANKED_BY, ranked_by
from utils.evaluation.result_text import format_table
from utils.evaluation.results import Summary, read_results, result_path, summarize
from utils.inference import cli

SOURCES = ("predictions", "callable", "list_queries")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("results", nargs="*", type=Path, metavar="JSONL", help="answers that test.py wrote")
    add("--benchmark", metavar="SPEC", help='whose queries were answered: "ReasonSeg|val", "refcoco|unc|testA", ...')
    add("--dataset_dir", type=Path, metavar="DIR", help="folder that holds reason_seg/, refer_seg/, coco/, ...")
    add("--predictions", type=Path, metavar="FILE", help="score these answers")
    add("--callable", metavar="MODULE:FUNCTION", help="ask this function, and write its answers to --output")
    add("--list_queries", type=Path, metavar="FILE", help="only write what there is to answer, a line per query")
    add("--output", type=Path, metavar="DIR", help="also write the result there, as test.py does (scripts/compare.py)")
    add("--resume", action="store_true", help="--callable: keep the answers that an interrupted run left in --output")
    add(
        "--allow_missing",
        action="store_true",
        help="leave out queries without an answer and images that cannot be read, and print their number",
    )
    add("--limit", type=cli.whole(1), metavar="N", help="only the first N images of the benchmark")
    add("--protocol", choices=PROTOCOLS, help="docs/evaluation.md (default: as it was evaluated)")
    add("--several_seg", choices=SEVERAL_SEG, help="scored mask of several (default: as evaluated, else union)")
    add(
        "--rank_by",
        choices=RANKED_BY,
        help="report AURC and AUSE of this uncertainty (docs/evaluation.md): ambiguity and predicted_iou of any "
        "answers, layers of those of mc:T (default: layers, where there is one)",
    )
    add("--json", action="store_true", help="print all digits, intervals and counts as JSON")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises a ValueError for flags that do not go together."""
    given = [name for name in SOURCES if getattr(args, name) is not None]
    if args.results:
        others = [*given, *(name for name in ("benchmark", "output", "limit") if getattr(args, name) is not None)]
        if others:
            raise ValueError(f"test.py's answers name their benchmark: leave --{others[0]} out, or give the file as "
                             "--predictions")  # fmt: skip
        return
    if len(given) != 1:
        names = ", ".join(f"--{name}" for name in SOURCES)
        raise ValueError(f"give test.py's JSONL files, or --benchmark and one of {names}")
    if args.predictions and not args.predictions.is_file():
        raise ValueError(f"--predictions {args.predictions}: no such file")
    for name in ("benchmark", "dataset_dir", *(["output"] if args.callable else [])):
        if getattr(args, name) is None:
            raise ValueError(f"--{given[0]} needs --{name}")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.list_queries:
        return list_queries(args)
    if args.results:
        summaries = [rescore(path, args.protocol, args.several_seg, args.rank_by) for path in args.results]
    else:
        summaries = [score_any(args)]
    if args.json:
        ranked = {"rank_by": args.rank_by} if args.rank_by else {}
        print(json.dumps([summary.to_dict() | ranked for summary in summaries], indent=2, ensure_ascii=False))
        return 0
    print(format_table(summaries))
    if args.rank_by:
        print(f"AURC and AUSE rank the answers by {args.rank_by}.")
    return 0


def list_queries(args: argparse.Namespace) -> int:
    from utils.datasets import get_eval_dataset
    from utils.evaluation.any_model import write_queries

    if args.list_queries.exists():
        raise ValueError(f"{args.list_queries} exists; give another file")
    dataset = get_eval_dataset(args.benchmark, args.dataset_dir)
    count = write_queries(dataset, args.list_queries, args.limit)
    print(f"{count} queries of {args.benchmark} in {args.list_queries}")
    return 0


def score_any(args: argparse.Namespace) -> Summary:
    """The summary of another model's answers, which --output keeps."""
    from utils.datasets import get_eval_dataset
    from utils.evaluation import any_model

    function = any_model.load_callable(args.callable) if args.callable else None
    dataset = get_eval_dataset(args.benchmark, args.dataset_dir, args.allow_missing)
    path = args.predictions
    if function is not None:
        path = args.output / "answers" / f"{dataset.spec.slug}.jsonl"
        if path.exists() and not args.resume:
            raise ValueError(f"{path} exists: --resume goes on with it, or give another --output")
        path.parent.mkdir(parents=True, exist_ok=True)
        any_model.ask(dataset, function, path, args.limit, args.allow_missing, progress=True)
    result = any_model.score_file(
        dataset, path, args.protocol, args.several_seg, args.limit, args.allow_missing, args.rank_by, progress=True
    )
    if args.output:
        written = result_path(args.output, dataset.spec, result.provenance.mode)
        if written.exists() and not args.resume:
            raise ValueError(f"{written} exists; give another --output")
        args.output.mkdir(parents=True, exist_ok=True)
        result.save(args.output)
    return result.summary


def rescore(
    path: Path, protocol: str | None = None, several_seg: str | None = None, rank_by: str | None = None
) -> Summary:
    """The summary of a result file.

    Raises:
        ValueError: for a missing file, a line that is no answer, or other numbers in the JSON beside the file.
    """
    if not path.is_file():
        raise ValueError(f"no file matches {path}; give the JSONL that test.py wrote")
    provenance, records = read_results(path)
    if rank_by:
        records = ranked_by(records, rank_by)
    benchmark, mode = benchmark_of(provenance.spec), provenance.mode
    provenance = replace(
        provenance,
        protocol=benchmark.protocol(protocol or provenance.protocol, mode),
        several_seg=several_seg or provenance.several_seg,
    )
    summary = replace(summarize(provenance, records), checkpoint=provenance.checkpoint)
    json_path = path.with_suffix(".json")
    if json_path.is_file():
        saved = Summary.load(json_path)
        summary.counts |= {key: saved.counts.get(key, 0) for key in ("skipped", "missing")}
        saved.counts.setdefault("answers_cut", summary.counts["answers_cut"])  # older versions did not count them
        scored_by = benchmark.protocol(saved.protocol, mode), saved.several_seg
        if scored_by == (summary.protocol, summary.several_seg) and not rank_by:
            for key in ("benchmark", "mode", "layer_policy", "metrics", "intervals", "breakdown", "counts", "layers"):
                before, now = getattr(saved, key), getattr(summary, key)
                if before != now:
                    raise ValueError(
                        f"{json_path} has other {key} than follow from {path.name}: {before} there, {now} recomputed; "
                        "one of the two files was changed, or an older version wrote them"
                    )
    return summary


if __name__ == "__main__":
    sys.exit(cli.run(main))
