"""Rules for all sources: what is absent, ignored, joined, found, split; boxes; lists of classes and colors."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion.annotated_images import gray_of
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from model import load
from scripts import convert_data
from utils.conversion.boxes import SamBoxes
from utils.conversion.class_lists import read_classes, read_colors
from utils.datasets import DataError, get_eval_dataset, get_train_dataset
from utils.datasets.masks import decode_mask, encode_mask
from utils.datasets.reason_seg import read_annotation
from utils.inference import cli

ROOT = Path(__file__).resolve().parents[2]
H, W = 40, 60
SQUARE = [[5, 5], [15, 5], [15, 15], [5, 15]]
FLAT = [float(number) for point in SQUARE for number in point]


def convert(capsys, output: Path, *arguments: object, code: int = 0, pictures: int = 0) -> str:
    """Runs the converter and the check of what it wrote; returns the output, of the error if ``code`` is 2."""
    flags = [*arguments, "--output", output, "--pictures", pictures]
    result = cli.run(convert_data.main, [str(flag) for flag in flags])
    captured = capsys.readouterr()
    assert result == code, captured.err
    if code == 0:
        assert cli.run(convert_data.main, ["check", str(output)]) == 0, capsys.readouterr().err
        capsys.readouterr()
    return captured.err if code else captured.out


def photo(path: Path, height: int = H, width: int = W, grey: int = 90, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (gray_of(path, grey),) * 3).save(path, **options)
    return path


def labelme(folder: Path, name: str, *shapes: tuple, encoding: str = "utf-8", **more: object) -> None:
    if not (folder / f"{name}.jpg").exists():
        photo(folder / f"{name}.jpg")
    rows = [{"label": label, "points": points, "shape_type": kind} for label, points, kind in shapes]
    value = {"imagePath": f"{name}.jpg", "imageHeight": H, "imageWidth": W, "shapes": rows, **more}
    (folder / f"{name}.json").write_bytes(json.dumps(value, ensure_ascii=False).encode(encoding))


def coco(path: Path, images: list[dict], rows: list[dict], categories: tuple[str, ...] = ("cup", "dish")) -> Path:
    named = [{"id": number, "name": name} for number, name in enumerate(categories, start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": named}))
    return path


def lines(path: Path) -> dict[tuple[str, str], dict]:
    """(image's name, query) -> line."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(Path(row["image"]).name, row["query"]): row for row in rows}


def areas(path: Path, split: str = "train") -> dict[tuple[str, str], list[int]]:
    """(image's name, query) -> pixels of the merged mask, [] if absent."""
    dataset = get_eval_dataset(f"custom|{path}|{split}", path.parent)
    samples = [dataset[i] for i in range(len(dataset))]
    return {(Path(s.image_id).name, q.text): [int((m == 1).sum()) for m in q.masks] for s in samples for q in s.queries}


# -- absent targets ----------------------------------------------------------------------------------------------------


def test_what_is_annotated_in_any_form_is_not_absent(capsys, tmp_path):
    """A line, a box, another spelling, an object without a label: none of them lets --absent deny what is there."""
    labelme(tmp_path, "a", ("Crack", [[1, 1], [9, 9]], "line"), ("cup", SQUARE, "polygon"))
    labelme(tmp_path, "b", ("crack ", SQUARE, "polygon"), ("CUP", SQUARE, "polygon"))
    labelme(tmp_path, "c", ("dish", SQUARE, "polygon"), ("", SQUARE, "polygon"))
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, "--absent", 9)
    assert "joined: 'crack' with 'Crack'" in out
    assert {key: line["masks"] == [] for key, line in lines(tmp_path / "own.jsonl").items()} == {
        ("a.jpg", "cup"): False,
        ("a.jpg", "dish"): True,
        ("b.jpg", "Crack"): False,
        ("b.jpg", "cup"): False,
        ("b.jpg", "dish"): True,
        ("c.jpg", "dish"): False,
    }


def test_images_without_annotation_are_negatives_on_request_only(capsys, tmp_path):
    labelme(tmp_path, "a", ("cup", SQUARE, "polygon"))
    labelme(tmp_path, "empty")
    (tmp_path / "broken.json").write_text("{")
    for name in ("plain", "broken"):
        photo(tmp_path / f"{name}.jpg")
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, "--absent", 1, pictures=3)
    assert "without annotation: 2 images" in out
    assert list(lines(tmp_path / "own.jsonl")) == [("a.jpg", "cup")]
    flags = ("labelme", tmp_path, "--negatives", "--overwrite", "--val", 0.4)
    convert(capsys, tmp_path / "own.jsonl", *flags)  # own.train.png of the first run is no image of the data
    written = lines(tmp_path / "own.jsonl")
    assert list(written) == [("a.jpg", "cup"), ("empty.jpg", "cup"), ("plain.jpg", "cup")]
    assert [len(line["masks"]) for line in written.values()] == [1, 0, 0]


