"""Converts annotations to the JSONL that training and evaluation read (docs/your_own_data.md), and checks such a file.

    python scripts/convert_data.py labelme photos --output own.jsonl --val 0.2 --absent 1
    python scripts/convert_data.py coco instances.json --images photos --output own.jsonl --query "the {label}"
    python scripts/convert_data.py masks masks --images photos --output own.jsonl --query "the crack"
    python scripts/convert_data.py check own.jsonl --pictures 12

Each query occurs once per image: objects with the same label become one line with several masks.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from utils.datasets.base import DataError, read_json
from utils.datasets.coco_file import by_id, image_record, row_of
from utils.datasets.custom import load_lines, read_labels
from utils.datasets.images import DECODE_ERRORS
from utils.datasets.jsonl import Line, LineFile, scan
from utils.datasets.masks import encode_mask, stack_masks
from utils.datasets.reason_seg import IMAGE_SUFFIXES
from utils.datasets.spec import Spec
from utils.inference import cli
from utils.plotting.overlays import Panel, evenly_spaced, save_picture, sheet


@dataclass
class AnnotatedImage:
    """An image with its queries. Maps each query to its masks in the form of the JSONL; no mask = absent."""

    path: Path
    size: tuple[int, int] | None
    queries: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True, metavar="{labelme,coco,masks,check}")
    shared = argparse.ArgumentParser(add_help=False)
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


# -- LabelMe -----------------------------------------------------------------------------------------------------------


def read_labelme(args: argparse.Namespace, skipped: Counter[str]) -> list[AnnotatedImage]:
    """One image per JSON file. Shapes with the same label and group_id are parts of one object.

    If a file has queries in ``text``, as ReasonSeg's do, each of them refers to all shapes with the label ``target``.
    """
    files = sorted(args.folder.rglob("*.json"))
    if not files:
        raise DataError(
            f"{args.folder} contains no .json, not even in subfolders; give the folder that LabelMe wrote to"
        )
    photos = []
    for file in files:
        annotation = read_json(file)
        shapes = annotation.get("shapes")
        if not isinstance(shapes, list) or not all(
            isinstance(shape, dict) and isinstance(shape.get("label"), str) and shape["label"].strip()
            for shape in shapes
        ):
            raise DataError(f"{file} is not a LabelMe file: it has no list 'shapes' of dicts with a 'label'")
        size = (annotation.get("imageHeight"), annotation.get("imageWidth"))
        photo = AnnotatedImage(
            _labelme_image(file, annotation), size if all(type(side) is int for side in size) else None
        )
        objects: dict[Any, list[Any]] = defaultdict(list)
        for number, shape in enumerate(shapes):
            try:
                parts = _labelme_shape(shape, photo)
            except DataError as error:
                skipped[f"{shape.get('shape_type')} ({error})"] += 1
                continue
            group = shape.get("group_id")
            objects[shape["label"].strip(), number if group is None else f"group {group}"] += parts
        texts = annotation.get("text")
        for (label, _), parts in objects.items():
            queries = [args.query.replace("{label}", label)]
            if isinstance(texts, list):
                queries = [str(text).strip() for text in texts if label == "target"]
            rings = [part for part in parts if isinstance(part, list)]
            for query in filter(None, queries):
                photo.queries[query] += [rings] * bool(rings) + [part for part in parts if isinstance(part, dict)]
        photos.append(photo)
    return photos


def _labelme_image(file: Path, annotation: dict[str, Any]) -> Path:
    """The image at ``imagePath`` (with backslashes on Windows), or the one of the same name beside the file."""
    image_path = str(annotation.get("imagePath") or "").replace("\\", "/")
    candidates = [file.parent / image_path] if image_path else []
    candidates += [
        path
        for path in sorted(file.parent.glob(f"{_escape_glob(file.stem)}.*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    existing = next((path for path in candidates if path.is_file()), None)
    if existing is None:
        raise DataError(f"{file} has no image: neither its imagePath {image_path!r} nor one of the same name exists")
    return existing


def _escape_glob(name: str) -> str:
    """Escapes the characters of a file name that are special in a glob pattern."""
    return "".join(f"[{character}]" if character in "[]*?" else character for character in name)


def _labelme_shape(shape: dict[str, Any], photo: AnnotatedImage) -> list[Any]:
    """Converts a shape to polygons [[[x, y], ...]] or RLE; ``DataError`` with the reason if it has no area."""
    kind = shape.get("shape_type") or "polygon"
    try:
        points = np.array(shape.get("points"), dtype=np.float64).reshape(-1, 2).round(2)
    except (TypeError, ValueError) as error:
        raise DataError("its points are not pairs of numbers") from error
    if kind == "mask":
        return [_labelme_mask(shape.get("mask"), points, photo)]
    if kind == "rectangle" and len(points) == 2:
        (x0, y0), (x1, y1) = points
        points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    elif kind == "circle" and len(points) == 2:  # the center, and a point on the circle
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        radius = np.hypot(*(points[1] - points[0]))
        points = (points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).round(2)
    elif kind not in ("polygon", "rectangle"):
        raise DataError("it has no area")
    if len(points) < 3:
        raise DataError(f"{len(points)} points")
    return [points.tolist()]


def _labelme_mask(encoded: Any, points: np.ndarray, photo: AnnotatedImage) -> dict[str, Any]:
    """Decodes LabelMe's mask, a base64 PNG whose upper left corner is the minimum of ``points``, as RLE."""
    if photo.size is None:
        raise DataError("the file lacks imageHeight and imageWidth")
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
            patch = np.asarray(picture) != 0
    except (*DECODE_ERRORS, binascii.Error, TypeError) as error:
        raise DataError("its PNG cannot be read") from error
    mask = np.zeros(photo.size, dtype=bool)
    x, y = (int(corner) for corner in points.min(axis=0)) if len(points) else (0, 0)
    if patch.ndim != 2 or x < 0 or y < 0 or mask[y : y + len(patch), x : x + patch.shape[1]].shape != patch.shape:
        raise DataError("its PNG does not fit into the image")
    mask[y : y + len(patch), x : x + patch.shape[1]] = patch
    return encode_mask(mask)


