"""YOLO: a text file per image, with a row ``class x1 y1 x2 y2 ...`` per object, in fractions of width and height.

The format is the one that Ultralytics documents ("Instance Segmentation Datasets Overview", "Oriented Bounding Boxes")
and reads (ultralytics/data/utils.py): ``data.yaml`` names the classes and the folders of images, and the rows of
``.../images/a.jpg`` are in ``.../labels/a.txt``. Roboflow writes a data.yaml beside ``train/images``, Label Studio a
``classes.txt`` beside ``labels``, CVAT and darknet ``obj.names`` and the rows beside the images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from utils.conversion.annotated import Annotated, AnnotatedImage, Annotation, clean_ring, kind_of, split_of, whole
from utils.conversion.images import IMAGE_SUFFIXES, ImageFolder, files_below, plain
from utils.conversion.regions import Size, add_region, add_unnamed, number, trusted_size
from utils.datasets.base import DataError, MissingDataError, read_text
from utils.files import ShallowAliases

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
CLASS_LISTS = ("classes.txt", "obj.names", "classes.names", "_darknet.labels")
NO_LABELS = {
    *CLASS_LISTS,
    "labels.txt",
    "predefined_classes.txt",
    "train.txt",
    "val.txt",
    "valid.txt",
    "test.txt",
    "trainval.txt",
}
FAR = 2.0  # fractions of an image beyond which a coordinate is in pixels, or wrong
UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # of Label Studio


def read_yolo(
    path: Path, images: Path | None = None, classes: Path | None = None, encoding: str | None = None
) -> Annotated:
    """Reads the images that have a file of rows; an empty one is an image without annotations.

    Rows of 4 numbers are boxes, which have no mask; of 8, a box with corners. A confidence or the number of a track at
    the end of a row is passed over.

    Args:
        path: a data.yaml, or a folder that holds one or a list of classes.
        images: folder of the images, if they are not where the format has them.
        classes: text file of which line k + 1 names class k; default: the data.yaml's names, or a list in the folder.
        encoding: of the files, if they are not Unicode.

    Raises:
        DataError: if no names of classes, or no images with rows are found, if the number of names is not the one that
            data.yaml says, or if an image may be one of several.
    """
    if not path.exists():
        raise MissingDataError(f"{path} does not exist; give a data.yaml, or the folder of a YOLO data set")
    candidates = [path / name for name in YAML_NAMES] if path.is_dir() else [path]
    file = next((file for file in candidates if file.is_file()), None)
    folder = path if path.is_dir() else path.parent
    settings = _settings(file, encoding) if file else {}
    named = _classes(folder, file, settings, classes, encoding)
    result = Annotated()
    layout = _Layout(folder, images, result.left_out)
    for rows, image, split in layout.pairs(settings, encoding):
        annotated = AnnotatedImage(image, None, split=split)
        size = trusted_size(image, None, result)
        try:
            lines = read_text(rows, encoding).splitlines()
        except DataError as error:
            result.left_out[f"label file that is no text: {error}"] += 1
            result.not_negative.add(image)
            continue
        if size is not None:
            for line in lines:
                _add_row(annotated.annotations, line, named, size, result.left_out)
            result.images.append(annotated)
    if not result.images:
        first = list(result.left_out.items())[:4]
        reasons = "; ".join(f"{count} x {reason}" for reason, count in first) or "no label files"
        raise DataError(f"{path}: no image with a label file was found ({reasons}); check --images")
    return result


# -- classes -----------------------------------------------------------------------------------------------------------


class _TextLoader(ShallowAliases, yaml.BaseLoader):
    """A YAML loader whose values are texts."""


def _settings(file: Path, encoding: str | None) -> dict[str, Any]:
    """data.yaml with all values as texts: YAML would read the name ``no`` as False."""
    try:
        settings = yaml.load(read_text(file, encoding), Loader=_TextLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is not valid YAML ({str(error)[:300]}); correct it") from error
    if not isinstance(settings, dict):
        raise DataError(f"{file} is no data.yaml: it holds no 'names' of classes")
    return settings


@dataclass
class _Classes:
    file: Path  # that names them
    names: dict[int, str]
    has_keypoints: bool = False  # then rows are a box and keypoints


def _classes(
    folder: Path, file: Path | None, settings: dict[str, Any], classes: Path | None, encoding: str | None
) -> _Classes:
    has_keypoints = bool(settings.get("kpt_shape"))
    if classes is None and file and settings.get("names"):
        names = _names_of(settings["names"], file)
        count = whole(settings.get("nc"))
        if count is not None and count != len(names):
            raise DataError(f"{file} names {len(names)} classes but says nc: {count}; correct it")
        return _Classes(file, names, has_keypoints)
    folders = [folder, folder.parent] if folder.name == "labels" else [folder, folder / "train"]
    places = [place / name for place in folders for name in CLASS_LISTS]
    classes = classes or next((place for place in places if place.is_file()), None)
    if classes is None:
        raise DataError(f"{folder} has no data.yaml with 'names' and no classes.txt; give --classes FILE")
    lines = [line.strip() for line in read_text(classes, encoding).splitlines()]
    if not any(lines):
        raise DataError(f"{classes} is empty; name class k in line k + 1")
    if kind_of(lines[0]) == "ignored":  # LabelMe's list, from which converters drop lines
        raise DataError(f"{classes} begins with {lines[0]!r}, which is no class of YOLO's; name class k in line k + 1")
    return _Classes(classes, dict(enumerate(lines)), has_keypoints)


def _names_of(names: Any, file: Path) -> dict[int, str]:
    """Names as a list, or as a dictionary by number."""
    items = names.items() if isinstance(names, dict) else enumerate(names) if isinstance(names, list) else ()
    numbered = {whole(key): name.strip() for key, name in items if isinstance(name, str)}
    if not numbered or None in numbered or len(numbered) != len(names):
        raise DataError(f"{file}: 'names' is neither a list of names nor a dictionary of number: name; correct it")
    return {key: name for key, name in numbered.items() if key is not None}


# -- files -------------------------------------------------------------------------------------------------------------


class _Layout:
    """Which label file belongs to which image."""

    def __init__(self, folder: Path, images: Path | None, left_out: Counter[str]) -> None:
        self.folder, self.given = folder, images
        self.finder = ImageFolder(images) if images else None
        self.left_out = left_out
        self.places: set[Path] = set()  # folders of images
        self.used: dict[Path, Path] = {}  # image -> its label file
        self.met: Counter[Path] = Counter()  # label files
        self._stems: dict[Path, dict[str, list[Path]]] = {}

    def pairs(self, settings: dict[str, Any], encoding: str | None) -> Iterator[tuple[Path, Path, str]]:
        """(label file, image, split); by the splits of data.yaml, or else all below the folder."""
        listed = False
        for split in ("train", "val", "valid", "test"):
            entries = settings.get(split) or []
            for entry in [entries] if isinstance(entries, str) else entries if isinstance(entries, list) else []:
                place = self._place(str(entry), str(settings.get("path") or ""))
                if place is None:
                    self.left_out[f"folder of a split that does not exist: {entry!r:.200} of {split!r}"] += 1
                    continue
                listed = True
                if place.is_file():
                    yield from self._listed(place, split, encoding)
                else:
                    yield from self._below(place, split)
        if not listed:
            yield from self._below(self.folder, None)
        images = {image.resolve() for place in self.places for image in files_below(place, IMAGE_SUFFIXES, Counter())}
        self.left_out += Counter(f"image without a label file: {image}" for image in sorted(images - self.used.keys()))

    def _place(self, entry: str, root: str) -> Path | None:
        """The folder or list that data.yaml means. Roboflow writes ``../train/images`` for ``train/images``.

        Absolute paths of another machine are found by their last parts, at least two of them.
        """
        entry, root = entry.replace("\\", "/"), root.replace("\\", "/")
        roots = [self.folder / root, self.folder]
        written = next(filter(_exists, (place / entry for place in roots)), None)
        below = next(filter(_exists, (place / entry.removeprefix("../") for place in roots)), None)
        if written and below and written.resolve() != below.resolve():
            raise DataError(f"{self.folder}: {entry!r} may be {written} or {below}; correct it in data.yaml")
        parts = PurePosixPath(entry).parts
        tails = (self.folder.joinpath(*parts[start:]) for start in range(1, len(parts) - 1))
        found = written or below or next(filter(_exists, tails), None)
        labels = (_swapped(place / entry, "images", "labels") for place in roots)  # of images that are elsewhere
        return found or next(filter(_exists, labels), None)

    def _below(self, place: Path, split: str | None) -> Iterator[tuple[Path, Path, str]]:
        """The label files of a folder of images (or of both); ``split`` None = as the folders are called."""
        labels = _swapped(place, "images", "labels")
        labels = labels if labels.is_dir() else place
        self.places |= {self.given or place, place}
        for rows in files_below(labels, [".txt"], self.left_out):
            relative = rows.relative_to(labels)
            image = self._image_of(rows, relative.parent)
            if image is None and (rows.name.lower() in NO_LABELS or rows.name.lower().startswith("readme")):
                continue
            if image is None:
                self.left_out[f"label file without an image: {rows}"] += 1
            elif self._is_new(image, rows):
                yield rows, image, split if split is not None else split_of(_plain_parts(relative))

    def _listed(self, file: Path, split: str, encoding: str | None) -> Iterator[tuple[Path, Path, str]]:
        """The images that a text file lists, by their paths."""
        finder = ImageFolder(*([self.given] if self.given else []), self.folder)
        for line in read_text(file, encoding).splitlines():
            if not line.strip():
                continue
            try:
                image = finder.find(line.strip(), beside=file.parent)
            except MissingDataError:
                self.left_out[f"image that is missing: {line.strip()[:200]}"] += 1
                continue
            places = [_swapped(image.parent, "images", "labels"), image.parent]
            rows = next(
                (place / f"{image.stem}.txt" for place in places if (place / f"{image.stem}.txt").is_file()), None
            )
            if rows is None:
                self.left_out[f"image without a label file: {image}"] += 1
            elif self._is_new(image, rows):
                yield rows, image, split

    def _image_of(self, rows: Path, relative: Path) -> Path | None:
        """The image of a label file: in the folder ``images`` for ``labels``, beside it, or in --images."""
        folders = [_swapped(rows.parent, "labels", "images"), rows.parent]
        if self.given:
            folders = [self.given / relative, self.given, *folders]
        stems = list(dict.fromkeys([rows.stem, UPLOAD_PREFIX.sub("", rows.stem)]))
        for stem in stems:
            for folder in folders:
                found = self._stems_in(folder).get(plain(stem), [])
                if len(found) > 1:
                    raise DataError(f"{rows} may belong to {found[0]} or {found[1]}; remove one of them")
                if found:
                    return found[0]
            if self.finder:
                try:
                    return self.finder.find("", stem, self.given)
                except MissingDataError:
                    continue
        return None

    def _stems_in(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._stems:
            stems = self._stems.setdefault(folder, {})
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
                    stems.setdefault(plain(path.stem), []).append(path)
        return self._stems[folder]

    def _is_new(self, image: Path, rows: Path) -> bool:
        """Whether the image was not met before; ``DataError`` if another label file has rows for it."""
        other = self.used.setdefault(image.resolve(), rows)
        if other != rows:
            raise DataError(f"{image} has two label files, {other} and {rows}; remove one, or give --images")
        self.met[rows] += 1
        return self.met[rows] == 1


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # a name that is too long, or that the system cannot encode
        return False


def _swapped(folder: Path, name: str, other: str) -> Path:
    """The folder with its last part ``name`` replaced: images/train -> labels/train."""
    parts = list(folder.parts)
    if name in parts:
        parts[len(parts) - 1 - parts[::-1].index(name)] = other
    return Path(*parts)


def _plain_parts(path: Path) -> Path:
    """obj_train_data/a.txt, as darknet and CVAT call it -> train/a.txt."""
    return Path(*(part.removeprefix("obj_").removesuffix("_data") for part in path.parts))


# -- rows --------------------------------------------------------------------------------------------------------------


def _add_row(annotations: list[Annotation], line: str, classes: _Classes, size: Size, left_out: Counter[str]) -> None:
    """Adds the object of a row; one whose class has no name is left out."""
    fields = line.split()
    if not fields:
        return
    try:
        label_number, *values = map(number, fields)
    except DataError:
        return add_unnamed(annotations, "row that is not of numbers", left_out)
    label = classes.names.get(int(label_number), "") if label_number.is_integer() else ""
    if not label:
        unknown = f"class {fields[0][:20]}, which {classes.file.name} does not name"
        return add_unnamed(annotations, unknown, left_out)
    values = _without_scores(values)
    if len(values) != 4 and not classes.has_keypoints:
        return add_region(annotations, label, lambda: _polygon(values, size), left_out)
    height, width = size
    reason, box = "a box with keypoints" if classes.has_keypoints else "a box", None
    if len(values) >= 4 and max(map(abs, values[:4])) <= FAR:
        x, y, w, h = values[:4]
        box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
    else:
        reason = "a box that is not in fractions of its image"
        left_out[reason] += 1
    annotations.append(Annotation(label, None, box, reason))


def _without_scores(values: list[float]) -> list[float]:
    """The coordinates of a row: without the number of a track, a whole one above 1, and a confidence, the odd one."""
    if len(values) > 4 and values[-1] > 1 and values[-1].is_integer() and max(map(abs, values[:-1])) <= FAR:
        values = values[:-1]
    return values[:-1] if len(values) > 4 and len(values) % 2 else values


def _polygon(values: list[float], size: Size) -> list[Any]:
    if max(map(abs, values), default=0) > FAR:
        raise DataError("a polygon that is not in fractions of its image")
    if len(values) < 6 or len(values) % 2:
        raise DataError(f"{len(values)} numbers, neither a box nor a polygon")
    return [clean_ring([[x * size[1], y * size[0]] for x, y in zip(values[::2], values[1::2])], size)]
