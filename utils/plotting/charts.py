"""Charts at the width of a paper's column: 7 point text, colors and dashes that color-blind readers can distinguish.

They use matplotlib without pyplot and its global state.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.plotting.overlays import LINES, PALETTE

COLUMN = 3.3  # inches
STYLE = {
    "font.size": 7,
    "figure.titlesize": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "text.parse_math": False,  # a query may hold a dollar sign
}


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of the given size in inches; the project's style applies inside the context."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its keys are annotated as literals
        yield Figure(figsize=(width, height), layout="constrained")


def png(picture: np.ndarray, caption: str = "") -> bytes:
    """A PNG file of RGB [H, W, 3], with the caption in its metadata.

    No palette: 256 colors would halve the size, but distort colors (yellow turns green).
    """
    metadata, data = PngInfo(), io.BytesIO()
    metadata.add_itxt("Description", caption)
    Image.fromarray(picture).save(data, format="PNG", optimize=True, pnginfo=metadata)
    return data.getvalue()


def pixels(fig: Figure, dpi: int = 250) -> np.ndarray:
    """Renders a figure as uint8 RGB [H, W, 3]."""
    fig.set_dpi(dpi)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_chart(path: Path, picture: np.ndarray | Figure, caption: str) -> None:
    """Writes a figure, or RGB [H, W, 3], as a PNG with its caption."""
    path.write_bytes(png(pixels(picture) if isinstance(picture, Figure) else picture, caption))


def curves(axes: Axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], marked: bool = True) -> None:
    """Plots lines, name -> (x, y), with a legend if there are several."""
    for number, (name, (x, y)) in enumerate(lines.items()):
        style = dict(LINES[number % len(LINES)])
        if not marked or len(x) > 40:
            style.pop("marker")
        axes.plot(x, y, label=name, **style)
    if len(lines) > 1:
        axes.legend(loc="best", handlelength=2.6)
    axes.grid(axis="y", linewidth=0.3, alpha=0.6)


def layer_curves(ciou: Mapping[str, Sequence[float]], loss: Mapping[str, Sequence[float]]) -> Figure:
    """Fig. 2: cIoU with each layer forced, and the loss of its similarity maps; one line per checkpoint."""
    with figure(COLUMN, 3.7) as fig:
        above, below = fig.subplots(2, 1, sharex=True)
        for axes, values, label in ((above, ciou, "cIoU, layer forced"), (below, loss, "loss of similarity maps")):
            curves(axes, {name: (range(len(line)), line) for name, line in values.items()})
            axes.set_ylabel(label)
        below.set_xlabel("layer (0 = embeddings)")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes, letter in ((above, "(a)"), (below, "(b)")):
            axes.set_title(letter, loc="left")
        return fig


def phrase_curves(hits: Mapping[str, Mapping[bool, Sequence[float]]], area: float) -> Figure:
    """How often a phrase's map is highest on its target, layer by layer.

    Args:
        hits: kind of similarity -> control or not -> [L]; area: what a random cell hits.
    """
    lines = {
        kind + " (another image's phrases)" * control: (range(len(values)), values)
        for kind, pair in hits.items()
        for control, values in pair.items()
    }
    with figure(COLUMN, 2.6) as fig:
        axes = fig.subplots()
        curves(axes, lines, marked=False)
        axes.axhline(area, color="0.6", linewidth=0.8, linestyle=":")
        axes.set(xlabel="layer (0 = embeddings)", ylabel="target's share of the highest cell", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return fig


def policy_strips(tables: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Heat maps with a row per group of queries and a column per layer: the darker, the more of the group's [SEG].

    Args:
        tables: title -> group -> shares of the layers.
    """
    rows = sum(len(groups) for groups in tables.values())
    with figure(COLUMN, 0.16 * rows + 0.35 * len(tables) + 0.3) as fig:
        all_axes = fig.subplots(len(tables), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, groups) in zip(all_axes, tables.items()):
            heat_map = axes.imshow(np.array(list(groups.values())) * 100, cmap="Blues", vmin=0, vmax=100, aspect="auto")
            axes.set_yticks(range(len(groups)), list(groups))
            axes.set_title(title, loc="left")
        all_axes[-1].set_xlabel("layer")
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        fig.colorbar(heat_map, ax=list(all_axes), label="% of [SEG]", pad=0.02, aspect=30)
        return fig


