"""The rule of imports (docs/architecture.md): a room imports from its own floor and from those below, never upwards."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("model",),
    ("utils.distributed", "utils.config", "utils.plotting"),
    ("utils.datasets",),
    ("utils.inference", "utils.demo"),
    ("utils.evaluation", "utils.training", "utils.dashboard"),
    ("utils.diagnostics",),
    ("entry points",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """``utils.datasets.base`` -> ``utils.datasets``; whatever is run from a shell is an entry point."""
    parts = module.split(".")
    if parts[0] == "utils":
        return ".".join(parts[:2])
    return "model" if parts[0] == "model" else "entry points"


def imports() -> list[tuple[str, str, str]]:
    """(room, room that it imports from, the place and the import) of the whole product."""
    found = []
    files = [
        *ROOT.glob("*.py"),
        *(path for name in ("model", "utils", "scripts") for path in (ROOT / name).rglob("*.py")),
    ]
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: imports are absolute"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.split(".")[0] in ("model", "utils", "scripts", "train_ds", "test", "chat", "app"):
                    place = f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
                    found.append((room_of(module), room_of(name), place))
    return [row for row in found if row[0] != row[1]]


def test_no_room_imports_upwards() -> None:
    wrong = [place for room, other, place in imports() if FLOOR_OF[other] > FLOOR_OF[room]]
    assert not wrong, "\n".join(wrong)


def test_no_rooms_import_each_other() -> None:
    below: dict[str, set[str]] = defaultdict(set)
    for room, other, _ in imports():
        below[room].add(other)

    def reached(room: str, seen: set[str]) -> set[str]:
        for other in below[room] - seen:
            seen |= {other}
            reached(other, seen)
        return seen

    cycles = [room for room in FLOOR_OF if room in reached(room, set())]
    assert not cycles, cycles


@pytest.mark.parametrize("room", [room for room in FLOOR_OF if "." in room])
def test_every_room_is_there(room: str) -> None:
    path = ROOT / room.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_nothing_lies_beside_the_rooms() -> None:
    beside = {path.stem for path in (ROOT / "utils").glob("*.py")} - {"__init__"}
    assert {f"utils.{name}" for name in beside} <= set(FLOOR_OF)


def test_pip_installs_the_packages_alone() -> None:
    """``test`` would shadow the standard library's, and ``app`` anybody's."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set(pytest.importorskip("setuptools").find_namespace_packages(str(ROOT), **packages["find"]))
    assert {name.partition(".")[0] for name in found} == {"model", "utils"}
    for path in (*ROOT.glob("model/**/*.py"), *ROOT.glob("utils/**/*.py")):
        assert ".".join(path.parent.relative_to(ROOT).parts) in found
