"""Converts annotations to the JSONL that training and evaluation read (docs/your_own_data.md), and checks such a file.

    python scripts/convert_data.py labelme photos --output own.jsonl --val 0.2 --absent 1
    python scripts/convert_data.py coco instances.json --images photos --output own.jsonl --query "the {label}"
    python scripts/convert_data.py masks masks --images photos --output own.jsonl --query "the crack"
    python scripts/convert_data.py check own.jsonl --pictures 12

Each query occurs once per image: objects with the same label become one line with several masks.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.conversion.check import check_file
from utils.conversion.coco import read_coco
from utils.conversion.labelme import read_labelme
from utils.conversion.lines import lines_of, write_lines
from utils.conversion.mask_images import read_masks
from utils.datasets.base import DataError
from utils.inference import cli


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.source == "check":
        return check_file(args.file, args.pictures)
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"--output {args.output} already exists; add --overwrite, or give another name")
    if "{label}" not in args.query and args.source != "masks":
        raise ValueError(f"--query {args.query!r} lacks {{label}}: all objects would get the same query")
    skipped: Counter[str] = Counter()
    photos = {"labelme": read_labelme, "coco": read_coco, "masks": read_masks}[args.source](args, skipped)
    if missing := [photo.path for photo in photos if not photo.path.is_file()]:
        raise DataError(f"{len(missing)} of {len(photos)} images are missing, such as {missing[0]}; check --images")
    lines = lines_of(photos, args.output.parent, args.val, args.absent)
    if not lines:
        raise DataError(f"nothing to write to {args.output}: no label in {len(photos)} images")
    write_lines(lines, args.output)
    for reason, count in sorted(skipped.items()):
        print(f"skipped: {count} x {reason}", file=sys.stderr)
    absent, splits = sum(not line["masks"] for line in lines), Counter(line.get("split", "train") for line in lines)
    shares = ", ".join(f"{count} {split}" for split, count in splits.items())
    print(f"wrote {args.output}: {len(photos)} images, {len(lines)} queries ({absent} absent; {shares})")
    print(f"to inspect it: python scripts/convert_data.py check {args.output} --pictures 12")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True, metavar="{labelme,coco,masks,check}")
    shared = Parser(add_help=False)
    add = shared.add_argument
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL to write; paths are relative to its folder",
    )
    add("--overwrite", action="store_true", help="replace --output")
    add("--query", default="{label}", metavar="TEXT", help='the query, such as "the {label}" (default: {label})')
    add("--val", type=_share, default=0.0, metavar="P", help="fraction of the images in split 'val', such as 0.2")
    add(
        "--absent",
        type=int,
        default=0,
        metavar="N",
        help="add up to N queries per image for labels of other images, as absent targets; only if every object is "
        "annotated",
    )
    source = sources.add_parser("labelme", parents=[shared], help="a folder of LabelMe's JSON files")
    source.add_argument("folder", type=Path, help="folder, searched with its subfolders")
    source = sources.add_parser("coco", parents=[shared], help="a COCO JSON (instances)")
    source.add_argument("file", type=Path)
    source.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: the file's)")
    source.add_argument(
        "--label",
        choices=("category", "caption"),
        default="category",
        help="what {label} is: the category's name (default), or the annotation's own 'caption'",
    )
    source = sources.add_parser("masks", parents=[shared], help="PNG masks: NAME.png, NAME_mask.png or LABEL/NAME.png")
    source.add_argument("folder", type=Path)
    source.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images NAME.jpg")
    source.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="for index PNGs: text file, line k names value k; 0 is background",
    )
    source = sources.add_parser("check", help="decode all images and masks of a JSONL, and list all errors")
    source.add_argument("file", type=Path)
    source.add_argument("--pictures", type=int, default=0, metavar="N", help="also plot N lines into FILE.SPLIT.png")
    return parser.parse_args(argv)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to below 1")
    return share


if __name__ == "__main__":
    sys.exit(cli.run(main))