# -- COCO --------------------------------------------------------------------------------------------------------------


def read_coco(args: argparse.Namespace, skipped: Counter[str]) -> list[AnnotatedImage]:
    """One image per image of the file, one mask per annotation."""
    instances = read_json(args.file)
    folder = args.images or args.file.parent
    images = by_id(instances, "images", args.file)
    categories = by_id(instances, "categories", args.file) if args.label == "category" else {}
    photos = {}
    for key, image in images.items():
        record = image_record(image)
        photos[key] = AnnotatedImage(folder / record["file_name"], (record["height"], record["width"]))
    for annotation in by_id(instances, "annotations", args.file).values():
        photo = photos[row_of(images, annotation.get("image_id"), "image", args.file)["id"]]
        source = annotation
        if args.label == "category":
            source = row_of(categories, annotation.get("category_id"), "category", args.file)
        label = source.get("name" if args.label == "category" else "caption")
        if not isinstance(label, str) or not label.strip():
            raise DataError(
                f"{args.file}: annotation {annotation['id']} has the {args.label} {label!r}; expected a text"
            )
        masks = _coco_masks(annotation.get("segmentation"))
        if masks:
            photo.queries[args.query.replace("{label}", label.strip())] += masks
        else:
            skipped["annotation without a segmentation of 3 points"] += 1
    return list(photos.values())


def _coco_masks(segmentation: Any) -> list[Any]:
    """Converts a COCO segmentation to items of ``masks``: a list of polygons, or RLE."""
    if isinstance(segmentation, dict):
        return [segmentation]
    parts = segmentation if isinstance(segmentation, list) else []
    rings = [part for part in parts if isinstance(part, list) and len(part) >= 6]
    return [part for part in parts if isinstance(part, dict)] + [rings] * bool(rings)


# -- mask images -------------------------------------------------------------------------------------------------------


