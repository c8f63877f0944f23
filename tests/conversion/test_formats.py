"""What a path seems to be, where it was given to the reader of another format."""

from __future__ import annotations

import json
import zipfile

import pytest
from conversion import test_cvat, test_label_studio, test_via
from conversion.annotated_images import photo
from conversion.test_conversion_rules import SQUARE, coco, labelme
from conversion.test_convert_data import run


def write(folder, source):
    """A file of a source; those of LabelMe are given by their folder."""
    folder.mkdir()
    if source == "coco":
        return coco(folder / "a.json", [], [])
    if source == "labelme":
        labelme(folder, "a", ("cup", SQUARE, "polygon"))
        return folder
    if source == "via":
        return test_via.write(folder, test_via.entry("a.jpg", test_via.region("cup")))
    if source == "label-studio":
        return test_label_studio.write(folder, test_label_studio.task("a.jpg", test_label_studio.rectangle("cup")))
    test_cvat.write(folder, test_cvat.image("a.jpg", test_cvat.box("cup", 0, 0, 4, 4)))
    return folder / "annotations.xml"


SOURCES = ("coco", "labelme", "via", "label-studio", "cvat")


@pytest.mark.parametrize("reader", [*SOURCES, "yolo"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_right_source_is_named(capsys, tmp_path, source, reader):
    path = write(tmp_path / "set", source)
    if reader == "labelme":
        path = tmp_path / "set"
    elif path.is_dir() and reader not in ("coco", "yolo"):
        path = path / "a.json"
    code, _, err = run(capsys, reader, path, "--output", tmp_path / "own.jsonl")
    named = f"is a file for: convert_data.py {source}" in err
    assert named == (source != reader), err
    assert code == 2 or source == reader == "labelme"


@pytest.mark.parametrize("source", [*SOURCES, "masks", "yolo"])
def test_what_is_not_read_is_named(capsys, tmp_path, source):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.json", "{}")
    photo(tmp_path / "voc/train/a.jpg")
    (tmp_path / "voc/train/a.xml").write_text("<annotation>\n<filename>a.jpg</filename></annotation>")
    (tmp_path / "panoptic.json").write_text(json.dumps({"images": [], "annotations": [{"segments_info": []}]}))
    flags = ["--output", tmp_path / "own.jsonl", *(["--images", tmp_path] if source == "masks" else [])]
    for path, message in (
        ("set.zip", "set.zip is an archive; unpack it"),
        ("panoptic.json", "panoptic.json is a panoptic COCO file"),
        ("voc/train/a.xml", "a.xml is XML of Pascal VOC or LabelMe 3.0, which is not read; export COCO"),
        ("nowhere", "nowhere does not exist; check the path"),
        ("voc", "is a folder; give the exported file" if source in ("via", "label-studio") else "voc"),
    ):
        code, _, err = run(capsys, source, tmp_path / path, *flags)
        assert code == 2
        assert message in err
    assert "XML of Pascal VOC" in err or source == "cvat"
