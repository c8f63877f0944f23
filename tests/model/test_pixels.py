"""Images of every kind become uint8 RGB of the right brightness, or an error that names them; none runs a program."""

from __future__ import annotations

import ast
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.processing.pixels import FORMATS, ORIENTATION, as_pixels, read_pixels
from utils.datasets import DataError
from utils.datasets.images import read_label_image

ROOT = Path(__file__).resolve().parents[2]
RAMP = np.linspace(0, 1, 48).reshape(6, 8)  # brightness, dark to light


def saved(folder: Path, values: np.ndarray | Image.Image, name: str) -> Path:
    path = folder / name
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(path)
    return path


@pytest.mark.parametrize(
    ("high", "dtype", "name"),
    [
        (255, np.uint8, "a.png"),
        (65535, np.uint16, "a.png"),
        (65535, ">u2", "a.tif"),
        (4095, np.uint16, "a.png"),  # 12 bits in 16
        (4095, np.uint16, "a.tif"),
        (1023, np.uint16, "a.png"),  # 10
        (16383, np.uint16, "a.tif"),  # 14
        (65535, np.int32, "a.tif"),
        (4095, np.int32, "a.tif"),
        (1, np.float32, "a.tif"),
        (255, np.float32, "a.tif"),
        (4095, np.float32, "a.tif"),
        (65535, np.float32, "a.tif"),
    ],
)
def test_brightness_of_gray_images(tmp_path: Path, high: int, dtype: object, name: str) -> None:
    values = RAMP * high if dtype is np.float32 else np.round(RAMP * high)
    pixels = read_pixels(saved(tmp_path, values.astype(dtype), name), apply_exif=False)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (6, 8, 3))
    assert np.abs(pixels / 255 - RAMP[..., None]).max() < 1.01 / 255


@pytest.mark.parametrize("high", [65535, 16383, 4095, 1023])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_brightness_of_rgb_with_16_bits(tmp_path: Path, high: int, suffix: str) -> None:
    cv2 = pytest.importorskip("cv2")
    colors = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
    path = tmp_path / f"a.{suffix}"
    assert cv2.imwrite(str(path), np.round(colors[..., ::-1] * high).astype(np.uint16))
    assert np.abs(read_pixels(path, apply_exif=False) / 255 - colors).max() < 1.01 / 255


@pytest.mark.parametrize(
    ("image", "name", "color"),
    [
        (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "a.jpg", (254, 0, 0)),
        (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "a.tif", (255, 0, 0)),
        (Image.new("LA", (8, 6), (100, 255)), "a.png", (100, 100, 100)),
        (Image.new("LA", (8, 6), (100, 0)), "a.png", (255, 255, 255)),
        (Image.new("RGBA", (8, 6), (255, 0, 0, 0)), "a.webp", (255, 255, 255)),
        (Image.new("1", (8, 6), 1), "a.png", (255, 255, 255)),
        (Image.new("1", (8, 6), 1), "a.tif", (255, 255, 255)),
        (Image.new("YCbCr", (8, 6), (255, 128, 128)), "a.jpg", (255, 255, 255)),
        (Image.new("RGB", (8, 6), (9, 200, 30)).quantize(4), "a.gif", (9, 200, 30)),
        (Image.new("RGB", (8, 6), (9, 200, 30)), "a.bmp", (9, 200, 30)),
    ],
)
def test_colors_of_other_modes(tmp_path: Path, image: Image.Image, name: str, color: tuple[int, int, int]) -> None:
    pixels = read_pixels(saved(tmp_path, image, name), apply_exif=False)
    assert pixels.shape == (6, 8, 3)
    assert pixels[0, 0].tolist() == pytest.approx(list(color), abs=1)


