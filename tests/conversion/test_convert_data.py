"""LabelMe folders, COCO files and mask images are converted to JSONL without loss."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from conversion.annotated_images import gray_of
from PIL import Image

from scripts import convert_data
from utils.datasets import get_eval_dataset, get_train_dataset
from utils.datasets.masks import encode_mask
from utils.inference import cli

REALDATA = Path(__file__).resolve().parents[3] / "shared/realdata"
H, W = 40, 60
SQUARE = [[5, 5], [15, 5], [15, 15], [5, 15]]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.run(convert_data.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def photo(path: Path, height: int = H, width: int = W) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (gray_of(path, 30),) * 3).save(path)


def shape(label: str, points: list, kind: str | None = "polygon", **more: object) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, **more}


def labelme(folder: Path, name: str, *shapes: dict, **more: object) -> None:
    photo(folder / f"{name}.jpg")
    value = {"imagePath": f"{name}.jpg", "imageHeight": H, "imageWidth": W, "shapes": list(shapes), **more}
    (folder / f"{name}.json").write_text(json.dumps(value))


def masks_of(path: Path, split: str = "train") -> dict[str, np.ndarray]:
    """``"IMAGE: query"`` -> merged mask [N, H, W], as in evaluation."""
    dataset = get_eval_dataset(f"custom|{path}|{split}", path.parent)
    samples = (dataset[i] for i in range(len(dataset)))
    return {f"{s.image_id}: {query.text}": query.masks for s in samples for query in s.queries}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- LabelMe -----------------------------------------------------------------------------------------------------------


def test_labelme_shapes(capsys, tmp_path):
    patch = np.zeros((8, 6), np.uint8)
    patch[2:5, 1:4] = 1
    png = io.BytesIO()
    Image.fromarray(patch).save(png, "PNG")
    encoded = base64.b64encode(png.getvalue()).decode()
    shapes = [
        shape("box", SQUARE),
        shape("plate", [[20, 10], [30, 18]], "rectangle"),
        shape("ball", [[40, 20], [48, 20]], "circle"),
        shape("leaf", [[10, 20], [15, 27]], "mask", mask=encoded),
        shape("pole", SQUARE, group_id=1),
        shape("pole", [[30, 30], [35, 30], [35, 35]], group_id=1),
        shape("cup", SQUARE, None),
        shape("cup", [[30, 30], [35, 30], [35, 35]]),
        shape("crack", [[1, 1], [9, 9]], "linestrip"),
        shape("crack", [[1, 1], [9, 9]]),
    ]
    labelme(tmp_path / "photos", "a", *shapes)
    code, out, err = run(
        capsys, "labelme", tmp_path / "photos", "--output", tmp_path / "own.jsonl", "--query", "the {label}"
    )
    assert code == 0, err
    assert "1 image, 6 queries (0 absent; 6 train)" in out
    assert "left out: 1 x linestrip (a line has no area)" in out
    assert "left out: 1 x polygon (2 points)" in out
    assert {line["query"]: len(line["masks"]) for line in lines_of(tmp_path / "own.jsonl")} == {
        "the box": 1, "the plate": 1, "the ball": 1, "the leaf": 1, "the pole": 1, "the cup": 2,
    }  # fmt: skip
    masks_by_key = {key.split("the ")[1]: masks[0] for key, masks in masks_of(tmp_path / "own.jsonl").items()}
    assert masks_by_key["box"].sum() == 100
    assert masks_by_key["plate"][10:18, 20:30].all()
    assert masks_by_key["plate"].sum() == 80
    circle = cv2.circle(np.zeros((H, W), np.uint8), (40, 20), 8, 1, -1)
    assert (masks_by_key["ball"] & circle).sum() / (masks_by_key["ball"] | circle).sum() > 0.85
    assert np.argwhere(masks_by_key["leaf"]).min(axis=0).tolist() == [22, 11]
    assert masks_by_key["leaf"].sum() == 9
    assert np.array_equal(masks_by_key["pole"], masks_by_key["cup"])


def test_labelme_images_are_found(capsys, tmp_path):
    """With a Windows path, in another folder, or without imagePath beside the file."""
    labelme(tmp_path / "json/deep", "a", shape("box", SQUARE), imagePath="..\\..\\images\\a.jpg")
    (tmp_path / "json/deep/a.jpg").unlink()
    photo(tmp_path / "images/a.jpg")
    labelme(tmp_path / "json", "b [1]", shape("box", SQUARE), imagePath=None, imageHeight=None)
    assert run(capsys, "labelme", tmp_path / "json", "--output", tmp_path / "out/own.jsonl")[0] == 0
    lines = lines_of(tmp_path / "out/own.jsonl")
    assert [line["image"] for line in lines] == ["../json/b [1].jpg", "../images/a.jpg"]
    assert [line["size"] for line in lines] == [[H, W], [H, W]]
    assert all(masks.sum() == 100 for masks in masks_of(tmp_path / "out/own.jsonl").values())


def test_queries_of_reason_seg(capsys, tmp_path):
    labelme(
        tmp_path,
        "a",
        shape("target", SQUARE),
        shape("ignore", SQUARE),
        text=["the box", "What is square?"],
        is_sentence=False,
    )
    assert run(capsys, "labelme", tmp_path, "--output", tmp_path / "own.jsonl")[0] == 0
    assert {key: masks.sum() for key, masks in masks_of(tmp_path / "own.jsonl").items()} == {
        "a.jpg: the box": 100,
        "a.jpg: What is square?": 100,
    }


def test_validation_images_and_absent_queries(capsys, tmp_path):
    for number in range(10):
        labelme(tmp_path, f"{number}", shape(("box", "cup", "dish")[number % 3], SQUARE))
    labelme(tmp_path, "empty")
    convert = ("labelme", tmp_path, "--output", tmp_path / "own.jsonl", "--val", "0.3", "--absent")
    code, out, _ = run(capsys, *convert, 1)
    assert code == 0
    assert "without annotation: 1 image, such as" in out
    assert "10 images, 20 queries (10 absent; 14 train, 6 val)" in out
    lines = lines_of(tmp_path / "own.jsonl")
    by_image = {line["image"]: line["split"] for line in lines}
    assert sorted(by_image.values()).count("val") == 3
    assert all(by_image[line["image"]] == line["split"] for line in lines)
    assert all(line["query"] in ("box", "cup", "dish") for line in lines)
    assert len(get_train_dataset(f"custom|{tmp_path / 'own.jsonl'}", tmp_path)) == 7
    before = (tmp_path / "own.jsonl").read_bytes()
    code, _, err = run(capsys, *convert, 2)
    assert code == 2
    assert "already exists; add --overwrite" in err
    assert (tmp_path / "own.jsonl").read_bytes() == before
    assert run(capsys, *convert, 2, "--overwrite")[0] == 0
    assert len(lines_of(tmp_path / "own.jsonl")) == 10 + 10 * 2
    assert run(capsys, *convert, 2, "--overwrite", "--negatives")[0] == 0
    assert len(lines_of(tmp_path / "own.jsonl")) == 10 + 10 * 2 + 2


# -- COCO --------------------------------------------------------------------------------------------------------------


def coco(**change: object) -> dict:
    def annotation(number: int, category: int, segmentation: object, **more: object) -> dict:
        return {"id": number, "image_id": 1, "category_id": category, "segmentation": segmentation, **more}

    target = np.zeros((H, W), bool)
    target[20:30, 30:50] = True
    flat = [float(number) for point in SQUARE for number in point]
    rows = [
        annotation(1, 3, [flat, [1.0, 1.0, 2.0, 2.0]], caption="the left cup"),
        annotation(2, 3, encode_mask(target), caption="the right cup"),
        annotation(3, 4, [[1, 1, 2, 2]], caption="a line"),
    ]
    images = [{"id": 1, "file_name": "a.jpg", "height": H, "width": W}]
    images += [{"id": 2, "file_name": "b.jpg", "height": H, "width": W}]
    return {
        "images": images,
        "annotations": rows,
        "categories": [{"id": 3, "name": "cup"}, {"id": 4, "name": "line"}],
        **change,
    }


@pytest.mark.parametrize(
    ("flags", "areas"),
    [
        (("--query", "the {label}s"), {"the cups": 300}),
        (("--label", "caption"), {"the left cup": 100, "the right cup": 200}),
    ],
)
def test_coco(capsys, tmp_path, flags, areas):
    for name in "ab":
        photo(tmp_path / f"photos/{name}.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(coco()))
    files = (tmp_path / "instances.json", "--images", tmp_path / "photos", "--output", tmp_path / "own.jsonl")
    code, out, _ = run(capsys, "coco", *files, *flags, "--absent", 1, "--negatives")
    assert code == 0
    assert "left out: 1 x segmentation that cannot be used (2 points)" in out
    assert "left out: 1 x part of a segmentation (2 points)" in out
    masks_by_key = {key.removeprefix("photos/"): masks for key, masks in masks_of(tmp_path / "own.jsonl").items()}
    assert {key[7:]: masks.sum() for key, masks in masks_by_key.items() if key.startswith("a")} == areas
    assert [len(masks) for key, masks in masks_by_key.items() if key.startswith("b")] == [0]


@pytest.mark.skipif(not REALDATA.is_dir(), reason="the shared real photographs are not here")
def test_coco_on_a_real_photograph(capsys, tmp_path):
    """Areas agree with COCO's within 1%."""
    source = REALDATA / "coco/instances_39769.json"
    instances = json.loads(source.read_text())
    for row in instances["annotations"]:
        row["caption"] = f"object {row['id']}"
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    files = (tmp_path / "instances.json", "--images", REALDATA / "coco/train2017", "--output", tmp_path / "own.jsonl")
    assert run(capsys, "coco", *files, "--label", "caption")[0] == 0
    masks_by_key = {key.split(": ")[1]: masks.sum() for key, masks in masks_of(tmp_path / "own.jsonl").items()}
    assert len(masks_by_key) == len(instances["annotations"]) > 0
    for row in instances["annotations"]:
        assert masks_by_key[row["caption"]] == pytest.approx(row["area"], rel=0.01)


