"""Answers in a terminal: text as it is written, and pictures in terminals that can show them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TextIO

import numpy as np
from PIL import Image

from model.processing.tokens import SEG
from utils.plotting.overlays import color

PICTURE_BOX = 900, 500  # pixels: a photograph must not push the conversation off the screen
CHUNK = 4096  # of kitty's protocol


class AnswerPrinter:
    """Prints an answer while it is written; where nobody watches, only when it is whole.

    Each [SEG] has the color of its mask.
    """

    def __init__(self, stream: TextIO, environment: Mapping[str, str]) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.colored = self.live and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
        self.text = ""
        self.segs = 0

    def update(self, text: str) -> None:
        """The answer so far."""
        whole = text.rstrip("\ufffd")  # the first bytes of a character
        if self.live and whole.startswith(self.text):
            self._write(whole[len(self.text) :])
            self.text = whole

    def finish(self, text: str) -> None:
        rest = text.removeprefix(self.text)
        self._write(f"{rest}\n")

    def _write(self, text: str) -> None:
        if self.live:  # a model's bytes must not steer the terminal
            text = printable(text)
        if self.colored:
            first, *others = text.split(SEG)
            for rest in others:
                red, green, blue = color(self.segs)
                first += f"\x1b[1;38;2;{red};{green};{blue}m{SEG}\x1b[0m{rest}"
                self.segs += 1
            text = first
        self.stream.write(text)
        self.stream.flush()


def printable(text: str) -> str:
    """Text without what steers a terminal, or cannot be written to it (bytes in a file's name)."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def picture_protocol(stream: TextIO, environment: Mapping[str, str]) -> str:
    """``kitty``, ``iterm`` or nothing: which pictures the terminal shows, by what it says about itself."""
    if not stream.isatty() or environment.get("TMUX") or environment.get("TERM", "").startswith(("screen", "tmux")):
        return ""
    program = environment.get("TERM_PROGRAM", "")
    if environment.get("KITTY_WINDOW_ID") or environment.get("TERM") == "xterm-kitty" or program == "ghostty":
        return "kitty"
    return "iterm" if program in ("iTerm.app", "WezTerm") else ""


def picture_codes(picture: np.ndarray, protocol: str) -> str:
    """What to print for a picture [H, W, 3] to appear."""
    image = Image.fromarray(picture)
    image.thumbnail(PICTURE_BOX)
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    if protocol == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(file.getvalue())}:{data}\a\n"
    parts = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    heads = ["a=T,f=100,", *[""] * (len(parts) - 1)]
    more = [*[1] * (len(parts) - 1), 0]
    return "".join(f"\x1b_G{h}m={m};{part}\x1b\\" for h, m, part in zip(heads, more, parts)) + "\n"
