"""Many prompts about many images, a JSON line each; a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from model.structures import Turn
from utils.datasets.images import read_image
from utils.inference.answer_files import describe, free_stem, save_pictures
from utils.inference.loading import predict
from utils.inference.terminal import printable

FILE_NAME = "answers.jsonl"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
PROMPTS_AT_ONCE = 16  # of an image, on one cache


def find_images(path: Path) -> list[Path]:
    """The image files of a folder by name, or the file itself.

    Raises:
        ValueError: if there is none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ValueError(f"--image: {path} holds no image ({' '.join(IMAGE_SUFFIXES)})")
    return found


def read_prompts(lines: Iterable[str]) -> list[str]:
    """A prompt per line, each once; empty lines are none.

    Raises:
        ValueError: if there is none.
    """
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ValueError("--prompts holds no prompt; write one per line")
    return prompts


def answer_all(
    model,
    processor,
    images: list[Path],
    prompts: list[str],
    folder: Path,
    settings: dict[str, Any],
    say: Callable[[str], None],
    pictures: bool = True,
) -> int:
    """Asks every prompt about every image, each by itself. A line of ``answers.jsonl`` stands for a finished answer.

    Args:
        settings: what the answers depend on, written into each line; layer_policy, max_new_tokens and seed are used.
        say: gets a line of progress per image.

    Returns:
        how many images could not be read; they are named, and left out.

    Raises:
        ValueError: if the file holds answers of other settings.
    """
    if inside := [image for image in images if image.resolve().parent == folder.resolve()]:
        raise ValueError(f"--output {folder} is where {inside[0].name} lies; pictures of answers need another folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    done = _read_done(path, settings)
    options = {name: settings[name] for name in ("layer_policy", "max_new_tokens", "seed")}
    same_stem = Counter(image.stem for image in images)
    unread = 0
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for place, image in enumerate(images, start=1):
            left = [prompt for prompt in prompts if (str(image), prompt) not in done]
            if not left:
                continue
            try:
                pixels = read_image(image, apply_exif=True)
            except ValueError as error:
                say(f"error: {error}")
                unread += 1
                continue
            stem = image.stem if same_stem[image.stem] == 1 else image.name
            for start in range(0, len(left), PROMPTS_AT_ONCE):
                part = left[start : start + PROMPTS_AT_ONCE]
                [answers] = predict(model, processor, [pixels], [[Turn(prompt) for prompt in part]], **options)
                for prompt, prediction in zip(part, answers):
                    values = describe(str(image), pixels, prompt, prediction, settings["layer_policy"])
                    if pictures:
                        save_pictures(folder, free_stem(folder, stem, "_overlay.png"), pixels, values, prediction)
                    file.write(json.dumps(values | {"settings": settings}, ensure_ascii=False) + "\n")
                file.flush()
            say(printable(f"{place}/{len(images)} {image}: {len(left)} answers"))
    return unread


def _read_done(path: Path, settings: dict[str, Any]) -> set[tuple[str, str]]:
    """(image, prompt) of the answers that are there. What a stopped run left of a line is cut off."""
    if not path.exists():
        return set()
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    done = set()
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
            key, theirs = (values["image"], values["prompt"]), values["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no answer ({error!r}); give another --output") from error
        if theirs != settings:
            other = [f"{name}: {theirs.get(name)!r} there, {settings[name]!r} now" for name in settings
                     if theirs.get(name) != settings[name]]  # fmt: skip
            raise ValueError(f"{path} holds answers of other settings ({'; '.join(other)}); give another --output")
        done.add(key)
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    return done
