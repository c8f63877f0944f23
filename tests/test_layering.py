"""The rule of imports (docs/architecture.md): a package imports from its own layer and lower ones, never upwards."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    ("model",),
    ("utils.command_line", "utils.distributed", "utils.files", "utils.wording", "utils.config", "utils.plotting"),
    ("utils.datasets",),
    ("utils.inference", "utils.demo", "utils.conversion"),
    ("utils.evaluation", "utils.training", "utils.dashboard"),
    ("utils.diagnostics",),
    ("entry points",),
)
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}


def package_of(module: str) -> str:
    """``utils.datasets.base`` -> ``utils.datasets``; modules that are run from a shell are entry points."""
    parts = module.split(".")
    if parts[0] == "utils":
        return ".".join(parts[:2])
    return "model" if parts[0] == "model" else "entry points"


def imports() -> list[tuple[str, str, str]]:
    """(importing package, imported package, place and import) of all imports between packages, tests excluded."""
    rows = []
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
                    rows.append((package_of(module), package_of(name), place))
    return [row for row in rows if row[0] != row[1]]


def test_no_package_imports_upwards() -> None:
    upwards = [place for package, other, place in imports() if LAYER_OF[other] > LAYER_OF[package]]
    assert not upwards, "\n".join(upwards)


def test_no_packages_import_each_other() -> None:
    below: dict[str, set[str]] = defaultdict(set)
    for package, other, _ in imports():
        below[package].add(other)

    def reached(package: str, seen: set[str]) -> set[str]:
        for other in below[package] - seen:
            seen |= {other}
            reached(other, seen)
        return seen

    cycles = [package for package in LAYER_OF if package in reached(package, set())]
    assert not cycles, cycles


@pytest.mark.parametrize("package", [package for package in LAYER_OF if "." in package])
def test_every_package_exists(package: str) -> None:
    path = ROOT / package.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_utils_has_no_modules_outside_of_its_packages() -> None:
    beside = {path.stem for path in (ROOT / "utils").glob("*.py")} - {"__init__"}
    assert {f"utils.{name}" for name in beside} <= set(LAYER_OF)


def test_pip_installs_only_the_packages() -> None:
    """An installed ``test`` would shadow the standard library's, and ``app`` other people's."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    installed = set(pytest.importorskip("setuptools").find_namespace_packages(str(ROOT), **packages["find"]))
    assert {name.partition(".")[0] for name in installed} == {"model", "utils"}
    for path in (*ROOT.glob("model/**/*.py"), *ROOT.glob("utils/**/*.py")):
        assert ".".join(path.parent.relative_to(ROOT).parts) in installed
