"""Pictures: masks over an image, similarity maps, and sheets of samples with their queries.

Images are uint8 RGB [H, W, 3]. Colors are those of Okabe and Ito, which color-blind people can distinguish.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from model.structures import IGNORE_PIXEL

PALETTE = np.array(
    [
        (230, 159, 0),  # orange
        (86, 180, 233),  # sky blue
        (204, 121, 167),  # pink
        (0, 158, 115),  # green
        (240, 228, 66),  # yellow
        (0, 114, 178),  # blue
        (213, 94, 0),  # vermilion
    ],
    dtype=np.uint8,
)
LINES = [  # of charts: blue, vermilion, green, orange, pink; dashes distinguish them, too
    {"color": PALETTE[n] / 255, "linestyle": dash, "marker": marker}
    for n, dash, marker in ((5, "-", "o"), (6, "--", "s"), (3, "-.", "^"), (0, ":", "D"), (2, (0, (5, 1)), "v"))
]
TRUTH_COLOR = (0, 114, 178)
IGNORED_COLOR = (60, 60, 60)
INK, PALE, PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
MAX_CELL_RATIO = 2.0  # largest width / height of a cell; a 1x5000 image is scaled down to fit


@dataclass
class Panel:
    """One row of a sheet.

    Attributes:
        image: [H, W, 3] uint8.
        query: the expression.
        masks: [N, H, W] bool; similarities: [N, H, W] in [0, 1], or None.
        truth: [H, W] or, of several targets, [N, H, W] uint8 with 0, 1 and 255; None if unknown.
        answer: text of the model's answer.
        notes: short lines such as "IoU 0.83".
        deviations: [N, H, W] in [0, 0.5], standard deviation of the probabilities over layers (``mc:T``), or None.
    """

    image: np.ndarray
    query: str
    masks: np.ndarray
    similarities: np.ndarray | None = None
    truth: np.ndarray | None = None
    answer: str = ""
    notes: Sequence[str] = ()
    deviations: np.ndarray | None = None


def evenly_spaced(length: int, count: int) -> list[int]:
    """At most ``count`` indices into ``length`` items, evenly spaced from the first to the last."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def color(number: int) -> tuple[int, int, int]:
    """Color of the ``number``-th [SEG], from 0."""
    red, green, blue = PALETTE[number % len(PALETTE)].tolist()
    return red, green, blue


