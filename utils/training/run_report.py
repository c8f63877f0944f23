"""A training run as one self-contained HTML file: curves, tables, pictures, settings.

It is made from the run's folder (``log.jsonl``, ``config.yaml``, ``checkpoints/index.json``, ``pictures/``); the run
may be finished, resumed, or still running.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import reduce
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.config import Config, to_dict
from utils.files import write_atomically
from utils.plotting import charts, text_tables
from utils.plotting.overlays import evenly_spaced
from utils.training.checkpoint import read_index, step_name, step_of
from utils.training.run_log import GRPO, LOG, NOT_LOSSES, PICTURES, read_log
from utils.wording import counted

NAME = "report.html"
WIDTH = 9.0  # inches of a chart
BUDGET = 1_800_000  # bytes, for all validation pictures
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #141414; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 0.5em 0; display: block; overflow-x: auto; }
th, td { text-align: left; padding: 0.2em 0.9em 0.2em 0; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
img { max-width: 100%; height: auto; } pre { background: #f5f5f5; padding: 0.8em; overflow-x: auto; font-size: 13px; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; } figcaption, .note { color: #555; font-size: 13px; }
figure { margin: 1em 0; }
"""
Points = tuple[list[float], list[float]]  # x and y
Series = dict[str, Points]  # the curves of a chart by name


def write_report(folder: Path) -> Path:
    """Reads a run's folder and writes ``report.html`` into it.

    Raises:
        ValueError: if the folder is not a training run.
    """
    lines = read_log(folder)
    starts, train, val = ([line for line in lines if line.get("kind") == kind] for kind in ("start", "train", "val"))
    if not starts:
        raise ValueError(
            f"{folder} is not a training run: its {LOG} has no start; give a folder that train_ds.py wrote"
        )
    settings = read_settings(folder, starts[-1])
    parts = [
        head(folder, settings, starts, lines),
        section("Validation", validation_table(val, read_index(folder)), validation_charts(val)),
        section("Losses", chart(loss_series(train), "Unweighted terms of the objective; loss is their weighted sum.")),
        section(
            "Policy",
            chart(policy_series(train), "Reward and its baseline; entropy of the policy in nats."),
            layer_chart(train),
        ),
        section(
            "Sampled answers",
            chart(
                answer_series(train), "Loss (grpo), mean rewards by name, tokens, entropy per token in nats, shares."
            ),
        ),
        section(
            "Gradients and speed", chart(speed_series(train), "Gradient norms before clipping, per part and in total.")
        ),
        section("Validation pictures", *sheets(folder)),
        section("Data", html_table(starts[-1].get("data", []))),
        section("Parameters", html_table(parameters(starts[-1])), html_table(starts[-1].get("weights", []))),
        section(
            "Settings",
            changed_settings(settings),
            f"<pre>{escape(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))}</pre>",
        ),
        section(
            "Versions", html_table([starts[-1].get("versions", {}) | {"commit": starts[-1].get("commit", "unknown")}])
        ),
    ]
    title = escape(f"{folder.resolve().name}: training run")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    html = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{CSS}</style>\n</head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )
    path = folder / NAME
    write_atomically(path, html)
    return path


# -- reading -----------------------------------------------------------------------------------------------------------


def read_settings(folder: Path, start: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The effective configuration by section: ``config.yaml``, or the log's copy of it."""
    path = folder / "config.yaml"
    if not path.is_file():
        return start.get("config", {})
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid YAML ({' '.join(str(error).split())[:300]}); without it, {LOG} is read"
        ) from error
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise ValueError(f"{path} holds no sections of settings; without it, {LOG} is read")
    for name, value in settings.get("train", {}).items():
        if name in ("epochs", "steps_per_epoch") and not isinstance(value, int):
            raise ValueError(f"{path}: train.{name} is {value!r}, not a whole number; without the file, {LOG} is read")
    return settings


# -- sections ----------------------------------------------------------------------------------------------------------


