"""Folders of mask images as tools export them: what is no mask of classes, no PNG or no label."""

from __future__ import annotations

import numpy as np
import pytest
from conversion.annotated_images import assert_masks, by_name, kinds, photo, pixels
from PIL import Image

from utils.conversion.mask_images import read_masks
from utils.conversion.queries import Queries, Summary
from utils.datasets.base import DataError

SQUARE = pixels(5, 5, 15, 15)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def voc(folder, *kinds_of_masks):
    """As labelme2voc and CVAT's Segmentation mask 1.1 write it: an object of class 2 that is the first of its image."""
    photo(folder / "JPEGImages/a.jpg")
    for value, name in enumerate(kinds_of_masks, start=1):
        save(folder / name / "a.png", SQUARE * np.uint8(value))
    (folder / "names.txt").write_text("_background_\ncat\ndog\n")
    return folder, folder / "JPEGImages"


@pytest.mark.parametrize("name", ["SegmentationObject", "SegmentationObjectPNG"])
def test_masks_of_objects_are_not_read_as_classes(tmp_path, name):
    result = read_masks(*voc(tmp_path, name, "SegmentationClass"), classes=tmp_path / "names.txt")
    [image] = result.images
    image.annotations = [annotation for annotation in image.annotations if annotation.kind == "target"]
    assert_masks(image, {"dog": SQUARE})
    assert kinds(result) == {"mask of single objects, not of classes (SegmentationObject)": 1}


def test_two_masks_of_classes_for_an_image_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"SegmentationClass/a.png and .*old/a.png are both masks of"):
        read_masks(*voc(tmp_path, "old", "SegmentationClass"), classes=tmp_path / "names.txt")


@pytest.mark.parametrize("name", ["masks", "SegmentationClass", "Labels"])
def test_a_folder_of_masks_is_no_label(tmp_path, name):
    with pytest.raises(DataError, match=f"the folder '{name}' is hardly a label"):
        read_masks(*voc(tmp_path, name))
    assert by_name(read_masks(*voc(tmp_path, name), query="the cat"))["a.jpg"].annotations[0].label == "the cat"


def test_images_whose_mask_cannot_be_used_do_not_lack_its_label(tmp_path):
    """A JPEG, a damaged PNG, a PNG of another size: what they show is unknown, not absent."""
    for name in "abcd":
        photo(tmp_path / f"images/{name}.jpg")
        save(tmp_path / f"masks/dog/{name}.png", SQUARE)
    save(tmp_path / "masks/cat/a.png", SQUARE)
    photo(tmp_path / "masks/cat/b.jpg")
    (tmp_path / "masks/cat/c.png").write_bytes(b"\x89PNG")
    save(tmp_path / "masks/cat/d.png", SQUARE[:9])
    result = read_masks(tmp_path / "masks", tmp_path / "images")
    assert kinds(result) == {
        "mask that is no PNG (JPEG and the like alter the values)": 1,
        "mask that cannot be used": 1,
    }
    images = Queries("{label}", None, Summary()).images_of(result)
    assert {image.path.stem: image.has_unknown for image in images} == {"a": False, "b": True, "c": True, "d": True}


def test_a_folder_of_jpeg_masks_says_so(tmp_path):
    photo(tmp_path / "images/a.jpg")
    photo(tmp_path / "masks/a.jpg")
    with pytest.raises(DataError, match=r"no \.png, .* but a\.jpg: JPEG and the like alter"):
        read_masks(tmp_path / "masks", tmp_path / "images")


def test_linked_folders_are_searched_once(tmp_path):
    photo(tmp_path / "images/a.jpg")
    save(tmp_path / "far/cat/a.png", SQUARE)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/round").symlink_to(tmp_path / "masks")
    result = read_masks(tmp_path / "masks", tmp_path / "images")
    assert [(image.path.name, image.annotations[0].label) for image in result.images] == [("a.jpg", "cat")]


def test_a_mask_may_have_the_whole_name_of_its_image(tmp_path):
    for name in ("a.jpg", "a.b.jpg", "a.jpeg"):
        photo(tmp_path / "images" / name)
    save(tmp_path / "masks/a.jpg.png", SQUARE)
    save(tmp_path / "masks/a.b.png", SQUARE)
    result = read_masks(tmp_path / "masks", tmp_path / "images", query="the cat")
    assert sorted(image.path.name for image in result.images) == ["a.b.jpg", "a.jpg"]
