"""The documentation: short paragraphs in the field's words; links, paths, commands and flags that exist."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import load_script

from utils.command_line.other_trainers import THEIRS, rows

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "assets/tiny/README.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST = 80  # words in a paragraph or an item of a list
FOLDERS = "model|utils|scripts|configs|docs|tests|assets"
PATH = re.compile(rf"(?<![\w./+-])(?:{FOLDERS})/[\w./+-]*\w")
PROGRAM = re.compile(r"(?:[\w.]+/)*\w+\.py")
FLAG = re.compile(r"--[a-z][\w-]*")
SOURCES = ("labelme", "coco", "masks", "yolo", "label-studio", "via", "cvat", "parquet")  # of scripts/convert_data.py
ELSEWHERE = {"--shm-size"}  # flags of other programs that the text names
PRIVATE = re.compile(  # older words of this project for things that have a standard name
    r"LISA's way|connect\w* from|text.blind|by heart|\bmend|way out|stands? once|\bgo(?:es)? on\b|\bdoubt|says? no\b"
)
pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def without_code(text: str) -> str:
    """The text of a page without its fenced and its indented code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<=\n\n)(?:    .*\n+)+", "", text)


def code_of(text: str) -> Iterator[str]:
    """Fenced blocks, indented blocks, and inline code; no ``text``, which is of other projects."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        if language != "text":
            yield block
    yield from re.findall(r"(?<=\n\n)((?:    .*\n+)+)", text)
    yield from re.findall(r"`([^`\n]+)`", without_code(text))


def paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists; no headings, tables or pictures."""
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", without_code(text))
    return [part.strip() for part in parts if not re.match(r"\s*(?:#|\||!\[|$)", part)]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(program, its arguments) of every command that runs one of this project's programs."""
    calls = []
    for block in code_of(text):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # an apostrophe
                words = line.split()
            words = list(takewhile(lambda word: word not in (";", "|", "&&"), words))
            index = next((i for i, word in enumerate(words) if PROGRAM.fullmatch(word)), len(words))
            launcher, arguments = words[:index], words[index + 1 :]
            launched = {"python", "deepspeed", "torchrun"} & set(launcher)
            if index < len(words) and (launched or (not launcher and FLAG.match(" ".join(arguments)))):
                calls.append((words[index], arguments))
    return calls


@functools.cache
def help_of(program: str, command: str = "") -> str:
    main = load_script(program.removesuffix(".py")).main
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", [program, *([command] if command else []), "--help"])
        with contextlib.suppress(SystemExit):
            main()
    return shown.getvalue()


def flags_of(program: str, arguments: list[str]) -> set[str]:
    """The flags in a program's --help, and all settings if it takes a configuration."""
    command = arguments[0] if arguments and re.fullmatch(r"[a-z]+", arguments[0]) else ""
    shown = help_of(program) + (help_of(program, command) if command else "")
    if "--config" in shown and program != "train_ds.py":
        shown += help_of("train_ds.py")
    return {"--help", *FLAG.findall(shown)}


# -- text --------------------------------------------------------------------------------------------------------------


@pages
def test_paragraphs_can_be_read_in_one_breath(page: Path) -> None:
    counts = {part[:60]: len(part.split()) for part in paragraphs(page.read_text(encoding="utf-8"))}
    long = {start: count for start, count in counts.items() if count > LONGEST}
    assert not long, "\n".join(f"{count} words: {start}" for start, count in long.items())


def test_a_paragraph_is_counted_without_tables_and_code() -> None:
    text = "# A heading\n\none two\nthree\n\n| a | b |\n|---|---|\n\n- four\n- five\n  six\n\n"
    text += "```bash\nls\n```\n\n    ls\n\nend\n"
    assert paragraphs(text) == ["one two\nthree", "- four", "- five\n  six", "end"]


def test_the_first_screen_of_the_readme() -> None:
    """A picture, the two commands, a few lines of Python, and the table of pages."""
    first = "\n".join(README.read_text(encoding="utf-8").splitlines()[:45])
    needed = ("layers.gif", "bash scripts/demo.sh", "bash scripts/run_tests.sh", "from model import load", "| page |")
    assert not [text for text in needed if text not in first]


