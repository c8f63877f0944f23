"""The log of a training run: a line per logged step, a progress bar, ``log.jsonl``, and trackers such as TensorBoard.

Values stay on the device as running sums until a step is logged; then one all-reduce and one copy fetch them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from utils import distributed
from utils.datasets.spec import Spec
from utils.files import write_atomically
from utils.plotting import text_tables
from utils.training.checkpoint import step_name, step_of
from utils.training.trackers import Trackers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from model.loading.weights import Loaded
    from model.objective import UGroundOutput

LOG = "log.jsonl"  # in a run's folder: a line per logged step
PICTURES = "pictures"  # in a run's folder: the validation samples, BENCHMARK/step_00000060.png
GRPO = "grpo"  # begins the names of the sampled answers' numbers; the rest names a reward, or what was counted
NOT_LOSSES = {  # logged numbers that are no losses -> their tags in the trackers
    "reward": "policy/reward",
    "baseline": "policy/baseline",
    "entropy": "policy/entropy",
    "lr": "train/lr",
    "images_per_s": "train/images_per_s",
    "skipped": "train/skipped",
    "gradient": "gradient/all",
}


def loading_table(loaded: Sequence[Loaded]) -> str:
    """Table of the loaded modules: parameters, dtype, fingerprint, the source of their weights, and what is new."""
    rows = [["module", "parameters", "dtype", "fingerprint", "source"]]
    for row in loaded:
        source = f"{row.source}; new: {row.new}" if row.new else row.source
        rows.append([row.module, f"{row.parameters:,}", row.dtype, row.fingerprint, source])
    return "\n".join(text_tables.aligned(rows, "lrl"))


def parameter_table(model: nn.Module) -> str:
    """Table of parameters and trainable parameters, per part and in total."""
    from model.lora import parameters_by_part

    counts = parameters_by_part(model)
    total, trained = (sum(column) for column in zip(*counts.values()))
    rows = [["part", "parameters", "trainable", ""]]
    rows += [[part, *(f"{count:,}" for count in pair), ""] for part, pair in counts.items()]
    rows.append(["all", f"{total:,}", f"{trained:,}", f"({trained / total:.2%})"])
    return "\n".join(text_tables.aligned(rows, "lr"))


class Meter:
    """Means over the micro steps since the last ``collect``, over all processes.

    Args:
        num_layers: L, for the histogram of chosen layers.
    """

    def __init__(self, device: torch.device, num_layers: int) -> None:
        self.device, self.num_layers = device, num_layers
        self.restart()

    def restart(self) -> None:
        """Resets all sums. Call it after a pause (validation), too, which images/s must not include."""
        import torch

        self.sums: dict[str, torch.Tensor] = {}
        self.layers = torch.zeros(self.num_layers, device=self.device)
        self.layer_losses = torch.zeros(self.num_layers, device=self.device)
        self.images = self.micro_steps = 0
        self.with_masks, self.of_all_layers, self.with_thoughts = torch.zeros(3, device=self.device)
        self.started = time.perf_counter()

    def add(self, output: UGroundOutput, images: int) -> None:
        """Adds one micro step; does not synchronize with the device."""
        import torch

        for name, value in {"loss": output.loss.detach(), **output.terms}.items():
            new = value.float()
            self.sums[name] = new if name == "baseline" or name not in self.sums else self.sums[name] + new
        self.layers.index_add_(0, output.layers, torch.ones_like(output.layers, dtype=torch.float32))
        if output.layer_losses is not None:
            self.layer_losses += output.layer_losses
            self.of_all_layers += output.has_masks
        self.with_masks += output.has_masks
        if output.has_thoughts is not None:
            self.with_thoughts += output.has_thoughts
        self.images += images
        self.micro_steps += 1

    def collect(self) -> dict[str, Any]:
        """Values since the last call, over all processes. All of them must call it.

        Returns:
            means of loss and text over micro steps, of thought over those whose step has one, and of other terms over
            those with a mask; ``grpo_layer_entropy`` over [SEG] tokens; the last ``baseline``, or with a critic the
            mean of its ``critic_baseline``; ``layers``: [L] counts of chosen layers; ``map_loss_by_layer``: [L], where
            it was computed; ``images_per_s``.
        """
        import torch

        over: dict[str, Any] = {"baseline": 1, "loss": self.micro_steps, "text": self.micro_steps}
        over |= {name: self.micro_steps for name in self.sums if name.startswith(GRPO)}
        over["thought"] = self.with_thoughts.clamp(min=1)
        with_masks = self.with_masks.clamp(min=1)
        means = [value / over.get(name, with_masks) for name, value in self.sums.items()]
        world = distributed.world_size()
        by_layer = self.layer_losses / self.of_all_layers  # NaN if no micro step computed it
        numbers = distributed.mean(torch.cat([torch.stack(means), self.layers, by_layer])).tolist()
        seconds = time.perf_counter() - self.started
        values: dict[str, Any] = dict(zip(self.sums, numbers))
        if not values.get("thought", 1):
            del values["thought"]  # no answer had one
        if f"{GRPO}_layer_entropy" in values:
            entropy, segs = values.pop(f"{GRPO}_layer_entropy"), values[f"{GRPO}_segs"]
            if segs:  # else no answer had one
                values[f"{GRPO}_layer_entropy"] = entropy / segs
        if "critic_baseline" in values:
            values["baseline"] = values.pop("critic_baseline")
        numbers = numbers[len(means) :]
        values["layers"] = [round(count * world) for count in numbers[: self.num_layers]]
        if not math.isnan(numbers[-1]):
            values["map_loss_by_layer"] = numbers[self.num_layers :]
        values["images_per_s"] = self.images * world / seconds
        self.restart()
        return values


class DivergedError(ValueError):
    """The loss is not finite."""

    shared = True  # raised on every process


def check_finite(values: dict[str, Any], step: int) -> None:
    """Raises ``DivergedError`` for a loss that is not finite: it never recovers."""
    bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"step {step}: {', '.join(bad)} not finite; the run cannot recover. Lower --lr or raise --warmup_steps, "
            "and resume from the last checkpoint with --auto_resume true"
        )


class RunLog:
    """Writes the log on the main process; on the others every method does nothing.

    Args:
        folder: the run's; ``log.jsonl``, ``tensorboard/`` and ``pictures/`` are in it.
        start_step: steps done before; what an interrupted run logged after them is deleted.
        report_to: names of trackers; settings: of the run, which they show.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        total_steps: int,
        steps_per_epoch: int,
        report_to: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.total_steps, self.steps_per_epoch, self.start_step = total_steps, steps_per_epoch, start_step
        self.main = distributed.is_main()
        if not self.main:
            return
        self.lines = folder / LOG
        truncate_log(self.lines, start_step)
        self.pictures = folder / PICTURES
        for old in self.pictures.glob("*/step_*.png"):
            if step_of(old.stem) > start_step:
                old.unlink()
        self.trackers = Trackers(report_to, folder, start_step, settings or {}, self.print)
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=None)
        self.started = time.perf_counter()

    def print(self, text: str) -> None:
        """Prints above the progress bar."""
        if self.main:
            tqdm.write(text)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Writes a line to ``log.jsonl`` only."""
        if self.main:
            self._write({"kind": kind, "step": step, **values})

    def advance(self) -> None:
        """Advances the progress bar by one optimizer step."""
        if self.main:
            self.bar.update(1)

    def train(self, step: int, values: dict[str, Any], gradients: dict[str, float]) -> None:
        """Logs a step: ``values`` of the meter with ``lr`` and ``gradient``, and the gradient's norm per part.

        ``log.jsonl`` also gets the epoch and the ``seconds`` since this process began to log.
        """
        if not self.main:
            return
        epoch, elapsed = step / self.steps_per_epoch, time.perf_counter() - self.started
        line = {"kind": "train", "step": step, "epoch": round(epoch, 3), "seconds": elapsed, **values}
        self._write(line | {"gradients": gradients})
        scalars = {f"map_loss_by_layer/{i}": loss for i, loss in enumerate(values.get("map_loss_by_layer", ()))}
        for name, value in values.items():
            if name not in ("map_loss_by_layer", "layers"):
                own = name.removeprefix(f"{GRPO}_")
                kind = f"{GRPO}/{own}" if own != name else f"loss/{name}"
                scalars[NOT_LOSSES.get(name, kind)] = value
        scalars |= {f"gradient/{part}": norm for part, norm in gradients.items()}
        self.trackers.each(lambda tracker: tracker.scalars(scalars, step))
        if any(layers := values["layers"]):
            self.trackers.each(lambda tracker: tracker.histogram("policy/layers", layers, step))
        left = elapsed / max(1, step - self.start_step) * (self.total_steps - step)
        self.print(step_line(step, self.total_steps, epoch, values, left))

    def validation(self, step: int, results: dict[str, dict[str, float]], best: bool) -> None:
        """Logs metrics per benchmark; the first benchmark selects the best checkpoint."""
        if not self.main:
            return
        self._write({"kind": "val", "step": step, "epoch": round(step / self.steps_per_epoch, 3), "metrics": results})
        by_tag = {f"val/{Spec.parse(spec).slug}/{name}": v for spec, of in results.items() for name, v in of.items()}
        self.trackers.each(lambda tracker: tracker.scalars(by_tag, step))
        for spec, metrics in results.items():
            shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            self.print(f"  validation after step {step}: {spec}: {shown}" + ("  (best so far)" if best else ""))
            best = False

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Logs an RGB picture [H, W, 3] of a benchmark; also writes it to a file, for the report."""
        from utils.plotting.charts import png

        if self.main:
            self.trackers.each(lambda tracker: tracker.picture(f"val/{name}", image, step))
            path = self.pictures / name / f"{step_name(step)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image, f"{name}, step {step}"))

    def close(self) -> None:
        if self.main:
            self.bar.close()
            self.trackers.each(lambda tracker: tracker.close())

    def _write(self, line: dict[str, Any]) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(_rounded(line)) + "\n")
        self.trackers.each(lambda tracker: tracker.flush())


