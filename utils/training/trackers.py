"""Where a run's curves are shown beside ``log.jsonl``: TensorBoard, Weights & Biases, trackio (``--report_to``).

``log.jsonl`` holds everything that is logged here, and alone is read again. So a tracker that fails (no network, no
login, a full disk) is dropped with one warning, and training continues.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.files import write_atomically

REMOTE_RUN = "remote_run.txt"  # in a run's folder: its id at wandb and trackio, which a resumed run continues


class Tracker(Protocol):
    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def histogram(self, tag: str, counts: Sequence[int], step: int) -> None:
        """``counts`` of the whole numbers 0, 1, ...; not all of them are 0."""

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        """``image``: RGB, uint8, [H, W, 3]."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Events in the run's folder; those after ``start_step`` are deleted."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, counts: Sequence[int], step: int) -> None:
        numbers = np.arange(len(counts))
        self.writer.add_histogram_raw(
            tag,
            min=0,
            max=len(counts) - 1,
            num=sum(counts),
            sum=float((numbers * counts).sum()),
            sum_squares=float((numbers**2 * counts).sum()),
            bucket_limits=(numbers + 0.5).tolist(),
            bucket_counts=list(counts),
            global_step=step,
        )

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        self.writer.add_image(tag, image, step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Remote:
    """A run at wandb or trackio, whose interfaces are the same but for ``init``.

    Args:
        run: what the package's ``init`` returned.
    """

    def __init__(self, package: Any, run: Any) -> None:
        self.package, self.run = package, run

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def histogram(self, tag: str, counts: Sequence[int], step: int) -> None:
        edges = np.arange(len(counts) + 1) - 0.5
        self.run.log({tag: self.package.Histogram(np_histogram=(np.array(counts), edges))}, step=step)

    def picture(self, tag: str, image: np.ndarray, step: int) -> None:
        self.run.log({tag: self.package.Image(image)}, step=step)

    def flush(self) -> None:
        """Both send what is logged by themselves."""

    def close(self) -> None:
        self.run.finish()


def open_wandb(folder: Path, settings: Mapping[str, Any]) -> Remote:
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "uground"),
        id=remote_run(folder),
        name=folder.name,
        dir=str(folder),
        config=dict(settings),
        resume="allow",
        allow_val_change=True,  # a resumed run may have more epochs
    )
    return Remote(wandb, run)


def open_trackio(folder: Path, settings: Mapping[str, Any]) -> Remote:
    trackio = importlib.import_module("trackio")
    project = os.environ.get("TRACKIO_PROJECT", "uground")
    return Remote(trackio, trackio.init(project, name=remote_run(folder), config=dict(settings), resume="allow"))


def remote_run(folder: Path) -> str:
    """The id of the run at wandb and trackio: made once, kept in the run's folder."""
    path = folder / REMOTE_RUN
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not known:
        known = f"{folder.name}-{secrets.token_hex(4)}"
        write_atomically(path, f"{known}\n")
    return known


class Trackers:
    """The trackers of a run.

    Args:
        names: of ``--report_to``; ``none`` names no tracker.
        folder: the run's. start_step: steps done before.
        settings: of the run, shown beside the curves.
        warn: prints a line.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        start_step: int,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(folder, start_step),
            "wandb": lambda: open_wandb(folder, settings),
            "trackio": lambda: open_trackio(folder, settings),
        }
        self.warn = warn
        self.opened: dict[str, Tracker] = {}
        for name in names:
            if name != "none":
                try:
                    self.opened[name] = makers[name]()
                except Exception as error:  # of any kind: it is another project's
                    self._drop(name, error)

    def each(self, action: Callable[[Tracker], None]) -> None:
        """Calls ``action`` with every tracker; one that raises is not called again."""
        for name, tracker in list(self.opened.items()):
            try:
                action(tracker)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self.opened.pop(name, None)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.warn(f"warning: nothing more is reported to {name} ({reason}); log.jsonl has everything")
