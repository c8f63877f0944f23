"""The dashboard without its page: uploads, visitors with their conversations, streamed answers.

The model runs on one thread, in the order of the questions. The images of the latest visitors stay encoded; others are
encoded again with the visitor's next question.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from model.layer_rules import MonteCarloMean
from model.structures import MAX_NEW_TOKENS, Prediction, Turn
from utils.datasets.images import DECODE_ERRORS, read_image
from utils.inference.session import ImageSession

if TYPE_CHECKING:
    from model.grounding import GroundingModel
    from model.processing.processor import UGroundProcessor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_TURNS = 20  # shown on the page
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a visitor may send."""

    upload_bytes: int = 20_000_000
    pixels: int = 30_000_000
    prompt_characters: int = 2000
    new_tokens: int = MAX_NEW_TOKENS
    samples: int = 64  # of layers, for one mask


def open_upload(path: str | Path, limits: Limits) -> np.ndarray:
    """An uploaded picture as uint8 [H, W, 3], upright. Its size is read from its header before anything is decoded.

    Raises:
        ValueError: if it is not a picture, or exceeds the limits.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError("the picture is no longer on the server; upload it again")
    if (size := path.stat().st_size) > limits.upload_bytes:
        raise ValueError(
            f"the file has {size / 1e6:.0f} MB; at most {limits.upload_bytes / 1e6:.0f} MB are allowed: save it smaller"
        )
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = 0
    except DECODE_ERRORS as error:
        raise ValueError("the file is not a picture that can be read; use PNG, JPEG or WebP") from error
    if not 0 < width * height <= limits.pixels:
        shown = f"{width} x {height} pixels" if width else "hundreds of millions of pixels"
        raise ValueError(
            f"the picture has {shown}; at most {limits.pixels / 1e6:.0f} million are accepted: make it smaller"
        )
    try:
        return read_image(path, apply_exif=True)
    except ValueError as error:
        raise ValueError("the picture is damaged and cannot be decoded; save it again as PNG or JPEG") from error


@dataclass
class Visit:
    """One visitor's image and conversation.

    Attributes:
        source: the uploaded file that the image is from.
        turns: those on the page; the model sees ``session.history``.
        prediction: the latest answer; policy: the layer policy of its masks.
        monte_carlo: the latest answer with ``MonteCarloMean``, if requested.
        folder: of the files to download.
    """

    source: str
    image: np.ndarray
    session: ImageSession
    folder: Path
    turns: list[Turn] = field(default_factory=list)
    prediction: Prediction | None = None
    policy: str = ""
    monte_carlo: Prediction | None = None

    @property
    def masks(self) -> np.ndarray:
        """[N, H, W] bool of the latest answer."""
        if self.prediction is None:
            return np.zeros((0, *self.image.shape[:2]), bool)
        return self.prediction.masks.numpy()


class Visits:
    """The latest ``capacity`` visitors; the least recently seen is dropped first.

    Args:
        folder: each visit gets a subfolder with an unguessable name.
    """

    def __init__(self, capacity: int, folder: Path) -> None:
        self.capacity, self.folder = capacity, folder
        self._visits: OrderedDict[str, Visit] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._visits)

    def get(self, visitor: str) -> Visit | None:
        with self._lock:
            if visitor in self._visits:
                self._visits.move_to_end(visitor)
            return self._visits.get(visitor)

    def put(self, visitor: str, visit: Visit) -> None:
        self.drop(visitor)
        with self._lock:
            self._visits[visitor] = visit
            dropped = [self._visits.popitem(last=False)[1] for _ in range(len(self._visits) - self.capacity)]
        for old in dropped:
            shutil.rmtree(old.folder, ignore_errors=True)

    def drop(self, visitor: str) -> None:
        with self._lock:
            visit = self._visits.pop(visitor, None)
        if visit is not None:
            shutil.rmtree(visit.folder, ignore_errors=True)

    def new_folder(self) -> Path:
        return self.folder / secrets.token_urlsafe(16)


class VisitorLeft(Exception):
    """The visitor left before the answer was complete."""


class Dashboard:
    """A model with its visitors, and the limits of their requests.

    Args:
        name: of the model, as shown to visitors. fingerprint: of its weights.
        layer_policy: the default of answers; None = the model's own.
        remember: whether the model sees earlier questions by default.
        think: whether answers begin with a thought (``model.opened.predict``).
        folder: for files to download.
        capacity: visitors whose images stay encoded.
    """

    def __init__(
        self,
        model: GroundingModel,
        processor: UGroundProcessor,
        name: str,
        fingerprint: str,
        folder: Path,
        *,
        layer_policy: str | None = None,
        remember: bool = False,
        think: str = "auto",
        limits: Limits | None = None,
        capacity: int = 16,
    ) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.layer_policy = layer_policy or model.config.layer_policy
        self.remember, self.think = remember, think
        self.limits = limits or Limits()
        self.visits = Visits(capacity, folder)
        self.fingerprint = fingerprint
        self.started = monotonic()
        self.answered = 0
        self._worker = ThreadPoolExecutor(1, "model")

    @property
    def num_layers(self) -> int:
        return self.model.ppm.num_layers

    def health(self, waiting: int) -> dict[str, Any]:
        """The answer of ``/health``."""
        return {
            "status": "ok",
            "model": self.name,
            "fingerprint": self.fingerprint,
            "device": str(self.model.device),
            "queue": waiting,
            "visitors": len(self.visits),
            "answered": self.answered,
            "uptime_seconds": round(monotonic() - self.started, 1),
        }

    def warm_up(self) -> None:
        """Answers a first question, so that the first visitor does not wait for one-time initialization."""
        gray = np.full((64, 64, 3), 127, np.uint8)
        self._run(lambda: ImageSession(self.model, self.processor, gray).ask("the red star", max_new_tokens=8))

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def open(self, visitor: str, source: str) -> Visit:
        """The visitor's conversation about an uploaded file, continued if it is about the same file.

        Raises:
            ValueError: if the file cannot be used.
        """
        visit = self.visits.get(visitor)
        if visit is None or visit.source != source:
            image = open_upload(source, self.limits)
            session = self._run(lambda: ImageSession(self.model, self.processor, image))
            visit = Visit(source, image, session, self.visits.new_folder())
            self.visits.put(visitor, visit)
        return visit

    def ask(
        self,
        visitor: str,
        source: str | None,
        prompt: str,
        layer_policy: str | None = None,
        remember: bool | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Generator[str | Visit, None, None]:
        """Yields the answer so far after each token, and finally the visit with the complete answer.

        Closing the generator cancels the answer at the next token.

        Args:
            source: the uploaded file; None = the image of the visitor's previous question.

        Raises:
            ValueError: if there is no image, or the question is invalid.
        """
        if not prompt.strip():
            raise ValueError("the question is empty: say what to look for, for example 'the red star'")
        if len(prompt) > self.limits.prompt_characters:
            raise ValueError(
                f"the question has {len(prompt)} characters; at most {self.limits.prompt_characters} are accepted"
            )
        if not 1 <= max_new_tokens <= self.limits.new_tokens:
            raise ValueError(f"max_new_tokens {max_new_tokens} is not between 1 and {self.limits.new_tokens}")
        policy = layer_policy or self.layer_policy
        if (samples := self.model.config.layer_rule(policy).samples) > self.limits.samples:
            raise ValueError(f"{policy} takes {samples} samples; at most {self.limits.samples} are allowed here")
        visit = self.visits.get(visitor) if source is None else self.open(visitor, source)
        if visit is None:
            raise ValueError("there is no image to ask about: upload one, or pick an example")
        session = visit.session
        prompt = prompt.strip().encode("utf-8", "replace").decode()  # lone surrogates are not text
        options: dict[str, Any] = {"layer_policy": policy, "max_new_tokens": max_new_tokens, "think": self.think}
        options["remember"] = self.remember if remember is None else remember
        prediction = yield from self._stream(lambda on_text: session.ask(prompt, on_text=on_text, **options))
        visit.prediction, visit.policy, visit.monte_carlo = prediction, policy, None
        visit.turns = [*visit.turns, Turn(prompt, prediction.text, prediction.thought)][-MAX_TURNS:]
        self.answered += 1
        yield visit

    def measure_uncertainty(self, visitor: str) -> Visit:
        """Decodes the latest answer's masks with several sampled layers (``MonteCarloMean``), for their uncertainty.

        Raises:
            ValueError: if there is no answer with a mask.
        """
        visit = self.visits.get(visitor)
        if visit is None or visit.prediction is None or not visit.prediction.layers:
            raise ValueError("there is no mask yet to measure the uncertainty of; ask for something first")
        session = visit.session
        visit.monte_carlo = self._run(lambda: session.decode_again(str(MonteCarloMean())))
        return visit

    def layer_map(self, visit: Visit, seg: int, layer: int) -> np.ndarray:
        """Similarity map [H, W] in [0, 1] of any layer, for one [SEG] of the latest answer."""
        from model.geometry import maps_at

        assert visit.prediction is not None
        config, grid = self.model.config, visit.prediction.layer_maps[seg : seg + 1, layer]
        return maps_at(grid, config.map_fit, visit.image.shape[:2])[0].numpy()

    def reset(self, visitor: str) -> None:
        """Forgets the visitor's conversation; the image stays encoded."""
        visit = self.visits.get(visitor)
        if visit is not None:
            visit.session.reset()
            visit.turns, visit.prediction, visit.monte_carlo = [], None, None

    def _run(self, work: Callable[[], T]) -> T:
        return self._worker.submit(work).result()

    def _stream(self, work: Callable[[Callable[[str], None]], T]) -> Generator[str, None, T]:
        """Runs ``work`` on the model's thread, yields its updates, and returns its result.

        It is cancelled when the generator is closed.
        """
        updates: SimpleQueue[str | None] = SimpleQueue()
        cancelled = threading.Event()

        def on_text(text: str) -> None:
            if cancelled.is_set():
                raise VisitorLeft
            updates.put(text)

        def answer() -> T:
            try:
                if cancelled.is_set():
                    raise VisitorLeft
                return work(on_text)
            finally:
                updates.put(None)

        future = self._worker.submit(answer)
        try:
            while (update := updates.get()) is not None:
                yield update
            return future.result()
        finally:
            cancelled.set()
            wait([future])