def overlay(image: np.ndarray, masks: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    """Blends masks over an image, one color per [SEG], each with an outline that is visible on any background.

    Args:
        image: [H, W, 3] uint8.
        masks: [N, H, W] bool.
        opacity: of the fill; 0 = outlines only.
    """
    return paint(image, [(mask, color(number)) for number, mask in enumerate(masks)], opacity)


def truth_overlay(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Blends the ground truth over an image: [H, W], or [N, H, W] in the colors of N [SEG]; ignored pixels in grey."""
    targets = truth.reshape(-1, *image.shape[:2])
    colors = [TRUTH_COLOR] if len(targets) == 1 else map(color, range(len(targets)))
    layers = [((targets == IGNORE_PIXEL).any(axis=0), IGNORED_COLOR)]
    return paint(image, [*layers, *((target == 1, rgb) for target, rgb in zip(targets, colors))], opacity=0.55)


def paint(
    image: np.ndarray, layers: Sequence[tuple[np.ndarray, tuple[int, int, int]]], opacity: float, outline: bool = True
) -> np.ndarray:
    """Fills all masks [H, W] with their colors, then draws the outlines, so that no fill hides an outline."""
    picture = image.copy()
    for mask, rgb in layers:
        mask = mask.astype(bool)
        picture[mask] = (picture[mask] * (1 - opacity) + np.array(rgb) * opacity + 0.5).astype(np.uint8)
    thickness = max(1, round(min(picture.shape[:2]) / 250))
    halo = thickness + 2 if min(picture.shape[:2]) > 150 else 0
    for mask, rgb in layers if outline else ():
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        if halo:
            cv2.drawContours(picture, contours, -1, (255, 255, 255), halo)
        cv2.drawContours(picture, contours, -1, rgb, thickness)
    return picture


def heat_map(image: np.ndarray, similarity: np.ndarray, opacity: float = 0.75) -> np.ndarray:
    """Blends a similarity map [H, W] in [0, 1] over the grey image: dark violet = 0, yellow = 1 (viridis)."""
    levels = (np.clip(similarity, 0, 1) * 255 + 0.5).astype(np.uint8)
    heat = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    return cv2.addWeighted(heat, opacity, grey, 1 - opacity, 0)


def sheet(panels: Sequence[Panel], title: str = "", cell: int = 220) -> np.ndarray:
    """A picture with one row per sample: image, query and answer, similarity map, mask, deviation, ground truth.

    The columns of similarity maps and deviations are left out if no sample has any.

    Args:
        title: printed on top, wrapped.
        cell: height of the pictures in pixels.
    """
    columns = ["image", "query and answer", "similarity map", "mask", "deviation", "ground truth"]
    if all(panel.similarities is None for panel in panels):
        columns.remove("similarity map")
    if all(panel.deviations is None for panel in panels):
        columns.remove("deviation")
    width = max([cell, *(round(cell * min(MAX_CELL_RATIO, _ratio(panel.image))) for panel in panels)])
    text_width, gap = max(240, cell + 40), 12
    widths = [text_width if name == "query and answer" else width for name in columns]
    *lefts, right = np.cumsum([gap, *(w + gap for w in widths)]).tolist()
    left_edges = dict(zip(columns, lefts, strict=True))
    head = wrap(title, font(15), right - 2 * gap) if title else []
    texts = [_lines(panel, text_width) for panel in panels]
    heights = [max(cell, 20 * len(lines)) for lines in texts]
    top = gap + 22 * len(head) + 26
    canvas = Image.new("RGB", (right, top + sum(h + gap for h in heights)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(head):
        draw.text((gap, gap + 22 * number), line, INK, font(15))
    for name, left in left_edges.items():
        draw.text((left, top - 24), name, PALE, font(13))
    y = top
    for panel, lines, height in zip(panels, texts, heights):
        for number, (line, ink) in enumerate(lines):
            draw.text((left_edges["query and answer"], y + 20 * number), line, ink, font(14))
        for name, picture in _pictures(fit(panel, width, cell)).items():
            if picture is not None:
                canvas.paste(Image.fromarray(picture), (left_edges[name], y))
            elif name in left_edges:
                draw.text((left_edges[name], y), "none", PALE, font(13))
        y += height + gap
    return np.array(canvas)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Writes RGB [H, W, 3], or a mask [H, W] of 0 and 255, as a PNG, under a temporary name until it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        Image.fromarray(picture).save(unfinished, format="PNG", compress_level=3)  # 9% larger, in a third of the time
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def fit(panel: Panel, width: int, height: int) -> Panel:
    """Scales all pictures of a panel into a box, so that outlines are drawn at display size."""
    old_height, old_width = panel.image.shape[:2]
    scale = min(width / old_width, height / old_height)
    size = max(3, round(old_width * scale)), max(3, round(old_height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR

    def resize(values: np.ndarray) -> np.ndarray:
        return cv2.resize(values.astype(np.float32), size, interpolation=method)

    def stack(pictures: np.ndarray) -> np.ndarray:
        return np.stack([resize(picture) for picture in pictures]) if len(pictures) else np.zeros((0, *size[::-1]))

    truth = panel.truth
    if truth is not None:
        targets = truth.reshape(-1, old_height, old_width)
        ignored, inside = stack(targets == IGNORE_PIXEL) > 0.5, stack(targets == 1) > 0.5
        truth = np.where(ignored, IGNORE_PIXEL, inside).astype(np.uint8).reshape(*truth.shape[:-2], *size[::-1])
    return replace(
        panel,
        image=np.array(Image.fromarray(panel.image).resize(size, Image.Resampling.LANCZOS)),
        masks=stack(panel.masks) > 0.5,
        similarities=None if panel.similarities is None else stack(panel.similarities),
        deviations=None if panel.deviations is None else stack(panel.deviations),
        truth=truth,
    )


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text into lines of at most ``width`` pixels: at spaces, and within words that are wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if face.getlength(lines[-1] + character) > width and lines[-1]:
                lines.append("")
            lines[-1] += character
    return lines


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib's files: Latin, Greek, Cyrillic."""
    package = importlib.util.find_spec("matplotlib")  # located, not imported, which takes a second
    assert package is not None
    assert package.origin is not None
    return ImageFont.truetype(str(Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"), size)


def _ratio(image: np.ndarray) -> float:
    return image.shape[1] / image.shape[0]


def _lines(panel: Panel, width: int, max_lines: int = 6) -> list[tuple[str, tuple[int, int, int]]]:
    """(line, color) of the text column; a text of more than ``max_lines`` lines ends in an ellipsis."""
    lines = []
    for text, ink in ((panel.query, INK), (panel.answer, PALE), *((note, INK) for note in panel.notes)):
        wrapped = wrap(text, font(14), width) if text else []
        if len(wrapped) > max_lines:
            wrapped = [*wrapped[: max_lines - 1], f"{wrapped[max_lines - 1][:-2]}…"]
        lines += [(line, ink) for line in wrapped]
    return lines


def _pictures(panel: Panel) -> dict[str, np.ndarray | None]:
    """Column -> picture of a row; None where there is nothing to show.

    Masks are shown on a pale grey image, where no color of the scene competes with theirs.
    """
    pale = np.repeat(cv2.cvtColor(panel.image, cv2.COLOR_RGB2GRAY)[..., None] // 2 + 110, 3, axis=2)

    def heat(maps: np.ndarray | None) -> np.ndarray | None:
        return None if maps is None or len(maps) == 0 else heat_map(panel.image, maps.max(axis=0))

    return {
        "image": panel.image,
        "similarity map": heat(panel.similarities),
        "mask": overlay(pale, panel.masks),
        "deviation": heat(None if panel.deviations is None else 2 * panel.deviations),  # yellow = 0.5, the largest
        "ground truth": None if panel.truth is None else truth_overlay(pale, panel.truth),
    }
