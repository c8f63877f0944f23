"""Exports of tools, converted by the program and read back as evaluation reads them."""

from __future__ import annotations

import numpy as np
from conversion import test_cvat, test_label_studio, test_via, test_yolo
from conversion.annotated_images import H, W, photo, pixels
from conversion.test_convert_data import lines_of, masks_of, run


def convert(capsys, *arguments, output):
    code, out, err = run(capsys, *arguments, "--output", output, "--pictures", 0)
    assert code == 0, err
    return out


def test_yolo_with_its_splits(capsys, tmp_path):
    file = test_yolo.dataset(tmp_path / "set", f"1 {test_yolo.SQUARE}\n9 {test_yolo.SQUARE}\n0 0.5 0.5 0.2 0.2\n")
    output = tmp_path / "own.jsonl"
    out = convert(capsys, "yolo", file, "--split", "--absent", 1, output=output)
    assert "1 x class 9, which data.yaml does not name" in out
    assert "1 x box without a mask" in out
    [line] = lines_of(output)
    assert (line["query"], line["split"]) == ("dog", "train")
    [mask] = masks_of(output).values()
    np.testing.assert_array_equal(mask[0], test_yolo.SQUARE_PIXELS)


def test_label_studio_without_denying_a_point(capsys, tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg")
    brush = test_label_studio.pack(test_label_studio.rgba(pixels(5, 5, 15, 25)).ravel())
    cat = test_label_studio.result("brush", "cat", format="rle", rle=brush)
    dog = test_label_studio.result("keypoint", "dog", x=10, y=10, width=1)
    tasks = [
        test_label_studio.task("a.jpg", cat, dog),
        test_label_studio.task("b.jpg", test_label_studio.rectangle("dog")),
    ]
    file, output = test_label_studio.write(tmp_path, *tasks), tmp_path / "own.jsonl"
    convert(capsys, "label-studio", file, "--query", "the {label}", "--absent", 2, output=output)
    queries = {(line["image"], line["query"]): len(line["masks"]) for line in lines_of(output)}
    assert queries == {("a.jpg", "the cat"): 1, ("b.jpg", "the dog"): 1, ("b.jpg", "the cat"): 0}
    np.testing.assert_array_equal(masks_of(output)["a.jpg: the cat"][0], pixels(5, 5, 15, 25))


def test_via_with_one_query(capsys, tmp_path):
    photo(tmp_path / "a.jpg")
    file = test_via.write(tmp_path, test_via.entry("a.jpg", test_via.region("", attribute="")))
    convert(capsys, "via", file, "--query", "the balloon", output=tmp_path / "own.jsonl")
    [line] = lines_of(tmp_path / "own.jsonl")
    assert line["query"] == "the balloon"
    assert line["size"] == [H, W]


def test_cvat_with_an_attribute(capsys, tmp_path):
    photo(tmp_path / "images/a.jpg")
    caption = '<attribute name="caption">the red cat</attribute>'
    test_cvat.write(tmp_path, test_cvat.image("a.jpg", test_cvat.box("cat", 0, 0, 4, 4, inner=caption)))
    out = convert(capsys, "cvat", tmp_path, "--attribute", "caption", output=tmp_path / "own.jsonl")
    assert "1 image, 1 query" in out
    [line] = lines_of(tmp_path / "own.jsonl")
    assert line["query"] == "the red cat"
    assert line["masks"] == [[[[0, 0], [4, 0], [4, 4], [0, 4]]]]