# -- reserved labels ---------------------------------------------------------------------------------------------------


def test_ignored_and_background_labels(capsys, tmp_path):
    inner = [[7, 7], [11, 7], [11, 11], [7, 11]]
    labelme(
        tmp_path,
        "a",
        ("cup", SQUARE, "polygon"),
        ("__ignore__", inner, "polygon"),
        ("__ignore__", [[20, 0], [60, 40]], "rectangle"),
        ("dish", [[30, 10], [40, 20]], "rectangle"),
        ("_background_", SQUARE, "polygon"),
    )
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path)
    assert "reserved: 2 x '__ignore__', ignored region" in out
    assert "reserved: 1 x '_background_', no query" in out
    [sample] = [get_eval_dataset(f"custom|{tmp_path / 'own.jsonl'}", tmp_path)[0]]
    cup, dish = (query.masks[0] for query in sample.queries)
    assert [query.text for query in sample.queries] == ["cup", "dish"]
    assert (cup[7:11, 7:11] == 255).all()  # the smaller region lies above the target
    assert (cup == 1).sum() == 100 - 16
    assert (dish[10:20, 30:40] == 1).all()  # the smaller target lies above the region
    assert (dish[:, 20:] == 255).sum() == 40 * 40 - 100


def test_reason_seg_is_converted_as_its_own_reader_reads_it(capsys, tmp_path):
    folder = tmp_path / "reason_seg/ReasonSeg/train"
    shapes = [
        ("target", [[2, 2], [30, 2], [30, 30], [2, 30]], "polygon"),
        ("Ignore_this", [[5, 5], [20, 5], [20, 20], [5, 20]], "polygon"),
        ("target", [[8, 8], [12, 8], [12, 12], [8, 12]], "polygon"),
        ("flag", SQUARE, "polygon"),
    ]
    labelme(folder, "a", *shapes, text=["What is it?", "the thing"], is_sentence=True)
    assert read_annotation(folder / "a.json")
    convert(capsys, tmp_path / "own.jsonl", "labelme", folder)
    first = get_train_dataset("ReasonSeg|train", tmp_path).sample(0, np.random.default_rng(0)).masks[0]
    queries = get_eval_dataset(f"custom|{tmp_path / 'own.jsonl'}", tmp_path)[0].queries
    assert [query.text for query in queries] == ["What is it?", "the thing"]
    for query in queries:
        [mask] = query.masks
        outline = (first != mask).sum()  # OpenCV fills the outline, COCO's rule half of it
        assert outline < 150
        assert all((mask == value)[y, x] for value, y, x in ((1, 25, 25), (255, 16, 16), (1, 10, 10), (0, 35, 50)))


# -- images: one entry each, found, of the right size ------------------------------------------------------------------


def test_entries_of_one_image_are_joined_and_in_one_split(capsys, tmp_path):
    for number in range(4):
        photo(tmp_path / f"photos/{number}.jpg", grey=50 * number)
    names = ["photos/0.jpg", "./photos\\0.jpg", *(f"photos/{n}.jpg" for n in range(1, 4))]
    images = [{"id": n, "file_name": name, "height": H, "width": W} for n, name in enumerate(names)]
    rows = [{"id": 1, "image_id": str(n), "category_id": "1", "segmentation": [FLAT]} for n in range(5)]
    coco(tmp_path / "c.json", images, rows)
    out = convert(capsys, tmp_path / "own.jsonl", "coco", tmp_path / "c.json", "--val", 0.01)
    assert "4 images, 4 queries (0 absent; 3 train, 1 val)" in out
    assert len(lines(tmp_path / "own.jsonl")["0.jpg", "cup"]["masks"]) == 2


@pytest.mark.parametrize(("share", "val"), [(0.01, 1), (0.99, 3), (0.5, 2)])
def test_shares_leave_an_image_on_both_sides(capsys, tmp_path, share, val):
    """Drawn among the images that give lines: the two without a label do not count."""
    for number in range(6):
        labelme(tmp_path, str(number), *([("cup", SQUARE, "polygon")] if number < 4 else []))
    convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, "--val", share)
    splits = [line["split"] for line in lines(tmp_path / "own.jsonl").values()]
    assert (splits.count("val"), len(splits)) == (val, 4)


def test_splits_of_the_tool(capsys, tmp_path):
    """Roboflow's layout: a COCO file per folder, in which names may repeat."""
    for number, split in enumerate(("train", "valid", "test")):
        photo(tmp_path / split / "a.jpg", grey=40 * number)
        images = [{"id": 0, "file_name": "a.jpg", "height": H, "width": W}]
        rows = [{"id": 0, "image_id": 0, "category_id": 2, "segmentation": [FLAT]}]
        coco(tmp_path / split / "_annotations.coco.json", images, rows, ("things", "cup"))
    out = convert(capsys, tmp_path / "own.jsonl", "coco", tmp_path)
    assert "own splits are not used: 1 test, 1 train, 1 val (--split uses them)" in out
    convert(capsys, tmp_path / "own.jsonl", "coco", tmp_path, "--split", "--overwrite")
    rows = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert {row["image"]: row["split"] for row in rows} == {
        "train/a.jpg": "train",
        "valid/a.jpg": "val",
        "test/a.jpg": "test",
    }