def ceiling_chart(
    losses: np.ndarray,
    layers: Sequence[int],
    kinds: Sequence[str],
    levels: Sequence[str],
    gains: Mapping[str, tuple[float, float, float]],
) -> Figure:
    """(a) What each kind of query loses in each layer, (b) what each way to choose a layer gains, with intervals.

    Args:
        losses: [kinds, layers] points of gIoU below the kind's best layer, which a dot marks.
        kinds: their names; levels: text to the right of each row.
        gains: name -> (gain, low, high) in points of gIoU.
    """
    values = np.array(list(gains.values()))
    with figure(COLUMN, 0.15 * (len(kinds) + len(gains)) + 1.3) as fig:
        above, below = fig.subplots(2, 1, height_ratios=[len(kinds) + 1, len(gains) + 1])
        heat_map = above.imshow(losses, cmap="Blues", vmin=0, vmax=max(1.0, min(10.0, losses.max())), aspect="auto")
        above.plot(losses.argmin(1), range(len(kinds)), "o", color=PALETTE[6] / 255)
        above.set_yticks(range(len(kinds)), kinds)
        shown = range(0, len(layers), max(1, len(layers) // 8))
        above.set_xticks(shown, [str(layers[n]) for n in shown])
        above.set_xlabel("layer", labelpad=1)
        above.spines[:].set_visible(False)
        bar = fig.colorbar(heat_map, ax=above, location="top", aspect=30, pad=0.02, shrink=0.7)
        bar.set_label("points of gIoU below the best layer (dot)", labelpad=2)
        _beside(above, ["best  oracle", *levels], range(-1, len(kinds)))
        below.barh(range(len(gains)), values[:, 0], height=0.6, color=PALETTE[1] / 255)
        below.hlines(range(len(gains)), values[:, 1], values[:, 2], color="black", linewidth=0.8)
        below.axvline(0, color="black", linewidth=0.6)
        below.set_yticks(range(len(gains)), list(gains))
        below.set_ylim(len(gains) - 0.4, -0.6)
        most = max(1.0, float(values[:, 2].max()))
        below.set_xlim(max(float(values[:, 1].min()), -1.5 * most) - 0.1 * most, 1.1 * most)  # cuts losses short
        below.set_xlabel("gain over the best fixed layer, points of gIoU", loc="right")
        below.grid(axis="x", linewidth=0.3, alpha=0.6)
        _beside(below, [f"{gain:+.1f}" for gain in values[:, 0]], range(len(gains)))
        for axes, letter in ((above, "(a)"), (below, "(b)")):
            axes.set_title(letter, loc="left")
        return fig


def _beside(axes: Axes, texts: Sequence[str], rows: Sequence[int]) -> None:
    """Writes texts to the right of the axes, at the rows' height."""
    for text, row in zip(texts, rows, strict=True):
        axes.text(1.03, row, text, va="center", transform=axes.get_yaxis_transform())


def training_curves(
    losses: Mapping[str, np.ndarray], entropies: Mapping[str, np.ndarray], steps: Sequence[int]
) -> Figure:
    """Loss of each layer's maps over training, one panel per run, and the entropy of the policies.

    Args:
        losses: name -> [S, L] at the S steps, plotted as a running mean over 5; darker lines are lower layers.
        entropies: name -> [S] in nats, for the runs of ``losses`` with a policy.
    """
    panels = len(losses) + bool(entropies)
    with figure(2 * COLUMN, 1.9) as fig:
        shares = [1.0] * len(losses) + [1.5] * bool(entropies)
        all_axes = fig.subplots(1, panels, squeeze=False, width_ratios=shares)[0]
        for axes, (name, table) in zip(all_axes, losses.items()):
            axes.sharey(all_axes[0])
            layers = table.shape[1]
            for layer, line in enumerate(table.T):
                axes.plot(steps, running_mean(line, 5), color=colormaps["viridis"](layer / max(1, layers - 1) * 0.92))
            axes.set_title(name, loc="left")
            axes.set_xlabel("step")
            axes.tick_params(labelleft=axes is all_axes[0])
        all_axes[0].set_ylabel("loss of similarity maps")
        scale = ScalarMappable(Normalize(0, layers - 1), ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 64))))
        fig.colorbar(scale, ax=all_axes[len(losses) - 1], label="layer", ticks=MaxNLocator(integer=True))
        if entropies:
            styles = dict(zip(losses, LINES))
            for name, line in entropies.items():
                all_axes[-1].plot(steps, line, label=name, **(styles[name] | {"marker": ""}))
            all_axes[-1].set_title("policy's entropy, nats", loc="left")
            all_axes[-1].set_xlabel("step")
            all_axes[-1].set_ylim(0, 1.45 * max(line.max() for line in entropies.values()))  # room for the legend
            all_axes[-1].legend(loc="upper right", handlelength=1.8)
        return fig


def running_mean(line: np.ndarray, width: int) -> np.ndarray:
    """Centered moving average, over fewer values at the ends."""
    weights = np.ones(min(width, len(line)))
    return np.convolve(line, weights, "same") / np.convolve(np.ones(len(line)), weights, "same")
