"""Many prompts about many images, a JSON line each; an interrupted run can be resumed."""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from model.opened import Opened
from model.processing.pixels import read_pixels
from utils.inference.answer_files import answer_record, free_stem, save_pictures
from utils.inference.terminal import printable

ANSWERS_FILE = "answers.jsonl"
OPENED_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
PROMPTS_AT_ONCE = 16  # about one image, on one cache


def find_images(path: Path) -> list[Path]:
    """The image files of a folder by name, or the file itself.

    Raises:
        ValueError: if there is none.
    """
    if not path.is_dir():
        return [path]
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in OPENED_SUFFIXES)
    if not images:
        raise ValueError(f"--image: {path} holds no image ({' '.join(OPENED_SUFFIXES)})")
    return images


def read_lines(path: Path) -> list[str]:
    """Lines of a text file in UTF-8 or, if its byte order mark says so, UTF-16; they end in any system's way.

    Raises:
        ValueError: if it is in another encoding.
    """
    raw = path.read_bytes()
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding} text (byte {error.start}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_prompts(lines: Iterable[str]) -> list[str]:
    """A prompt per line, without duplicates and empty lines.

    Raises:
        ValueError: if there is none.
    """
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
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
        settings: all that answers depend on, written into each line; layer_policy, max_new_tokens and seed are used.
        report: receives a line of progress per image.

    Returns:
        the number of images that could not be read; they are reported and skipped.

    Raises:
        ValueError: if the file holds answers of other settings, or ``folder`` holds an image.
    """
    if inside := [image for image in images if image.resolve().parent == folder.resolve()]:
        raise ValueError(
            f"--output {folder} also holds the image {inside[0].name}; give another folder for the pictures of answers"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS_FILE
    done = _read_done(path, settings)
    options = {name: settings[name] for name in ("layer_policy", "max_new_tokens", "seed")}
    same_stem = Counter(image.stem for image in images)
    unreadable = 0
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for number, image in enumerate(images, start=1):
            remaining = [prompt for prompt in prompts if (str(image), prompt) not in done]
            if not remaining:
                continue
            try:
                pixels = read_pixels(image, apply_exif=True)
            except ValueError as error:
                report(f"error: {error}")
                unreadable += 1
                continue
            stem = image.stem if same_stem[image.stem] == 1 else image.name
            for start in range(0, len(remaining), PROMPTS_AT_ONCE):
                part = remaining[start : start + PROMPTS_AT_ONCE]
                for prompt, prediction in zip(part, opened.ask(pixels, part, **options)):
                    values = answer_record(str(image), pixels, prompt, prediction, settings["layer_policy"])
                    if pictures:
                        save_pictures(folder, free_stem(folder, stem, "_overlay.png"), pixels, values, prediction)
                    file.write(json.dumps(values | {"settings": settings}, ensure_ascii=False) + "\n")
                file.flush()
            report(printable(f"{number}/{len(images)} {image}: {len(remaining)} answers"))
    return unreadable


def _read_done(path: Path, settings: dict[str, Any]) -> set[tuple[str, str]]:
    """(image, prompt) of all finished answers. Cuts off the incomplete line that an interrupted run left."""
    if not path.exists():
        return set()
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    done = set()
    for number, line in enumerate(complete.decode("utf-8").split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
            key, saved = (values["image"], values["prompt"]), values["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not an answer ({error!r}); give another --output") from error
        if saved != settings:
            changes = [f"{name}: {saved.get(name)!r} there, {settings[name]!r} now" for name in settings
                       if saved.get(name) != settings[name]]  # fmt: skip
            raise ValueError(f"{path} holds answers of other settings ({'; '.join(changes)}); give another --output")
        done.add(key)
    if len(complete) < len(text):
        os.truncate(path, len(complete))
    return done