@pytest.mark.parametrize(
    "written",
    [
        "photos\\ä b.jpg",
        "C:\\Users\\me\\photos\\ä b.jpg",
        "/home/other/data/photos/ä b.jpg",
        "file:///data/photos/%C3%A4%20b.jpg",
        "../elsewhere/ä b.jpg",
        "a\u0308 b.JPG",
        None,
    ],
)
def test_images_are_found_as_tools_write_them(capsys, tmp_path, written):
    photo(tmp_path / "images/photos/ä b.jpg")
    (tmp_path / "json").mkdir()
    labelme(tmp_path / "images/photos", "ä b", ("cup", SQUARE, "polygon"), imagePath=written)
    (tmp_path / "images/photos/ä b.json").rename(tmp_path / "json/ä b.json")
    convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path / "json", "--images", tmp_path / "images")
    assert areas(tmp_path / "own.jsonl") == {("ä b.jpg", "cup"): [100]}


def test_an_image_of_another_folder_is_not_taken(capsys, tmp_path):
    """Of two files of one name, the one whose image is missing does not annotate the other's."""
    for folder in ("x", "y"):
        labelme(tmp_path / folder, "0", (f"cup {folder}", SQUARE, "polygon"))
    (tmp_path / "y/0.jpg").unlink()
    photo(tmp_path / "0.jpg", grey=7)  # beside x/0.json lies the image that it means
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path)
    (tmp_path / "0.jpg").unlink()
    assert [line["image"] for line in lines(tmp_path / "own.jsonl").values()] == ["x/0.jpg", "0.jpg"]
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, "--overwrite")
    assert f"may be another entry's (check --images): {tmp_path / 'y/0.json'}" in out
    assert list(lines(tmp_path / "own.jsonl")) == [("0.jpg", "cup x")]


def test_an_image_that_may_be_several_is_named(capsys, tmp_path):
    for number, folder in enumerate(("x", "y")):
        photo(tmp_path / f"images/{folder}/a.jpg", grey=90 * number)
    images = [{"id": 1, "file_name": "a.jpg", "height": None, "width": None}]
    coco(tmp_path / "c.json", images, [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [FLAT]}])
    flags = ("coco", tmp_path / "c.json", "--images", tmp_path / "images")
    assert "'a.jpg' may be one of 2 different images" in convert(capsys, tmp_path / "own.jsonl", *flags, code=2)


def test_image_data_is_written_out(capsys, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (W, H)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    labelme(tmp_path / "in", "a", ("cup", SQUARE, "polygon"), imagePath="a.json", imageData=data)
    (tmp_path / "in/a.jpg").unlink()
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path / "in")
    assert "only in the JSON itself (imageData), written to" in out
    assert (tmp_path / "own_images/a.png").read_bytes() == file.getvalue()
    (tmp_path / "in/a.json").write_text((tmp_path / "in/a.json").read_text().replace('"cup"', '""'))
    convert(capsys, tmp_path / "other.jsonl", "labelme", tmp_path / "in", code=2)
    assert not (tmp_path / "other_images").exists()