# -- mask pictures -----------------------------------------------------------------------------------------------------


def save_mask(path: Path, *values: int, height: int = H) -> None:
    """Value k covers 5 rows from row 5k on."""
    mask = np.zeros((height, W), np.uint8)
    for value in values:
        mask[5 * (value % 8) : 5 * (value % 8) + 5] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def test_masks_of_one_label_and_of_folders(capsys, tmp_path):
    for name in "ab":
        photo(tmp_path / f"photos/{name}.jpg")
    save_mask(tmp_path / "plain/a_mask.png", 255)
    save_mask(tmp_path / "plain/b.png")
    convert = ("masks", tmp_path / "plain", "--images", tmp_path / "photos", "--output", tmp_path / "own.jsonl")
    code, _, err = run(capsys, *convert)
    assert code == 2
    assert "a_mask.png has no label: give --query or --classes" in err
    assert run(capsys, *convert, "--query", "the crack")[0] == 0
    assert [line["masks"] for line in lines_of(tmp_path / "own.jsonl")] == [["plain/a_mask.png"], []]
    assert {key: masks.shape[0] for key, masks in masks_of(tmp_path / "own.jsonl").items()} == {
        "photos/a.jpg: the crack": 1,
        "photos/b.jpg: the crack": 0,
    }
    for label, names in (("cup", "a"), ("dish", "ab")):
        for name in names:
            save_mask(tmp_path / f"folders/{label}/{name}.png", 1)
    folders = ("masks", tmp_path / "folders", "--images", tmp_path / "photos", "--output", tmp_path / "more.jsonl")
    assert run(capsys, *folders, "--query", "the {label}")[0] == 0
    assert sorted(masks_of(tmp_path / "more.jsonl")) == [
        "photos/a.jpg: the cup",
        "photos/a.jpg: the dish",
        "photos/b.jpg: the dish",
    ]