def read_masks(args: argparse.Namespace, skipped: Counter[str]) -> list[AnnotatedImage]:
    """One image per image that has a PNG. An all-black PNG means that its label is absent."""
    files = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() == ".png")
    if not files:
        raise DataError(f"{args.folder} contains no .png, not even in subfolders")
    images = {path.stem: path for path in sorted(args.images.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    classes = args.classes.read_text(encoding="utf-8").split("\n") if args.classes else []
    photos: dict[Path, AnnotatedImage] = {}
    for file in files:
        image = images.get(file.stem) or images.get(file.stem.removesuffix("_mask"))
        if image is None:
            raise DataError(f"{file} has no image {file.stem}.jpg (.jpeg, .png) in {args.images}")
        labels = read_labels(file)
        photo = photos.setdefault(image, AnnotatedImage(image, labels.shape))
        if classes:
            for value in np.unique(labels[labels > 0]).tolist():
                name = classes[value - 1].strip() if value <= len(classes) else ""
                if name:
                    photo.queries[args.query.replace("{label}", name)].append(encode_mask(labels == value))
                else:
                    skipped[f"value {value}, which {args.classes} does not name"] += 1
            continue
        label = "" if file.parent == args.folder else file.parent.name
        if not label and "{label}" in args.query:
            raise DataError(f"{file} has no label: give --query or --classes, or put it into a folder LABEL")
        path = relative(file, args.output.parent)
        photo.queries[args.query.replace("{label}", label)] += [path] * bool(labels.any())
    return list(photos.values())


# -- writing -----------------------------------------------------------------------------------------------------------


def lines_of(photos: list[AnnotatedImage], folder: Path, val: float, absent: int) -> list[dict[str, Any]]:
    """Lines of the JSONL; paths are relative to ``folder``. The choice of validation images is deterministic."""
    rng = np.random.default_rng(0)
    for_val = set(rng.permutation(len(photos))[: round(val * len(photos)) or bool(val)].tolist())
    all_queries = sorted({query for photo in photos for query in photo.queries})
    lines = []
    for number, photo in enumerate(photos):
        others = [query for query in all_queries if query not in photo.queries]
        queries = dict(photo.queries) | {others[i]: [] for i in rng.permutation(len(others))[:absent]}
        for query, masks in queries.items():
            line = {"image": relative(photo.path, folder), "query": query, "masks": masks}
            line |= {"size": list(photo.size)} if photo.size else {}
            lines.append(line | ({"split": "val" if number in for_val else "train"} if val else {}))
    return lines


def relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def write_lines(lines: list[dict[str, Any]], output: Path) -> None:
    """Writes the file atomically."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


# -- checking ----------------------------------------------------------------------------------------------------------


def check_file(path: Path, pictures: int) -> int:
    """Decodes all images and masks and returns 0; ``DataError`` listing all errors."""
    _, splits = scan(path)
    problems: list[str] = []
    for split in splits:
        file = LineFile(Spec.parse(f"custom|{path}|{split}"), path.parent, None)
        print(f"{split}: " + ", ".join(f"{count} {name}" for name, count in file.counts.items()))
        lines = [line for image in range(len(file)) for line in file.lines(image)]
        problems += [problem for line in lines if (problem := _decode_error(path.parent, line))]
        if pictures and not problems:
            chosen = [lines[i] for i in evenly_spaced(len(lines), pictures)]
            picture = path.with_name(f"{path.stem}.{split}.png")
            save_picture(picture, sheet(list(_panels(path.parent, chosen)), f"{path}, {split}"))
            print(f"wrote {picture}")
    if problems:
        raise DataError("\n  ".join([f"{path}: {len(problems)} line(s) cannot be used", *problems]))
    print(f"{path}: all images and masks can be read")
    return 0


def _decode_error(folder: Path, line: Line) -> str:
    try:
        load_lines(folder, [line])
    except DataError as error:
        return str(error)
    return ""


def _panels(folder: Path, lines: Iterable[Line]) -> Iterator[Panel]:
    for line in lines:
        image, [masks] = load_lines(folder, [line])
        conversation = " / ".join(f"{turn.question} {turn.answer}" for turn in line.turns)
        stack = stack_masks(masks, *image.shape[:2])
        truth = stack.max(axis=0, initial=0)
        yield Panel(
            image, line.query or conversation, stack, truth=truth, notes=[f"{len(masks)} masks, line {line.number}"]
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