def test_sizes_are_compared_upright(capsys, tmp_path):
    """Annotations for the stored pixels are turned with the image; for a third size they are left out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = {"x": [[5, 5], [15, 5], [15, 15], [5, 15]]}["x"]
    for name in ("stored", "upright", "scaled"):
        photo(tmp_path / f"{name}.jpg", H, W, exif=exif)
    labelme(tmp_path, "stored", ("cup", mask, "polygon"))
    labelme(tmp_path, "upright", ("cup", mask, "polygon"), imageHeight=W, imageWidth=H)
    labelme(tmp_path, "scaled", ("cup", mask, "polygon"), imageHeight=2 * W, imageWidth=2 * H)
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path)
    assert "1 x image whose annotations were turned with it" in out
    assert "1 x image of another size than its annotations were made for" in out
    dataset = get_eval_dataset(f"custom|{tmp_path / 'own.jsonl'}", tmp_path)
    masks = {dataset[i].image_id: dataset[i].queries[0].masks[0] for i in range(2)}
    assert masks["stored.jpg"][5:15, H - 15 : H - 5].all()
    assert masks["upright.jpg"][5:15, 5:15].all()
    assert all(mask.shape == (W, H) and mask.sum() == 100 for mask in masks.values())


def test_output_in_a_linked_folder(capsys, tmp_path):
    labelme(tmp_path / "photos", "a", ("cup", SQUARE, "polygon"))
    (tmp_path / "big/disk/labels").mkdir(parents=True)
    (tmp_path / "labels").symlink_to(tmp_path / "big/disk/labels")
    convert(capsys, tmp_path / "labels/own.jsonl", "labelme", tmp_path / "photos")
    assert lines(tmp_path / "labels/own.jsonl")["a.jpg", "cup"]["image"] == "../../../photos/a.jpg"


def test_other_files_are_passed_over(capsys, tmp_path):
    labelme(tmp_path, "a", ("cup", SQUARE, "polygon"))
    for name, content in (("._a.json", "\0"), ("classes.json", "[1]"), ("__MACOSX/a.json", "{}"), ("cut.json", '{"a')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path)
    assert "left out: 2 x hidden file" in out
    assert f"left out: 1 x JSON that is not a LabelMe file, without a list 'shapes': {tmp_path / 'classes.json'}" in out
    assert "left out: 1 x JSON that cannot be read" in out


def test_encodings(capsys, tmp_path):
    for number, encoding in enumerate(("utf-8-sig", "utf-16")):
        labelme(tmp_path, str(number), ("杯子", SQUARE, "polygon"), encoding=encoding)
    convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path)
    labelme(tmp_path, "2", ("杯子", SQUARE, "polygon"), encoding="gbk")
    flags = ("labelme", tmp_path, "--overwrite")
    message = convert(capsys, tmp_path / "own.jsonl", *flags, code=2)
    assert f"{tmp_path / '2.json'} is not utf-8 text (byte " in message
    assert "--encoding gbk" in message
    convert(capsys, tmp_path / "own.jsonl", *flags, "--encoding", "gbk")
    assert list(lines(tmp_path / "own.jsonl")) == [(f"{number}.jpg", "杯子") for number in range(3)]


# -- LabelMe's and COCO's spellings ------------------------------------------------------------------------------------


def test_shapes_of_new_and_other_tools(capsys, tmp_path):
    patch = io.BytesIO()
    Image.new("L", (10, 10), 1).save(patch, "PNG")
    encoded = base64.b64encode(patch.getvalue()).decode()
    corners = [[5, 5], [15, 5], [15, 15], [5, 15]]
    kinds = ["rotation", "oriented_rectangle", "quadrilateral", "rectangle", "cuboid", None]
    labelme(tmp_path, "a", *((f"{kind}", corners, kind) for kind in kinds))
    content = json.loads((tmp_path / "a.json").read_text())
    over = {"label": "mask", "points": [[54.6, 35], [64, 44]], "shape_type": "mask", "mask": encoded, "group_id": [1]}
    content["shapes"].append(over)
    (tmp_path / "a.json").write_text(json.dumps(content))
    convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path)
    expected = {("a.jpg", f"{kind}"): [100] for kind in kinds}
    assert areas(tmp_path / "own.jsonl") == {**expected, ("a.jpg", "mask"): [5 * 5]}


PAIRS = [[5, 5], [15, 5], [15, 15], [5, 15]]


def square_mask() -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[5:15, 5:15] = True
    return mask


@pytest.mark.parametrize(
    "segmentation",
    [
        FLAT,
        PAIRS,
        [FLAT],
        [PAIRS],
        [[FLAT]],
        [{"x": x, "y": y} for x, y in PAIRS],
        [FLAT, [1, 1, 2, 2]],
        [[5, 5, 10, 5, 10, 15, 5, 15], [[10, 5], [15, 5], [15, 15], [10, 15]]],
        encode_mask(square_mask()),
        [encode_mask(square_mask())],
        [encode_mask(square_mask()), [[5, 5, 9, 5, 9, 9]]],
        {"size": [H, W], "counts": [5 * H + 5, *[10, 30] * 9, 10, 25 + (W - 15) * H]},
    ],
)
def test_spellings_of_a_segmentation(capsys, tmp_path, segmentation):
    photo(tmp_path / "a.jpg")
    images = [{"id": "7", "file_name": "a.jpg", "height": None, "width": None}]
    row = {"id": 1, "image_id": 7, "category_id": 1.0, "segmentation": segmentation, "iscrowd": 0}
    convert(capsys, tmp_path / "own.jsonl", "coco", coco(tmp_path / "c.json", images, [row]))
    assert areas(tmp_path / "own.jsonl") == {("a.jpg", "cup"): [100]}


def test_ids_that_occur_twice(capsys, tmp_path):
    """Annotation ids tell nothing apart here; image and category ids do."""
    for name in "ab":
        photo(tmp_path / f"{name}.jpg")
    images = [{"id": n, "file_name": f"{name}.jpg", "height": H, "width": W} for n, name in enumerate("ab")]
    rows = [{"id": 1, "image_id": n, "category_id": 1, "segmentation": [FLAT]} for n in (0, 1)]
    convert(capsys, tmp_path / "own.jsonl", "coco", coco(tmp_path / "c.json", [*images, images[0]], rows))
    assert len(lines(tmp_path / "own.jsonl")) == 2
    images[1]["id"] = 0
    message = convert(capsys, tmp_path / "b.jsonl", "coco", coco(tmp_path / "c.json", images, rows), code=2)
    assert "c.json: 1 id(s) in 'images' occur twice with different content: 0" in message


# -- boxes -------------------------------------------------------------------------------------------------------------


def boxes(folder: Path) -> Path:
    photo(folder / "a.jpg")
    images = [{"id": 1, "file_name": "a.jpg", "height": H, "width": W}]
    places = [[5, 5, 10, 10], [50, 30, 20, 20], [70, 5, 9, 9], [0, 0, 0, 5]]
    rows = [{"id": n, "image_id": 1, "category_id": 1 + n % 2, "bbox": box} for n, box in enumerate(places)]
    return coco(folder / "c.json", images, rows)


def test_boxes_alone_say_so(capsys, tmp_path):
    message = convert(capsys, tmp_path / "own.jsonl", "coco", boxes(tmp_path), code=2)
    assert "left out: 3 x box without a mask (--boxes rectangle or --boxes sam" in message


def test_boxes_become_rectangles(capsys, tmp_path):
    out = convert(capsys, tmp_path / "own.jsonl", "coco", boxes(tmp_path), "--boxes", "rectangle")
    assert "note: 2 x box made into a mask by --boxes" in out
    assert "left out: 1 x box outside its image" in out
    assert areas(tmp_path / "own.jsonl") == {("a.jpg", "cup"): [100], ("a.jpg", "dish"): [100]}


TOOLS = ["labelme", "label-studio", "via", "cvat"]


def one_box_one_outline(tmp_path: Path, tool: str) -> tuple[str, Path]:
    """A tool's export for a.jpg: the box of a cup, the outline of a dish, both SQUARE. -> its name and its path."""
    percent = {"x": 500 / W, "y": 500 / H, "width": 1000 / W, "height": 1000 / H}
    results = [
        {"id": name, "type": kind, "from_name": "label", "value": {**value, f"{kind}labels": [name]}}
        for name, kind, value in (
            ("cup", "rectangle", percent),
            ("dish", "polygon", {"points": [[100 * x / W, 100 * y / H] for x, y in SQUARE]}),
        )
    ]
    regions = {
        "cup": {"name": "rect", "x": 5, "y": 5, "width": 10, "height": 10},
        "dish": {"name": "polygon", "all_points_x": [5, 15, 15, 5], "all_points_y": [5, 5, 15, 15]},
    }
    via = {"filename": "a.jpg", "size": -1, "regions": [
        {"shape_attributes": shape, "region_attributes": {"class": name}} for name, shape in regions.items()
    ]}  # fmt: skip
    xml = (
        f'<annotations><image id="0" name="a.jpg" width="{W}" height="{H}"><box label="cup" xtl="5" ytl="5" xbr="15" '
        'ybr="15"/><polygon label="dish" points="5,5;15,5;15,15;5,15"/></image></annotations>'
    )
    if tool == "labelme":
        labelme(tmp_path, "a", ("cup", [[15, 5], [5, 15]], "rectangle"), ("dish", SQUARE, "polygon"))
    (tmp_path / "label-studio").write_text(
        json.dumps([{"data": {"image": "a.jpg"}, "annotations": [{"result": results}]}])
    )
    (tmp_path / "via").write_text(json.dumps({"a.jpg-1": via}))
    (tmp_path / "cvat").write_text(xml)
    return tool, tmp_path if tool == "labelme" else tmp_path / tool


