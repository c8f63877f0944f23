"""Mask images: a PNG per image, or per image and label."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from utils.conversion.annotated import SPLITS, Annotated, AnnotatedImage, Annotation, split_of
from utils.conversion.class_lists import VOID, Color, read_classes, read_colors
from utils.conversion.images import IMAGE_SUFFIXES, files_below, plain
from utils.datasets.base import DataError
from utils.datasets.custom import read_labels
from utils.datasets.images import DECODE_ERRORS
from utils.datasets.masks import encode_mask

INSTANCES = {"segmentationobject", "segmentationobjectpng"}  # VOC's folders of masks whose values number objects
INSTANCE_MASK = "mask of single objects, not of classes (SegmentationObject)"
NO_LABELS = {  # names of folders that hold masks of one label, or of all
    *("mask", "masks", "label", "labels", "annotation", "annotations", "gt", "groundtruth", "ground_truth"),
    *("segmentation", "segmentations", "segmentationclass", "segmentationclasspng"),
}
MASK_SUFFIX = re.compile(r"[_.-](mask|masks)$")  # NAME_mask.png


def read_masks(
    folder: Path,
    images: Path,
    query: str = "{label}",
    classes: Path | None = None,
    colors: Path | None = None,
    encoding: str | None = None,
) -> Annotated:
    """Reads NAME.png, NAME_mask.png and LABEL/NAME.png for the images NAME.jpg (or of another format).

    With ``classes`` or ``colors`` a PNG holds several labels; otherwise what is not black is one object, and an
    all-black PNG means that its label is absent.

    Args:
        folder: of the PNGs, searched with its subfolders.
        images: folder of the images; may be the same.
        query: what is asked for, with ``{label}``; without it, every PNG is of this query.
        classes: list of the values (``read_classes``); colors: of the colors (``read_colors``).
        encoding: of lists that are not UTF-8.

    Raises:
        DataError: if there is no PNG, a mask may belong to several images, an image has several masks of all labels,
            one has no label, or colors have no list.
    """
    result = Annotated()
    pairs = _pairs(folder, images, result)
    if classes or colors:
        _check_one_each(pairs)
    values = read_classes(classes, encoding) if classes else None
    table = read_colors(colors, encoding) if colors else None
    found: set[int] = set()
    parents = {file.parent for file in pairs if file.parent != folder}
    are_splits = {parent.name.lower() for parent in parents} <= SPLITS.keys()
    for file, image in pairs.items():
        try:
            if table is not None:
                size, annotations = _by_color(file, table, colors, result)
            elif values is not None:
                size, annotations = _by_value(file, values, classes, result, found)
            else:
                label = "" if file.parent == folder or are_splits else file.parent.name
                size, annotations = _one_object(file, label, query, folder, result)
        except _UnusableMask as error:
            result.left_out[f"mask that cannot be used: {error}"] += 1
            size, annotations = None, [Annotation("", None, reason="a mask that cannot be used")]
        within = file.relative_to(folder)
        split = split_of(image.relative_to(images)) or split_of(within if are_splits else within.parent)
        result.images.append(AnnotatedImage(image, size, annotations, split))
    if values is not None and found and not found & values.keys():
        shown = ", ".join(map(str, sorted(found)[:8]))
        raise DataError(
            f"{classes} names none of the values in the PNGs of {folder}: {shown}; it is another data set's"
        )
    return result


class _UnusableMask(DataError):
    """A mask is left out; the others are read."""


# -- which mask is of which image --------------------------------------------------------------------------------------


def _pairs(folder: Path, images: Path, result: Annotated) -> dict[Path, Path]:
    """Mask -> image. Each file is one or the other, also if both are in one folder."""
    files = _outside(files_below(folder, IMAGE_SUFFIXES, result.left_out), folder, images)
    are_instances = [{part.lower() for part in file.relative_to(folder).parts[:-1]} & INSTANCES for file in files]
    files = [file for file, is_instance in zip(files, are_instances) if not is_instance]
    result.left_out += Counter(INSTANCE_MASK for is_instance in are_instances if is_instance)
    pngs = [file for file in files if file.suffix.lower() == ".png"]
    others = [file for file in files if file.suffix.lower() != ".png"]
    if not pngs:
        found = f", but {others[0].name}: JPEG and the like alter the values; save masks as PNG" if others else ""
        raise DataError(f"{folder} contains no .png, not even in subfolders{found}")
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in _outside(files_below(images, IMAGE_SUFFIXES, result.left_out), images, folder):
        by_stem[plain(path.stem)].append(path)
        by_stem[plain(path.name)].append(path)  # a.jpg.png
    pairs = {}
    for file in pngs:
        stem = plain(file.stem)
        base = MASK_SUFFIX.sub("", stem)
        candidates = by_stem.get(base, []) if base != stem else []
        candidates = candidates or [path for path in by_stem.get(stem, []) if not _same(path, file)]
        candidates = [path for path in candidates if not MASK_SUFFIX.search(plain(path.stem))] or candidates
        if image := _nearest(file, folder, candidates, images):
            pairs[file] = image
    in_use = {path.resolve() for path in pairs.values()}
    _leave_out_other_formats(others, by_stem, result)
    result.not_negative |= set(pairs)
    for file in pngs:
        if file in pairs and file.resolve() in in_use:
            raise DataError(f"{file} is the mask of {pairs[file]} and the image of another mask; rename one of them")
        if file not in pairs and not any(_same(file, path) for path in by_stem.get(plain(file.stem), [])):
            result.left_out[f"mask without an image of its name in {images}: {file}"] += 1
    return pairs


def _leave_out_other_formats(files: list[Path], images: Mapping[str, list[Path]], result: Annotated) -> None:
    """Counts masks that are no PNG: nobody can tell what their images lack."""
    for file in files:
        stem = plain(file.stem)
        base = MASK_SUFFIX.sub("", stem)
        is_image = base == stem and any(_same(file, path) for path in images.get(stem, []))
        if is_image or file.parent.name.lower().endswith("visualization"):  # LabelMe's masks above the image
            continue
        for image in images.get(base, []) or images.get(stem, []):
            result.left_out[f"mask that is no PNG (JPEG and the like alter the values): {file}"] += 1
            result.not_negative.add(file)
            result.images.append(AnnotatedImage(image, None, [Annotation("", None, reason="no PNG")]))


def _check_one_each(pairs: Mapping[Path, Path]) -> None:
    """``DataError`` if an image has two masks: the values of one of them may mean something else."""
    first: dict[Path, Path] = {}
    for file, image in pairs.items():
        if (other := first.setdefault(image.resolve(), file)) != file:
            raise DataError(f"{other} and {file} are both masks of {image}; give the folder of those of the classes")


def _outside(files: list[Path], folder: Path, other: Path) -> list[Path]:
    """The files of a folder that are not in the other one, where that is a part of it."""
    inner, outer = other.resolve(), folder.resolve()
    return (
        [file for file in files if inner == outer or inner not in file.resolve().parents]
        if (outer in inner.parents)
        else files
    )


def _same(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()


def _nearest(file: Path, folder: Path, candidates: list[Path], images: Path) -> Path | None:
    """The image of a mask; of several, the one in the same subfolder. ``DataError`` if that does not decide."""
    if len(candidates) > 1:
        parts = set(file.parent.relative_to(folder).parts)
        shared = [len(parts & set(path.parent.relative_to(images).parts)) for path in candidates]
        candidates = [path for path, count in zip(candidates, shared) if count == max(shared)]
    if len(candidates) > 1:
        shown = ", ".join(map(str, candidates[:4]))
        raise DataError(f"{file} may be the mask of {len(candidates)} images: {shown}; keep or name one of them")
    return candidates[0] if candidates else None


# -- what a mask says --------------------------------------------------------------------------------------------------


def _one_object(
    file: Path, label: str, query: str, folder: Path, result: Annotated
) -> tuple[tuple[int, int], list[Annotation]]:
    if not label and "{label}" in query:
        listed = next((f" (--classes {path}?)" for path in file.parent.glob("_classes.csv")), "")
        raise DataError(f"{file} has no label: give --query or --classes{listed}, or put it into a folder LABEL")
    if "{label}" in query and label.lower() in NO_LABELS:
        raise DataError(
            f"{file}: the folder {label!r} is hardly a label; say what the masks show with --query, --classes or "
            "--colors, or call the folder so"
        )
    try:
        labels = read_labels(file)
    except DataError as error:
        raise _UnusableMask(str(error)) from error
    values = np.unique(labels)
    if len(values[values > 0]) > 1:
        reason = f"PNG with several values besides 0, read as one object (--classes tells them apart): {file}"
        result.notes[reason] += 1
    label, is_query = (label, False) if "{label}" in query else (query, True)
    if labels.any():
        return labels.shape, [Annotation(label, str(file.resolve()), is_query=is_query)]
    return labels.shape, [Annotation(label, None, kind="absent", is_query=is_query)]


def _by_value(
    file: Path, names: Mapping[int, str], listed: Path | None, result: Annotated, found: set[int]
) -> tuple[tuple[int, int], list[Annotation]]:
    labels = _index(file)
    annotations = [Annotation("", None, kind="background")]  # the image is annotated, even if nothing is in it
    for value in np.unique(labels).tolist():
        name = names.get(value)
        found |= {value} if value else set()
        if name:
            annotations.append(Annotation(name, encode_mask(labels == value)))
        elif value:
            result.left_out[f"value {value}, which {listed} does not name"] += 1
            annotations += [] if value == VOID else [Annotation("", None, reason="no label")]
    return labels.shape, annotations


def _index(file: Path) -> np.ndarray:
    """The values of an index PNG [H, W]; of channels that are equal, the one value. Transparent pixels are 0.

    Raises:
        DataError: if the PNG is in colors.
    """
    mode, values = _open(file)
    if values.ndim == 2:
        return values
    alpha = values[..., -1] if mode in ("LA", "RGBA", "PA") else None
    channels = values if alpha is None else values[..., :-1]
    if (channels != channels[..., :1]).any():
        raise DataError(
            f"{file} is in colors (mode {mode}), not an index per pixel; tell which color is which label with --colors "
            "FILE (CVAT: labelmap.txt), instead of --classes"
        )
    return channels[..., 0] if alpha is None else np.where(alpha > 0, channels[..., 0], 0)


def _by_color(
    file: Path, names: Mapping[Color, str], listed: Path | None, result: Annotated
) -> tuple[tuple[int, int], list[Annotation]]:
    _, values = _open(file, "RGBA")
    codes = values[..., :3].astype(np.int64) @ (1 << 16, 1 << 8, 1)
    codes[values[..., 3] == 0] = 0
    annotations = [Annotation("", None, kind="background")]
    by_code = {(red << 16) + (green << 8) + blue: name for (red, green, blue), name in names.items()}
    unknown = [code for code in np.unique(codes).tolist() if code and code not in by_code]
    for code in np.unique(codes).tolist():
        if name := by_code.get(code):
            annotations.append(Annotation(name, encode_mask(codes == code)))
    if unknown:
        share = np.isin(codes, unknown).mean()
        red, green, blue = unknown[0] >> 16, unknown[0] >> 8 & 255, unknown[0] & 255
        example = f"{file}, such as {red},{green},{blue} ({share:.1%} of its pixels)"
        result.left_out[f"PNG with colors that {listed} does not name: {example}"] += 1
        annotations.append(Annotation("", None, reason="no label"))
    return codes.shape, annotations


def _open(file: Path, convert: str = "") -> tuple[str, np.ndarray]:
    """Mode and values of a PNG, converted to a mode if one is given."""
    try:
        with Image.open(file, formats=("PNG",)) as image:
            return image.mode, np.asarray(image.convert(convert) if convert else image)
    except DECODE_ERRORS as error:
        raise _UnusableMask(f"{file} is not a PNG that can be read ({error})") from error
