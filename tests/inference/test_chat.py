"""chat.py: interactive in a terminal, and for many images at once, as scripts use it."""

import base64
import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import time

import numpy as np
import pytest
from conftest import write_jpg
from forks import Program
from PIL import Image
from programs import chat, run
from tiny_run import ROOT

from model.processing.thoughts import MARKS
from utils.datasets.base import read_text
from utils.datasets.images import read_image
from utils.datasets.masks import decode_mask
from utils.inference.folder import find_images, read_prompts
from utils.inference.terminal import AnswerPrinter, picture_codes, picture_protocol
from utils.plotting import overlays

# -- interactive -------------------------------------------------------------------------------------------------------


class Terminal:
    """chat.py in a process of its own behind a pseudo-terminal."""

    def __init__(self, *arguments, **environment: str) -> None:
        self.screen, inside = pty.openpty()
        plain = {"TERM": "xterm", "TMUX": "", "TERM_PROGRAM": "", "KITTY_WINDOW_ID": ""}
        env = os.environ | plain | environment
        self.program = Program(ROOT / "chat.py", *arguments, output=os.ttyname(inside), env=env)
        self.inside = inside
        self.unread = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What appears on the screen up to ``text``."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            assert time.monotonic() < end, f"no {text!r} in {self.unread!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                self.unread += os.read(self.screen, 1 << 16).decode(errors="replace")
        seen, self.unread = self.unread.split(text, 1)
        return seen

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def line(self, text: str, prompt: str = ".png> ") -> str:
        """Types a line; returns the output until the next prompt."""
        self.type(f"{text}\n")
        self.until("\n")  # the terminal's echo
        return self.until(prompt)

    def interrupt(self, prompt: str) -> None:
        """Ctrl-C at the prompt, again where the line editor misses it, between its prompt and its ``select``."""
        for _ in range(12):
            self.type("half a line\x03")
            with contextlib.suppress(AssertionError):
                return self.until(prompt, 5)
        raise AssertionError(f"no {prompt!r} after Ctrl-C")

    def quit(self) -> int | None:
        code = None
        for _ in range(60):  # Ctrl-D is lost while the line editor takes the terminal over; a person presses it again
            self.type("\x04")
            if (code := self.program.ends(1)) is not None:
                break
        os.close(self.screen)
        os.close(self.inside)
        return code


@pytest.mark.slow
def test_a_conversation_at_a_terminal(version, tmp_path):
    for number in (0, 1):
        write_jpg(tmp_path / f"photo{number}.png", number)
    out = tmp_path / "out"
    terminal = Terminal("--version", version, "--output", out, "--max_new_tokens", 1, "--layer_policy", "fixed:2")
    assert "/history [on|off]" in terminal.until("image file: ")
    assert terminal.line("", "image file: ") == ""
    assert "nowhere.jpg does not exist" in terminal.line("nowhere.jpg", "image file: ")
    assert "nothing" not in terminal.line(f"'{tmp_path / 'photo0.png'}'")
    answer = terminal.line("the red star")
    assert "\x1b[1;38;2;230;159;0m[SEG]\x1b[0m" in answer  # in the color of the mask
    assert f"layer 2, {mask_of(out, 'photo0_001').sum()} pixels -> {out}" in answer.replace("\r\n", "")
    assert "photo0_001_mask_1.png" in answer
    assert terminal.line("") == "photo0"
    assert "layer: fixed:2" in terminal.line("/layer")
    assert "[SEG] 1: layer 3" in terminal.line("/layer fixed:3")  # the same answer's mask, decoded again
    assert "layer 9 does not exist" in terminal.line("/layer fixed:9")
    assert "uncertainty 0." in terminal.line("/mc 4")
    assert json.loads((out / "photo0_003.json").read_text())["masks"][0]["uncertainty"]["layers"]
    assert "error: 'mc:0' samples no layer" in terminal.line("/mc 0")
    assert "layer: mc:16" in terminal.line("/mc")
    assert "each question is answered independently" in terminal.line("/history")
    assert "the model sees 0 earlier" in terminal.line("/history on")
    terminal.line("the blue circle")
    assert "the model sees 1 earlier" in terminal.line("/history")
    assert "takes on or off" in terminal.line("/history maybe")
    assert "star_overlay.png, 1 mask" in terminal.line(f"/save {tmp_path / 'kept' / 'star'}")
    assert mask_of(tmp_path / "kept", "star").shape == (48, 64)
    assert "needs a path" in terminal.line("/save")
    assert "was reset" in terminal.line("/reset")
    assert "no answer to save" in terminal.line("/save again")
    assert "the model sees 0 earlier" in terminal.line("/history")
    assert "unknown command /fly" in terminal.line("/fly")
    assert "no.jpg does not exist" in terminal.line(f"/image {tmp_path / 'no.jpg'}")
    terminal.line(f"/image {tmp_path / 'photo1.png'}")
    assert "/save PATH" in terminal.line("/help")
    terminal.interrupt("photo1.png> ")
    assert "[SEG]" in terminal.line("the red star")
    assert terminal.quit() == 0
    assert sorted(path.stem for path in out.glob("*.json")) == [*(f"photo0_00{n}" for n in range(1, 6)), "photo1_001"]


def mask_of(folder, stem) -> np.ndarray:
    return read_image(folder / f"{stem}_mask_1.png")[..., 0] > 0


@pytest.mark.slow
def test_ctrl_c_interrupts_an_answer(mute_version, tmp_path):
    write_jpg(tmp_path / "photo.png", 0)
    words = ("--version", mute_version, "--image", tmp_path / "photo.png", "--output", tmp_path / "out")
    terminal = Terminal(*words, "--max_new_tokens", 1_000_000, "--history", "on", NO_COLOR="1")
    terminal.until("photo.png> ")
    for _ in range(2):
        terminal.type("what is there\n")
        terminal.until("there\r\n")
        terminal.until("AS")  # the answer is streamed
        terminal.type("\x03")
        terminal.until("photo.png> ")
    assert "the model sees 0 earlier" in terminal.line("/history")
    assert terminal.quit() == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pictures_in_terminals_that_show_them(version, tmp_path):
    write_jpg(tmp_path / "photo.png", 0)
    words = ("--version", version, "--image", tmp_path / "photo.png", "--output", tmp_path / "out")
    terminal = Terminal(*words, "--max_new_tokens", 1, TERM_PROGRAM="iTerm.app")
    terminal.until("photo.png> ")
    terminal.type("a star\n")
    terminal.until("\x1b]1337;File=inline=1;size=")
    shown = base64.b64decode(terminal.until("\a").split(":")[1])
    assert terminal.quit() == 0
    expected = read_image(tmp_path / "out" / "photo_001_overlay.png")
    assert np.array_equal(np.array(Image.open(io.BytesIO(shown))), expected)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_protocols():
    picture = np.random.default_rng(0).integers(0, 255, (600, 1200, 3), dtype=np.uint8)
    codes = picture_codes(picture, "kitty")
    parts = [part.removeprefix("\x1b_G").split(";") for part in codes.rstrip("\n").split("\x1b\\")[:-1]]
    assert [head for head, _ in parts] == ["a=T,f=100,m=1", *["m=1"] * (len(parts) - 2), "m=0"]
    image = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in parts))))
    assert image.size == (900, 450)
    for environment, expected in (
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/tmux"}, ""),
        ({"TERM": "xterm-256color"}, ""),
    ):
        assert picture_protocol(Screen(), environment) == expected
        assert picture_protocol(io.StringIO(), environment) == ""


