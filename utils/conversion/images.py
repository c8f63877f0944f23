"""Finding the image that an annotation file means, and its size."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import and_, eq
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from PIL import Image

from model.processing.pixels import FORMATS, SUFFIXES, UNREAD_SUFFIXES
from utils.datasets.base import DataError, MissingDataError
from utils.datasets.images import DECODE_ERRORS

IMAGE_SUFFIXES = frozenset(SUFFIXES)
EXIF_ORIENTATION = 0x0112


def files_below(folder: Path, suffixes: Iterable[str], left_out: Counter[str]) -> list[Path]:
    """All files below a folder with one of the suffixes (lower case), sorted, without those that a Mac adds.

    Linked folders are followed, each folder once.
    """
    wanted, files = set(suffixes), []
    for path in sorted(_below(folder)):
        if path.suffix.lower() not in wanted or not path.is_file():
            continue
        if any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts):
            left_out["hidden file of the operating system (such as ._NAME, __MACOSX)"] += 1
            continue
        files.append(path)
    return files


def _below(folder: Path) -> Iterator[Path]:
    met = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(place)) in met:
            folders.clear()
            continue
        met.add(real)
        yield from (Path(place, name) for name in names)


def plain(name: str) -> str:
    """A file name for comparison: Unicode's NFC, lower case."""
    return unicodedata.normalize("NFC", name).lower()


class ImageFolder:
    """The images that annotation files may mean: those in the given folders, and those that a written path leads to.

    Args:
        folders: searched with their subfolders, the first one first: --images, then the folder of the annotations.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders = list(dict.fromkeys(folders))
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str, stem: str = "", beside: Path | None = None, split: str = "") -> Path:
        """The image that a tool wrote as ``name``.

        Tried in this order: the path as written (relative to each folder and to ``beside``), the longest ending of it
        that exists in a folder, an image of the same base name anywhere in the folders, an image named ``stem``. Of
        several, the one in the same subfolder is meant: labels/train/a.json, images/train/a.jpg.

        Args:
            name: with slashes or backslashes, absolute, ``file://``, or with %20; "" = none was written.
            stem: of the annotation file, for files that name no image.
            beside: folder of the annotation file.
            split: of several images of a name, those below a folder of this name are meant.

        Raises:
            MissingDataError: if there is none.
            DataError: if several images of different content have the name.
        """
        if path := self.as_written(name, beside):
            return path
        base_names = [PurePosixPath(spelling).name for spelling in _spellings(name)]
        candidates = [path for base in base_names for path in self._named(plain(base))]
        if not candidates and stem:
            candidates = self._named(plain(stem), beside)
        candidates = self._mirrored(candidates, beside) or _with_longest_ending(candidates, name)
        if split:
            candidates = [path for path in candidates if split in path.parent.parts] or candidates
        return _only(candidates, name or stem, self._folders(beside))

    def as_written(self, name: str, beside: Path | None = None) -> Path | None:
        """The image at the path that a tool wrote, or at its longest ending of a folder and a name; None if none is."""
        for spelling in _spellings(name):
            parts = PurePosixPath(spelling).parts
            for tail in (spelling, *("/".join(parts[start:]) for start in range(1, len(parts) - 1))):
                for folder in self._folders(beside):
                    if _is_image(path := Path(os.path.normpath(folder / tail))):
                        return path
        return None

    def guess(self, path: Path, names: Sequence[str], beside: Path | None = None) -> str:
        """The first of the names by which an image was found, if it is at none of these paths; else ""."""
        folders = {plain(PurePosixPath(spelling).parent.name) for name in names for spelling in _spellings(name)} - {""}
        is_sure = plain(path.parent.name) in folders or self._mirrored([path], beside)  # of another case, or in NFD
        return "" if is_sure or any(self.as_written(name, beside) == path for name in names) else names[0]

    def _folders(self, beside: Path | None) -> list[Path]:
        """The folders in the order of search: a subfolder of the first one before it, another one after all."""
        if beside is None:
            return self.folders
        inside = beside.is_relative_to(self.folders[0])
        return list(dict.fromkeys([beside, *self.folders] if inside else [*self.folders, beside]))

    def _mirrored(self, candidates: list[Path], beside: Path | None) -> list[Path]:
        """The candidates in the subfolder of a folder that ``beside`` is of its own."""
        if beside is None:
            return []
        inside = [beside.relative_to(folder) for folder in self.folders if beside.is_relative_to(folder)]
        meant = {folder / part for part in inside for folder in self.folders if part != Path()}
        return [path for path in candidates if path.parent in meant]

    def _named(self, key: str, beside: Path | None = None) -> list[Path]:
        """The images with a base name; with ``beside`` those with a stem, in that folder if there are any."""
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for folder in self.folders:
                for path in files_below(folder, IMAGE_SUFFIXES, Counter()):
                    self._by_name[plain(path.name)].append(path)
                    self._by_name[f"stem {plain(path.stem)}"].append(path)
        if beside is None:
            return self._by_name.get(key, [])
        found = self._by_name.get(f"stem {key}", [])
        return [path for path in found if path.parent == beside] or found


def _with_longest_ending(candidates: list[Path], name: str) -> list[Path]:
    """The candidates that share the most parts with a written path: folders of other case, or in Unicode's NFD."""
    written = [plain(part) for part in PurePosixPath(unquote(name.replace("\\", "/"))).parts[::-1]]
    endings = ([plain(part) for part in path.parts[::-1]] for path in candidates)
    shared = [sum(accumulate(map(eq, written, ending), and_)) for ending in endings]
    return [path for path, count in zip(candidates, shared) if count == max(shared)]


