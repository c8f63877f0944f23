"""Answers in a terminal: streamed text, and pictures in terminals that can show them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import TextIO

import numpy as np
from PIL import Image

from model.processing.tokens import SEG
from utils.plotting.overlays import color

PICTURE_BOX = 900, 500  # pixels; a larger picture would push the conversation off the screen
KITTY_CHUNK = 4096  # of kitty's protocol


class AnswerPrinter:
    """Streams an answer to a terminal; writes it to a file or pipe only when it is complete.

    In a terminal, a thought stands dimmed on a line of its own, and each [SEG] of the answer has the color of its mask.

    Args:
        split: thought and answer of a text (``UGroundProcessor.split_thought``).
    """

    def __init__(self, stream: TextIO, environment: Mapping[str, str], split: Callable[[str], tuple[str, str]]) -> None:
        self.stream, self.split = stream, split
        self.live = stream.isatty()
        self.colored = self.live and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
        self.thought = self.text = ""  # printed so far
        self.segs = 0

    def update(self, text: str) -> None:
        """Prints what is new in the answer so far."""
        if not self.live:
            return
        thought, answer = self.split(text.rstrip("\ufffd"))  # without the first bytes of an unfinished character
        if not answer:
            thought = thought.rpartition(" ")[0]  # its last word may be the beginning of a mark
        self._extend(thought, answer)

    def finish(self, text: str, thought: str = "") -> None:
        """Prints the rest of the complete answer, and in a terminal of its thought."""
        if not text.startswith(self.text):  # later tokens changed how earlier ones read: once more, whole
            self._write("\n")
            self.text, self.segs = "", 0
        self._extend(thought if self.live else "", text)
        self._write("\n")

    def _extend(self, thought: str, text: str) -> None:
        if thought.startswith(self.thought) and thought != self.thought:
            more = thought[len(self.thought) :] if self.thought else f"thought: {thought}"
            self._write(f"\x1b[2m{printable(more)}\x1b[0m" if self.colored else printable(more))
            self.thought = thought
        if text.startswith(self.text) and text != self.text:
            if self.thought and not self.text:
                self._write("\n")
            self._write(self._marked(text[len(self.text) :]))
            self.text = text

    def _marked(self, text: str) -> str:
        if self.live:  # a model must not control the terminal
            text = printable(text)
        if self.colored:
            first, *others = text.split(SEG)
            for rest in others:
                red, green, blue = color(self.segs)
                first += f"\x1b[1;38;2;{red};{green};{blue}m{SEG}\x1b[0m{rest}"
                self.segs += 1
            text = first
        return text

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def printable(text: str) -> str:
    """Replaces control characters, and bytes in file names that are not text, by U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def picture_protocol(stream: TextIO, environment: Mapping[str, str]) -> str:
    """The terminal's protocol for pictures, from its environment: ``kitty``, ``iterm``, or an empty string."""
    if not stream.isatty() or environment.get("TMUX") or environment.get("TERM", "").startswith(("screen", "tmux")):
        return ""
    program = environment.get("TERM_PROGRAM", "")
    if environment.get("KITTY_WINDOW_ID") or environment.get("TERM") == "xterm-kitty" or program == "ghostty":
        return "kitty"
    return "iterm" if program in ("iTerm.app", "WezTerm") else ""


def picture_codes(picture: np.ndarray, protocol: str) -> str:
    """The escape sequences that show a picture [H, W, 3]."""
    image = Image.fromarray(picture)
    image.thumbnail(PICTURE_BOX)
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    if protocol == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(file.getvalue())}:{data}\a\n"
    codes = []
    for start in range(0, len(data), KITTY_CHUNK):
        head, more = "" if start else "a=T,f=100,", int(start + KITTY_CHUNK < len(data))
        codes.append(f"\x1b_G{head}m={more};{data[start : start + KITTY_CHUNK]}\x1b\\")
    return "".join(codes) + "\n"
