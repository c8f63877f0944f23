"""Converts answers that other projects' evaluation scripts wrote to the lines that scripts/score.py scores.

    python scripts/convert_answers.py sesame *.json --benchmark SPEC --dataset_dir D --output F
    python scripts/score.py --benchmark SPEC --dataset_dir D --predictions F

Sources: hallusegbench (a folder with orgl_orgi/ and three more), sesame (also READ and UGround's release:
preds_*_of_*.json), sa2va (ST_jsons/*.json), text4seg (a folder of folders), and those that keep pixel counts alone:
unipixel, visionreasoner (also Seg-Zero: output_*.json). Give the files of all processes. docs/scoring.md tells what
each leaves out, and what to do where none are written.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.inference import cli

SOURCES = ("hallusegbench", "sa2va", "sesame", "text4seg", "unipixel", "visionreasoner")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("source", choices=SOURCES, metavar="SOURCE", help=f"whose files: {', '.join(SOURCES)}")
    add("files", nargs="+", type=Path, metavar="FILE", help="of all processes; text4seg, hallusegbench: the folder")
    add(
        "--benchmark",
        required=True,
        metavar="SPEC",
        help='that was answered: "refcoco|unc|testA", "ReasonSeg|val", ...',
    )
    add("--dataset_dir", required=True, type=Path, metavar="DIR", help="folder that holds reason_seg/, refer_seg/, ...")
    add("--output", required=True, type=Path, metavar="FILE", help="JSONL to write")
    args = parser.parse_args(argv)
    if args.output.exists():
        raise ValueError(f"{args.output} exists; give another --output")

    from utils.datasets import get_eval_dataset
    from utils.evaluation.other_projects import Asked, convert
    from utils.files import write_atomically

    lines = convert(args.source, args.files, Asked(get_eval_dataset(args.benchmark, args.dataset_dir)))
    write_atomically(args.output, "".join(lines))
    empty = sum('"masks": []' in line for line in lines)
    print(f"{len(lines)} answers to {args.benchmark} in {args.output}, {empty} of them without a mask")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
