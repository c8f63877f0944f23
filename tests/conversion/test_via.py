"""VIA's projects and exports, of version 1 and 2: shapes, label attributes, and images of one name."""

from __future__ import annotations

import json
import math

import pytest
from conversion.annotated_images import H, assert_masks, by_name, kinds, masks_of, photo, pixels, reasons_of

from utils.conversion.via import read_via
from utils.datasets.base import DataError


def region(label, name="rect", attribute="class", **shape):
    shape = shape or {"x": 2, "y": 3, "width": 6, "height": 6}
    attributes = {attribute: label} if attribute else {}
    return {"shape_attributes": {"name": name, **shape}, "region_attributes": attributes}


def entry(name, *regions, size=100):
    return {"filename": name, "size": size, "regions": list(regions), "file_attributes": {}}


def write(folder, *entries, project=True, **more):
    images = {f"{entry['filename']}{entry['size']}": entry for entry in entries}
    file = folder / "via.json"
    file.write_text(json.dumps({"_via_settings": {}, "_via_img_metadata": images, **more} if project else images))
    return file


@pytest.mark.parametrize("project", [True, False])
def test_shapes(tmp_path, project):
    photo(tmp_path / "a.jpg")
    shapes = [
        region("rect"),
        region("disk", "circle", cx=15, cy=10, r=5.5),
        region("oval", "ellipse", cx=20, cy=10, rx=6, ry=2, theta=math.pi / 2),
        region("patch", "polygon", all_points_x=[1, 5, 5, 1], all_points_y=[1, 1, 4, 4]),
        region("crack", "polyline", all_points_x=[1, 5], all_points_y=[1, 1]),
        region("eye", "point", cx=1, cy=1),
        region("flat", "rect", x=1, y=1, width=0, height=3),
        region("odd", "polygon", all_points_x=[1, 5, 5], all_points_y=[1, 1]),
        region("two", "polygon", all_points_x=[1, 5], all_points_y=[1, 1]),
        region("star", "star"),
        region(" "),
        {"shape_attributes": {}, "region_attributes": None},
    ]
    annotated = read_via(write(tmp_path, entry("a.jpg", *shapes), project=project))
    [image] = annotated.images
    masks = masks_of(image)
    assert masks["disk"][10, 10:20].all()
    assert abs(masks["disk"].sum() - math.pi * 5.5**2) < 8
    assert masks["oval"][5:15, 19:21].all()
    assert not masks["oval"][:, :18].any()
    assert_masks(image, {**masks, "rect": pixels(3, 2, 9, 8), "patch": pixels(1, 1, 4, 5)})
    assert set(masks) == {"rect", "disk", "oval", "patch"}
    assert reasons_of(image) == {
        "crack": "a line",
        "eye": "a point",
        "flat": "no area",
        "odd": "its points are not pairs of numbers",
        "two": "2 points",
        "star": "a shape 'star'",
        "": "region without 'class'",
    }
    assert kinds(annotated)["region without 'class'"] == 2


def test_regions_of_version_1_are_a_dictionary(tmp_path):
    photo(tmp_path / "a.jpg")
    file = write(tmp_path, {**entry("a.jpg"), "regions": {"0": region("cat"), "1": region("dog")}}, project=False)
    assert set(masks_of(read_via(file).images[0])) == {"cat", "dog"}


@pytest.mark.parametrize(("separator", "mark", "end"), [(",", "#", "\n"), (",", "", "\r\n"), (";", "", "\r")])
def test_csv(tmp_path, separator, mark, end):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b, c.jpg")

    def row(name, count, number, shape, attributes):
        fields = [name, "100", "{}", count, number, json.dumps(shape), json.dumps(attributes, ensure_ascii=False)]
        return separator.join('"' + field.replace('"', '""') + '"' for field in fields)

    columns = ["filename", "file_size", "file_attributes", "region_count", "region_id"]
    header = mark + separator.join([*columns, "region_shape_attributes", "region_attributes"])
    cat, dog = region("cat"), region("Dög\u2028x", "circle", cx=10, cy=10, r=4)
    rows = [row("a.jpg", "2", str(i), *shape.values()) for i, shape in enumerate((cat, dog))]
    file = tmp_path / "via.csv"
    text = end.join([header, *rows, row("b, c.jpg", "0", "0", {}, {}), row("a.jpg", "1", "3", "{", {"class": "owl"})])
    file.write_bytes(text.encode())
    images = by_name(read_via(file))
    assert set(masks_of(images["a.jpg"])) == {"cat", "Dög\u2028x"}
    assert_masks(images["a.jpg"], masks_of(images["a.jpg"]) | {"cat": pixels(3, 2, 9, 8)})
    assert reasons_of(images["a.jpg"]) == {"owl": "no shape attributes"}
    assert images["b, c.jpg"].annotations == []


# -- labels ------------------------------------------------------------------------------------------------------------


