"""Photographs with an EXIF orientation, and the shapes and sizes of ReasonSeg's JSON files."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from disk import write_json
from PIL import Image

from model.processing.pixels import ORIENTATION
from utils.datasets import DataError, get_eval_dataset, get_train_dataset
from utils.datasets.images import read_annotated
from utils.datasets.masks import shape_polygon

RED_SQUARE = [[5, 60], [40, 60], [40, 90], [5, 90]]


def upright_scene() -> np.ndarray:
    """64 x 96 (width x height), gray with a red square."""
    scene = np.full((96, 64, 3), 128, np.uint8)
    scene[60:91, 5:41] = (255, 0, 0)
    return scene


def write_turned(path: Path, upright: np.ndarray, orientation: int = 6) -> None:
    """Stores a picture lying, with the EXIF orientation that turns it upright; as a PNG, so without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = {1: upright, 3: upright[::-1, ::-1], 6: np.rot90(upright)}[orientation]
    Image.fromarray(np.ascontiguousarray(stored)).save(path, "PNG", exif=exif)


def reason_seg(root: Path, **changes: object) -> Path:
    folder = root / "reason_seg/ReasonSeg/train"
    write_turned(folder / "a.png", upright_scene())
    shapes = [{"label": "target", "shape_type": "polygon", "points": RED_SQUARE}]
    values = {"text": ["the red square"], "is_sentence": False, "shapes": shapes, "imageHeight": 96, "imageWidth": 64}
    write_json(folder / "a.json", values | changes)
    return root


def sample_of(root: Path, name: str):
    return get_train_dataset(name, root).sample(0, np.random.default_rng(0))


def test_reason_seg_is_read_upright_as_opencv_reads_it(tmp_path: Path) -> None:
    sample = sample_of(reason_seg(tmp_path), "ReasonSeg|train")
    assert np.array_equal(sample.image, cv2.imread(str(tmp_path / "reason_seg/ReasonSeg/train/a.png"))[..., ::-1])
    assert np.array_equal(sample.image, upright_scene())
    assert np.array_equal(sample.masks[0] == 1, (sample.image == (255, 0, 0)).all(-1))
    assert get_eval_dataset("ReasonSeg|train", tmp_path)[0].image.shape == (96, 64, 3)