def test_masks_with_classes(capsys, tmp_path):
    photo(tmp_path / "photos/a.jpg")
    save_mask(tmp_path / "masks/a.png", 1, 2, 255)
    (tmp_path / "classes.txt").write_text("road\r\ncar\r\n")
    files = ("--images", tmp_path / "photos", "--output", tmp_path / "own.jsonl", "--classes", tmp_path / "classes.txt")
    code, out, _ = run(capsys, "masks", tmp_path / "masks", *files)
    assert code == 0
    assert "value 255, which" in out
    masks_by_key = {key: np.flatnonzero(masks[0][:, 0])[0] for key, masks in masks_of(tmp_path / "own.jsonl").items()}
    assert masks_by_key == {"photos/a.jpg: road": 5, "photos/a.jpg: car": 10}


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", None, "contains no .json"),
        ("a.json", "{", "a.json is not valid JSON"),
        ("a.json", {"shapes": 3}, "JSON that is not a LabelMe file, without a list 'shapes': "),
        ("a.json", {"shapes": [{"points": SQUARE}]}, "a.json has no image"),
        ("a.json", {"shapes": [{"label": "box", "points": SQUARE}]}, "a.json has no image"),
    ],
)
def test_wrong_labelme_folders_are_named(capsys, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    code, _, err = run(capsys, "labelme", tmp_path, "--output", tmp_path / "own.jsonl")
    assert code == 2
    assert message in err
    assert not (tmp_path / "own.jsonl").exists()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (shape("x", [[1, 2], [3]]), "polygon (its points are not pairs of numbers)"),
        (shape("x", "points"), "polygon (its points are not pairs of numbers)"),
        (shape("x", [[1, 1], [5, 5]], "mask", mask="!"), "mask (its PNG cannot be read)"),
        (shape("x", [[1, 1], [5, 5]], "mask"), "mask (its PNG cannot be read)"),
        (shape("x", [[1, 1]], "point"), "point (a point has no area)"),
        (shape("x", [[1, 1]], "circle"), "circle (a circle of 1 points; it needs 2)"),
        (shape("x", SQUARE, "star"), "star (a kind of shape that is not known)"),
        (shape("x", [[1, 1], [10**400, 5], [5, 5]]), "polygon (its points are not pairs of numbers)"),
        (shape("x", [[1, 1], [10**6, 5], [5, 5]]), "polygon (a point far outside its image)"),
        (shape("x", [[-9, -9], [-5, -9], [-5, -5]]), "mask outside its image, or empty"),
        (shape("\ud83d", SQUARE), "label with half a character"),
        (shape(" ", SQUARE), "annotation without a label"),
    ],
)
def test_wrong_shapes_are_counted(capsys, tmp_path, wrong, reason):
    labelme(tmp_path, "a", wrong, shape("box", SQUARE))
    code, out, err = run(capsys, "labelme", tmp_path, "--output", tmp_path / "own.jsonl")
    assert code == 0, err
    assert f"left out: 1 x {reason}" in out
    assert [line["query"] for line in lines_of(tmp_path / "own.jsonl")] == ["box"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no list 'images'"),
        ({"annotations": [{"id": 1, "image_id": 9, "category_id": 3}]}, "that is not in the file: image_id 9"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 9}]}, "that the file names: category_id 9"),
        ({"categories": [{"id": 3, "name": ""}, {"id": 4}]}, "3 x annotation without a category that the file names"),
        ({"annotations": []}, "no query in 2 images"),
        (
            {"images": [{"id": 1, "file_name": "c.jpg", "height": H, "width": W}]},
            "1 of 1 images are missing, such as",
        ),
    ],
)
def test_wrong_coco_files_are_named(capsys, tmp_path, change, message):
    (tmp_path / "instances.json").write_text(json.dumps(coco(**change)))
    for name in "ab":
        photo(tmp_path / f"{name}.jpg")
    code, _, err = run(capsys, "coco", tmp_path / "instances.json", "--output", tmp_path / "own.jsonl")
    assert code == 2
    assert message in err
    assert not (tmp_path / "own.jsonl").exists()