@pytest.mark.parametrize("page", [README, ROOT / "docs/inference.md"], ids=["README.md", "inference.md"])
def test_the_python_of_a_page_runs(page: Path, version: str, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in turn, as in one session."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(photo.parent)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("runs/tiny/merged", version), names)
    masks = names["answer"].masks
    assert masks.dtype == torch.bool
    assert masks.shape[1:] == (48, 64)
    assert len(masks) == names["answer"].text.count("[SEG]") > 0


def test_the_notebook_runs(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All cells in turn, without Jupyter; the file holds no outputs."""
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shown: list[Any] = []
    names: dict[str, Any] = {"display": shown.append}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            exec("".join(cell["source"]).replace("runs/tiny/merged", version), names)
    assert Path.cwd() == ROOT
    assert len(shown) == len(names["answer"].masks) > 0
    assert shown[0].size == names["image"].size


@pages
def test_pages_use_standard_terms(page: Path) -> None:
    """The words in brackets in the glossary of docs/architecture.md are only for readers of older commits."""
    text = without_code(page.read_text(encoding="utf-8")).partition("## Glossary")[0]
    private = [match.group() for match in PRIVATE.finditer(re.sub(r"`[^`]*`", "", text))]
    assert not private, private


# -- links and paths ---------------------------------------------------------------------------------------------------


@pages
def test_links_have_targets(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong, wrong


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)", README.read_text(encoding="utf-8")))
    assert linked >= {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


@pages
def test_paths_exist(page: Path) -> None:
    paths = {path for path in PATH.findall(page.read_text(encoding="utf-8")) if "NAME" not in path}
    wrong = sorted(path for path in paths if not (ROOT / path).exists())
    assert not wrong, wrong


def test_the_tree_names_every_module() -> None:
    """docs/architecture.md lists all modules of model/ and utils/, and no others."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = page.partition("## The tree")[2].partition("## ")[0]
    named, folders = set(), []
    for line in tree.splitlines():
        if folder := re.match(r"( *)(\w+)/ ", line + " "):
            folders = [*folders[: len(folder[1]) // 2], folder[2]]
        elif line.startswith("  "):
            folders = folders[: (len(line) - len(line.lstrip())) // 2]
            named |= {"/".join([*folders, name]) for name in re.findall(r"\w+\.py", line)}
    modules = (path for folder in ("model", "utils") for path in (ROOT / folder).rglob("*.py"))
    existing = {str(path.relative_to(ROOT)) for path in modules if path.name != "__init__.py"}
    assert not sorted(existing - named), "add a line"
    assert not sorted(named - existing), "remove a line"


# -- commands ----------------------------------------------------------------------------------------------------------


@pages
def test_commands_and_their_flags_exist(page: Path) -> None:
    wrong = []
    for program, arguments in commands(page.read_text(encoding="utf-8")):
        path = next((path for path in (program, f"scripts/{program}") if (ROOT / path).is_file()), None)
        if path is None:
            wrong.append(program)
            continue
        flags = {flag for word in arguments for flag in FLAG.findall(word)} - {"--any_setting"}
        wrong += [f"{program} {flag}" for flag in sorted(flags - flags_of(path, arguments))]
    assert not wrong, wrong


@pages
def test_flags_in_the_text_exist(page: Path) -> None:
    programs = [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    known = ELSEWHERE.union(*(flags_of(str(path.relative_to(ROOT)), []) for path in programs))
    known = known.union(*(flags_of("scripts/convert_data.py", [source]) for source in SOURCES))
    if page.name == "migrating.md":
        known |= {f"--{row.flag}" for program in THEIRS for row in rows(program)} | {"--vision-tower"}
    named = re.findall(r"`(--[a-z][\w-]*)", without_code(page.read_text(encoding="utf-8")))
    assert set(named) <= known, set(named) - known


@pages
def test_python_blocks_are_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        ast.parse(block)
