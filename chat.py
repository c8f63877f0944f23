"""Answers questions about images with text and masks.

python chat.py --version DIR                                                     interactive, in the terminal
python chat.py --version DIR --image F --prompt "the red star" --output OUT      one answer; stdout holds its text alone
python chat.py --version DIR --image FOLDER --prompts FILE --output OUT          all prompts about all images, as JSONL
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np

from model import layer_rules
from model.layer_rules import MonteCarloMean
from model.processing.pixels import read_pixels
from model.structures import MAX_NEW_TOKENS, MAX_SEGS, Prediction
from utils.command_line.parser import Parser
from utils.datasets.base import read_text
from utils.inference import cli
from utils.inference.answer_files import answer_record, free_stem, save_answer
from utils.inference.folder import answer_all, find_images, read_prompts
from utils.inference.session import ImageSession
from utils.inference.terminal import AnswerPrinter, picture_codes, picture_protocol, printable
from utils.plotting.overlays import overlay
from utils.wording import counted

MC_SAMPLES = MonteCarloMean.samples
RULES = "\n".join(
    fill(rule.help, 79, initial_indent=f"{'':6}{rule.spelling():<12}", subsequent_indent=" " * 18)
    for rule in layer_rules.rules_for("inference")
)
HELP = f"""Type what to look for, for example: Please segment the red star in this image.
  /image PATH        ask about another image
  /layer [RULE]      use another layer rule, also for the last answer's masks:
{RULES}
  /mc [T]            short for /layer mc:T (T = {MC_SAMPLES})
  /history [on|off]  whether the model sees the earlier questions and answers
  /think [auto|on|off]  whether answers begin with a thought
  /reset             forget them
  /save PATH         save the last answer again: PATH_overlay.png,
                     PATH_mask_1.png, ..., PATH.json
  /help              this text
  /quit              quit (also Ctrl-D); Ctrl-C interrupts an answer"""


@dataclass
class Photo:
    """An image on disk and its pixels, uint8 [H, W, 3], upright according to its EXIF data."""

    path: Path
    pixels: np.ndarray

    @classmethod
    def open(cls, path: str) -> Photo:
        return cls(Path(path), read_pixels(Path(path).expanduser(), apply_exif=True))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        program="chat.py",
        description="Asks a UGround model about an image. With --prompt it answers once: the text goes to stdout, an "
        "overlay, a lossless mask (0/255, the image's size) per [SEG] and a JSON with the chosen layers to --output. "
        "With --prompts, or a folder as --image, it answers all prompts about all images: a JSON line each in "
        "--output/answers.jsonl, and the same pictures; started again, it resumes. Without either it is interactive.",
        epilog="Exit codes: 0 answered (also if nothing was found), 1 some images of many could not be read, 2 invalid "
        "input, 130 interrupted.",
    )
    add = parser.add_argument
    cli.add_model_flags(parser)
    add("--image", metavar="PATH", help="image to ask about, or a folder of images")
    add("--prompt", metavar="TEXT", help="one question; needs --image")
    add(
        "--prompts",
        metavar="FILE",
        help="a question per line, each answered independently; - reads stdin; needs --image",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for pictures (default: answers/ if interactive; a single --prompt writes none)",
    )
    add(
        "--no_pictures",
        action="store_true",
        help="with --prompts or a folder: write only answers.jsonl, which holds the masks too",
    )
    add(
        "--history",
        choices=("on", "off"),
        default="off",
        help="interactive: whether the model sees earlier questions and answers about the image (default: off; "
        "models trained on single questions answer worse with it)",
    )
    cli.add_layer_flag(parser, "default: the model's own, argmax, or last for a published checkpoint")
    cli.add_think_flag(parser)
    length = "longest answer in tokens (default: %(default)s)"
    add("--max_new_tokens", type=cli.whole(1), default=MAX_NEW_TOKENS, metavar="N", help=length)
    add("--seed", type=int, default=0, metavar="S", help="random seed of sampled layers (default: 0)")
    args = parser.parse_args(arguments)
    given = [flag for flag in ("prompt", "prompts") if getattr(args, flag) is not None]
    if len(given) == 2:
        parser.error("give --prompt or --prompts, not both")
    if given and args.image is None:
        parser.error(f"--{given[0]} needs --image")
    args.many = args.prompts is not None or (args.image is not None and Path(args.image).is_dir())
    if args.many and not given:
        parser.error(f"--image {args.image} is a folder: give --prompt or --prompts")
    if args.many and args.output is None:
        parser.error("many answers need --output")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: say what to look for, for example 'the red star'")
    images = find_images(Path(args.image)) if args.many else []
    prompts = _prompts(args) if args.many else []
    photo = Photo.open(args.image) if args.image is not None and not args.many else None
    opened = cli.open_model(args)
    model = opened.model
    args.layer_policy = str(model.config.layer_rule(args.layer_policy))
    opened.processor.opening(args.think)  # raises if the model writes no thoughts
    if args.many:
        settings = {"checkpoint": opened.fingerprint, "precision": opened.precision}
        settings |= {name: getattr(args, name) for name in ("layer_policy", "max_new_tokens", "seed")}
        settings |= {"think": args.think} if args.think != "auto" else {}  # older answers have no such key
        unreadable = answer_all(opened, images, prompts, args.output, settings, print_status, not args.no_pictures)
        return int(unreadable > 0)
    chat = Chat(model, opened.processor, args)
    if photo is not None:
        chat.set_photo(photo)
    if args.prompt is None:
        return run_interactive(chat, args.output or Path("answers"))
    chat.ask(args.prompt)
    if args.output and photo is not None:
        chat.save_files(args.output, photo.path.stem)
    chat.print_masks()
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [args.prompt]
    if args.prompts == "-":
        return read_prompts(sys.stdin)
    return read_prompts(read_text(Path(args.prompts)).splitlines())


class Chat:
    """The current image, the last answer about it, and the settings that commands change."""

    def __init__(self, model, processor, args: argparse.Namespace) -> None:
        self.model, self.processor = model, processor
        self.layer_policy, self.max_new_tokens, self.seed = args.layer_policy, args.max_new_tokens, args.seed
        self.think = args.think
        self.remember = args.history == "on"
        self.photo: Photo | None = None
        self.session: ImageSession | None = None
        self.prompt = ""
        self.last: Prediction | None = None
        self.files: list[str] = []
        self.overlay = ""  # the file of the last answer's masks over the image

    def set_photo(self, photo: Photo) -> None:
        """Starts a conversation about an image."""
        self.session = ImageSession(self.model, self.processor, photo.pixels)
        self.photo, self.last = photo, None

    def ask(self, prompt: str) -> None:
        """Answers a question and prints the answer to stdout."""
        assert self.session is not None
        self.prompt = prompt.encode("utf-8", "replace").decode()  # bytes that are not text
        printer = AnswerPrinter(sys.stdout, os.environ, self.processor.split_thought)
        self.last = None
        self.last = self.session.ask(
            self.prompt,
            layer_policy=self.layer_policy,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            on_text=printer.update,
            remember=self.remember,
            think=self.think,
        )
        if self.last.thought and not printer.live:
            print_status(f"thought: {self.last.thought}")
        printer.finish(self.last.text, self.last.thought)

    def save_files(self, folder: Path, stem: str) -> None:
        """Writes the files of the last answer."""
        assert self.photo is not None
        assert self.last is not None
        values = answer_record(str(self.photo.path), self.photo.pixels, self.prompt, self.last, self.layer_policy)
        save_answer(folder, stem, self.photo.pixels, values, self.last)
        self.overlay = str(folder / values["overlay"])
        self.files = [str(folder / mask["file"]) for mask in values["masks"]]

    def print_masks(self) -> None:
        """Prints layer, size and file of every mask to stderr."""
        assert self.last is not None
        if self.last.cut:
            length = f"{counted(len(self.last.token_ids), 'token')}, {len(self.last.layers)} [SEG]"
            print_status(f"the answer was cut at {length}; at most: {self.max_new_tokens} tokens, {MAX_SEGS} [SEG]")
        if not self.last.layers:
            print_status("the answer holds no [SEG], so there is no mask")
        rule = layer_rules.parse(self.layer_policy)
        for number, layer in enumerate(self.last.layers):
            pixels = int(self.last.masks[number].sum())
            written = f" -> {self.files[number]}" if self.files else ""
            uncertainty = f", uncertainty {self.last.uncertainty[number].score:.2f}" if self.last.uncertainty else ""
            print_status(f"[SEG] {number + 1}: {rule.words(layer)}, {pixels} pixels{uncertainty}{written}")
        if self.overlay:
            shown = "all masks over the image" if self.last.layers else "the image without masks"
            print_status(f"{shown} -> {self.overlay}")

    def show_overlay(self) -> None:
        """Shows the masks over the image, in a terminal that can show pictures."""
        assert self.photo is not None
        assert self.last is not None
        if (protocol := picture_protocol(sys.stdout, os.environ)) and self.last.layers:
            picture = overlay(self.photo.pixels, self.last.masks.numpy())
            print(picture_codes(picture, protocol), end="", flush=True)

    # the commands: what a line that begins with / calls

    def image(self, path: str) -> None:
        if not path:
            shown = printable(str(self.photo.path)) if self.photo else "none yet"
            print_status(f"image: {shown} (another one: /image PATH)")
            return
        quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""  # as terminals paste a dragged file
        self.set_photo(Photo.open(path[1:-1] if quoted else path))

    def layer(self, rule: str) -> None:
        if rule:
            self.layer_policy = str(self.model.config.layer_rule(rule))
            if self.session is not None and self.last is not None and self.last.layers:
                self.last = self.session.decode_again(rule, self.seed)
        print_status(f"layer: {self.layer_policy}")

    def history(self, wanted: str) -> None:
        if wanted not in ("", "on", "off"):
            raise ValueError("/history takes on or off")
        self.remember = wanted == "on" if wanted else self.remember
        turns = len(self.session.history) if self.session else 0
        if self.remember:
            print_status(f"history: on, the model sees {counted(turns, 'earlier question')} (/reset forgets them)")
        else:
            print_status("history: off, each question is answered independently (/history on changes that)")

    def set_think(self, wanted: str) -> None:
        if wanted:
            self.processor.opening(wanted)  # raises if there is no such choice
            self.think = wanted
        print_status(f"think: {self.think}")

    def reset(self) -> None:
        turns = len(self.session.history) if self.session else 0
        if self.session is not None:
            self.session.reset()
        self.last = None
        print_status(f"the conversation was reset: {counted(turns, 'earlier question')} forgotten, the image stays")

    def save(self, path: str) -> None:
        if self.last is None:
            raise ValueError("there is no answer to save yet")
        if not path:
            raise ValueError("/save needs a path: /save star writes star_overlay.png, star_mask_1.png, star.json")
        self.save_files(Path(path).expanduser().parent, Path(path).name)
        print_status(f"saved {path}_overlay.png, {counted(len(self.files), 'mask')}, {path}.json")


def run_interactive(chat: Chat, folder: Path) -> int:
    """Handles questions and commands until the end of the input; returns the exit code."""
    import torch

    if sys.stdin.isatty():
        import readline  # gives input() line editing and a history

        readline.parse_and_bind("tab: complete")
        readline.set_completer_delims(" ")
    print_status(HELP)
    while True:
        try:
            line = read_line("image file: " if chat.photo is None else f"{printable(chat.photo.path.name)}> ")
            if line is None or line in ("/quit", "/exit"):
                return 0
            if line:
                handle_line(chat, line, folder)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            print_status(f"error: {error}")
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print_status("")


def handle_line(chat: Chat, line: str, folder: Path) -> None:
    """Runs a command or answers a question."""
    commands: dict[str, Callable[[str], None]] = {
        "/image": chat.image,
        "/layer": chat.layer,
        "/mc": lambda samples: chat.layer(f"mc:{samples or MC_SAMPLES}"),
        "/history": chat.history,
        "/think": chat.set_think,
        "/reset": lambda _: chat.reset(),
        "/save": chat.save,
        "/help": lambda _: print_status(HELP),
    }
    word, _, rest = line.partition(" ")
    before = chat.last
    if word in commands:
        commands[word](rest.strip())
    elif chat.photo is None:
        chat.image(line)
    elif word.startswith("/"):
        raise ValueError(f"unknown command {word}; /help lists them")
    else:
        chat.ask(line)
    if chat.last is not None and chat.last is not before:  # an answer, or new masks of the last one
        assert chat.photo is not None
        chat.save_files(folder, free_stem(folder, chat.photo.path.stem))
        chat.print_masks()
        chat.show_overlay()


def read_line(prompt: str) -> str | None:
    """One line, or None at the end of the input. The prompt goes to stderr if stdout is not a terminal."""
    try:
        if sys.stdout.isatty():
            return input(prompt).strip()
        print(prompt, end="", file=sys.stderr, flush=True)
        return input().strip()
    except EOFError:
        print_status("")
        return None


def print_status(text: str) -> None:
    """Prints to stderr: stdout holds answers only."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, out_of_memory=cli.SMALLER_WEIGHTS))