@pytest.mark.parametrize("tool", TOOLS)
def test_drawn_rectangles_are_filled_or_segmented(capsys, tmp_path, tool):
    photo(tmp_path / "a.jpg")
    source, out = one_box_one_outline(tmp_path, tool), tmp_path / "own.jsonl"
    assert "note: 1 x drawn rectangle, filled (--boxes sam" in convert(capsys, out, *source)
    assert areas(out) == {("a.jpg", "cup"): [100], ("a.jpg", "dish"): [100]}
    flags = ("--overwrite", "--boxes", "sam", "--sam", ROOT / "assets/tiny/sam.pth")
    assert "left out: 1 x box in which there is no mask" in convert(capsys, out, *source, *flags)  # the photo is gray
    assert areas(out) == {("a.jpg", "dish"): [100]}


@pytest.mark.parametrize("tool", [*TOOLS, "coco", "yolo", "masks"])
@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_images_that_exif_mirrors_or_turns_by_180_degrees(capsys, tmp_path, tool, orientation):
    """Their size does not tell what annotations were made for: the upright image, which tools show, is taken."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(tmp_path / "a.jpg", exif=exif)
    if tool == "coco":
        images = [{"id": 1, "file_name": "a.jpg", "height": H, "width": W}]
        rows = [{"id": 1, "image_id": 1, "category_id": 2, "segmentation": [FLAT]}]
        source = ("coco", coco(tmp_path / "c.json", images, rows))
    elif tool == "yolo":
        (tmp_path / "classes.txt").write_text("dish\n")
        corners = " ".join(f"{x / W} {y / H}" for x, y in SQUARE)
        (tmp_path / "a.txt").write_text(f"0 {corners} {SQUARE[0][0] / W} {SQUARE[0][1] / H}\n")
        source = ("yolo", tmp_path)
    elif tool == "masks":
        (tmp_path / "masks/dish").mkdir(parents=True)
        Image.fromarray(square_mask()).save(tmp_path / "masks/dish/a.png")
        source = ("masks", tmp_path / "masks", "--images", tmp_path)
    else:
        source = one_box_one_outline(tmp_path, tool)
    printed = convert(capsys, tmp_path / "own.jsonl", *source)
    assert "note: 1 x image that its EXIF data turn or mirror, and whose size does not tell" in printed
    dataset = get_eval_dataset(f"custom|{tmp_path / 'own.jsonl'}", tmp_path)
    queries = {query.text: query.masks[0] for query in dataset[0].queries}
    assert set(queries) == ({"cup", "dish"} if tool in TOOLS else {"dish"})
    for mask in queries.values():
        assert np.array_equal(mask, square_mask())


def test_boxes_become_masks_of_sam(capsys, tmp_path):
    """The same as segment-anything's own predictor makes of each box; a box outside the image has none."""
    weights = ROOT / "assets/tiny/sam.pth"
    pixels = np.full((H, W, 3), 220, np.uint8)
    pixels[5:15, 5:15] = (200, 20, 20)
    file = boxes(tmp_path)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    convert(capsys, tmp_path / "own.jsonl", "coco", file, "--boxes", "sam", "--sam", weights)
    parts = SamBoxes(weights).sam.cpu()
    predictor = SamPredictor(Sam(parts.image_encoder, parts.prompt_encoder, parts.mask_decoder))
    predictor.set_image(np.asarray(Image.open(tmp_path / "a.jpg")))
    for label, box in (("cup", [5, 5, 15, 15]), ("dish", [50, 30, 60, 40])):
        [mask], _, _ = predictor.predict(box=np.array(box), multimask_output=False)
        [found] = lines(tmp_path / "own.jsonl")["a.jpg", label]["masks"]
        assert (decode_mask(found) != mask).sum() <= 2
        assert mask.sum() > 20
    flags = ("coco", file, "--boxes", "sam", "--overwrite")
    assert "--sam FILE belong together" in convert(capsys, tmp_path / "own.jsonl", *flags, code=2)
    assert "c.json" in convert(capsys, tmp_path / "own.jsonl", *flags, "--sam", file, code=2)


