"""Many prompts about many images, a JSON line each; an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from model.opened import Opened
from model.processing.pixels import SUFFIXES, UNREAD_SUFFIXES, read_pixels
from model.structures import Prediction
from utils.inference.answer_files import answer_record, save_pictures
from utils.inference.terminal import printable
from utils.wording import counted

ANSWERS_FILE = "answers.jsonl"
ANSWER_START = b'{"image": "'  # of a line
PROMPTS_AT_ONCE = 16  # about one image, on one cache


def find_images(path: Path) -> list[Path]:
    """The image files of a folder by name, or the file itself. Those of formats that are not read are among them.

    Raises:
        ValueError: if there is none.
    """
    if not path.is_dir():
        return [path]
    images = sorted(file for file in path.iterdir() if is_image(file, (*SUFFIXES, *UNREAD_SUFFIXES)))
    if not images:
        raise ValueError(f"--image: {path} holds no image ({' '.join(SUFFIXES)})")
    return images


def is_image(file: Path, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether a file is an image by its name; hidden ones, such as a Mac's ``._a.jpg``, are not."""
    return file.suffix.lower() in suffixes and not file.name.startswith(".")


def read_prompts(lines: Iterable[str]) -> list[str]:
    """A prompt per line, without duplicates and empty lines.

    Raises:
        ValueError: if there is none.
    """
    stripped = (line.strip().strip("\ufeff") for line in lines)  # a byte order mark, from a pipe of Windows
    prompts = list(dict.fromkeys(line for line in stripped if line))
    if not prompts:
        raise ValueError("--prompts holds no prompt; write one per line")
    return prompts


def answer_all(
    opened: Opened,
    images: list[Path],
    prompts: list[str],
    folder: Path,
    settings: dict[str, Any],
    report: Callable[[str], None],
    pictures: bool = True,
) -> int:
    """Answers every prompt about every image, each independently; a line of ``answers.jsonl`` is a finished answer.

    Args:
        settings: all that answers depend on, written into each line; ``options`` are those of the flags.
        report: receives a line of progress per image.

    Returns:
        the number of images that could not be read; they are reported and skipped.

    Raises:
        ValueError: if the file holds answers of other settings, or ``folder`` holds an image.
    """
    make_output(folder, images)
    path = folder / ANSWERS_FILE
    done = Done.read(path, settings)
    options = {name: settings[name] for name in ("layer_policy", "max_new_tokens", "seed")}
    options["think"] = settings.get("think", "auto")
    same_stem = Counter(image.stem for image in images)
    unreadable = kept = 0
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for number, image in enumerate(images, start=1):
            try:
                content = hashlib.sha256(image.read_bytes()).hexdigest()[:16]
                if all(done.holds(image, prompt, content) for prompt in prompts):
                    kept += len(prompts)
                    continue
                pixels = read_pixels(image, apply_exif=True)
            except (ValueError, OSError) as error:
                report(f"error: {error}")
                unreadable += 1
                continue
            size = pixels.shape[1], pixels.shape[0]
            remaining = [prompt for prompt in prompts if not done.holds(image, prompt, content, size)]
            kept += len(prompts) - len(remaining)
            if not remaining:
                continue
            replaced = sum(done.knows(image, prompt) for prompt in remaining)
            stem = image.stem if same_stem[image.stem] == 1 else image.name
            for prompt, prediction in _ask(opened, pixels, remaining, options):
                values = answer_record(str(image), pixels, prompt, prediction, settings["layer_policy"])
                values["content"] = content
                if pictures:
                    save_pictures(folder, done.free_stem(folder, stem), pixels, values, prediction)
                file.write(json.dumps(values | {"settings": settings}, ensure_ascii=False) + "\n")
                file.flush()  # pictures without a line are of an answer that a killed run did not finish
            again = f", {replaced} of them again: the image was replaced" if replaced else ""
            report(printable(f"{number}/{len(images)} {image}: {counted(len(remaining), 'answer')}{again}"))
    if kept:
        report(f"there already: {counted(kept, 'answer')}")
    report(printable(f"results: {path}"))
    return unreadable


def make_output(folder: Path, images: list[Path]) -> None:
    """Makes the folder of the answers; ``ValueError`` if one of the images is in it."""
    if inside := [image for image in images if image.resolve().parent == folder.resolve()]:
        raise ValueError(
            f"--output {folder} also holds the image {inside[0].name}; give another folder for the pictures of answers"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _ask(
    opened: Opened, pixels: np.ndarray, prompts: list[str], options: dict[str, Any]
) -> Iterator[tuple[str, Prediction]]:
    """Prompts and their answers; ``PROMPTS_AT_ONCE`` share a pass."""
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        part = prompts[start : start + PROMPTS_AT_ONCE]
        yield from zip(part, opened.ask(pixels, part, **options))


@dataclass
class Done:
    """Finished answers in ``answers.jsonl``.

    Attributes:
        answers: (absolute path, prompt) -> (width, height) and fingerprint ("" in older lines) of the image file.
        overlays: file names of overlays that lines name.
    """

    answers: dict[tuple[str, str], tuple[tuple[int, int], str]] = field(default_factory=dict)
    overlays: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path, settings: dict[str, Any]) -> Done:
        """Reads a file, if there is one. Cuts off the incomplete line that an interrupted run left.

        Raises:
            ValueError: if a line, also an incomplete one, is no answer, or one of other settings.
        """
        done = cls()
        if not path.exists():
            return done
        text = path.read_bytes()
        complete = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(complete.split(b"\n")[:-1], start=1):
            try:
                values = json.loads(line.decode("utf-8"))
                key, saved = (absolute(values["image"]), values["prompt"]), values["settings"]
                state = (values["width"], values["height"]), values.get("content", "")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is not an answer ({error!r}); give another --output"
                ) from error
            if saved != settings:
                changes = [
                    f"{name}: {saved.get(name)!r} there, {settings.get(name)!r} now"
                    for name in {**saved, **settings}
                    if saved.get(name) != settings.get(name)
                ]
                raise ValueError(
                    f"{path} holds answers of other settings ({'; '.join(changes)}); give another --output, or "
                    "the same settings"
                )
            done.answers[key] = state
            done.overlays.add(values.get("overlay", ""))
        rest = text[len(complete) :]
        if not rest.startswith(ANSWER_START[: len(rest)]):
            raise ValueError(f"{path} does not end with an answer, or the beginning of one; give another --output")
        if rest:
            os.truncate(path, len(complete))
        return done

    def knows(self, image: Path, prompt: str) -> bool:
        """Whether the prompt was answered about an image of that path, whatever it showed."""
        return (absolute(image), prompt) in self.answers

    def holds(self, image: Path, prompt: str, content: str, size: tuple[int, int] | None = None) -> bool:
        """Whether the prompt was answered about this file: its fingerprint or, in older lines, its size decides."""
        known_size, known_content = self.answers.get((absolute(image), prompt), (None, None))
        return known_content == content or (known_content == "" and known_size == size)

    def free_stem(self, folder: Path, stem: str) -> str:
        """``STEM_001``, or the first number that no answer has; pictures that a killed run left have no answer."""
        names = (f"{stem}_{n:03d}" for n in count(1))
        name = next(
            name
            for name in names
            if f"{name}_overlay.png" not in self.overlays and not (folder / f"{name}.json").exists()
        )
        self.overlays.add(f"{name}_overlay.png")
        return name


def absolute(image: str | Path) -> str:
    """One name for a file, given from any folder."""
    return os.path.abspath(image)