def _spellings(name: str) -> list[str]:
    """A written path with slashes, and the same with %20 and the like decoded; [] for no path."""
    text = re.sub(r"^file://(localhost)?", "", name.strip(), flags=re.IGNORECASE).replace("\\", "/")
    text = re.sub(r"^/?[A-Za-z]:/", "/", text)
    spellings = dict.fromkeys([text, unquote(text), unquote(text).split("?")[0]])
    return [spelling for spelling in spellings if spelling and "\0" not in spelling and len(spelling) < 4096]


def _is_image(path: Path) -> bool:
    try:
        return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that the system cannot encode
        return False


def _only(candidates: list[Path], name: str, folders: list[Path]) -> Path:
    unique = list({path.resolve(): path for path in candidates}.values())
    if not unique:
        suffix = PurePosixPath(name.replace("\\", "/")).suffix.lower()
        unread = f" ({suffix} is not read: save it as JPEG or PNG)" if suffix in UNREAD_SUFFIXES else ""
        raise MissingDataError(f"no image {name[:200]!r} in {', '.join(map(str, folders))}{unread}")
    first = unique[0]
    if any(not _same_content(first, other) for other in unique[1:]):
        shown = ", ".join(map(str, unique[:4]))
        raise DataError(
            f"{name!r} may be one of {len(unique)} different images: {shown}; give --images the right folder"
        )
    return first


def _same_content(first: Path, second: Path) -> bool:
    return first.stat().st_size == second.stat().st_size and first.read_bytes() == second.read_bytes()


def first_of_copies(paths: Iterable[Path]) -> dict[Path, Path]:
    """Each file -> the first with the same bytes. Only files of the same size are read."""
    first: dict[tuple[int, bytes], Path] = {}
    sizes = {path: path.stat().st_size for path in dict.fromkeys(paths)}
    shared = {size for size, count in Counter(sizes.values()).items() if count > 1}
    return {
        path: first.setdefault((size, _digest(path)), path) if size in shared else path for path, size in sizes.items()
    }


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def image_sizes(path: Path) -> tuple[tuple[int, int], int]:
    """(height, width) of the stored pixels, and the EXIF orientation (1 to 8; 1 = upright).

    Raises:
        DataError: if the file is no image that can be read to its end.
    """
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:
        raise DataError(f"image {path} cannot be read ({error})") from error
    return _image_sizes(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=100_000)
def _image_sizes(path: Path, _changed: int, _bytes: int) -> tuple[tuple[int, int], int]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            size = image.height, image.width
            image.draft(image.mode, (1, 1))  # JPEG: an eighth of the pixels shows as well whether the file is whole
            image.load()
    except DECODE_ERRORS as error:
        raise DataError(f"image {path} cannot be read ({error})") from error
    return size, orientation if orientation in range(1, 9) else 1


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image turned by its EXIF orientation, as training reads it; ``DataError`` as above."""
    (height, width), orientation = image_sizes(path)
    return (width, height) if orientation >= 5 else (height, width)
