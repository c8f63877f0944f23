"""Small images and JSON files on disk, for the data sets' tests."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

H, W = 40, 60
REALDATA = Path(__file__).resolve().parents[2] / "shared/realdata"


def box(x: int, y: int, size: int = 10) -> list[float]:
    return [x, y, x + size, y, x + size, y + size, x, y + size]


def write_image(path: Path, height: int = H, width: int = W) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (30, 60, 90)).save(path)


def write_json(path: Path, value: object, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(value, ensure_ascii=False).encode(encoding))


def square(x: float, y: float, size: float = 10) -> list[list[float]]:
    return [[x, y], [x + size, y], [x + size, y + size], [x, y + size]]