def test_lisa_plus_and_conversations_are_read_upright(tmp_path: Path) -> None:
    write_turned(tmp_path / "coco/train2017/a.jpg", upright_scene())
    item = {"img_path": "a.jpg", "English Question": "Where?", "ID": [3], "points": {"3": {"points": RED_SQUARE}}}
    write_json(tmp_path / "reason_seg_plus/LISA_Plus_Instance_Seg.json", [item])
    sample = sample_of(tmp_path, "instance_seg")
    assert np.array_equal(sample.image, upright_scene())
    assert sample.image[sample.masks[0] == 1].mean(axis=0) == pytest.approx([255, 0, 0], abs=20)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A square."}]
    write_json(tmp_path / "llava_dataset/llava_instruct_150k.json", [{"image": "a.jpg", "conversations": turns}])
    assert np.array_equal(sample_of(tmp_path, "llava_instruct_150k").image, upright_scene())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imageHeight": 64, "imageWidth": 96}, r"a\.json: the image is 64x96 but its annotation says 96x64"),
        ({"imageHeight": "96"}, r"a\.json has height '96' and width 64"),
    ],
)
def test_sizes_of_reason_seg_must_agree(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sample_of(reason_seg(tmp_path, **change), "ReasonSeg|train")


def test_sizes_of_reason_seg_may_be_missing(tmp_path: Path) -> None:
    assert sample_of(reason_seg(tmp_path, imageHeight=None), "ReasonSeg|train").image.shape == (96, 64, 3)


@pytest.mark.parametrize(("size", "orientation"), [((96, 64), 6), ((64, 96), 6), ((96, 64), 1)])
def test_the_size_tells_which_pixels_were_annotated(tmp_path: Path, size: tuple[int, int], orientation: int) -> None:
    path = tmp_path / "a.png"
    write_turned(path, upright_scene(), orientation)
    expected = upright_scene() if size == (96, 64) else np.rot90(upright_scene())
    assert np.array_equal(read_annotated(path, "set/a", *size), expected)


@pytest.mark.parametrize(
    ("scene", "size", "orientation", "message"),
    [
        (upright_scene(), (96, 64), 3, "set/a: .* has the EXIF orientation 3, and its size does not tell"),
        (upright_scene()[:64], (64, 64), 6, "has the EXIF orientation 6, and its size does not tell"),
        (upright_scene(), (50, 50), 6, "set/a: the image is 96x64 but its annotation says 50x50"),
    ],
)
def test_a_rotated_image_does_not_pass_in_silence(
    tmp_path: Path, scene: np.ndarray, size: tuple[int, int], orientation: int, message: str
) -> None:
    write_turned(tmp_path / "a.png", scene, orientation)
    with pytest.raises(DataError, match=message):
        read_annotated(tmp_path / "a.png", "set/a", *size)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_rectangles_and_circles_are_targets(tmp_path: Path) -> None:
    shapes = [
        {"label": "target", "shape_type": "rectangle", "points": [[40, 90], [5, 60]]},
        {"label": "target", "shape_type": "circle", "points": [[30, 25], [30, 35]]},
        {"label": "flag", "shape_type": "line", "points": [[0, 0], [1, 1]]},
    ]
    mask = sample_of(reason_seg(tmp_path, shapes=shapes), "ReasonSeg|train").masks[0]
    assert mask[60:91, 5:41].all()
    assert mask[:50].sum() == pytest.approx(np.pi * 10**2, rel=0.1)
    assert mask[50:].sum() == 31 * 36
    only = reason_seg(tmp_path, shapes=shapes[1:])
    assert get_train_dataset("ReasonSeg|train", only).describe()["unusable"] == 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"shape_type": "linestrip", "points": RED_SQUARE}, r"shape 1 \('target'\) is a linestrip of 4 points"),
        ({"shape_type": "point", "points": [[1, 1]]}, "is a point of 1 points"),
        ({"shape_type": "rectangle", "points": [[1, 1]]}, "is a rectangle of 1 points"),
        ({"shape_type": "circle", "points": [[1, 1], "x"]}, "is a circle whose points are not pairs"),
        ({"shape_type": "mask", "points": [[1, 1], [2, 2]]}, "is a mask of 2 points"),
        ({"points": []}, "is a polygon without points"),
    ],
)
def test_a_shape_that_is_not_drawn_is_named(tmp_path: Path, shape: dict, message: str) -> None:
    good = {"label": "target", "points": RED_SQUARE}
    root = reason_seg(tmp_path, shapes=[good, {"label": "target", **shape}])
    with pytest.raises(DataError, match=message):
        get_train_dataset("ReasonSeg|train", root)


def test_polygons_of_two_points_are_drawn_as_in_lisa_but_are_no_target_alone(tmp_path: Path) -> None:
    line = {"label": "target", "points": [[0, 0], [9, 0]]}
    mask = sample_of(reason_seg(tmp_path, shapes=[line, {"label": "target", "points": RED_SQUARE}]), "ReasonSeg|train")
    assert mask.masks[0, 0].sum() == 10
    (tmp_path / "reason_seg/ReasonSeg/train/b.json").write_text(
        json.dumps({"text": ["x"], "is_sentence": False, "shapes": [line]})
    )
    write_turned(tmp_path / "reason_seg/ReasonSeg/train/b.png", upright_scene())
    assert len(get_eval_dataset("ReasonSeg|train", tmp_path).skipped) == 1


def test_a_circle_is_a_polygon_of_its_radius() -> None:
    polygon = np.array(shape_polygon({"shape_type": "circle", "points": [[10, 20], [13, 24]]}))
    assert np.hypot(*(polygon - [10, 20]).T) == pytest.approx(5)
