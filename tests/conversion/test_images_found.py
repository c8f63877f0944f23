"""Which image an entry means: the missing one of a name is not another folder's, whatever the tool."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from conversion import test_cvat, test_label_studio, test_via
from conversion.annotated_images import H, W, kinds, photo

from utils.conversion.annotated import WRONG_GUESS
from utils.conversion.coco import read_coco
from utils.conversion.cvat import read_cvat
from utils.conversion.label_studio import read_label_studio
from utils.conversion.labelme import read_labelme
from utils.conversion.via import read_via
from utils.datasets.base import DataError

SQUARE = [[5, 5], [15, 5], [15, 15], [5, 15]]


def coco(folder, names):
    images = [{"id": i, "file_name": name, "height": H, "width": W} for i, name in enumerate(names)]
    rows = [
        {"id": i, "image_id": i, "category_id": 1, "segmentation": [[5, 5, 15, 5, 15, 15, 5, 15]]}
        for i, _ in enumerate(names)
    ]
    file = folder / "a.json"
    file.write_text(json.dumps({"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cup"}]}))
    return read_coco(file)


def cvat(folder, names):
    test_cvat.write(folder, *(test_cvat.image(name, test_cvat.box("cup", 0, 0, 9, 9)) for name in names))
    return read_cvat(folder / "annotations.xml")


def label_studio(folder, names):
    tasks = [test_label_studio.task(f"s3://x/{name}", test_label_studio.rectangle("cup")) for name in names]
    return read_label_studio(test_label_studio.write(folder, *tasks))


def via(folder, names):
    entries = {name: {"filename": name, "size": -1, "regions": [test_via.region("cup")]} for name in names}
    (folder / "via.json").write_text(json.dumps(entries))
    return read_via(folder / "via.json")


def labelme(folder, names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        value = {"imagePath": "1.jpg", "shapes": [{"label": "cup", "points": SQUARE}]}
        (folder / name).with_suffix(".json").write_text(json.dumps(value))
    return read_labelme(folder)


@pytest.mark.parametrize("read", [coco, cvat, label_studio, via, labelme])
def test_a_missing_image_is_not_the_one_of_another_folder(tmp_path, read):
    photo(tmp_path / "train/1.jpg")
    result = read(tmp_path, ["train/1.jpg", "val/1.jpg"])
    assert [(image.path.parent.name, len(image.annotations)) for image in result.images] == [("train", 1)]
    assert kinds(result)[WRONG_GUESS] == 1


@pytest.mark.parametrize("read", [coco, cvat, label_studio, via])
def test_one_image_for_two_names_is_neither(tmp_path, read):
    """Two folders were copied into one: only one image of the name is left, and nobody can tell which."""
    photo(tmp_path / "1.jpg")
    photo(tmp_path / "2.jpg")
    result = read(tmp_path, ["train/1.jpg", "val/1.jpg", "train/2.jpg"])
    assert Counter(image.path.name for image in result.images) == {"2.jpg": 1}
    assert kinds(result)[WRONG_GUESS] == 2
    assert tmp_path / "1.jpg" in result.not_negative


@pytest.mark.parametrize("read", [coco, cvat, label_studio])
def test_folders_of_another_case_or_normalization(tmp_path, read):
    """A Mac writes names in Unicode's NFD; Windows does not tell case."""
    for folder in ("e\u0301t\u00e9", "Val"):
        photo(tmp_path / folder / "1.JPG", grey=len(folder))
    result = read(tmp_path, ["\u00e9te\u0301/1.jpg", "val/1.jpg"])
    assert [image.path.parent.name for image in result.images] == ["e\u0301t\u00e9", "Val"]
    assert not +result.left_out


def test_a_format_that_is_not_read_is_named(tmp_path):
    (tmp_path / "1.heic").write_bytes(b"ftypheic")
    with pytest.raises(DataError, match=r"\.heic is not read: save it as JPEG or PNG"):
        coco(tmp_path, ["1.heic"])