def step_line(step: int, total: int, epoch: float, values: dict[str, Any], seconds_left: float) -> str:
    """One line of a logged step; masks and maps as BCE+dice, layers as mean and standard deviation."""
    counts = np.array(values["layers"], dtype=float)
    parts = [f"step {step}/{total}", f"epoch {epoch:.2f}", f"loss {values['loss']:.3f}"]
    parts += [f"{name} {values[name]:.3f}" for name in ("text", "thought") if name in values]
    parts += [
        f"{kind} {values[f'{kind}_bce']:.3f}+{values[f'{kind}_dice']:.3f}"
        for kind in ("mask", "map")
        if f"{kind}_bce" in values
    ]
    if "policy" in values:
        parts.append(f"policy {values['policy']:+.3f} H {values['entropy']:.2f}")
    if "reward" in values:
        parts.append(f"reward {values['reward']:.2f} (baseline {values['baseline']:.2f})")
    parts += [f"{name.removeprefix(f'{GRPO}_')} {value:.3f}" for name, value in values.items() if name.startswith(GRPO)]
    if counts.sum():
        layers = np.arange(len(counts))
        mean = np.average(layers, weights=counts)
        deviation = np.average((layers - mean) ** 2, weights=counts) ** 0.5
        parts.append(f"layer {mean:.1f}±{deviation:.1f}")
    parts += [f"lr {values['lr']:.1e}", f"|g| {values['gradient']:.2f}", f"{values['images_per_s']:.1f} img/s"]
    if values.get("skipped"):
        parts.append(f"skipped {values['skipped']}")
    return "  ".join([*parts, f"eta {tqdm.format_interval(int(seconds_left))}"])


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``, without incomplete ones (still being written, or cut off).

    Raises:
        ValueError: if the folder is not a training run.
    """
    path = folder / LOG
    if not path.is_file():
        raise ValueError(f"{folder} is not a training run: it has no {LOG}; give a folder that train_ds.py wrote")
    lines = map(_parsed, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [line for line in lines if line]


def truncate_log(path: Path, step: int) -> None:
    """Deletes the lines of ``log.jsonl`` after ``step``: a resumed run writes them again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if _parsed(line).get("step", math.inf) <= step]
        write_atomically(path, "".join(f"{line}\n" for line in lines))


def _parsed(line: str) -> dict[str, Any]:
    """A line of the log; empty if it was cut off when the run was killed."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return values if isinstance(values, dict) else {}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
