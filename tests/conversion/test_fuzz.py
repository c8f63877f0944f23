"""Damaged inputs of the converter: an error that names a file, or a JSONL that its own check accepts."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import damaged_json
from PIL import Image

from scripts import convert_data
from utils.datasets.masks import encode_mask
from utils.inference import cli

H, W = 20, 30
SQUARE = [[2, 2], [12, 2], [12, 12], [2, 12]]


def labelme(name: str) -> dict[str, Any]:
    shapes = [
        ("cup", SQUARE, "polygon"),
        ("Cup", [[3, 3], [15, 15]], "rectangle"),
        ("dish", [[9, 9], [12, 9]], "circle"),
    ]
    rows = [{"label": a, "points": b, "shape_type": c, "group_id": None} for a, b, c in shapes]
    return {"imagePath": name, "imageHeight": H, "imageWidth": W, "imageData": None, "shapes": rows}


def coco() -> dict[str, Any]:
    mask = np.zeros((H, W), bool)
    mask[3:9, 4:20] = True
    segmentations = [
        [[2, 2, 12, 2, 12, 12]],
        encode_mask(mask),
        SQUARE,
        {"size": [H, W], "counts": [100, 50, H * W - 150]},
    ]
    rows = [
        {"id": n, "image_id": 1 + n % 2, "category_id": 1 + n % 2, "segmentation": value, "bbox": [2, 2, 9, 9]}
        for n, value in enumerate(segmentations)
    ]
    images = [{"id": n + 1, "file_name": f"{name}.jpg", "height": H, "width": W} for n, name in enumerate("ab")]
    return {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dish"}]}


def mutated(value: Any, rng: random.Random) -> bytes:
    """One to three damages of the values; sometimes the text is cut or gets other bytes."""
    raw = json.dumps(value).encode()
    for _ in range(rng.randint(1, 3)):
        raw = damaged_json(raw, rng)
    if rng.random() < 0.1:
        raw = raw[: rng.randrange(len(raw))]
    if rng.random() < 0.05:
        raw = rng.choice([b"\xff\xfe", b"\xba\xec", b"\0", b"[" * 5000, b"1" * 5000]) + raw
    return raw


def mutated_png(rng: random.Random) -> bytes:
    """An index PNG of any mode, sometimes of another size, cut, or with a byte changed."""
    size = rng.choice([(H, W), (H, W), (H, W), (W, H), (1, 1)])
    values = np.random.default_rng(rng.randrange(99)).integers(0, 4, size).astype(np.uint8)
    image = Image.fromarray(values)
    if rng.random() < 0.6:
        image = image.convert(rng.choice(["RGB", "RGBA", "LA", "P", "1", "I;16"]))
    file = io.BytesIO()
    image.save(file, rng.choice(["PNG", "PNG", "PNG", "GIF"] if image.mode not in ("LA", "I;16") else ["PNG"]))
    raw = bytearray(file.getvalue())
    if rng.random() < 0.3:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw)


def write_labelme(folder: Path, rng: random.Random) -> list[object]:
    (folder / "a.json").write_bytes(mutated(labelme("a.jpg"), rng))
    (folder / "b.json").write_text(json.dumps(labelme("b.jpg")) if rng.random() < 0.9 else "{}")
    return ["labelme", folder, "--absent", 1, "--negatives"]


def write_coco(folder: Path, rng: random.Random) -> list[object]:
    (folder / "c.json").write_bytes(mutated(coco(), rng))
    return ["coco", folder / "c.json", "--val", 0.5, *(["--boxes", "rectangle"] if rng.random() < 0.5 else [])]


def write_masks(folder: Path, rng: random.Random) -> list[object]:
    (folder / "masks").mkdir()
    for name in "ab":
        (folder / f"masks/{name}.png").write_bytes(mutated_png(rng))
    lists = [
        b"cup\ndish\nfork\n",
        b"_background_\r\ncup\r\ndish",
        b"1 cup\n2 dish",
        b"\xff\xfea\0\n\0",
        b"",
        b"1 a\n1 b",
    ]
    (folder / "classes.txt").write_bytes(rng.choice(lists))
    flags = rng.choice([["--classes", folder / "classes.txt"], ["--query", "the cup"]])
    return ["masks", folder / "masks", "--images", folder, "--absent", 1, *flags]


@pytest.mark.parametrize("write", [write_labelme, write_coco, write_masks])
def test_damaged_inputs(capsys, tmp_path: Path, write: Callable[[Path, random.Random], list[object]]) -> None:
    written = 0
    for seed in range(120):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for name in "ab":
            Image.new("RGB", (W, H), (90, 90, 90)).save(folder / f"{name}.jpg")
        flags = write(folder, random.Random(seed))
        output = folder / "out/own.jsonl"
        arguments = [str(flag) for flag in (*flags, "--output", output, "--pictures", 0)]
        code = cli.run(convert_data.main, arguments)
        error = capsys.readouterr().err
        assert (code == 2 and "error: " in error and str(tmp_path) in error) or (code == 0 and not error), (seed, error)
        assert output.exists() == (code == 0), seed
        if code == 0:
            written += 1
            assert cli.run(convert_data.main, ["check", str(output)]) == 0, (seed, capsys.readouterr().err)
    assert written > 30  # the damage is small enough that most of a file can often be used