def plain(text):
    return "", text


def test_text_is_streamed_to_terminals_only():
    screen, file = Screen(), io.StringIO()
    for stream in (screen, file):
        printer = AnswerPrinter(stream, {"NO_COLOR": "1"}, plain)
        for text in ("It", "It is\ufffd", "It is é", "It is é [SEG]"):
            printer.update(text)
            assert (stream.getvalue() == text.rstrip("\ufffd")) == stream.isatty()
        printer.finish("It is é [SEG].\x1b[2J")
    assert screen.getvalue() == "It is é [SEG].\ufffd[2J\n"  # a model cannot control the terminal
    assert file.getvalue() == "It is é [SEG].\x1b[2J\n"


def test_an_answer_that_reads_otherwise_at_the_end_is_printed_once_more():
    screen = Screen()
    printer = AnswerPrinter(screen, {"NO_COLOR": "1"}, plain)
    for text in ("I do", "I do n", "I don't [SEG]"):
        printer.update(text)
    printer.finish("I don't [SEG].")
    assert screen.getvalue() == "I do n\nI don't [SEG].\n"


@pytest.mark.parametrize("marks", MARKS.values(), ids=MARKS)
@pytest.mark.parametrize("answer", ["It is [SEG].", "It is \ufffd", ""])  # the second ended within a character
def test_a_thought_stands_on_a_line_of_its_own(marks, answer):
    screen, file = Screen(), io.StringIO()
    streamed = f"{marks.opening} é is it" + (f" {marks.closing} {answer}" if answer else "")
    thought, final = marks.split(streamed)
    for stream in (screen, file):
        printer = AnswerPrinter(stream, {"NO_COLOR": "1"}, marks.split)
        for end in range(1, len(streamed) + 1):
            printer.update(streamed[:end])
        printer.finish(final, thought)
    assert screen.getvalue() == ("thought: é is it\n" + (f"{answer}\n" if answer else ""))
    assert file.getvalue() == f"{answer}\n"


