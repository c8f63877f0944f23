"""YOLO's label files: every kind of row, and the folders of Ultralytics, Roboflow, Label Studio, CVAT and darknet."""

from __future__ import annotations

import pytest
from conversion.annotated_images import assert_masks, by_name, kinds, masks_of, photo, pixels, reasons_of

from utils.conversion.yolo import read_yolo
from utils.datasets.base import DataError

SQUARE = "0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6"  # of an image of 30 x 20 pixels
SQUARE_PIXELS = pixels(4, 3, 12, 15)


def write(file, text=""):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def dataset(folder, rows, names="names: [cat, dog]"):
    """An image with rows in the layout of Ultralytics; returns data.yaml."""
    photo(folder / "images/train/a.jpg")
    write(folder / "labels/train/a.txt", rows)
    return write(folder / "data.yaml", f"path: .\ntrain: images/train\n{names}\n")


def found(annotated):
    return {(image.path.name, image.split): set(masks_of(image)) for image in annotated.images}


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        SQUARE,
        f"{SQUARE} 0.87",  # confidence
        f"{SQUARE} 17",  # track
        f"{SQUARE} 0.87 17",
        SQUARE.replace(" ", "\t"),
        "0.1 0.2 0.5 0.2 0.5 0.4 0.5 0.6 0.1 0.6",
    ],
)
def test_polygons(tmp_path, row):
    [image] = read_yolo(dataset(tmp_path, f"1 {row}\n")).images
    assert image.split == "train"
    assert_masks(image, {"dog": SQUARE_PIXELS})


@pytest.mark.parametrize(
    "row", ["0.5 0.5 0.2 0.4", "0.5 0.5 0.2 0.4 0.9", "0.5 0.5 0.2 0.4 0.9 3", "0.5 0.5 0.2 0.4 3"]
)
def test_boxes_have_no_mask(tmp_path, row):
    annotated = read_yolo(dataset(tmp_path, f"0 {row}"))
    [annotation] = annotated.images[0].annotations
    assert (annotation.label, annotation.mask, annotation.reason) == ("cat", None, "a box")
    assert annotation.box == pytest.approx((12, 6, 18, 14))
    assert kinds(annotated) == {}  # the converter decides what becomes of boxes


def test_rows_that_cannot_be_used(tmp_path):
    rows = (
        f"7 {SQUARE}\n-1 {SQUARE}\n0.5 {SQUARE}\nx {SQUARE}\n0 0.1 nan\n0 0.1 0.2\n1 30 40 50 40 50 60\n\n0 {SQUARE}\n"
    )
    annotated = read_yolo(dataset(tmp_path, rows))
    [image] = annotated.images
    assert_masks(image, {"cat": SQUARE_PIXELS})
    assert reasons_of(image) == {
        "cat": "2 numbers, neither a box nor a polygon",
        "dog": "a polygon that is not in fractions of its image",
        "": "row that is not of numbers",
    }
    assert sum(not annotation.label for annotation in image.annotations) == 5
    assert kinds(annotated) == {
        "class 7, which data.yaml does not name": 1,
        "class -1, which data.yaml does not name": 1,
        "class 0.5, which data.yaml does not name": 1,
        "row that is not of numbers": 2,
        "region without a mask (2 numbers, neither a box nor a polygon)": 1,
        "region without a mask (a polygon that is not in fractions of its image)": 1,
    }


