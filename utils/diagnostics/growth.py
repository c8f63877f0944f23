"""How time and memory of a training step grow with what it holds (``scripts/bench.py growth``)."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

from utils.diagnostics.benchmark import UGROUND, Bench, Preset

GROWTH: dict[str, tuple[Any, ...]] = {
    "questions per image": (1, 2, 4, 8, 16),
    "[SEG] per answer": (1, 2, 4, 8, 16),
    "megapixels on disk": (1, 3, 6, 12),
    "images per batch": (1, 2, 4),
    "layers that may be chosen": (1, 4, 12),
    "layers of LLaMA": (4, 8, 12),
}


def growth(preset: Preset, device: str, folder: str, repeats: int) -> list[list[Any]]:
    """Rows (what, value, median seconds, peak MB) of a training step with cached features."""
    bench, rows = Bench(preset, device, folder), []
    for what, values in GROWTH.items():
        for value in values:
            samples, settings = bench.samples(1), UGROUND | {"first_candidate_layer": 1}
            if what == "questions per image":
                samples = bench.samples(value)
            elif what == "[SEG] per answer":
                samples = bench.samples(1, segs=value)
            elif what == "megapixels on disk":
                side = round((value * 1e6 / 12) ** 0.5)
                samples = bench.samples(preset.questions, size=(3 * side, 4 * side))
            elif what == "images per batch":
                samples = bench.samples(1, images=value)
            elif what == "layers that may be chosen":
                layers = bench.model.config.num_hidden_layers
                settings["first_candidate_layer"] = max(1, layers + 1 - value)
            else:
                baseline_bytes = bench.baseline_bytes  # memory is counted from before the first model
                del bench
                bench = Bench(replace(preset, llama=preset.llama | {"layers": value}), device, folder)
                bench.baseline_bytes = baseline_bytes
                samples = bench.samples(1)
            bench.configure(settings)
            batch = bench.batch(samples)
            bench.step(batch)
            step = partial(bench.step, batch)
            seconds = statistics.median(bench.seconds(step) for _ in range(repeats))
            rows.append([what, value, seconds, bench.peak(step) / 2**20])
    return rows
