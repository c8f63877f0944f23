"""Converts annotations to the JSONL that training and evaluation read (docs/your_own_data.md), and checks such a file.

    python scripts/convert_data.py labelme photos --output own.jsonl --val 0.2 --absent 1
    python scripts/convert_data.py coco instances.json --images photos --output own.jsonl
    python scripts/convert_data.py masks masks --images photos --output own.jsonl --query "a crack"
    python scripts/convert_data.py yolo dataset/data.yaml --output own.jsonl --split
    python scripts/convert_data.py cvat annotations.xml --output own.jsonl  # or label-studio, via
    python scripts/convert_data.py parquet hub:Ricky06662/ReasonSeg_test --output own.jsonl
    python scripts/convert_data.py check own.jsonl --pictures 12

Each query occurs once per image: objects with the same label become one line with several masks. What was left out, and
why, is printed after every conversion, and the first lines are drawn into FILE.SPLIT.png.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.loading.hub import resolve_dataset
from utils.command_line.parser import Parser
from utils.conversion.annotated import Annotated
from utils.conversion.check import check_file, plot_first
from utils.conversion.coco import read_coco
from utils.conversion.cvat import read_cvat
from utils.conversion.formats import check_path, hint
from utils.conversion.images import IMAGE_SUFFIXES, files_below, first_of_copies, image_sizes, upright_size
from utils.conversion.label_studio import read_label_studio
from utils.conversion.labelme import read_labelme
from utils.conversion.lines import add_absent, lines_of, write_lines
from utils.conversion.mask_images import read_masks
from utils.conversion.parquet import read_parquet
from utils.conversion.queries import BoxMasks, QueriedImage, Queries, Summary
from utils.conversion.via import read_via
from utils.conversion.yolo import read_yolo
from utils.datasets.base import DataError
from utils.inference import cli
from utils.wording import counted

READERS: dict[str, Callable[[argparse.Namespace], Annotated]] = {
    "labelme": lambda args: read_labelme(args.folder, args.images, args.encoding, extracted(args.output)),
    "coco": lambda args: read_coco(args.file, args.images, args.label, args.encoding),
    "masks": lambda args: read_masks(args.folder, args.images, args.query, args.classes, args.colors, args.encoding),
    "yolo": lambda args: read_yolo(args.file, args.images, args.classes, args.encoding),
    "label-studio": lambda args: read_label_studio(args.file, args.images, args.attribute, args.encoding),
    "via": lambda args: read_via(args.file, args.images, args.attribute, one_query(args), args.encoding),
    "cvat": lambda args: read_cvat(args.file, args.images, args.attribute, args.encoding),
    "parquet": lambda args: read_parquet(args.folder, extracted(args.output)),
}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.source == "check":
        return check_file(args.file, args.pictures)
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"--output {args.output} already exists; add --overwrite, or give another name")
    if "{label}" not in args.query and args.source not in ("masks", "via"):
        raise ValueError(f"--query {args.query!r} lacks {{label}}: all objects would get the same query")
    if (args.boxes == "sam") != (args.sam is not None):
        raise ValueError("--boxes sam and --sam FILE belong together: the SAM that segments the boxes")
    if args.split and args.val:
        raise ValueError("--split and --val exclude each other: the splits are the tool's own, or drawn")
    had_extracted = extracted(args.output).exists()
    try:
        convert(args)
    except BaseException:
        if not had_extracted:
            shutil.rmtree(extracted(args.output), ignore_errors=True)
        raise
    return 0


def convert(args: argparse.Namespace) -> None:
    """Reads, joins, prints the summary and writes; ``DataError`` if there is nothing to write."""
    if args.source == "parquet":
        args.folder = resolve_dataset(str(args.folder), "parquet").path
    annotated = read(args)
    summary = Summary()
    images = Queries(args.query, box_masks(args), summary).images_of(annotated)
    without = [image for image in images if not image.is_annotated] + unlisted(args, annotated, summary)
    images = [image for image in images if image.is_annotated]
    text = summary.lines()
    if without and not args.negatives:
        text.append(
            f"  without annotation: {counted(len(without), 'image')}, such as {without[0].path} (--negatives uses them)"
        )
    own = Counter(image.split for image in images if image.split)
    if len(own) > 1 and not args.split:
        shares = ", ".join(f"{count} {name}" for name, count in own.items())
        text.append(f"  the tool's own splits are not used: {shares} (--split uses them)")
    add_absent(images, without if args.negatives else [], args.absent)
    lines = lines_of([*images, *(without if args.negatives else [])], args.output.parent, args.val, args.split)
    if args.val and all(line["split"] == "train" for line in lines):
        text.append("  note: --val needs two images with queries; all are for training")
    if not lines or (args.split and not own):
        print("\n".join(text))
        reasons = "; ".join(line.strip() for line in text[1:4]) or "no annotation has a label"
        source = args.folder if "folder" in args else args.file
        problem = f"no query in {counted(summary.images, 'image')} of {source} ({reasons})"
        raise DataError(
            f"nothing to write to {args.output}: {problem if not lines else 'the annotations name no split; use --val'}"
        )
    write_lines(lines, args.output)
    try:
        sheets = plot_first(args.output, args.pictures) if args.pictures else []
    except DataError as error:
        sheets = []
        text.append(f"  no pictures: {error}")
    absent, splits = sum(not line["masks"] for line in lines), Counter(line.get("split", "train") for line in lines)
    shares = ", ".join(f"{count} {split}" for split, count in splits.items())
    written = len({line["image"] for line in lines})
    # printed once all is written: whoever reads our output may stop after a line
    text.append(
        f"wrote {args.output}: {counted(written, 'image')}, {counted(len(lines), 'query', 'queries')} "
        f"({absent} absent; {shares})"
    )
    text += [f"wrote {sheet}" for sheet in sheets]
    text.append(f"to check every image and mask: python scripts/convert_data.py check {args.output}")
    print("\n".join(text))


def read(args: argparse.Namespace) -> Annotated:
    """What the reader of the source finds; ``DataError`` that says what the path is, if it is something else."""
    path = args.folder if "folder" in args else args.file
    check_path(path)
    if path.is_file() and args.source in ("labelme", "masks"):
        raise DataError(f"{path} is a file; give the folder that holds it{hint(path, args.source)}")
    if path.is_dir() and args.source in ("label-studio", "via"):
        raise DataError(f"{path} is a folder; give the exported file in it{hint(path, args.source)}")
    try:
        annotated = READERS[args.source](args)
    except DataError as error:
        raise DataError(f"{error}{hint(path, args.source)}") from error
    if not annotated.images and (other := hint(path, args.source)):
        reasons = "; ".join(+annotated.left_out) or "no annotations"
        raise DataError(f"{path} cannot be used ({reasons}){other}")
    return annotated


def one_query(args: argparse.Namespace) -> str:
    """The query of all regions, if --query says so; "" = it depends on their labels."""
    return "" if "{label}" in args.query else args.query


def box_masks(args: argparse.Namespace) -> BoxMasks | None:
    if args.boxes is None:
        return None
    from utils.conversion.boxes import SamBoxes, filled  # imports SAM

    return SamBoxes(args.sam) if args.boxes == "sam" else filled


def extracted(output: Path) -> Path:
    """The folder for images that annotation files hold themselves."""
    return output.with_name(f"{output.stem}_images")


def unlisted(args: argparse.Namespace, annotated: Annotated, summary: Summary) -> list[QueriedImage]:
    """The images in the folder of which the annotations say nothing."""
    source = args.images or (args.folder if "folder" in args else args.file if args.file.is_dir() else args.file.parent)
    known = {entry.path.resolve() for entry in annotated.images} | {path.resolve() for path in annotated.not_negative}
    files = files_below(source, IMAGE_SUFFIXES, Counter())
    first = first_of_copies([*known, *(path.resolve() for path in files)])
    images = []
    for path in files:
        sheet_of = path.with_name(path.stem.rpartition(".")[0] + ".jsonl")  # FILE.SPLIT.png of ``check``
        if first[path.resolve()] in known or sheet_of.is_file() or sheet_of == args.output:
            continue
        if not args.negatives:  # counted only
            images.append(QueriedImage(path, (0, 0)))
            continue
        try:
            image_sizes(path)
            images.append(QueriedImage(path.resolve(), upright_size(path)))
        except DataError as error:
            summary.left_out[f"image that cannot be read: {error}"] += 1
    return images


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    sources = parser.add_subparsers(dest="source", required=True, metavar=f"{{{','.join([*READERS, 'check'])}}}")
    shared = Parser(add_help=False)
    add_shared_flags(shared.add_argument)
    source = sources.add_parser("labelme", parents=[shared], help="a folder of LabelMe's or X-AnyLabeling's JSON files")
    source.add_argument("folder", type=Path, help="folder, searched with its subfolders")
    source.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, if they are elsewhere")
    source = sources.add_parser("coco", parents=[shared], help="a COCO JSON (instances), or a folder of them")
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
    listed = source.add_mutually_exclusive_group()
    listed.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="for index PNGs: text file, line k names value k; 0 is background. Also lists that begin with the "
        "background, lines VALUE NAME, and Roboflow's _classes.csv",
    )
    listed.add_argument(
        "--colors",
        type=Path,
        metavar="FILE",
        help="for PNGs in colors: CVAT's labelmap.txt, lines R G B NAME, a CSV, JSON {NAME: [R, G, B]}",
    )
    source = sources.add_parser(
        "parquet", parents=[shared], help="ReasonSeg or RefCOCO in parquet files: columns image, text, mask"
    )
    source.add_argument("folder", type=Path, help="folder, file, or data set of the hub: hub:org/name[@revision]")
    source.set_defaults(images=None)
    add_tools(lambda name, text: sources.add_parser(name, parents=[shared], help=text))
    source = sources.add_parser("check", help="decode all images and masks of a JSONL, and list all errors")
    source.add_argument("file", type=Path)
    source.add_argument("--pictures", type=_count, default=0, metavar="N", help="also plot N lines into FILE.SPLIT.png")
    return parser.parse_args(argv)


def add_tools(add_parser: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """The sources whose flags are alike (docs/annotation_tools.md)."""
    tools = {
        "yolo": ("YOLO's label files: a data.yaml, or a folder with a classes.txt", ""),
        "label-studio": ("Label Studio's export as JSON or JSON_MIN", "control for each region, such as a text area"),
        "via": ("VGG Image Annotator 1 or 2: a project, or an export as JSON or CSV", "region attribute"),
        "cvat": ("CVAT for images 1.1, or frames of CVAT for video 1.1 (XML)", "CVAT attribute"),
    }
    for name, (text, attribute) in tools.items():
        source = add_parser(name, text)
        source.add_argument("file", type=Path)
        source.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, if they are elsewhere")
        if attribute:
            source.add_argument("--attribute", default="", metavar="NAME", help=f"{attribute} that holds the label")
        else:
            source.add_argument("--classes", type=Path, metavar="FILE", help="text file, line k + 1 names class k")


def add_shared_flags(add: Callable[..., argparse.Action]) -> None:
    """The flags of every source."""
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
    add("--split", action="store_true", help="use the tool's own splits: folders train, valid, test and the like")
    add(
        "--absent",
        type=_count,
        default=0,
        metavar="N",
        help="add up to N queries per image for labels of other images, as absent targets; only if every object is "
        "annotated",
    )
    add(
        "--negatives",
        action="store_true",
        help="images without any annotation lack every label: add up to --absent queries (at least 1) to each",
    )
    add(
        "--boxes",
        choices=("rectangle", "sam"),
        help="masks for annotations that are only boxes: the rectangle, which is coarse, or what SAM finds in it",
    )
    add("--sam", metavar="FILE", help="for --boxes sam: SAM, as train_ds.py --vision_pretrained, or a merged model")
    add("--encoding", metavar="NAME", help="encoding of text files that are not UTF-8, such as gbk")
    add("--pictures", type=_count, default=12, metavar="N", help="plot the first N lines (default: 12; 0 = none)")


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


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