def test_transparency_of_a_palette_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 6), 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert read_pixels(tmp_path / "a.png", False)[0, :2].tolist() == [[255, 255, 255], [10, 20, 30]]


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.webp", "a.png", "a.mpo"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, name: str) -> None:
    first, second = (Image.new("RGB", (8, 6), color) for color in ((250, 0, 0), (0, 0, 250)))
    first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
    assert read_pixels(tmp_path / name, apply_exif=False)[3, 3].tolist() == pytest.approx([250, 0, 0], abs=6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((6, 8), 70000, np.int32), r"a\.tif cannot be decoded \(its values range from 0 to 70000"),
        (np.full((6, 8), -3, np.int32), "range from -3 to 0"),
        (np.full((6, 8), np.inf, np.float32), "range from 0 to 1.79"),
        (np.full((6, 8), -0.5, np.float32), "range from -0.5 to 0"),
    ],
)
def test_values_out_of_range_are_an_error(tmp_path: Path, values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pixels(saved(tmp_path, values, "a.tif"), apply_exif=False)


# -- arrays and PIL images ---------------------------------------------------------------------------------------------


def test_arrays() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    assert as_pixels(rgb) is rgb
    for dtype in (np.float16, np.float32, np.float64):
        assert np.array_equal(as_pixels((rgb / 255).astype(dtype)), rgb)
    gray = rgb[..., 0]
    assert np.array_equal(as_pixels(gray), np.repeat(gray[..., None], 3, axis=2))
    assert np.array_equal(as_pixels(gray / 255), as_pixels(gray))
    opaque = np.dstack([rgb, np.full((6, 8), 255, np.uint8)])
    assert np.array_equal(as_pixels(opaque), rgb)
    assert (as_pixels(opaque * np.array([1, 1, 1, 0], np.uint8)) == 255).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((6, 8, 3), 128.0), r"floats from 128 to 128; give .*float in \[0, 1\]"),
        (np.full((6, 8, 3), -0.1), "floats from -0.1 to -0.1"),
        (np.full((6, 8, 3), np.nan), "floats from nan to nan"),
        (np.zeros((6, 8, 3), np.uint16), "the image is uint16"),
        (np.zeros((6, 8, 3), bool), "the image is bool"),
        (np.zeros((6, 8, 2), np.uint8), r"\[6, 8, 2\]"),
        (np.zeros((3, 6, 8), np.uint8), r"\[3, 6, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"\[0, 8, 3\]"),
        ([[1]], "the image is a list"),
    ],
)
def test_other_arrays_are_an_error(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_pixels(image)  # type: ignore[arg-type]


def test_pil_images_of_16_bits() -> None:
    image = Image.fromarray(np.round(RAMP * 4095).astype(np.uint16))
    assert np.abs(as_pixels(image)[..., 0] / 255 - RAMP).max() < 1.01 / 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_rgb_of_12_bits(tmp_path: Path, orientation: int) -> None:
    """As the same image with 8 bits."""
    cv2 = pytest.importorskip("cv2")
    colors = np.round(np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2) * 4095).astype(np.uint16)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), colors[..., ::-1])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray((colors >> 4).astype(np.uint8)).save(tmp_path / "b.png", exif=exif)
    raw, chunk = path.read_bytes(), exif.tobytes().removeprefix(b"Exif\0\0")
    extra = len(chunk).to_bytes(4, "big") + b"eXIf" + chunk + zlib.crc32(b"eXIf" + chunk).to_bytes(4, "big")
    path.write_bytes(raw[:33] + extra + raw[33:])
    for apply_exif in (True, False):
        assert np.array_equal(read_pixels(path, apply_exif), read_pixels(tmp_path / "b.png", apply_exif))


# -- formats -----------------------------------------------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 160 120\n%%EndComments\n{} loop\n"


def test_postscript_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand it to Ghostscript, which runs it as a program: this one never ends."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "loop.jpg"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(ValueError, match=r"loop\.jpg cannot be decoded .*JPEG, PNG, WEBP, BMP, GIF, TIFF are read"):
        read_pixels(path, apply_exif=True)
    with pytest.raises(DataError, match=r"label image .*loop\.jpg cannot be decoded"):
        read_label_image(path)
    assert "EPS" not in FORMATS


def test_every_image_is_opened_with_a_list_of_formats() -> None:
    calls, missing = 0, []
    files = [
        *ROOT.glob("*.py"),
        *(path for part in ("model", "utils", "scripts") for path in (ROOT / part).rglob("*.py")),
    ]
    for path in files:
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                calls += 1
                if "formats" not in {keyword.arg for keyword in node.keywords}:
                    missing.append(f"{place}:{node.lineno}")
    assert calls >= 5
    assert not missing