def test_keypoints_are_no_polygon(tmp_path):
    file = dataset(tmp_path, "0 0.5 0.5 0.2 0.4 0.4 0.4 0.6 0.6", "names: {0: cat}\nkpt_shape: [2, 2]")
    assert reasons_of(read_yolo(file).images[0]) == {"cat": "a box with keypoints"}


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "label"),
    [
        ("names:\n- cat\n- no", "no"),
        ("names: {0: cat, 1: 'on'}", "on"),
        ("nc: 2\nnames: ['cat', ' red dog ']", "red dog"),
        ("names:\n  1: 12", "12"),
    ],
)
def test_names(tmp_path, names, label):
    assert_masks(read_yolo(dataset(tmp_path, f"1 {SQUARE}", names)).images[0], {label: SQUARE_PIXELS})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nc: 3\nnames: [cat, dog]", "names 2 classes but says nc: 3"),
        ("names: 3", "'names' is neither a list of names nor"),
        ("names: {cat: 0}", "'names' is neither a list of names nor"),
        ("names: [[a], b]", "'names' is neither a list of names nor"),
        ("names: [a", "not valid YAML"),
        ("x: 1", "no data.yaml with 'names' and no classes.txt; give --classes"),
    ],
)
def test_lists_that_do_not_fit(tmp_path, names, message):
    file = dataset(tmp_path, f"1 {SQUARE}", names)
    with pytest.raises(DataError, match=message) as error:
        read_yolo(file)
    assert str(tmp_path) in str(error.value)


def test_classes_given_by_hand(tmp_path):
    file = dataset(tmp_path, f"1 {SQUARE}")
    classes = write(tmp_path / "my.txt", "\ufeffa\r\n\r\n")
    assert kinds(read_yolo(file, classes=classes)) == {"class 1, which my.txt does not name": 1}
    with pytest.raises(DataError, match=r"my.txt is empty"):
        read_yolo(file, classes=write(tmp_path / "my.txt", "\n"))
    with pytest.raises(DataError, match=r"my.txt begins with '__ignore__'"):
        read_yolo(file, classes=write(tmp_path / "my.txt", "__ignore__\n_background_\ncat\n"))


# -- folders -----------------------------------------------------------------------------------------------------------


def test_roboflow(tmp_path):
    for split in ("train", "valid"):
        photo(tmp_path / split / "images/a_jpg.rf.12ab.jpg", grey=len(split))
        write(tmp_path / split / "labels/a_jpg.rf.12ab.txt", f"0 {SQUARE}")
    photo(tmp_path / "train/images/empty.jpg")
    write(tmp_path / "train/labels/empty.txt")
    photo(tmp_path / "train/images/unlabelled.jpg")
    write(tmp_path / "train/labels/orphan.txt", f"0 {SQUARE}")
    yaml = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 1\nnames: ['cat']\n"
    annotated = read_yolo(write(tmp_path / "data.yaml", yaml))
    assert found(annotated) == {
        ("a_jpg.rf.12ab.jpg", "train"): {"cat"},
        ("a_jpg.rf.12ab.jpg", "val"): {"cat"},
        ("empty.jpg", "train"): set(),
    }
    assert kinds(annotated) == {
        "folder of a split that does not exist": 1,
        "image without a label file": 1,
        "label file without an image": 1,
    }
    assert found(read_yolo(tmp_path)) == found(annotated)


def test_a_folder_that_may_be_one_of_two(tmp_path):
    photo(tmp_path / "train/images/x.jpg")
    file = dataset(tmp_path / "set", f"0 {SQUARE}")
    photo(tmp_path / "set/train/images/y.jpg")
    file.write_text("train: ../train/images\nnames: [cat]\n")
    with pytest.raises(DataError, match=r"'../train/images' may be .* or "):
        read_yolo(file)


@pytest.mark.parametrize(
    "entry",
    [
        "/content/datasets/set/images/train",
        "C:\\sets\\set\\images\\train",
        "[images/train]",
        "./images/train/",
        "list.txt",
    ],
)
def test_spellings_of_folders(tmp_path, entry):
    file = dataset(tmp_path, f"0 {SQUARE}")
    write(tmp_path / "list.txt", "./images/train/a.jpg\n\ndata/images/train/gone.jpg\n")
    file.write_text(f"train: {entry}\nnames: [cat]\n")
    assert found(read_yolo(file)) == {("a.jpg", "train"): {"cat"}}