def test_the_colors_are_those_of_the_masks_whatever_the_thought_says():
    """A [SEG] in a thought has no mask, and no color."""
    marks, screens = MARKS["tokens"], (Screen(), Screen())
    for screen, text in zip(screens, ("It is [SEG].", "<think> the [SEG] one </think> It is [SEG].")):
        printer = AnswerPrinter(screen, {}, marks.split)
        for end in range(1, len(text) + 1):
            printer.update(text[:end])
        printer.finish("It is [SEG].", marks.split(text)[0])
    alone, after = (screen.getvalue() for screen in screens)
    assert after.endswith(f"\n{alone}")
    thought = after.removesuffix(f"\n{alone}")
    assert re.sub(r"\x1b\[[0-9;]*m", "", thought) == "thought: the [SEG] one"
    assert set(re.findall(r"\x1b\[([0-9;]*)m", thought)) == {"2", "0"}


# -- many images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    for number, size in enumerate([(48, 64), (64, 40), (30, 30)]):
        write_jpg(tmp_path / "album" / f"{number}.png", number, size)
    (tmp_path / "album" / "notes.txt").write_text("no image")
    (tmp_path / "prompts.txt").write_text("the red star\n\nthe blue circle\nthe red star\n")
    return tmp_path / "album"


def ask_many(capsys, version, album, *more):
    output = album.parent / "out"
    words = ("--version", version, "--image", album, "--output", output, "--max_new_tokens", 2)
    code, out, err = run(capsys, chat, *words, *more)
    path = output / "answers.jsonl"
    return code, out, err, path.read_text(errors="replace").splitlines() if path.exists() else []


def test_many_prompts_about_many_images(capsys, version, album):
    code, out, err, lines = ask_many(capsys, version, album, "--prompts", album.parent / "prompts.txt")
    assert (code, out) == (0, ""), err
    answers = [json.loads(line) for line in lines]
    images = [str(album / f"{n}.png") for n in range(3)]
    prompts = ["the red star", "the blue circle"]
    assert [(values["image"], values["prompt"]) for values in answers] == [(i, p) for i in images for p in prompts]
    for number, values in enumerate(answers):
        assert values["answer"].count("[SEG]") == len(values["masks"]) > 0
        for entry in values["masks"]:
            mask = read_image(album.parent / "out" / entry["file"])[..., 0] > 0
            assert np.array_equal(decode_mask(entry["rle"]), mask)
            assert mask.shape == (values["height"], values["width"])
        assert values["overlay"] == f"{number // 2}_00{number % 2 + 1}_overlay.png"
    one = run(capsys, chat, "--version", version, "--image", images[1], "--prompt", prompts[1], "--max_new_tokens", 2)
    assert one[1] == f"{answers[3]['answer']}\n"


def test_an_interrupted_run_resumes(capsys, version, album):
    more = ("--prompts", album.parent / "prompts.txt", "--no_pictures")
    lines = ask_many(capsys, version, album, *more)[3]
    path = album.parent / "out" / "answers.jsonl"
    assert os.listdir(path.parent) == ["answers.jsonl"]
    path.write_text("\n".join([*lines[:3], lines[3][:40]]))  # killed while it wrote the fourth
    code, _, err, again = ask_many(capsys, version, album, *more)
    assert (code, again) == (0, lines)
    assert err.splitlines()[-4:] == [
        f"2/3 {album / '1.png'}: 1 answer",
        f"3/3 {album / '2.png'}: 2 answers",
        "there already: 3 answers",
        f"results: {path}",
    ]
    code, _, err, again = ask_many(capsys, version, album, *more, "--layer_policy", "fixed:1")
    assert (code, again) == (2, lines)
    assert "holds answers of other settings (layer_policy: 'argmax' there, 'fixed:1' now)" in err
    path.write_text('{"image": 1}\n')
    assert "line 1 is not an answer" in ask_many(capsys, version, album, *more)[2]
    for damaged in (b"\xff\n", bytes(900), f"{lines[0]}\n<html>".encode()):
        path.write_bytes(damaged)
        code, _, err, _ = ask_many(capsys, version, album, *more)
        assert (code, str(path) in err, path.read_bytes()) == (2, True, damaged)  # not emptied