def test_sam_may_be_that_of_a_merged_model(capsys, tmp_path, version):
    convert(capsys, tmp_path / "own.jsonl", "coco", boxes(tmp_path), "--boxes", "sam", "--sam", version)
    found = SamBoxes(Path(version)).sam.cpu().state_dict()
    expected = load(version).model.visual_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_image_in_the_mirrored_subfolder_is_meant(capsys, tmp_path):
    for number, part in enumerate(("train", "val")):
        photo(tmp_path / "images" / part / "a.jpg", grey=90 + number)
        labelme(tmp_path / "labels" / part, "a", ("cup", SQUARE, "polygon"))
        (tmp_path / "labels" / part / "a.jpg").unlink()
    source = ("labelme", tmp_path / "labels", "--images", tmp_path / "images", "--split")
    convert(capsys, tmp_path / "own.jsonl", *source)
    rows = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert {row["image"]: row["split"] for row in rows} == {f"images/{part}/a.jpg": part for part in ("train", "val")}
    photo(tmp_path / "images/other/b.jpg")
    photo(tmp_path / "images/more/b.jpg", grey=7)
    labelme(tmp_path / "labels/train", "b", ("cup", SQUARE, "polygon"))
    (tmp_path / "labels/train/b.jpg").unlink()
    message = convert(capsys, tmp_path / "own.jsonl", *source, "--overwrite", code=2)
    assert "'b.jpg' may be one of 2 different images" in message


# -- mask images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_file_is_image_or_mask(capsys, tmp_path, suffix):
    photo(tmp_path / f"1{suffix}")
    Image.fromarray(square_mask()).save(tmp_path / "1_mask.png")
    convert(capsys, tmp_path / "own.jsonl", "masks", tmp_path, "--images", tmp_path, "--query", "the road")
    assert [(line["image"], line["masks"]) for line in lines(tmp_path / "own.jsonl").values()] == [
        (f"1{suffix}", ["1_mask.png"])
    ]


