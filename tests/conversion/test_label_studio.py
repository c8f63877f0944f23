"""Label Studio's exports: every kind of region, tasks that nobody annotated, names that uploads get."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from conversion.annotated_images import H, W, assert_masks, by_name, kinds, masks_of, photo, pixels, reasons_of
from PIL import Image

from utils.conversion.label_studio import read_label_studio
from utils.datasets.base import DataError


def pack(values: np.ndarray, widths=(3, 4, 8, 16)) -> list[int]:
    """Packs bytes as rle-pack does: equal values as a run, differing ones together; lengths in the shortest width."""
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{width - 1:04b}" for width in widths)
    start = 0
    while start < len(values):
        stop = start + 1
        while stop < len(values) and stop - start < 2 ** widths[-1] and values[stop] == values[start]:
            stop += 1
        repeated = stop - start > 1
        while not repeated and stop < len(values) and stop - start < 8 and values[stop] != values[stop - 1]:
            stop += 1
        choice = next(number for number, width in enumerate(widths) if stop - start <= 2**width)
        bits += f"{repeated:b}{choice:02b}" + f"{stop - start - 1:0{widths[choice]}b}"
        bits += "".join(f"{value:08b}" for value in (values[start : start + 1] if repeated else values[start:stop]))
        start = stop
    bits += "0" * (-len(bits) % 8)
    return [int(bits[position : position + 8], 2) for position in range(0, len(bits), 8)]


def rgba(mask: np.ndarray) -> np.ndarray:
    colors = np.full((*mask.shape, 4), 255, np.uint8)  # opaque white is no mask where alpha is 0
    colors[..., 3] = mask * 255
    return colors


def result(kind: str, label: str, number=None, **value: object) -> dict:
    labels = {f"{kind}labels": [label]} if label else {}
    more = {"original_width": W, "original_height": H, "image_rotation": 0}
    return {"id": number or f"{kind}-{label}", "type": f"{kind}labels", "from_name": "label", **more} | {
        "value": {**value, **labels}
    }


def rectangle(label: str, x=10, y=20, width=20, height=30, **value: object) -> dict:
    return result("rectangle", label, x=x, y=y, width=width, height=height, **value)


def task(image: str, *results: dict, **more: object) -> dict:
    return {"id": 1, "data": {"image": image}, "annotations": [{"id": 5, "result": list(results)}], **more}


def write(folder, *tasks: dict):
    file = folder / "project-1.json"
    file.write_text(json.dumps(tasks))
    return file


def test_regions(tmp_path):
    photo(tmp_path / "a.jpg")
    rng = np.random.default_rng(0)
    brush = rng.random((H, W)) < 0.3
    bitmask = io.BytesIO()
    Image.fromarray(rgba(pixels(2, 3, 7, 9))).save(bitmask, "PNG")
    address = "data:image/png;base64," + base64.b64encode(bitmask.getvalue()).decode()
    results = [
        rectangle("box"),
        rectangle("turned", x=50, y=50, width=20, height=10, rotation=90),
        result("ellipse", "disk", x=50, y=50, radiusX=20, radiusY=10, rotation=90),
        result("polygon", "patch", points=[[10, 10], [50, 10], [50, 40], [10, 40]], closed=True),
        result("brush", "brush", format="rle", rle=pack(rgba(brush).ravel())),
        result("brush", "block", format="rle", rle=pack(rgba(pixels(5, 5, 15, 25)).ravel())),
        result("bitmask", "bitmap", imageDataURL=address),
        result("keypoint", "eye", x=10, y=10, width=0.5),
        result("polygon", "draft", points=[[10, 10], [50, 10], [50, 40]], closed=False),
        result("vector", "road", vertices=[{"x": 1, "y": 2}], closed=True),
        rectangle("flat", height=0),
        {**rectangle("upside down"), "image_rotation": 180},
        rectangle(""),
        {"type": "choices", "from_name": "scene", "value": {"choices": ["indoor"]}},
        {"type": "relation", "from_id": "x", "to_id": "y"},
    ]
    annotated = read_label_studio(write(tmp_path, task("/data/upload/1/a.jpg", *results)))
    [image] = annotated.images
    assert image.size == (H, W)
    disk = masks_of(image)["disk"]  # radii of 6 and 2 pixels, turned
    assert disk[5:15, 14:16].all()
    assert not disk[:, :12].any()
    expected = {
        "box": pixels(4, 3, 10, 9),
        "turned": pixels(10, 13, 16, 15),  # around its corner (15, 10)
        "disk": disk,
        "patch": pixels(2, 3, 8, 15),
        "brush": brush.astype(np.uint8),
        "block": pixels(5, 5, 15, 25),
        "bitmap": pixels(2, 3, 7, 9),
    }
    assert_masks(image, expected)
    assert reasons_of(image) == {
        "eye": "a point",
        "draft": "an open polygon",
        "road": "a path",
        "flat": "no area",
        "upside down": "drawn while the image was turned",
        "": "region without a label",
    }
    assert kinds(annotated)["region without a label"] == 1
    assert kinds(annotated)["value of the whole image"] == 1


@pytest.mark.parametrize(
    ("rle", "reason"),
    [
        ([1, 2, 3], "a brush mask that is cut off"),
        (pack(np.zeros(4 * H * W, np.uint8))[:-1], "a brush mask that is cut off"),
        (pack(np.zeros(4 * H * W, np.uint8)), "a mask outside its image, or empty"),
        (pack(np.zeros(4 * H * W + 4, np.uint8)), "a brush mask of another size than its image"),
        ([255] * 4000, "a brush mask of another size than its image"),
        ([0.5], "a brush mask that is no list of bytes"),
        ("x", "a brush mask that is no list of bytes"),
    ],
)
def test_damaged_brush_masks(tmp_path, rle, reason):
    photo(tmp_path / "a.jpg")
    file = write(tmp_path, task("a.jpg", result("brush", "cat", format="rle", rle=rle)))
    assert reasons_of(read_label_studio(file).images[0]) == {"cat": reason}


def test_tasks_without_a_valid_annotation(tmp_path):
    for name in ("a", "b", "c", "d"):
        photo(tmp_path / f"{name}.jpg")
    cat, dog = rectangle("cat"), rectangle("dog")
    cancelled = {"was_cancelled": True, "result": [dog]}
    file = write(
        tmp_path,
        {**task("a.jpg", cat), "predictions": [{"result": [dog]}]},
        {**task("b.jpg"), "annotations": [cancelled], "predictions": [{"result": [dog]}]},
        {**task("c.jpg"), "annotations": []},
        task("d.jpg"),
    )
    annotated = read_label_studio(file)
    assert {name: set(masks_of(image)) for name, image in by_name(annotated).items()} == {
        "a.jpg": {"cat"},
        "d.jpg": set(),
    }
    assert kinds(annotated) == {"cancelled annotation": 1, "task without annotation": 2}


def test_several_annotations_are_joined(tmp_path):
    photo(tmp_path / "a.jpg")
    annotations = [
        {"result": [rectangle("cat")]},
        {"was_cancelled": True, "result": []},
        {"result": [rectangle("dog")]},
    ]
    annotated = read_label_studio(write(tmp_path, {**task("a.jpg"), "annotations": annotations}))
    assert set(masks_of(annotated.images[0])) == {"cat", "dog"}
    assert annotated.notes == {"task with several annotations, which are joined": 1}


def test_labels_apart_from_their_outline_and_descriptions(tmp_path):
    photo(tmp_path / "a.jpg")
    box = {"x": 10, "y": 20, "width": 20, "height": 30, "rotation": 0}
    sides = {"original_width": W, "original_height": H}
    parts = [
        {"id": "r", "type": "rectangle", "from_name": "rect", "value": box, **sides},
        {"id": "r", "type": "labels", "from_name": "kind", "value": {**box, "labels": ["cat", "pet"]}, **sides},
        {"id": "r", "type": "textarea", "from_name": "caption", "value": {**box, "text": ["the red cat"]}, **sides},
        {"id": "s", "type": "labels", "from_name": "kind", "value": {**box, "labels": ["dog"]}, **sides},
    ]
    file = write(tmp_path, task("a.jpg", *parts))
    square = pixels(4, 3, 10, 9)
    assert_masks(read_label_studio(file).images[0], dict.fromkeys(("cat", "pet", "dog"), square))
    captions = read_label_studio(file, attribute="caption")
    assert_masks(captions.images[0], {"the red cat": square})
    assert kinds(captions) == {"region without a value of 'caption'": 1}
    with pytest.raises(DataError, match="no region has a value of the control 'colour'; there are: caption, kind"):
        read_label_studio(file, attribute="colour")


def test_minimal_json(tmp_path):
    photo(tmp_path / "a.jpg")
    sides = {"original_width": W, "original_height": H}
    box = {"x": 10, "y": 20, "width": 20, "height": 30, "rotation": 0}
    block = pack(rgba(pixels(5, 5, 15, 25)).ravel())
    row = {
        "image": "/data/upload/2/0a1b2c3d-a.jpg",
        "id": 4,
        "label": [{**box, "rectanglelabels": ["cat"], **sides}],
        "brush": [{"format": "rle", "rle": block, "brushlabels": ["dog"], **sides}],
        "scene": "indoor",
        "annotator": 1,
        "annotation_id": 9,
        "created_at": "2026-01-01T00:00:00Z",
    }
    file = write(tmp_path, row, {"image": "gone.jpg", "annotation_id": 10})
    annotated = read_label_studio(file)
    assert_masks(annotated.images[0], {"cat": pixels(4, 3, 10, 9), "dog": pixels(5, 5, 15, 25)})
    assert kinds(annotated) == {"image that is missing": 1}
    with pytest.raises(DataError, match="JSON_MIN"):
        read_label_studio(file, attribute="scene")


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("/data/upload/1/0a1b2c3d-cat.jpg", "cat.jpg"),
        ("/data/upload/1/0a1b2c3d-my_cat_1.jpg", "my cat (1).jpg"),
        ("http://localhost:8080/data/upload/1/0a1b2c3d-cat.jpg?token=1", "0a1b2c3d-cat.jpg"),
        ("/data/local-files/?d=sets/one%20two/cat.jpg", "one two/cat.jpg"),
        ("s3://bucket/some/cat.jpg", "cat.jpg"),
        ("https://example.org/img/c%C3%A4t.png?X-Amz-Signature=a.b", "cät.png"),
        ("C:\\pictures\\cat.jpg", "cat.jpg"),
        ("sub/cat.jpg", "sub/cat.jpg"),
    ],
)
def test_names_of_images(tmp_path, written, name):
    expected = photo(tmp_path / "photos" / name)
    photo(tmp_path / "photos/other.jpg")
    annotated = read_label_studio(write(tmp_path, task(written, rectangle("cat"))), tmp_path / "photos")
    assert [image.path for image in annotated.images] == [expected]


def test_images_that_cannot_be_told(tmp_path):
    photo(tmp_path / "x/a.jpg", grey=1)
    photo(tmp_path / "y/a.jpg", grey=2)
    with pytest.raises(DataError, match=r"project-1.json: 'a.jpg' may be one of 2 different images"):
        read_label_studio(write(tmp_path, task("a.jpg", rectangle("cat"))))
    with pytest.raises(DataError, match="names several images, as left, right"):
        read_label_studio(write(tmp_path, {**task("a.jpg"), "data": {"left": "a.jpg", "right": "b.jpg"}}))


def test_sizes(tmp_path):
    photo(tmp_path / "a.jpg", 2 * H, W)
    photo(tmp_path / "b.jpg")
    photo(tmp_path / "c.jpg")
    unsized = {**rectangle("cat"), "original_width": None}
    other = {**rectangle("dog"), "original_width": W + 1}
    file = write(
        tmp_path, task("a.jpg", rectangle("cat")), task("b.jpg", unsized), task("c.jpg", rectangle("cat"), other)
    )
    annotated = read_label_studio(file)
    [image] = annotated.images
    assert image.size is None
    assert_masks(image, {"cat": pixels(4, 3, 10, 9)})
    assert kinds(annotated) == {
        "image of another size than its annotations were made for": 1,
        "task whose regions were drawn on images of several sizes": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a list of tasks"),
        ("[1]", "expected a list of tasks"),
        ('"x"', "expected a list of tasks"),
        ('{"images": [], "annotations": [{"id": 1}], "categories": []}', "neither 'data' nor regions"),
        ('[{"data": {"image": "a.jpg"}}]', "no list of 'annotations'"),
        ("[{", "not valid JSON"),
    ],
)
def test_refused_files(tmp_path, text, message):
    file = tmp_path / "some.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_label_studio(file)
    assert str(file) in str(error.value)


def test_tasks_of_several_pages_are_left_out(tmp_path):
    """A region of the second page is not on the first; neither page is an image without annotation."""
    for name in "abc":
        photo(tmp_path / f"{name}.jpg")
    pages = {"pages": ["/data/upload/1/a.jpg", "/data/upload/1/b.jpg"]}
    on_second = {**rectangle("cat"), "item_index": 1}
    for data in (pages, pages | {"image": "/data/upload/1/a.jpg"}):
        tasks = [task("", on_second) | {"data": data}, task("c.jpg", rectangle("dog"))]
        result = read_label_studio(write(tmp_path, *tasks))
        assert list(by_name(result)) == ["c.jpg"]
        assert kinds(result) == {"task of several pages, which are not read": 1}
        assert {path.name for path in result.not_negative} == {"a.jpg", "b.jpg"}