def test_a_replaced_image_is_asked_about_again(capsys, version, album, monkeypatch):
    more = ("--prompt", "the red star", "--no_pictures")
    lines = ask_many(capsys, version, album, *more)[3]
    path = album.parent / "out" / "answers.jsonl"
    older = [
        json.dumps({name: value for name, value in json.loads(line).items() if name != "content"}) for line in lines
    ]
    path.write_text("\n".join(older) + "\n")  # as an earlier version wrote them
    monkeypatch.chdir(album.parent)  # one image, whichever way its path is given
    relative = ("--version", version, "--image", "album", "--output", "out", "--max_new_tokens", 2)
    code, _, err = run(capsys, chat, *relative, *more)
    assert (code, path.read_text().splitlines()) == (0, older)
    assert "there already: 3 answers" in err
    write_jpg(album / "1.png", 7, (20, 20))
    _, _, err, again = ask_many(capsys, version, album, *more)
    assert "2/3" in err
    assert "1 of them again: the image was replaced" in err
    assert [json.loads(line)["width"] for line in again[3:]] == [20]
    write_jpg(album / "1.png", 8, (20, 20))  # other content, same size
    again = ask_many(capsys, version, album, *more)[3]
    assert len(again) == 5
    assert len(ask_many(capsys, version, album, *more)[3]) == 5


def test_a_killed_run_goes_on_to_the_same_files(capsys, version, album, monkeypatch):
    more = ("--prompts", album.parent / "prompts.txt")

    def files():
        return {path.name: path.read_bytes() for path in (album.parent / "out").iterdir()}

    ask_many(capsys, version, album, *more)
    whole = files()
    shutil.rmtree(album.parent / "out")
    save, written = overlays.Image.Image.save, []

    def dies(image, path, **options):
        written.append(path)
        if len(written) == 9:
            save(image, path, **options)
            raise KeyboardInterrupt
        save(image, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(overlays.Image.Image, "save", dies)
        assert ask_many(capsys, version, album, *more)[0] == 130
    assert set(files()) < set(whole)
    ask_many(capsys, version, album, *more)
    assert files() == whole


def test_a_folder_without_the_files_that_a_mac_adds(tmp_path):
    for name in ("a.jpg", "._a.jpg", "b.JFIF", "c.heic", "d.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_images(tmp_path)] == ["a.jpg", "b.JFIF", "c.heic"]  # c is reported as not read


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_of_any_system(tmp_path, encoding, end):
    (tmp_path / "prompts.txt").write_bytes(end.join(["caf\u00e9", "", "star", ""]).encode(encoding))
    assert read_prompts(read_text(tmp_path / "prompts.txt").splitlines()) == ["caf\u00e9", "star"]
    assert read_prompts(["\ufeffstar\n", "\ufeff\n"]) == ["star"]  # as a pipe of Windows begins


def test_answers_do_not_overwrite_each_others_pictures(capsys, version, album):
    one, two = album.parent / "one.txt", album.parent / "two.txt"
    one.write_text("the red star\n")
    two.write_text("the blue circle\nthe red star\n")
    lines = ask_many(capsys, version, album, "--prompts", one)[3]
    before = {path.name: path.read_bytes() for path in (album.parent / "out").glob("*.png")}
    code, _, err, more = ask_many(capsys, version, album, "--prompts", two)
    assert (code, more[:3], len(more)) == (0, lines, 6), err
    files = [entry["file"] for line in more for entry in json.loads(line)["masks"]]
    assert len(set(files)) == len(files)
    assert all((album.parent / "out" / name).read_bytes() == content for name, content in before.items())


def test_files_of_others_are_not_overwritten(capsys, version, album):
    """Images and their annotations often lie side by side, under one name."""
    words = ("--version", version, "--image", album, "--output", album, "--max_new_tokens", 1, "--prompt", "a star")
    code, _, err = run(capsys, chat, *words)
    assert (code, "also holds the image 0.png" in err) == (2, True)
    (album / "0.json").write_text('{"shapes": []}')
    code, _, err = run(capsys, chat, *words[:2], "--image", album / "0.png", *words[4:])
    assert (code, "0.json exists and is not an answer" in err) == (2, True)
    assert (album / "0.json").read_text() == '{"shapes": []}'
    assert not list(album.glob("*_mask_*"))


def test_images_that_cannot_be_read_are_named(capsys, version, album):
    (album / "1.png").write_bytes(b"no picture")
    code, _, err, lines = ask_many(capsys, version, album, "--prompt", "the red star")
    assert (code, len(lines)) == (1, 2)
    assert "1.png cannot be decoded" in err


def test_invalid_calls_for_many(capsys, album, tmp_path):
    def refused(*arguments):
        code, out, err = run(capsys, chat, "--version", tmp_path, *arguments)
        assert (code, out) == (2, "")
        return err

    assert "is a folder: give --prompt or --prompts" in refused("--image", album)
    assert "many answers need --output" in refused("--image", album, "--prompt", "a")
    assert "not both" in refused("--image", album, "--prompt", "a", "--prompts", "b")
    assert "--prompts needs --image" in refused("--prompts", "b")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused("--image", tmp_path / "empty", "--prompt", "a", "--output", tmp_path / "out")
    assert "nothing.txt" in refused("--image", album, "--prompts", tmp_path / "nothing.txt", "--output", tmp_path / "o")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(["\n", "  "])