def test_wrong_masks_and_flags_are_named(capsys, tmp_path):
    photo(tmp_path / "photos/a.jpg")
    (tmp_path / "masks").mkdir()
    convert = ("masks", tmp_path / "masks", "--images", tmp_path / "photos", "--output", tmp_path / "own.jsonl")
    assert "contains no .png" in run(capsys, *convert)[2]
    save_mask(tmp_path / "masks/b.png", 1)
    assert "mask without an image of its name in" in run(capsys, *convert)[2]
    labelme(tmp_path / "labelme", "a", shape("box", SQUARE))
    flags = ("labelme", tmp_path / "labelme", "--output", tmp_path / "own.jsonl")
    assert "lacks {label}" in run(capsys, *flags, "--query", "the box")[2]
    with pytest.raises(SystemExit):
        convert_data.main([str(flag) for flag in (*flags, "--val", "1")])
    assert "'1' is not a fraction" in capsys.readouterr().err


# -- check -------------------------------------------------------------------------------------------------------------


def test_check_reads_everything(capsys, tmp_path):
    for number in range(4):
        labelme(tmp_path, f"{number}", shape(("box", "cup")[number % 2], SQUARE))
    run(capsys, "labelme", tmp_path, "--output", tmp_path / "own.jsonl", "--val", "0.5", "--absent", 1)
    code, out, err = run(capsys, "check", tmp_path / "own.jsonl", "--pictures", 3)
    assert code == 0, err
    assert "train: 2 images, 4 expressions, 2 absent, 0 multi" in out
    for split in ("train", "val"):
        with Image.open(tmp_path / f"own.{split}.png") as picture:
            assert picture.height > 3 * 220
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A box: [SEG]."}]
    lines = [{"image": "0.jpg", "conversations": turns, "masks": [SQUARE]}]
    (tmp_path / "talk.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert run(capsys, "check", tmp_path / "talk.jsonl", "--pictures", 1)[0] == 0


def test_check_names_every_line_that_cannot_be_decoded(capsys, tmp_path):
    photo(tmp_path / "a.jpg")
    good = {"image": "a.jpg", "masks": [SQUARE]}
    lines = [
        {**good, "query": "x"},
        {**good, "query": "y", "masks": [[[1, 1], [2, 2]]]},
        {**good, "query": "z", "size": [1, 1]},
    ]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = run(capsys, "check", tmp_path / "bad.jsonl", "--pictures", 3)
    assert code == 2
    assert "2 lines cannot be used" in err
    assert "line 2: a polygon has 2 points" in err
    assert "line 3: the image is 60x40" in err
    assert not (tmp_path / "bad.train.png").exists()
