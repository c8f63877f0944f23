"""Figures of one query, layer by layer: the paper's Fig. 4 to 6, and an animation over the layers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from utils.evaluation.layer_analysis import QueryView
from utils.plotting.charts import COLUMN, figure, pixels
from utils.plotting.overlays import LINES, Panel, fit, heat_map, overlay, truth_overlay

COLUMNS = 5  # maps per row, in the width of a paper's column
LETTERS_PER_INCH = 15  # at 7 points
CELL = 260  # side in pixels of the box that pictures are scaled to
BLUE, VERMILION = LINES[0]["color"], LINES[1]["color"]


def layer_maps(views: Mapping[str, QueryView]) -> Figure:
    """Similarity maps of all layers with the outline of the ground truth, and the answer; checkpoints side by side.

    Args:
        views: checkpoint's name -> its view of the query.
    """
    first = next(iter(views.values()))
    ratio = min(2.0, first.image.shape[0] / first.image.shape[1])
    rows = 1 + max(-(-len(view.maps) // COLUMNS) for view in views.values())
    width = COLUMN * len(views)
    title = textwrap.wrap(first.record.query, int(width * LETTERS_PER_INCH))
    height = rows * (0.9 * COLUMN / COLUMNS * ratio + 0.17) + 0.14 * (len(title) + 1)
    with figure(width, height) as fig:
        fig.suptitle("\n".join(title))
        blocks = fig.subfigures(1, len(views), squeeze=False)[0]
        for letter, block, (name, view) in zip("ab", blocks, views.items()):
            if len(views) > 1:
                block.suptitle(f"({letter}) {name}", fontweight="bold")
            _map_grid(block.subplots(rows, COLUMNS), view)
        return fig


def _map_grid(cells: np.ndarray, view: QueryView) -> None:
    """Draws image, ground truth and answer in the first row, then one map per layer."""
    panel, truth, similarities = _scaled_panel(view)
    for ax in cells.flat:
        ax.set_axis_off()
    faded = _faded(panel.image)
    answer = f"IoU {view.iou:.2f}", overlay(faded, panel.masks[-1:])
    pictures = [("image", panel.image), ("truth", truth_overlay(faded, truth)), answer]
    for ax, (name, picture) in zip(cells[0], pictures):
        ax.imshow(picture)
        ax.set_title(name, pad=2)
    for layer, (ax, similarity) in enumerate(zip(cells[1:].flat, similarities)):
        chosen = layer in view.record.layers
        ax.imshow(heat_map(panel.image, similarity))
        _outline(ax, truth)
        ax.set_title(f"{layer} chosen" if chosen else f"{layer}", pad=2, fontweight="bold" if chosen else "normal")
        if chosen:
            ax.set_axis_on()
            ax.set(xticks=[], yticks=[])
            for side in ax.spines.values():
                side.set(visible=True, color=VERMILION, linewidth=1.8)


def animate(view: QueryView, path: Path, dpi: int = 110) -> None:
    """Writes a GIF with one frame per layer: map, mask, IoU, and the policy's probability."""
    candidates = [layer for layer in range(len(view.maps)) if view.policy[layer] > 0] or list(range(len(view.maps)))
    frames = [Image.fromarray(pixels(frame, dpi)) for frame in _frames(view, candidates)]
    palette = Image.fromarray(np.concatenate([np.array(frame) for frame in frames])).quantize(255)
    palette_frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [2200 if layer in view.record.layers else 650 for layer in candidates]
    path.parent.mkdir(parents=True, exist_ok=True)
    palette_frames[0].save(
        path, save_all=True, append_images=palette_frames[1:], duration=durations, loop=0, optimize=True
    )


def _frames(view: QueryView, candidates: list[int]) -> Iterator[Figure]:
    """One frame per candidate layer."""
    panel, truth, similarities = _scaled_panel(view)
    faded = _faded(panel.image)
    ratio = min(1.2, view.image.shape[0] / view.image.shape[1])
    title = "\n".join(textwrap.wrap(view.record.query, int(2 * COLUMN * LETTERS_PER_INCH * 0.85)))
    for layer in candidates:
        chosen = ", the policy's choice" if layer in view.record.layers else ""
        pictures = [
            ("image and truth", panel.image),
            (f"similarity map, layer {layer}{chosen}", heat_map(panel.image, similarities[layer])),
            (f"SAM's mask, IoU {view.ious[layer]:.2f}", overlay(faded, panel.masks[layer : layer + 1])),
        ]
        with figure(2 * COLUMN, 2.15 * ratio + 1.55) as fig:
            fig.suptitle(title, fontsize=8)
            above, below = fig.subfigures(2, 1, squeeze=False, height_ratios=[2.15 * ratio + 0.2, 1.1])[:, 0]
            for ax, (name, picture) in zip(above.subplots(1, 3), pictures):
                ax.imshow(picture)
                ax.set_axis_off()
                ax.set_title(name, fontsize=8)
                _outline(ax, truth)
            ax = below.subplots()
            colors = [BLUE if each == layer else "0.75" for each in candidates]
            ax.bar(candidates, view.policy[candidates], color=colors, label="policy")
            ax.plot(candidates, [view.ious[each] for each in candidates], label="IoU", color=VERMILION, marker="o")
            ax.set(ylim=(0, 1.05), xlabel="layer")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
            yield fig


def _scaled_panel(view: QueryView) -> tuple[Panel, np.ndarray, np.ndarray]:
    """The query's pictures at display size, their ground truth and similarity maps.

    The panel's masks are those of all layers, then that of the answer.
    """
    masks = np.concatenate([view.masks, view.mask[None]])
    panel = fit(Panel(view.image, view.record.query, masks, view.maps, view.truth), CELL, CELL)
    assert panel.truth is not None
    assert panel.similarities is not None
    return panel, panel.truth, panel.similarities


def _faded(image: np.ndarray) -> np.ndarray:
    grey = (image.mean(-1, keepdims=True) / 2 + 110).astype(np.uint8)
    return np.repeat(grey, 3, axis=2)


def _outline(ax: Axes, truth: np.ndarray) -> None:
    """Draws the target's outline in black on white, visible on any color."""
    if (truth == 1).any() and not (truth == 1).all():
        for color, width in (("white", 1.6), ("black", 0.6)):
            ax.contour(truth == 1, [0.5], colors=color, linewidths=width)
