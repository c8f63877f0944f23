"""Ask a model about an image: answers as text, masks as pictures.

python chat.py --version DIR                                                  a conversation in the terminal
python chat.py --version DIR --image F --prompt "the red star" --output OUT   one answer; stdout holds its text alone
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from utils import cli
from utils.datasets.base import read_image
from utils.pipeline import predict
from utils.types import Prediction
from utils.visualize import heat_map, overlay, save_picture

HELP = """Type what to look for, for example: Please segment the red star in this image.
  /image PATH   talk about another image
  /help         this text
  /quit         leave (so does Ctrl-D)
Every question is answered by itself: the model does not see earlier ones."""


@dataclass
class Photo:
    """An image on disk and its pixels, [H, W, 3] uint8, turned upright as its EXIF data say."""

    path: Path
    pixels: np.ndarray

    @classmethod
    def open(cls, path: str) -> Photo:
        return cls(Path(path), read_image(Path(path).expanduser(), apply_exif=True))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Asks a UGround model about an image. With --prompt it answers once: the text goes to stdout, an "
        "overlay, a lossless mask (0/255, the image's size) per [SEG] and a JSON with the layers chosen to --output. "
        "Without --prompt it is interactive.",
        epilog="Exit codes: 0 answered (also when nothing was found), 2 wrong input, 130 interrupted.",
    )
    add = parser.add_argument
    cli.add_model_flags(parser)
    add("--image", metavar="FILE", help="image to talk about")
    add("--prompt", metavar="TEXT", help="one question; needs --image")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for pictures (default: answers/ when interactive, otherwise none are written)",
    )
    add(
        "--layer_policy",
        metavar="HOW",
        help="hidden state a [SEG] connects from: argmax, last, sample, soft (all, weighted), fixed:K, or mc:T, "
        "the mean of T samples with a map of its uncertainty. Default: the model's own, argmax, or last for a released "
        "checkpoint",
    )
    add("--max_new_tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    add("--seed", type=int, default=0, metavar="S", help="of sampled layers (default: 0)")
    args = parser.parse_args(arguments)
    if args.prompt is not None and args.image is None:
        parser.error("--prompt needs --image")
    if args.max_new_tokens < 1:
        parser.error("--max_new_tokens must be at least 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    photo = Photo.open(args.image) if args.image is not None else None
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: say what to look for, for example 'the red star'")
    opened = cli.open_model(args)
    model, processor = opened.model, opened.processor
    args.layer_policy = args.layer_policy or model.config.layer_policy
    options = {"layer_policy": args.layer_policy, "max_new_tokens": args.max_new_tokens, "seed": args.seed}

    def answer(photo: Photo, prompt: str, folder: Path | None, stem: str) -> None:
        prompt = prompt.encode("utf-8", "replace").decode()  # stray bytes of a terminal are no text
        prediction = predict(model, processor, [photo.pixels], [[prompt]], **options)[0][0]
        print(prediction.text, flush=True)
        report(prediction, save(folder, stem, photo, prompt, prediction, args.layer_policy) if folder else [])

    if args.prompt is not None:
        answer(photo, args.prompt, args.output, photo.path.stem)
        return 0
    folder = args.output or Path("answers")
    for shown, prompt in questions(photo):
        try:
            answer(shown, prompt, folder, free_stem(folder, shown.path.stem))
        except ValueError as error:
            say(f"error: {error}")
    return 0


def questions(photo: Photo | None) -> Iterator[tuple[Photo, str]]:
    """Reads images and prompts from the terminal until its end."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    say(HELP)
    while True:
        line = ask_user("image file: " if photo is None else f"{photo.path.name}> ")
        if line is None or line in ("/quit", "/exit"):
            return
        if line == "/help":
            say(HELP)
        elif photo is None or line.split(maxsplit=1)[:1] == ["/image"]:
            try:
                photo = Photo.open(line.removeprefix("/image").strip())
            except ValueError as error:
                say(f"error: {error}")
        elif line.startswith("/"):
            say(f"unknown command {line.split()[0]}; /help lists them")
        elif line:
            yield photo, line


def ask_user(prompt: str) -> str | None:
    """One line, or None at the end of the input. The prompt goes to stderr where stdout is no terminal."""
    try:
        if sys.stdout.isatty():
            return input(prompt).strip()
        print(prompt, end="", file=sys.stderr, flush=True)
        return input().strip()
    except EOFError:
        say("")
        return None


def save(folder: Path, stem: str, photo: Photo, prompt: str, prediction: Prediction, layer_policy: str) -> list[str]:
    """Writes STEM_overlay.png, STEM_mask_K.png per [SEG] and STEM.json; returns the masks' paths.

    With ``mc:T`` also STEM_deviation_K.png: the standard deviation of the T probabilities, yellow where it is 0.5.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{stem}.json"
    remove_old_masks(record)
    masks = (prediction.mask_logits > 0).numpy()
    described = []
    for number, (mask, layer) in enumerate(zip(masks, prediction.layers), start=1):
        name = f"{stem}_mask_{number}.png"
        save_picture(folder / name, mask.astype(np.uint8) * 255)
        described.append({"file": name, "layer": layer, "pixels": int(mask.sum()), "box_xywh": bounding_box(mask)})
    for number, (entry, found) in enumerate(zip(described, prediction.uncertainty), start=1):
        name = f"{stem}_deviation_{number}.png"
        save_picture(folder / name, heat_map(photo.pixels, 2 * found.variance.sqrt().numpy()))
        shares = {layer: round(share, 4) for layer, share in enumerate(found.layers.tolist()) if share}
        entry["uncertainty"] = {"file": name, "score": found.score, "layers": shares}
    save_picture(folder / f"{stem}_overlay.png", overlay(photo.pixels, masks))
    values = {
        "image": str(photo.path),
        "width": photo.pixels.shape[1],
        "height": photo.pixels.shape[0],
        "prompt": prompt,
        "answer": prediction.text,
        "layer_policy": layer_policy,
        "overlay": f"{stem}_overlay.png",
        "masks": described,
    }
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    record.write_text(text, encoding="utf-8", errors="backslashreplace")  # bytes in a file name become \udc.. escapes
    return [str(folder / mask["file"]) for mask in described]


def free_stem(folder: Path, stem: str) -> str:
    """``STEM_001``, or the first number after it that no earlier answer has."""
    return next(name for name in (f"{stem}_{n:03d}" for n in count(1)) if not (folder / f"{name}.json").exists())


def remove_old_masks(record: Path) -> None:
    """An earlier answer of the same name may have had more masks; those it lists would now be wrong."""
    try:
        old = json.loads(record.read_text(encoding="utf-8"))["masks"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    for mask in old:
        for written in (mask, mask.get("uncertainty")):
            if written:
                (record.parent / Path(written["file"]).name).unlink(missing_ok=True)


def bounding_box(mask: np.ndarray) -> list[int] | None:
    """x, y, width, height in pixels; None for an empty mask."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        return None
    return [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]


def report(prediction: Prediction, files: list[str]) -> None:
    """Layers and files, on stderr."""
    if not prediction.layers:
        say("the answer holds no [SEG], so there is no mask")
    for number, layer in enumerate(prediction.layers, start=1):
        pixels = int((prediction.mask_logits[number - 1] > 0).sum())
        written = f" -> {files[number - 1]}" if files else ""
        doubt = f", uncertainty {prediction.uncertainty[number - 1].score:.2f}" if prediction.uncertainty else ""
        say(f"[SEG] {number}: layer {layer}, {pixels} pixels{doubt}{written}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