def head(folder: Path, settings: Mapping[str, Any], starts: Sequence[dict], lines: Sequence[dict]) -> str:
    """Name, progress, date, device, commit and commands of the run."""
    train = settings.get("train", {})
    total, step = train.get("epochs", 0) * train.get("steps_per_epoch", 0), max(line.get("step", 0) for line in lines)
    state = "finished" if total and step >= total else "not finished"
    commands = "\n".join(
        f"{line.get('command', '')}" + (f"    # from step {line['step']}" if line.get("step") else "")
        for line in starts
    )
    start, processes = starts[-1], starts[-1].get("processes", 1)
    facts = {
        "started": starts[0].get("date", "").replace("T", " ").replace("+00:00", " UTC"),
        "time": duration(lines),
        "device": start.get("device", ""),
        "commit": start.get("commit", ""),
    }
    known = "; ".join(f"{name}: {value}" for name, value in facts.items() if value)
    return (
        f"<h1>{escape(folder.resolve().name)}</h1>\n<p>Step {step} of {total} ({state}), "
        f"{counted(processes, 'process', 'processes')}.</p>\n<p>{escape(known)}</p>\n"
        f'<pre class="wrap">{escape(commands)}</pre>'
    )


def duration(lines: Sequence[Mapping[str, Any]]) -> str:
    """Time of a run, ``1:02:03``: the last time of each process that wrote to the log; empty in older logs."""
    total, last = 0.0, 0.0
    for line in lines:
        if line.get("kind") == "start":
            total, last = total + last, 0.0
        last = line.get("seconds", last)
    return str(timedelta(seconds=round(total + last))) if total + last else ""


def section(title: str, *parts: str) -> str:
    """A heading with its parts; empty if no part has content."""
    content = "\n".join(part for part in parts if part)
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as an HTML table; columns in order of first appearance."""
    cells = text_tables.from_mappings(rows, lambda _, value: "" if value is None else shown(value))
    return text_tables.html(cells) if cells[0] else ""


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def validation_table(val: Sequence[dict], index: Mapping[str, str], most: int = 20) -> str:
    """A row for each of the last ``most`` validations and for the best."""
    best = index.get("best", "")
    rows = []
    for line in val:
        scores = {
            f"{spec} {name}": value for spec, metrics in line["metrics"].items() for name, value in metrics.items()
        }
        is_best = best == step_name(line["step"])
        rows.append({"step": line["step"], **scores, "": "best" if is_best else ""})
    omitted = max(0, len(rows) - most)
    shown_rows = [row for n, row in enumerate(rows) if n >= omitted or row[""]]
    note = "Metrics are fractions, 0 to 1."
    note += f" Omitted: {counted(len(rows) - len(shown_rows), 'earlier validation')}." if omitted else ""
    return f'{html_table(shown_rows)}<p class="note">{note}</p>' if rows else ""


def parameters(start: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Number of parameters and of trained ones, per part and in total; empty for older logs, which do not tell."""
    counts: dict[str, Sequence[int]] = start.get("parameters", {})
    total = {"all": [sum(column) for column in zip(*counts.values())]} if counts else {}
    return [{"part": part, "parameters": n, "trained": trained} for part, (n, trained) in (counts | total).items()]


