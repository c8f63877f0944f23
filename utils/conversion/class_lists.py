"""Lists of classes beside mask images: which value, or which color, is which label."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from utils.conversion.annotated import BACKGROUND_LABELS, IGNORED_LABELS, kind_of
from utils.datasets.base import DataError, read_text

Color = tuple[int, int, int]
VALUE_AND_NAME = (
    r"(?P<value>-?\d{1,9})(\s*[,;:=\t]\s*|\s+)(?P<name>\D.*)",
    r"(?P<name>.*[^\s\d,;:=].*?)\s*[,;:=\t]\s*(?P<value>-?\d{1,9})",
)
RGB = r"(?P<r>\d{1,3})\s*[,;\s]\s*(?P<g>\d{1,3})\s*[,;\s]\s*(?P<b>\d{1,3})"
COLOR_AND_NAME = (
    rf"(?P<name>[^:]*):\s*{RGB}\s*:.*",
    rf"{RGB}\s*[,;:\s]\s*(?P<name>.+)",
    rf"(?P<name>.+?)\s*[,;:\s]\s*{RGB}",
)
VALUE_HEADERS = {"value", "pixel value", "pixel", "index", "id", "class id", "class_id", "label_id"}
NAME_HEADERS = {"class", "name", "label", "class name", "class_name", "category", "label name"}
VOID = 255  # value of ignored pixels where a list begins with __ignore__ (-1 in LabelMe's scripts, as uint8)


def read_classes(path: Path, encoding: str | None = None) -> dict[int, str]:
    """Value -> label of an index PNG.

    Lines are names, the first of which is value 1, or 0 if it is a background label; ``VALUE NAME`` or ``NAME,VALUE``;
    a table whose header names both columns (Roboflow's _classes.csv); or CVAT's labelmap.txt, in its order from 0 on.
    A first line ``__ignore__`` is value 255, and the next one 0. Empty lines keep their value, comments (#) have none.

    Raises:
        DataError: if lines have no common form, or a value occurs twice.
    """
    lines = _lines(path, encoding)
    table = _table(lines)
    if table is not None:
        columns = _columns(table[0])
        if columns is None:
            raise DataError(f"{path} is a table of colors; give it with --colors instead of --classes")
        value, name = columns
        pairs = [(row[value], row[name]) for row in table[1:] if len(row) > max(value, name)]
        return _unique(path, [(_whole(path, number), label) for number, label in pairs])
    filled = [line for line in lines if line]
    if filled and filled[0].startswith(("{", "[")):
        raise DataError(f"{path} is JSON; --classes is a text file with a name per line, or VALUE NAME")
    if any(re.fullmatch(r"[^:]*:\s*\d+\s*,\s*\d+\s*,\s*\d+\s*:.*", line) for line in filled):
        names = [line.split(":")[0].strip() for line in filled]
        if kind_of(names[0]) != "background":
            raise DataError(f"{path} is a list of colors without the background first; give it with --colors instead")
        return _unique(path, list(enumerate(names)))
    for form in VALUE_AND_NAME:
        matches = [re.fullmatch(form, line) for line in filled]
        if filled and all(matches):
            return _unique(path, [(int(match["value"]), match["name"]) for match in matches if match])
        if sum(map(bool, matches)) > len(filled) / 2:
            odd = next(line for line, match in zip(filled, matches) if not match)
            raise DataError(f"{path}: most lines name a value, but not {odd[:80]!r}; write VALUE NAME in every line")
    return _numbered(path, lines)


def _numbered(path: Path, names: list[str]) -> dict[int, str]:
    """Labels by line: from 1 on, or from 0 on if the first is the background."""
    if not names or not names[0]:
        raise DataError(f"{path} begins with an empty line, so that its lines are no values; write VALUE NAME in each")
    ignored = [names.pop(0)] if names[0].lower() in IGNORED_LABELS else []
    has_background = bool(names) and names[0].lower() in BACKGROUND_LABELS
    if ignored and not has_background:
        raise DataError(f"{path}: {ignored[0]!r} is not followed by _background_; write VALUE NAME in every line")
    return _unique(path, [(VOID, name) for name in ignored] + list(enumerate(names, start=0 if has_background else 1)))


def read_colors(path: Path, encoding: str | None = None) -> dict[Color, str]:
    """Color -> label of a PNG in colors.

    Forms: CVAT's labelmap.txt (``NAME:R,G,B::``), lines ``R G B NAME`` or ``NAME R G B`` (spaces, commas or tabs), a
    table with a header (name, r, g, b), JSON ``{NAME: [R, G, B]}`` or ``{NAME: "#rrggbb"}``.

    Raises:
        DataError: naming the line that has no color, or the color that occurs twice.
    """
    lines = [line for line in _lines(path, encoding) if line]
    if lines and lines[0].startswith("{"):
        pairs = _json_colors(path, "\n".join(lines))
    else:
        table = _table(lines)
        pairs = _color_table(path, table) if table else [_color_line(path, line) for line in lines]
    colors: dict[Color, str] = {}
    for color, name in pairs:
        if not name:
            continue
        if colors.setdefault(color, name) != name:
            raise DataError(f"{path}: the color {color} is both {colors[color]!r} and {name!r}")
    if not colors:
        raise DataError(f"{path} names no color; write a line R G B NAME for each label")
    return colors


def _lines(path: Path, encoding: str | None) -> list[str]:
    """Stripped lines without comments; trailing empty lines are dropped."""
    lines = [line.strip() for line in re.split(r"\r*\n|\r", read_text(path, encoding))]
    lines = [line for line in lines if not line.startswith("#") or re.match(r"#[0-9a-fA-F]{6}\b", line)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _table(lines: list[str]) -> list[list[str]] | None:
    """The cells of a table whose first line is a header of at least two known columns; None if it is none."""
    filled = [line for line in lines if line]
    if not filled:
        return None
    separator = next((sign for sign in (",", ";", "\t") if sign in filled[0]), None)
    if separator is None:
        return None
    rows = [[cell.strip() for cell in row] for row in csv.reader(filled, delimiter=separator)]
    known = VALUE_HEADERS | NAME_HEADERS | {"r", "g", "b", "red", "green", "blue"}
    return rows if sum(cell.lower() in known for cell in rows[0]) >= 2 else None


def _columns(header: list[str]) -> tuple[int, int] | None:
    cells = [cell.lower() for cell in header]
    value = next((i for i, cell in enumerate(cells) if cell in VALUE_HEADERS), None)
    name = next((i for i, cell in enumerate(cells) if cell in NAME_HEADERS), None)
    return None if value is None or name is None else (value, name)


def _whole(path: Path, text: str) -> int:
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise DataError(f"{path}: {text[:40]!r} is not a pixel value")
    return int(text)


def _unique(path: Path, pairs: list[tuple[int, str]]) -> dict[int, str]:
    names: dict[int, str] = {}
    for value, name in pairs:
        if name and names.setdefault(value, name) != name:
            raise DataError(f"{path}: value {value} is both {names[value]!r} and {name!r}")
    if not names:
        raise DataError(f"{path} names no class; write a name per line")
    return names


def _color_table(path: Path, rows: list[list[str]]) -> list[tuple[Color, str]]:
    header = [cell.lower() for cell in rows[0]]
    wanted = (("r", "red"), ("g", "green"), ("b", "blue"), NAME_HEADERS)
    columns = [next((i for i, cell in enumerate(header) if cell in names), -1) for names in wanted]
    if min(columns) < 0:
        raise DataError(f"{path}: its header {', '.join(rows[0])!r} lacks one of name, r, g, b")
    filled = [[row[i] for i in columns] for row in rows[1:] if len(row) > max(columns)]
    return [(_color(path, [r, g, b]), name) for r, g, b, name in filled]


def _color_line(path: Path, line: str) -> tuple[Color, str]:
    for form in COLOR_AND_NAME:
        if match := re.fullmatch(form, line):
            return _color(path, [match["r"], match["g"], match["b"]]), match["name"].strip()
    if match := re.fullmatch(r"(#[0-9a-fA-F]{6})[,;:\s]+(.+)|(.+?)[,;:\s]+(#[0-9a-fA-F]{6})", line):
        return _color(path, match[1] or match[4]), (match[2] or match[3]).strip()
    raise DataError(f"{path}: {line[:80]!r} names no color; write R G B NAME, or NAME:R,G,B:: as CVAT does")


def _json_colors(path: Path, text: str) -> list[tuple[Color, str]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from error
    return [(_color(path, color), name.strip()) for name, color in content.items()]


def _color(path: Path, color: object) -> Color:
    """[R, G, B], or "#rrggbb", as numbers from 0 to 255."""
    if isinstance(color, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", color):
        color = list(bytes.fromhex(color[1:]))
    parts = [str(part) for part in color] if isinstance(color, list) else []
    if len(parts) != 3 or not all(re.fullmatch(r"\d{1,3}", part) and int(part) <= 255 for part in parts):
        raise DataError(f"{path}: {str(color)[:60]} is not a color; expected three numbers from 0 to 255")
    return int(parts[0]), int(parts[1]), int(parts[2])