def test_a_mask_of_two_images_is_named(capsys, tmp_path):
    for name in ("a.jpg", "a.png"):
        photo(tmp_path / "images" / name)
    (tmp_path / "masks").mkdir()
    Image.fromarray(square_mask()).save(tmp_path / "masks/a.png")
    flags = ("masks", tmp_path / "masks", "--images", tmp_path / "images", "--query", "the road")
    assert "a.png may be the mask of 2 images" in convert(capsys, tmp_path / "own.jsonl", *flags, code=2)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_index_pngs_of_any_mode(capsys, tmp_path, mode):
    """Equal channels are the index; colors need a list."""
    photo(tmp_path / "images/a.jpg")
    values = np.zeros((H, W), np.uint8)
    values[5:15, 5:15], values[20:30, 20:25] = 1, 2
    grey = Image.fromarray(values)
    image = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else grey if mode == "P" else grey.convert(mode)
    if mode == "P":
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    (tmp_path / "masks").mkdir()
    image.save(tmp_path / "masks/a.png")
    (tmp_path / "names.txt").write_text("cup\ndish\n")
    (tmp_path / "colors.txt").write_text("background:0,0,0::\ncup:128,0,0::\ndish:0,128,0::\n")
    flags = ("masks", tmp_path / "masks", "--images", tmp_path / "images")
    expected = {("a.jpg", "cup"): [100], ("a.jpg", "dish"): [50]}
    convert(capsys, tmp_path / "own.jsonl", *flags, "--classes", tmp_path / "names.txt")
    assert areas(tmp_path / "own.jsonl") == expected
    if mode == "P":
        image.convert("RGB").save(tmp_path / "masks/a.png")
        listed = ("--overwrite", "--classes", tmp_path / "names.txt")
        message = convert(capsys, tmp_path / "own.jsonl", *flags, *listed, code=2)
        assert "a.png is in colors (mode RGB)" in message
        convert(capsys, tmp_path / "own.jsonl", *flags, "--overwrite", "--colors", tmp_path / "colors.txt")
        assert areas(tmp_path / "own.jsonl") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cup\ndish", {1: "cup", 2: "dish"}),
        ("cup\r\r\ndish\r\r\n", {1: "cup", 2: "dish"}),
        ("cup\r\rdish\r", {1: "cup", 3: "dish"}),
        ("_background_\ncup", {0: "_background_", 1: "cup"}),
        ("__ignore__\n_background_\ncup", {255: "__ignore__", 0: "_background_", 1: "cup"}),
        ("# a comment\n0 background\n7: cup\n9\tthe dish\n", {0: "background", 7: "cup", 9: "the dish"}),
        ("cup,7\ndish,9", {7: "cup", 9: "dish"}),
        ("Pixel Value, Class\n0, background\n2, cup", {0: "background", 2: "cup"}),
        ("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncup:9,9,9::", {0: "background", 1: "cup"}),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_classes(tmp_path, text, expected, encoding):
    (tmp_path / "names.txt").write_bytes(text.encode(encoding))
    assert read_classes(tmp_path / "names.txt") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with an empty line"),
        ("\ncup", "begins with an empty line"),
        ("1 cup\n1 dish", "value 1 is both 'cup' and 'dish'"),
        ("1 cup\n2 dish\nfork", "most lines name a value, but not 'fork'"),
        ("__ignore__\ncup", "is not followed by _background_"),
        ("cup:9,9,9::\ndish:8,8,8::", "give it with --colors instead"),
        ("name,r,g,b\ncup,1,2,3", "give it with --colors instead"),
        ('{"cup": 1}', "is JSON"),
    ],
)
def test_lists_of_classes_that_could_be_read_wrongly_are_refused(tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(DataError, match=rf"names\.txt.*{message}"):
        read_classes(tmp_path / "names.txt")


@pytest.mark.parametrize(
    "text",
    [
        "# label:color_rgb:parts:actions\ncup:1,2,3::\nred dish:4,5,6:a:b\n",
        "1 2 3 cup\r\n4 5 6 red dish\r\n",
        "cup,1,2,3\nred dish,4,5,6",
        "id,name,r,g,b\n1,cup,1,2,3\n2,red dish,4,5,6",
        '{"cup": [1, 2, 3],\n "red dish": "#040506"}',
        "#010203 cup\nred dish #040506",
    ],
)
def test_lists_of_colors(tmp_path, text):
    (tmp_path / "colors").write_text(text)
    assert read_colors(tmp_path / "colors") == {(1, 2, 3): "cup", (4, 5, 6): "red dish"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cup\ndish", "'cup' names no color"),
        ("cup 1 2 300", "is not a color"),
        ("1 2 3 cup\n1 2 3 dish", r"the color \(1, 2, 3\) is both 'cup' and 'dish'"),
        ("{", "not valid JSON"),
        ('{"cup": {"r": 1}}', "is not a color"),
        ("", "names no color"),
    ],
)
def test_lists_of_colors_that_fail_are_named(tmp_path, text, message):
    (tmp_path / "colors").write_text(text)
    with pytest.raises(DataError, match=rf"colors.*{message}"):
        read_colors(tmp_path / "colors")


