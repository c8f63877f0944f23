"""The ceiling as text, tables and chart, without the model."""

from __future__ import annotations

from typing import Any

import numpy as np

from utils.evaluation.ceiling import (
    ACROSS,
    CHANCE,
    FIXED,
    GATE,
    KIND_CROSS,
    LAST,
    ORACLE,
    Ceiling,
    Measured,
    Row,
)
from utils.wording import counted

WORTH = 0.01  # gIoU; an oracle that gains less leaves nothing to choose
FIGURE = (
    "(a) gIoU of each layer, in points below the best layer of each kind of query (the dot); in brackets the number of "
    "queries, to the right the gIoU of the best layer and of the oracle. (b) Gain over the best fixed layer in "
    "points, with 95% intervals; c.-f. = cross-fitted; long bars to the left are cut short."
)
LAYERS = (
    "Layers: gIoU of mask and map, mean reward of the map by kind of reward, the share of queries that the layer is "
    "best for (equally good layers share a query), and mask gIoU by kind of query."
)
REWARDS = (
    "Rank correlation (Spearman) of map reward and mask IoU. Within queries: over the layers of a query, the mean over "
    "queries with its 95% interval; left out are queries whose IoUs or rewards are equal in all layers. Beyond layers: "
    "the same after each layer's mean is subtracted: does the reward see what a query prefers beside the layer that is "
    "best for all? Within layers: over the queries of a layer, the mean over layers."
)


def sentence(ceiling: Ceiling) -> str:
    """What a policy can gain at most, how much of it is chance, and what a gate reads off the states."""
    oracle, chance, gate, fixed = (ceiling.row(name) for name in (ORACLE, CHANCE, GATE, FIXED))
    return (
        f"A policy over layers {ceiling.layers[0]} to {ceiling.layers[-1]} can gain at most {points(oracle)} points of "
        f"gIoU over the best fixed layer ({fixed.layers}); {100 * chance.gain:z.1f} of these are chance by "
        f"the pixel halves, and a gate fitted to half of the images gains {points(gate)} on the other half."
    )


def verdict(ceiling: Ceiling) -> str:
    """The advice that follows by a rule.

    Readable: a cross-fitted row, of the gate or of a layer per kind, has a gain with an interval above 0. Unreadable:
    else, if the oracle across halves gains ``WORTH`` or more, with an interval above 0. Nothing to choose: else.
    """
    rows = [ceiling.row(name) for name in (GATE, KIND_CROSS) if ceiling.has(name)]
    across, fixed = ceiling.row(ACROSS), ceiling.row(FIXED)
    if readable := [row for row in rows if row.gain_low > 0]:
        row = max(readable, key=lambda row: row.gain)
        return f"There is something to choose, and it can be read: {row.name}, gains {points(row)} points."
    if across.gain >= WORTH and across.gain_low > 0:
        return (
            f"There is something to choose ({ACROSS}: {points(across)} points), but {fixed.queries} queries do not "
            f"show how to read it from the [SEG] states: expect little of a policy beyond layer {fixed.layers}."
        )
    best = "last" if ceiling.row(LAST).layers == fixed.layers else f"fixed:{fixed.layers}"
    return f"There is nothing to choose: train with layer_selection {best}."


def points(row: Row) -> str:
    """The gain in points of gIoU: ``4.8 [3.9, 5.8]``."""
    return f"{100 * row.gain:z.1f} [{100 * row.gain_low:z.1f}, {100 * row.gain_high:z.1f}]"


def caption(measured: Measured, ceiling: Ceiling, mode: str) -> str:
    """The caption of the table."""
    unanswered = int(np.count_nonzero(~measured.answered))
    without = f" Answers without [SEG] have IoU 0 in all layers ({unanswered} here)." if mode == "generate" else ""
    return (
        f"{sentence(ceiling)} {verdict(ceiling)}\n"
        f"gIoU of {counted(len(measured.images), 'query', 'queries')} with a target, with 95% intervals over images; "
        "gains are over the best fixed layer, paired. Mask: with the layer forced; map: at its best threshold (M_IoU). "
        "Cross-fitted: chosen on half of the images, measured on the other half. Chance level: what the oracle would "
        "reach if no query preferred a layer. Across halves: chosen on half of the pixels, measured on the other half "
        f"(there the best fixed layer has {ceiling.row(ACROSS).gIoU - ceiling.row(ACROSS).gain:.3f}). All [SEG] of an "
        f"answer use the forced layer; an answer that rejects is scored by its mask.{without}"
    )


def cells(ceiling: Ceiling) -> list[list[str]]:
    """The table: a row per way to choose layers, masks and maps side by side."""
    result = [["policy over layers", "layers, masks", "mask gIoU", "gain", "map gIoU", "gain"]]
    for name in dict.fromkeys(row.name for row in ceiling.rows):
        line = [name, ceiling.row(name).layers]
        for on in ("mask", "map"):
            row = ceiling.row(name, on) if ceiling.has(name, on) else None
            line += [_interval(row.gIoU, row.low, row.high) if row else ""]
            line += [_interval(row.gain, row.gain_low, row.gain_high) if row and row.name != FIXED else ""]
        result.append(line)
    return result


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:z.3f} [{low:z.3f}, {high:z.3f}]"


def layer_rows(measured: Measured, ceiling: Ceiling) -> list[dict[str, Any]]:
    """A row per candidate layer, of ``LAYERS``."""
    columns = {"mask_gIoU": measured.mask.mean(0), "map_gIoU": measured.map.mean(0)}
    answered = measured.answered
    for kind, values in measured.rewards.items():
        columns[f"reward_{kind}"] = values[answered].mean(0) if answered.any() else values.sum(0) * np.nan
    columns["best_share"] = ceiling.shares
    columns |= {f"mask_gIoU_{name}": measured.mask[part].mean(0) for name, part in list(parts(measured).items())[1:]}
    return [
        {"layer": layer} | {name: float(values[c]) for name, values in columns.items()}
        for c, layer in enumerate(measured.layers)
    ]


def parts(measured: Measured) -> dict[str, np.ndarray]:
    """Kind (its number of queries) -> bool [Q]; with several kinds, all queries first."""
    names = np.unique(measured.kinds)
    result = {"all": np.ones(len(measured.kinds), bool)}
    if len(names) > 1:
        result |= {str(name): measured.kinds == name for name in names}
    return {f"{name} ({np.count_nonzero(part)})": part for name, part in result.items()}


def chart(measured: Measured, ceiling: Ceiling) -> dict[str, Any]:
    """The arguments of ``utils.plotting.charts.ceiling_chart``."""
    ious = {name: measured.mask[part] for name, part in parts(measured).items()}
    means = np.array([part.mean(0) for part in ious.values()])
    highest = means.max(1)
    return {
        "losses": 100 * (highest[:, None] - means),
        "layers": measured.layers,
        "kinds": list(ious),
        "levels": [f"{top:.2f}  {part.max(1).mean():.2f}" for top, part in zip(highest, ious.values())],
        "gains": {
            row.name.replace("cross-fitted", "c.-f."): (100 * row.gain, 100 * row.gain_low, 100 * row.gain_high)
            for row in ceiling.rows
            if row.on == "mask" and row.name != FIXED
        },
    }
