"""One query, layer by layer: the paper's Fig. 4 to 6, and the [SEG] token sliding through the layers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from utils.evaluation.layer_analysis import Look
from utils.plotting.charts import COLUMN, LINES, figure, pixels
from utils.plotting.overlays import Panel, fit, heat_map, overlay, truth_overlay

COLUMNS = 5  # of maps in a paper's column
LETTERS_PER_INCH = 15  # at 7 points
CELL = 260  # pixels that a picture is scaled to
BLUE, VERMILION = LINES[0]["color"], LINES[1]["color"]


def layer_maps(looks: Mapping[str, Look]) -> Figure:
    """The similarity maps of all layers with the truth's outline, and the answer; a block per checkpoint, side by side.

    Args:
        looks: the same query, by the checkpoints' names.
    """
    first = next(iter(looks.values()))
    ratio = min(2.0, first.image.shape[0] / first.image.shape[1])
    rows = 1 + max(-(-len(look.maps) // COLUMNS) for look in looks.values())
    width = COLUMN * len(looks)
    title = textwrap.wrap(first.query, int(width * LETTERS_PER_INCH))
    height = rows * (0.9 * COLUMN / COLUMNS * ratio + 0.17) + 0.14 * (len(title) + 1)
    with figure(width, height) as drawn:
        drawn.suptitle("\n".join(title))
        blocks = drawn.subfigures(1, len(looks), squeeze=False)[0]
        for letter, block, (name, look) in zip("ab", blocks, looks.items()):
            if len(looks) > 1:
                block.suptitle(f"({letter}) {name}", fontweight="bold")
            _block(block.subplots(rows, COLUMNS), look)
        return drawn


def _block(cells: np.ndarray, look: Look) -> None:
    """First the image, the truth and the answer, then a map per layer."""
    panel = _fitted(look)
    for axes in cells.flat:
        axes.set_axis_off()
    pale, truth, similarities = _pale(panel), *_known(panel)
    answer = f"IoU {look.iou:.2f}", overlay(pale, panel.masks[-1:])
    pictures = [("image", panel.image), ("truth", truth_overlay(pale, truth)), answer]
    for axes, (name, picture) in zip(cells[0], pictures):
        axes.imshow(picture)
        axes.set_title(name, pad=2)
    for layer, (axes, similarity) in enumerate(zip(cells[1:].flat, similarities)):
        chosen = layer in look.layers
        axes.imshow(heat_map(panel.image, similarity))
        _outline(axes, truth)
        axes.set_title(f"{layer} chosen" if chosen else f"{layer}", pad=2, fontweight="bold" if chosen else "normal")
        if chosen:
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set(visible=True, color=VERMILION, linewidth=1.8)


def animate(look: Look, path: Path, dpi: int = 110) -> None:
    """A GIF: the map and the mask of one layer after the other, and what the policy thinks of it."""
    panel = _fitted(look)
    candidates = [layer for layer in range(len(look.maps)) if look.policy[layer] > 0] or list(range(len(look.maps)))
    frames = [Image.fromarray(pixels(frame, dpi)) for frame in _frames(look, panel, candidates)]
    palette = Image.fromarray(np.concatenate([np.array(frame) for frame in frames])).quantize(255)
    still = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    pauses = [2200 if layer in look.layers else 650 for layer in candidates]
    path.parent.mkdir(parents=True, exist_ok=True)
    still[0].save(path, save_all=True, append_images=still[1:], duration=pauses, loop=0, optimize=True)


def _frames(look: Look, panel: Panel, candidates: list[int]) -> Iterator[Figure]:
    """A frame per layer that the policy can choose."""
    ratio = min(1.2, look.image.shape[0] / look.image.shape[1])
    title = "\n".join(textwrap.wrap(look.query, int(2 * COLUMN * LETTERS_PER_INCH * 0.85)))
    for layer in candidates:
        with figure(2 * COLUMN, 2.15 * ratio + 1.55) as drawn:
            drawn.suptitle(title, fontsize=8)
            above, below = drawn.subfigures(2, 1, squeeze=False, height_ratios=[2.15 * ratio + 0.2, 1.1])[:, 0]
            for axes, (name, picture) in zip(above.subplots(1, 3), _three(look, panel, layer)):
                axes.imshow(picture)
                axes.set_axis_off()
                axes.set_title(name, fontsize=8)
                _outline(axes, _known(panel)[0])
            axes = below.subplots()
            tones = [BLUE if each == layer else "0.75" for each in candidates]
            axes.bar(candidates, look.policy[candidates], color=tones, label="policy")
            axes.plot(candidates, [look.ious[each] for each in candidates], label="IoU", color=VERMILION, marker="o")
            axes.set(ylim=(0, 1.05), xlabel="layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
            yield drawn


def _three(look: Look, panel: Panel, layer: int) -> list[tuple[str, np.ndarray]]:
    chosen = ", the policy's choice" if layer in look.layers else ""
    return [
        ("image and truth", panel.image),
        (f"similarity map, layer {layer}{chosen}", heat_map(panel.image, _known(panel)[1][layer])),
        (f"SAM's mask, IoU {look.ious[layer]:.2f}", overlay(_pale(panel), panel.masks[layer : layer + 1])),
    ]


def _fitted(look: Look) -> Panel:
    """The query's pictures at the size they are shown at; its masks are those of all layers and the answer."""
    masks = np.concatenate([look.masks, look.mask[None]])
    return fit(Panel(look.image, look.query, masks, look.maps, look.truth), CELL, CELL)


def _known(panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Truth and similarities, which a ``Look`` always has."""
    assert panel.truth is not None
    assert panel.similarities is not None
    return panel.truth, panel.similarities


def _pale(panel: Panel) -> np.ndarray:
    grey = (panel.image.mean(-1, keepdims=True) / 2 + 110).astype(np.uint8)
    return np.repeat(grey, 3, axis=2)


def _outline(axes: Axes, truth: np.ndarray) -> None:
    """The target's edge in black on white, which shows on any color."""
    if (truth == 1).any() and not (truth == 1).all():
        for color, width in (("white", 1.6), ("black", 0.6)):
            axes.contour(truth == 1, [0.5], colors=color, linewidths=width)
