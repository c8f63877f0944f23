"""Damaged files of all tools: readers return what they can read, or raise ``DataError`` naming the file."""

from __future__ import annotations

import contextlib
import json
import random
import re

import numpy as np
import pytest
from conversion import test_cvat, test_label_studio, test_via
from conversion.annotated_images import H, W, photo
from damage import damaged_json

from utils.conversion.annotated import Annotated
from utils.conversion.cvat import read_cvat
from utils.conversion.label_studio import read_label_studio
from utils.conversion.via import read_via
from utils.conversion.yolo import read_yolo
from utils.datasets.base import DataError
from utils.datasets.masks import decode_segmentation


def mutated_text(text: bytes, rng: random.Random) -> bytes:
    """The text with a number, a quoted text or a byte changed, or cut off."""
    choice = rng.random()
    if choice < 0.6:
        spans = [match.span() for match in re.finditer(rb"[\d.]+|\"[^\"]*\"|[a-z]+", text)]
        start, stop = rng.choice(spans)
        quote = b'"' if text[start : start + 1] == b'"' else b""
        odd = rng.choice([b"", b"-1", b"nan", b"1e999", b"9" * 5000, b"\xff", b"&x;", b"x", b"0", b"99999999", b"[[["])
        return text[:start] + quote + odd + quote + text[stop:]
    place = rng.randrange(len(text))
    return text[:place] if choice < 0.7 else text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]


def check(read, path, folder) -> None:
    problem = ""
    try:
        annotated = read(path)
    except DataError as error:
        problem = str(error)
    if problem:
        assert str(folder) in problem  # the file, or the one of its files
        return
    assert isinstance(annotated, Annotated)
    for annotation in (annotation for image in annotated.images for annotation in image.annotations):
        assert annotation.mask is not None or annotation.reason
        if annotation.mask is not None:  # a polygon beside the image is empty; the converter counts it
            with contextlib.suppress(DataError):
                decode_segmentation(annotation.mask, H, W)


@pytest.fixture
def folder(tmp_path):
    photo(tmp_path / "images/train/a.jpg")
    photo(tmp_path / "images/frame_000000.png")
    return tmp_path


def test_json(folder):
    rng = random.Random(0)
    brush = test_label_studio.pack(test_label_studio.rgba(np.eye(H, W, dtype=np.uint8)).ravel())
    task = test_label_studio.task(
        "a.jpg",
        test_label_studio.rectangle("box", rotation=9),
        test_label_studio.result("ellipse", "disk", x=50, y=50, radiusX=20, radiusY=10),
        test_label_studio.result("polygon", "patch", points=[[10, 10], [50, 10], [50, 40]]),
        test_label_studio.result("brush", "brush", format="rle", rle=brush),
        test_label_studio.result("bitmask", "bits", imageDataURL="data:image/png;base64,AAAA"),
    )
    ring = {"all_points_x": [1, 5, 5], "all_points_y": [1, 1, 4]}
    regions = [test_via.region("a"), test_via.region("b", "ellipse", cx=9, cy=9, rx=3, ry=2, theta=1)]
    image = test_via.entry("a.jpg", *regions, test_via.region("c", "polygon", **ring))
    project = {
        "_via_img_metadata": {"a.jpg1": image},
        "_via_attributes": {"region": {"class": {"options": {"1": "x"}}}},
    }
    for number in range(160):
        read, value = ((read_label_studio, [task]), (read_via, project), (read_via, {"a": image}))[number % 3]
        file = folder / "some.json"
        file.write_bytes(damaged_json(json.dumps(value).encode(), rng))
        check(read, file, folder)


def test_text(folder):
    rng = random.Random(1)
    mask = '<mask label="m" rle="1, 2, 2, 4" left="4" top="2" width="3" height="3"></mask>'
    shapes = [test_cvat.box("b", 1, 1, 9, 9, 'rotation="9"'), mask, '<polygon label="p" points="1,1;5,1;5,4"/>']
    track = f'<track id="0" label="car">{test_cvat.frame_box(0, 0)}</track>'
    xml = test_cvat.write(folder, test_cvat.META, test_cvat.image("a.jpg", *shapes), track).read_bytes()
    columns = b"filename,file_size,region_shape_attributes,region_attributes\n"
    rect = b'"{""name"":""rect"",""x"":1,""y"":1,""width"":4,""height"":4}"'
    csv = columns + b"a.jpg,9," + rect + b',"{""class"":""cat""}"\n'
    for number in range(120):
        read, text, name = ((read_cvat, xml, "annotations.xml"), (read_via, csv, "some.csv"))[number % 2]
        (folder / name).write_bytes(mutated_text(text, rng))
        check(read, folder / name, folder)


def test_yolo(folder):
    rng = random.Random(2)
    texts = {
        "data.yaml": b"path: .\ntrain: images/train\nval: [images/train, train.txt]\nnc: 2\nnames: {0: cat, 1: dog}\n",
        "train.txt": b"./images/train/a.jpg\n",
        "labels/train/a.txt": b"0 0.1 0.2 0.5 0.2 0.5 0.6\n1 0.5 0.5 0.2 0.4\n",
    }
    (folder / "labels/train").mkdir(parents=True)
    for _ in range(80):
        changed = rng.choice(list(texts))
        for name, text in texts.items():
            (folder / name).write_bytes(mutated_text(text, rng) if name == changed else text)
        check(read_yolo, folder / "data.yaml", folder)
