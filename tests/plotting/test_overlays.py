"""Pictures: colors where the masks are, sizes, and texts that stay inside their column."""

import numpy as np
import pytest
from PIL import Image

from utils.plotting import overlays
from utils.plotting.overlays import (
    TRUTH_COLOR,
    Panel,
    color,
    fit,
    font,
    overlay,
    save_picture,
    sheet,
    truth_overlay,
    wrap,
)


def gray(height, width):
    return np.full((height, width, 3), 100, np.uint8)


def make_panel(height=40, width=60, count=1, **values):
    masks = np.zeros((count, height, width), bool)
    masks[:, : height // 2] = True
    return Panel(
        gray(height, width), "the red star", masks, masks.astype(np.float32), masks.any(0).astype(np.uint8), **values
    )


def test_overlay_colors_masks_and_leaves_the_rest():
    image = gray(40, 60)
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 5:15, 5:15], masks[1, 25:35, 25:35] = True, True
    picture = overlay(image, masks)
    assert picture.dtype == np.uint8
    assert (image == 100).all()  # not changed in place
    outside = ~(masks.any(0))
    assert (picture[outside] == 100).all()
    assert tuple(picture[5, 5]) == overlays.color(0)  # the outline has the pure color
    assert tuple(picture[25, 25]) == overlays.color(1)
    assert not np.array_equal(picture[10, 10], picture[30, 30])
    expected = 100 * 0.45 + np.array(overlays.color(0)) * 0.55
    assert np.abs(picture[10, 10] - expected).max() <= 1


def test_overlay_without_masks_is_the_image():
    assert np.array_equal(overlay(gray(8, 9), np.zeros((0, 8, 9), bool)), gray(8, 9))


def test_later_fillings_do_not_hide_earlier_outlines():
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 10:30, 10:30], masks[1, 5:35, 20:50] = True, True
    assert tuple(overlay(gray(40, 60), masks)[20, 29]) == overlays.color(0)


def test_colors_repeat_only_after_the_palette_ends():
    assert len({overlays.color(n) for n in range(7)}) == 7
    assert overlays.color(7) == overlays.color(0)


def test_heat_map_runs_from_violet_to_yellow():
    values = np.linspace(0, 1, 60, dtype=np.float32)[None].repeat(40, 0)
    picture = overlays.heat_map(gray(40, 60), values, opacity=1.0).astype(int)
    low, high = picture[0, 0], picture[0, -1]
    assert low[2] > low[1]  # violet: more blue than green
    assert high[0] > 200 > 100 > high[2]  # yellow
    brightness = picture[0].sum(-1)
    assert (np.diff(brightness[::10]) > 0).all()


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (300, 500)])
def test_sheet_of_any_image_size(size):
    picture = sheet([make_panel(*size), make_panel(30, 30, count=0)], title="a title " * 40)
    assert picture.dtype == np.uint8
    assert picture.shape[0] < 800
    assert picture.shape[1] < 2500


def test_sheet_without_truth_and_maps_shows_none():
    full = sheet([make_panel()])
    bare = make_panel()
    bare.truth = bare.similarities = None
    mixed = sheet([make_panel(), bare])
    assert mixed.shape[1] == full.shape[1]
    assert not np.array_equal(mixed[-full.shape[0] // 2 :], full[-full.shape[0] // 2 :])
    assert sheet([bare]).shape[1] < full.shape[1] - 200  # no sample has a map: no column for it


def test_deviations_have_a_column_only_if_a_sample_has_any():
    plain, uncertain = make_panel(), make_panel()
    uncertain.deviations = 0.5 * uncertain.similarities
    wide = sheet([plain, uncertain])
    assert wide.shape[1] > sheet([plain]).shape[1] + 200
    certain = make_panel()
    certain.deviations = 0 * uncertain.deviations
    assert not np.array_equal(wide, sheet([plain, certain]))


def test_sheet_shows_ignored_pixels():
    panel, ignoring = make_panel(), make_panel()
    ignoring.truth[30:] = 255
    assert not np.array_equal(sheet([panel]), sheet([ignoring]))


@pytest.mark.parametrize("text", ["short", "many words " * 30, "x" * 300, "", "a " + "y" * 200 + " b", "größer ✓ Ω Ж"])
def test_wrapped_lines_fit_and_lose_nothing(text):
    lines = wrap(text, font(14), 200)
    assert all(font(14).getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_long_texts_are_cut_with_an_ellipsis():
    lines = overlays._lines(Panel(gray(5, 5), "word " * 500, np.zeros((0, 5, 5), bool)), 200)
    assert len(lines) == 6
    assert lines[-1][0].endswith("…")
    assert all(font(14).getlength(line) <= 200 for line, _ in lines)


def test_pictures_are_saved_without_loss(tmp_path):
    mask = (np.random.default_rng(0).random((33, 47)) > 0.5).astype(np.uint8) * 255
    path = tmp_path / "new" / "mask.png"
    save_picture(path, mask)
    with Image.open(path) as image:
        assert image.mode == "L"
        assert np.array_equal(np.array(image), mask)


def test_evenly_spaced_indices_run_from_the_first_to_the_last():
    assert overlays.evenly_spaced(10, 4) == [0, 3, 6, 9]
    assert overlays.evenly_spaced(3, 5) == [0, 1, 2]
    assert overlays.evenly_spaced(7, 1) == [0]
    assert overlays.evenly_spaced(0, 4) == []


def test_the_truth_of_several_targets_has_a_color_each():
    image = np.zeros((40, 60, 3), np.uint8)
    targets = np.zeros((2, 40, 60), np.uint8)
    targets[0, 5:15, 5:15], targets[1, 25:35, 40:50], targets[1, :3] = 1, 1, 255
    picture = truth_overlay(image, targets)
    shades = {
        name: picture[y, x].tolist() for name, (y, x) in {"a": (10, 10), "b": (30, 45), "ignored": (1, 30)}.items()
    }
    assert shades["a"] == [round(0.55 * value) for value in color(0)]
    assert shades["b"] == [round(0.55 * value) for value in color(1)]
    assert len(set(shades["ignored"])) == 1
    one = truth_overlay(image, targets[0])
    assert one[10, 10].tolist() == [round(0.55 * value) for value in TRUTH_COLOR]
    panel = Panel(image, "two", targets == 1, truth=targets)
    assert fit(panel, 30, 20).truth.shape == (2, 20, 30)
    assert sheet([panel]).shape[1] > 200
