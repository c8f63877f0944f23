"""CVAT's XML: images with every shape, subsets, masks, frames of videos, and files that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from conversion.annotated_images import H, W, assert_masks, by_name, kinds, masks_of, photo, pixels, reasons_of

from utils.conversion.cvat import read_cvat
from utils.datasets.base import DataError


def image(name, *shapes, more=""):
    return f'<image id="0" name="{name}" width="{W}" height="{H}" {more}>{"".join(shapes)}</image>'


def box(label, x0, y0, x1, y1, more="", inner=""):
    return f'<box label="{label}" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}" occluded="0" {more}>{inner}</box>'


def write(folder, *children, name="annotations.xml"):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    text = (
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{"".join(children)}</annotations>'
    )
    file.write_text(text, encoding="utf-8")
    return file


def test_shapes(tmp_path):
    photo(tmp_path / "images/a.jpg")
    mask = '<mask label="mask" rle="1, 2, 2, 4" left="4" top="2" width="3" height="3" occluded="0"></mask>'
    shapes = [
        box("box", "2.00", "3.00", "8.00", "9.00"),
        box("turned", 10, 8, 20, 12, 'rotation="90.00"'),
        '<ellipse label="disk" cx="20" cy="10" rx="6" ry="2" rotation="90"></ellipse>',
        '<polygon label="patch" points="1.00,1.00;5.00,1.00;5.00,4.00;1.00,4.00"></polygon>',
        mask,
        '<polyline label="crack" points="1,1;5,5"></polyline>',
        '<points label="eye" points="1,1"></points>',
        '<cuboid label="crate" xtl1="1"></cuboid>',
        '<skeleton label="man"><points label="1" points="3,3"></points></skeleton>',
        '<tag label="night"></tag>',
        box("flat", 1, 1, 9, 1),
        box("  ", 1, 1, 9, 9),
        '<polygon label="far" points="1,1;90000,1;1,9"></polygon>',
        '<polygon label="cut" points="1,1;9,"></polygon>',
        '<mask label="short" rle="1, 2" left="0" top="0" width="3" height="3"></mask>',
    ]
    annotated = read_cvat(write(tmp_path, image("a.jpg", *shapes)))
    [found] = annotated.images
    assert found.path == tmp_path / "images/a.jpg"
    assert found.size == (H, W)
    disk = masks_of(found)["disk"]
    assert disk[5:15, 19:21].all()
    assert not disk[:4].any()
    assert not disk[:, :18].any()
    expected_mask = np.zeros((H, W), np.uint8)
    expected_mask[2, 5:7] = expected_mask[3, 6] = 0
    expected_mask[2:5, 4:7] = [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    expected = {
        "box": pixels(3, 2, 9, 8),
        "turned": pixels(5, 13, 15, 17),
        "disk": disk,
        "patch": pixels(1, 1, 4, 5),
        "mask": expected_mask,
    }
    assert_masks(found, expected)
    assert reasons_of(found) == {
        "crack": "a line",
        "eye": "points",
        "crate": "a cuboid",
        "man": "a skeleton",
        "night": "a tag of the whole image",
        "flat": "no area",
        "far": "a point far outside its image",
        "cut": "its points are not pairs of numbers",
        "short": "a mask whose run lengths do not fill its box",
        "": "shape without label",
    }
    assert kinds(annotated)["shape without label"] == 1
    assert sum(kinds(annotated).values()) == 10


def test_subsets_of_a_project(tmp_path):
    photo(tmp_path / "images/train/a.jpg", grey=10)
    photo(tmp_path / "images/test/a.jpg", grey=20)
    photo(tmp_path / "images/default/b.jpg", grey=30)
    file = write(
        tmp_path,
        image("a.jpg", box("cat", 0, 0, 4, 4), more='subset="train" task_id="1"'),
        image("a.jpg", box("dog", 0, 0, 8, 8), more='subset="test" task_id="2"'),
        image("b.jpg", more='subset="default" task_id="2"'),
    )
    found = {(image.path.parent.name, image.split): list(masks_of(image)) for image in read_cvat(file).images}
    assert found == {("train", "train"): ["cat"], ("test", "test"): ["dog"], ("default", ""): []}


def test_folder_of_an_export_and_images_elsewhere(tmp_path):
    photo(tmp_path / "photos/deep/a.jpg")
    write(tmp_path / "export", image("C:\\data\\deep\\a.jpg", box("cat", 0, 0, 4, 4)), image("gone.jpg"))
    annotated = read_cvat(tmp_path / "export", tmp_path / "photos")
    assert [image.path.name for image in annotated.images] == ["a.jpg"]
    assert kinds(annotated) == {"image that is missing": 1}
    with pytest.raises(DataError, match=r"annotations.xml: none of its images is in .*--images"):
        read_cvat(tmp_path / "export")


def test_an_image_of_another_size_is_left_out(tmp_path):
    photo(tmp_path / "a.jpg", 50, 50)
    photo(tmp_path / "b.jpg", W, H)
    annotated = read_cvat(write(tmp_path, image("a.jpg", box("cat", 0, 0, 4, 4)), image("b.jpg")))
    assert [image.path.name for image in annotated.images] == ["b.jpg"]  # turned by EXIF, perhaps; told later
    assert kinds(annotated) == {"image of another size than its annotations were made for": 1}


def test_an_attribute_as_the_label(tmp_path):
    photo(tmp_path / "a.jpg")
    caption = '<attribute name="caption"> the red cat </attribute><attribute name="age">2</attribute>'
    file = write(tmp_path, image("a.jpg", box("cat", 0, 0, 4, 4, inner=caption), box("cat", 5, 5, 9, 9)))
    annotated = read_cvat(file, attribute="caption")
    assert_masks(annotated.images[0], {"the red cat": pixels(0, 0, 4, 4)})
    assert kinds(annotated) == {"shape without attribute 'caption'": 1}
    with pytest.raises(DataError, match="no shape has an attribute 'colour'; there are: age, caption"):
        read_cvat(file, attribute="colour")


# -- videos ------------------------------------------------------------------------------------------------------------

META = f"""<meta><task><id>7</id><mode>interpolation</mode><start_frame>0</start_frame><stop_frame>4</stop_frame>
<labels><label><name>car</name><color>#fa3253</color></label></labels>
<original_size><width>{W}</width><height>{H}</height></original_size></task></meta>"""


def frame_box(frame, x0, outside=0):
    more = f'frame="{frame}" keyframe="1" outside="{outside}"'
    return f'<box {more} xtl="{x0}" ytl="0" xbr="{x0 + 4}" ybr="4"></box>'


def test_tracks(tmp_path):
    for number in (0, 1, 2, 4):
        photo(tmp_path / f"images/frame_{number:06d}.PNG")
    car = [frame_box(0, 0), frame_box(1, 2), frame_box(3, 4, outside=1)]
    file = write(
        tmp_path,
        META,
        f'<track id="0" label="car">{"".join(car)}</track>',
        f'<track id="1" label="bus">{frame_box(3, 0)}{frame_box(4, 6)}</track>',
    )
    annotated = read_cvat(file)
    images = by_name(annotated)
    assert_masks(images["frame_000000.PNG"], {"car": pixels(0, 0, 4, 4)})
    assert_masks(images["frame_000001.PNG"], {"car": pixels(0, 2, 4, 6)})
    assert reasons_of(images["frame_000002.PNG"]) == {"car": "between two keyframes"}
    assert_masks(images["frame_000004.PNG"], {"bus": pixels(0, 6, 4, 10)})
    assert reasons_of(images["frame_000004.PNG"]) == {}  # the car has left
    assert kinds(annotated)["shape in a frame that is not there as an image"] == 1


def test_frames_counted_from_one_are_refused(tmp_path):
    for number in range(1, 6):
        photo(tmp_path / f"frame_{number:06d}.png")
    file = write(tmp_path, META, f'<track id="0" label="car">{frame_box(1, 0)}</track>')
    with pytest.raises(DataError, match=r"frame_000005.png is beyond the last frame, 4, .*-start_number 0"):
        read_cvat(file)


def test_tracks_without_frames_and_of_several_tasks(tmp_path):
    track = '<track id="0" label="car" task_id="{}"></track>'
    file = write(tmp_path, META, track.format(1))
    with pytest.raises(DataError, match="or the like is below"):
        read_cvat(file)
    photo(tmp_path / "frame_000000.png")
    file = write(tmp_path, META, track.format(1), track.format(2))
    with pytest.raises(DataError, match="tracks of several tasks"):
        read_cvat(file)


def test_frames_of_a_video_exported_as_images_have_no_suffix(tmp_path):
    photo(tmp_path / "images/frame_000003.PNG")
    [found] = read_cvat(write(tmp_path, image("frame_000003", box("car", 0, 0, 4, 4)))).images
    assert found.path.name == "frame_000003.PNG"


# -- files that are refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>', "DOCTYPE"),
        ("<annotation><filename>a.jpg</filename></annotation>", "its root is 'annotation'"),
        ("<annotations><image id='0'", "not XML"),
        ("{}", "not XML"),
        ("", "not XML"),
        ("<annotations></annotations>", "neither images nor tracks"),
    ],
)
def test_refused_files(tmp_path, text, message):
    file = tmp_path / "some.xml"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read_cvat(file)
    assert str(file) in str(error.value)


def test_the_file_declares_its_encoding(tmp_path):
    photo(tmp_path / "a.jpg")
    file = write(tmp_path, image("a.jpg", box("Löwe", 0, 0, 4, 4)))
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("utf-8", "utf-16"), encoding="utf-16")
    assert set(masks_of(read_cvat(file).images[0])) == {"Löwe"}
    file.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="not XML"):
        read_cvat(file)
    assert set(masks_of(read_cvat(file, encoding="latin-1").images[0])) == {"Löwe"}
    with pytest.raises(DataError, match="not XML"):
        read_cvat(file, encoding="klingon")
