"""Recomputes metrics from the answers alone, without the model or the data.

    python scripts/score.py runs/tiny/eval/*.jsonl

The numbers equal test.py's to the last bit; this is checked if its JSON is beside the answers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.evaluation.benchmarks import PROTOCOLS, SEVERAL_SEG, benchmark_of
from utils.evaluation.metrics import RANKED_BY, ranked_by
from utils.evaluation.result_text import format_table
from utils.evaluation.results import Summary, read_results, summarize
from utils.inference import cli


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="JSONL", help="answers that test.py wrote")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="docs/evaluation.md (default: as it was evaluated)")
    parser.add_argument("--several_seg", choices=SEVERAL_SEG, help="scored mask of several (default: as evaluated)")
    parser.add_argument(
        "--rank_by",
        choices=RANKED_BY,
        help="report AURC and AUSE of this uncertainty (docs/evaluation.md): ambiguity and predicted_iou of any "
        "answers, layers of those of mc:T (default: layers, where there is one)",
    )
    parser.add_argument("--json", action="store_true", help="print all digits, intervals and counts as JSON")
    args = parser.parse_args(argv)
    summaries = [rescore(path, args.protocol, args.several_seg, args.rank_by) for path in args.results]
    if args.json:
        ranked = {"rank_by": args.rank_by} if args.rank_by else {}
        print(json.dumps([summary.to_dict() | ranked for summary in summaries], indent=2, ensure_ascii=False))
        return 0
    print(format_table(summaries))
    if args.rank_by:
        print(f"AURC and AUSE rank the answers by {args.rank_by}.")
    return 0


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
