"""The check of a JSONL: decodes all images and masks, lists all errors, plots samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.datasets.base import DataError
from utils.datasets.custom import load_lines, with_ignored
from utils.datasets.jsonl import Line, LineFile, scan
from utils.datasets.masks import stack_masks
from utils.datasets.spec import Spec
from utils.plotting.overlays import Panel, evenly_spaced, save_picture, sheet
from utils.wording import counted


def check_file(path: Path, pictures: int) -> int:
    """Decodes all images and masks and returns 0; ``DataError`` listing all errors."""
    problems: list[str] = []
    for split, file in _splits(path):
        print(f"{split}: " + ", ".join(f"{count} {name}" for name, count in file.counts.items()))
        lines = [line for image in range(len(file)) for line in file.lines(image)]
        problems += [problem for line in lines if (problem := _decode_error(path.parent, line))]
        if pictures and not problems:
            print(f"wrote {_plot(path, split, [lines[i] for i in evenly_spaced(len(lines), pictures)])}")
    if problems:
        raise DataError("\n  ".join([f"{path}: {counted(len(problems), 'line')} cannot be used", *problems]))
    print(f"{path}: all images and masks can be read")
    return 0


def plot_first(path: Path, pictures: int) -> list[Path]:
    """Plots the first lines of each split into ``FILE.SPLIT.png``, and returns these files."""
    sheets = []
    for split, file in _splits(path):
        lines: list[Line] = []
        for image in range(len(file)):
            lines += file.lines(image)
            if len(lines) >= pictures:
                break
        sheets.append(_plot(path, split, lines[:pictures]))
    return sheets


def _splits(path: Path) -> Iterator[tuple[str, LineFile]]:
    for split in scan(path)[1]:
        yield split, LineFile(Spec.parse(f"custom|{path}|{split}"), path.parent, None)


def _decode_error(folder: Path, line: Line) -> str:
    try:
        load_lines(folder, [line])
    except DataError as error:
        return str(error)
    return ""


def _plot(path: Path, split: str, lines: list[Line]) -> Path:
    picture = path.with_name(f"{path.stem}.{split}.png")
    save_picture(picture, sheet(list(_panels(path.parent, lines)), f"{path}, {split}"))
    return picture


def _panels(folder: Path, lines: Iterable[Line]) -> Iterator[Panel]:
    for line in lines:
        image, [masks], [ignored] = load_lines(folder, [line])
        conversation = " / ".join(f"{turn.question} {turn.answer}" for turn in line.turns)
        stack = stack_masks(masks, *image.shape[:2])
        truth = with_ignored(stack.max(axis=0, initial=0), ignored)
        count = counted(len(masks), "mask") if masks else "absent" if line.query else "no mask"
        yield Panel(image, line.query or conversation, stack, truth=truth, notes=[f"{count}, line {line.number}"])