def changed_settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Table of the settings that differ from the defaults of ``train_ds.py``."""
    defaults = {name: value for section in to_dict(Config()).values() for name, value in section.items()}
    rows = [
        {"setting": name, "value": str(value), "default": str(defaults[name])}
        for values in settings.values()
        for name, value in values.items()
        if name in defaults and value != defaults[name]
    ]
    return "<p>Differences from the defaults:</p>" + html_table(rows) if rows else "<p>All settings are defaults.</p>"


# -- charts ------------------------------------------------------------------------------------------------------------


def column(lines: Sequence[dict], *path: str) -> Points:
    """(steps, values) of one number of the log, given by the keys that lead to it; lines without it are omitted."""
    values: list[Any] = [reduce(lambda inner, key: inner.get(key, {}), path, line) for line in lines]
    points = [(line["step"], value) for line, value in zip(lines, values) if isinstance(value, int | float)]
    return [step for step, _ in points], [value for _, value in points]


def loss_series(train: Sequence[dict]) -> dict[str, Series]:
    others = {"epoch", "seconds", *NOT_LOSSES}
    names = dict.fromkeys(
        name for line in train for name, value in line.items() if isinstance(value, float) and name not in others
    )
    return {name: {name: column(train, name)} for name in names if not name.startswith(GRPO)}


def answer_series(train: Sequence[dict]) -> dict[str, Series]:
    names = dict.fromkeys(name for line in train for name in line if name.startswith(GRPO))
    return {name.removeprefix(f"{GRPO}_"): {name: column(train, name)} for name in names}


def policy_series(train: Sequence[dict]) -> dict[str, Series]:
    reward = {name: column(train, name) for name in ("reward", "baseline")}
    return {"reward": reward, "entropy of the policy": {"entropy": column(train, "entropy")}}


def speed_series(train: Sequence[dict]) -> dict[str, Series]:
    names = {"gradient": "gradient, all", "lr": "learning rate", "images_per_s": "images per second"}
    series: dict[str, Series] = {title: {title: column(train, name)} for name, title in names.items()}
    for part in dict.fromkeys(part for line in train for part in line.get("gradients", {})):
        series[part] = {part: column(train, "gradients", part)}
    return series


def chart(series: Mapping[str, Series], caption: str, columns: int = 4) -> str:
    """A grid of small charts, one per title; those without points are omitted."""
    series = {title: lines for title, lines in series.items() if any(x for x, _ in lines.values())}
    if not series:
        return ""
    rows = -(-len(series) // columns)
    with charts.figure(WIDTH, 1.6 * rows) as figure:
        cells = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (title, lines) in zip(cells, series.items()):
            charts.curves(axes, lines, marked=False)
            axes.set_title(title, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axes in list(figure.axes)[len(series) :]:
            axes.set_axis_off()
        return picture(figure, caption)


def validation_charts(val: Sequence[dict]) -> str:
    series: dict[str, Series] = {}
    for spec in dict.fromkeys(spec for line in val for spec in line["metrics"]):
        names = dict.fromkeys(name for line in val for name in line["metrics"].get(spec, {}))
        series[spec] = {name: column(val, "metrics", spec, name) for name in names}
    return chart(series, "Metrics by step.") if len(val) > 1 else ""


def layer_chart(train: Sequence[dict]) -> str:
    """Layers used by the [SEG] tokens, and the map loss of every layer, over the steps."""
    tables = {}
    counted = [line for line in train if sum(line.get("layers", []))]
    if counted:
        shares = np.array([line["layers"] for line in counted], dtype=float)
        tables["% of [SEG] tokens that used a layer"] = counted, 100 * shares / shares.sum(1, keepdims=True)
    with_losses = [line for line in train if line.get("map_loss_by_layer")]
    if with_losses:
        losses = np.array([line["map_loss_by_layer"] for line in with_losses], dtype=float)
        tables["map loss of every layer"] = with_losses, losses
    if not tables:
        return ""
    with charts.figure(WIDTH / 2 * len(tables), 2.2) as figure:
        for axes, (title, (lines, values)) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items()):
            steps, layers = [line["step"] for line in lines], np.arange(values.shape[1])
            shades = axes.pcolormesh(steps, layers, values.T, shading="nearest", cmap="cividis")
            axes.set_title(title, loc="left")
            axes.set(xlabel="step", ylabel="layer")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            figure.colorbar(shades, ax=axes, pad=0.02)
        return picture(figure, "Layers that [SEG] tokens used in training, and the map loss of all layers.")


def picture(figure: Figure, caption: str) -> str:
    return inline(charts.png(charts.pixels(figure, 130), caption), caption)


def inline(data: bytes, caption: str) -> str:
    text = escape(caption)
    encoded = base64.b64encode(data).decode("ascii")
    return f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}"><figcaption>{text}</figcaption></figure>'


# -- pictures ----------------------------------------------------------------------------------------------------------


def sheets(folder: Path) -> Iterable[str]:
    """Validation pictures: the last, the first, and evenly spaced ones between them that fit into ``BUDGET``."""
    files = [sorted(each.glob("step_*.png")) for each in sorted((folder / PICTURES).glob("*")) if each.is_dir()]
    for most in (4, 3, 2, 1):
        chosen = [path for paths in files for path in pick_steps(paths, most)]
        if sum(path.stat().st_size for path in chosen) <= BUDGET:
            break
    for path in chosen if files else ():
        yield inline(path.read_bytes(), f"{path.parent.name}, step {step_of(path.stem)}")


def pick_steps(paths: Sequence[Path], most: int) -> list[Path]:
    """At most ``most`` of the paths, evenly spaced, the last included."""
    return list(paths[-1:]) if most == 1 else [paths[index] for index in evenly_spaced(len(paths), most)]