def test_label_studio(tmp_path):
    write(tmp_path / "export/classes.txt", "cat\ndog\n")
    write(tmp_path / "export/notes.json", "{}")
    write(tmp_path / "export/labels/0a1b2c3d-a.txt", f"1 {SQUARE}")
    photo(tmp_path / "photos/deep/a.jpg")
    assert found(read_yolo(tmp_path / "export", tmp_path / "photos")) == {("a.jpg", ""): {"dog"}}
    photo(tmp_path / "export/images/0a1b2c3d-a.jpg")
    assert found(read_yolo(tmp_path / "export")) == {("0a1b2c3d-a.jpg", ""): {"dog"}}


def test_darknet_and_cvat(tmp_path):
    write(tmp_path / "obj.names", "cat\ndog")
    write(tmp_path / "train.txt", "data/obj_train_data/a.jpg\n")
    photo(tmp_path / "obj_train_data/a.jpg")
    write(tmp_path / "obj_train_data/a.txt", f"1 {SQUARE}")
    assert found(read_yolo(tmp_path)) == {("a.jpg", "train"): {"dog"}}


def test_an_image_of_another_split_is_never_taken(tmp_path):
    file = dataset(tmp_path, f"0 {SQUARE}")
    write(tmp_path / "labels/val/a.txt", f"1 {SQUARE}")
    file.write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    annotated = read_yolo(file)
    assert found(annotated) == {("a.jpg", "train"): {"cat"}}
    assert kinds(annotated) == {"label file without an image": 1}
    flat = tmp_path / "flat"
    photo(flat / "a.jpg")
    (tmp_path / "images/train/a.jpg").unlink()
    with pytest.raises(DataError, match=r"a.jpg has two label files"):
        read_yolo(write(tmp_path / "data.yaml", "names: [cat, dog]"), flat)


def test_two_images_of_one_label_file(tmp_path):
    file = dataset(tmp_path, f"0 {SQUARE}")
    photo(tmp_path / "images/train/a.png")
    with pytest.raises(DataError, match=r"a.txt may belong to .*a.jpg or .*a.png"):
        read_yolo(file)


def test_damaged_files_are_left_out(tmp_path):
    file = dataset(tmp_path, f"0 {SQUARE}")
    photo(tmp_path / "images/train/b.jpg")
    (tmp_path / "labels/train/b.txt").write_bytes(b"\xff\xd8\xff")
    write(tmp_path / "images/train/c.jpg", "no image")
    write(tmp_path / "labels/train/c.txt", f"0 {SQUARE}")
    (tmp_path / "labels/train/._a.txt").write_bytes(b"\0\5")
    photo(tmp_path / "images/train/utf16.jpg")
    (tmp_path / "labels/train/utf16.txt").write_text(f"0 {SQUARE}\n", encoding="utf-16")
    annotated = read_yolo(file)
    assert set(by_name(annotated)) == {"a.jpg", "utf16.jpg"}
    assert kinds(annotated)["label file that is no text"] == 1
    assert kinds(annotated)["image that cannot be read"] == 1


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match=r"does not exist; give a data\.yaml"):
        read_yolo(tmp_path / "gone")
    write(tmp_path / "classes.txt", "cat")
    write(tmp_path / "labels/a.txt", f"0 {SQUARE}")
    with pytest.raises(DataError, match=r"no image with a label file .* \(1 x label file without an image: .*a\.txt\)"):
        read_yolo(tmp_path)


@pytest.mark.parametrize("listed", ["classes.txt", "_darknet.labels", "train/_darknet.labels"])
def test_an_image_called_train(tmp_path, listed):
    """Its train.txt has rows, and is no list of images."""
    photo(tmp_path / "train/train.jpg")
    (tmp_path / "train/train.txt").write_text(f"0 {SQUARE}")
    (tmp_path / "train.txt").write_text("train/train.jpg\n")
    (tmp_path / listed).write_text("cat\n")
    [image] = read_yolo(tmp_path).images
    assert_masks(image, {"cat": SQUARE_PIXELS})