def test_several_attributes_need_a_choice(tmp_path):
    photo(tmp_path / "a.jpg")
    both = region("cat")
    both["region_attributes"]["age"] = "2"
    empty = region("dog")
    empty["region_attributes"]["note"] = ""  # nobody filled it in
    file = write(tmp_path, entry("a.jpg", both, empty))
    with pytest.raises(DataError, match=r"'class' \(2 regions\), 'age' \(1 regions\); name one with --attribute"):
        read_via(file)
    annotated = read_via(file, attribute="age")
    assert set(masks_of(annotated.images[0])) == {"2"}
    assert kinds(annotated) == {"region without 'age'": 1}
    with pytest.raises(DataError, match=r"no region has the attribute 'kind'; there are: 'class'"):
        read_via(file, attribute="kind")


def test_checkboxes_and_named_options(tmp_path):
    photo(tmp_path / "a.jpg")
    boxes = region({"red": True, "round": "true", "big": False})
    options = {"class": {"type": "dropdown", "options": {"1": "cat", "dog": "a dog that barks", "3": ""}}}
    file = write(
        tmp_path,
        entry("a.jpg", boxes, region("1"), region("dog"), region("3")),
        _via_attributes={"region": options, "file": {}},
    )
    assert set(masks_of(read_via(file).images[0])) == {"red", "round", "cat", "dog", "3"}


def test_regions_without_attributes_take_one_label(tmp_path):
    photo(tmp_path / "a.jpg")
    file = write(tmp_path, entry("a.jpg", region("", attribute="")))
    with pytest.raises(DataError, match="no region has an attribute that names it"):
        read_via(file)
    assert_masks(read_via(file, label="the balloon").images[0], {"the balloon": pixels(3, 2, 9, 8)})


# -- images ------------------------------------------------------------------------------------------------------------


def test_images_of_one_name_are_told_apart_by_their_size(tmp_path):
    size = photo(tmp_path / "a.jpg").stat().st_size
    file = write(tmp_path, entry("a.jpg", region("cat"), size=size), entry("a.jpg", region("dog"), size=size + 1))
    annotated = read_via(file)
    assert [set(masks_of(image)) for image in annotated.images] == [{"cat"}]
    assert kinds(annotated) == {"image that is missing": 1}
    file = write(tmp_path, entry("a.jpg", region("cat"), size=size + 2), entry("a.jpg", region("dog"), size=size + 1))
    with pytest.raises(DataError, match=r"2 images 'a.jpg'; none has"):
        read_via(file)


def test_addresses_and_missing_images(tmp_path):
    photo(tmp_path / "photos/a b.jpg")
    file = write(tmp_path, entry("https://example.org/x/a%20b.jpg", region("cat"), size=-1), entry("gone.jpg"))
    annotated = read_via(file, tmp_path / "photos")
    assert [image.path.name for image in annotated.images] == ["a b.jpg"]
    assert kinds(annotated) == {"image that is missing": 1}
    with pytest.raises(DataError, match=r"via.json: none of its images is in .*--images"):
        read_via(write(tmp_path, entry("gone.jpg")))


def test_a_broken_image_is_left_out(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    annotated = read_via(write(tmp_path, entry("a.jpg", region("cat"))))
    assert annotated.images == []
    assert kinds(annotated) == {"image that cannot be read": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"project": {"data_format_version": "3.1.1"}, "metadata": {}}', "VIA 3"),
        ('{"images": [], "annotations": []}', "'images' is no dictionary with 'filename' and 'regions'"),
        ("{}", "holds no images of VIA"),
        ('{"_via_img_metadata": []}', "holds no images of VIA"),
        ("[1]", "expected a dict"),
        ('{"a": ', "not valid JSON"),
        ("", "lacks rows or one of the columns"),
        ("filename,label\na.jpg,cat\n", "lacks rows or one of the columns"),
    ],
)
def test_refused_files(tmp_path, text, message):
    file = tmp_path / "some.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_via(file)
    assert str(file) in str(error.value)


def test_size_of_the_image_limits_points(tmp_path):
    photo(tmp_path / "a.jpg")
    file = write(tmp_path, entry("a.jpg", region("far", "rect", x=1, y=1, width=9, height=10 * H * H)))
    assert reasons_of(read_via(file).images[0]) == {"far": "a point far outside its image"}


def test_csv_with_commas_in_file_names(tmp_path):
    """VIA does not quote them."""
    for name in ("a, b.jpg", "c.jpg"):
        photo(tmp_path / name)
    shape = '"{""name"":""rect"",""x"":2,""y"":3,""width"":5,""height"":4}"'
    rows = [f'{name},9,"{{}}",1,0,{shape},"{{""class"":""cat""}}"' for name in ("a, b.jpg", "c.jpg")]
    header = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    (tmp_path / "via.csv").write_text("\n".join([header, *rows]))
    result = read_via(tmp_path / "via.csv")
    assert {name: list(masks_of(image)) for name, image in by_name(result).items()} == {
        "a, b.jpg": ["cat"],
        "c.jpg": ["cat"],
    }