# -- copies and words --------------------------------------------------------------------------------------------------


def test_a_copy_under_another_name_is_the_same_image(capsys, tmp_path):
    """What one file shows, the other does not lack; nor are they in different splits."""
    for name, label in (("a", "cup"), ("b", "dish"), ("c", "cup"), ("d", "dish")):
        labelme(tmp_path, name, (label, SQUARE, "polygon"))
    for name in ("b", "copy"):
        shutil.copy(tmp_path / "a.jpg", tmp_path / f"{name}.jpg")
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, "--absent", 1, "--val", 0.3, "--negatives")
    assert f"1 x image that is there twice, used as one: {tmp_path / 'b.jpg'} is {tmp_path / 'a.jpg'}" in out
    written = {key: bool(line["masks"]) for key, line in lines(tmp_path / "own.jsonl").items()}
    assert {key for key, there in written.items() if there} == {
        ("a.jpg", "cup"), ("a.jpg", "dish"), ("c.jpg", "cup"), ("d.jpg", "dish"),
    }  # fmt: skip
    assert {key for key, there in written.items() if not there} == {("c.jpg", "dish"), ("d.jpg", "cup")}


def test_a_label_is_not_absent_beside_one_that_has_its_words(capsys, tmp_path):
    for name, label in (("a", "red cup"), ("b", "Cup"), ("c", "dish")):
        labelme(tmp_path, name, (label, SQUARE, "polygon"))
    convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, "--absent", 9, "--query", "the {label}")
    absent = {key for key, line in lines(tmp_path / "own.jsonl").items() if not line["masks"]}
    assert absent == {
        ("a.jpg", "the dish"), ("b.jpg", "the dish"), ("c.jpg", "the red cup"), ("c.jpg", "the Cup"),
    }  # fmt: skip


def test_one_image_cannot_be_split(capsys, tmp_path):
    labelme(tmp_path, "a", ("cup", SQUARE, "polygon"))
    out = convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, "--val", 0.5)
    note = "note: --val needs two images with queries; all are for training"
    assert note in out
    photo(tmp_path / "b.jpg")
    flags = ("labelme", tmp_path, "--overwrite", "--val", 0.5)
    assert note not in convert(capsys, tmp_path / "own.jsonl", *flags, "--negatives")
    err = convert(capsys, tmp_path / "own.jsonl", *flags, "--split", code=2)
    assert "--split and --val exclude each other" in err


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark_can_be_named(capsys, tmp_path, encoding):
    labelme(tmp_path, "a", ("cup", SQUARE, "polygon"), encoding=encoding)
    assert "it is UTF-16 or no text" in convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, code=2)
    convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, "--encoding", encoding)
    assert list(lines(tmp_path / "own.jsonl")) == [("a.jpg", "cup")]


@pytest.mark.parametrize(
    "other", ["CUP\u200b of\u00a0tea", "cup_of-tea", "\uff43\uff55\uff50 of tea", "\ufeffCup  of tea"]
)
def test_spellings_of_one_label(capsys, tmp_path, other):
    """As copied from web pages, in full width, or as an identifier."""
    labelme(tmp_path, "a", ("cup of tea", SQUARE, "polygon"))
    labelme(tmp_path, "b", (other, SQUARE, "polygon"))
    convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path, "--absent", 1)
    assert list(lines(tmp_path / "own.jsonl")) == [("a.jpg", "cup of tea"), ("b.jpg", "cup of tea")]


@pytest.mark.parametrize("labels", [("1", "-1"), ("cup", "cups"), ("x_", "y_"), ("\u0645\u06cc", "\u0645")])
def test_labels_that_are_told_apart(capsys, tmp_path, labels):
    for name, label in zip("ab", labels):
        labelme(tmp_path, name, (label, SQUARE, "polygon"))
    convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path)
    assert list(lines(tmp_path / "own.jsonl")) == [("a.jpg", labels[0]), ("b.jpg", labels[1])]


@pytest.mark.parametrize("name", ["b", "other"])
def test_an_image_whose_json_is_broken_is_no_negative(capsys, tmp_path, name):
    labelme(tmp_path / "photos", "a", ("cup", SQUARE, "polygon"))
    photo(tmp_path / "photos/b.jpg")
    (tmp_path / "json").mkdir()
    (tmp_path / "photos/a.json").rename(tmp_path / "json/a.json")
    (tmp_path / f"json/{name}.json").write_text('{"imagePath": "b.jpg", "shapes": [{"label": "cu')
    flags = ("--images", tmp_path / "photos", "--negatives")
    convert(capsys, tmp_path / "own.jsonl", "labelme", tmp_path / "json", *flags)
    assert list(lines(tmp_path / "own.jsonl")) == [("a.jpg", "cup")]
