"""The image transform: exact values, and output in place into a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from model.processing.transforms import CLIP_FITS, PIXEL_MEAN, PIXEL_STD, resize_and_pad
from model.settings import PpmSettings


@pytest.mark.parametrize(("height", "width", "inside"), [(30, 40, (48, 64)), (100, 50, (64, 32)), (64, 64, (64, 64))])
def test_values(height: int, width: int, inside: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(image).resize(inside[::-1], Image.Resampling.BILINEAR))
    expected = torch.zeros(3, 64, 64)
    expected[:, : inside[0], : inside[1]] = (torch.tensor(resized).permute(2, 0, 1) - PIXEL_MEAN) / PIXEL_STD
    pixels, size = resize_and_pad(image, 64)
    assert size == inside
    assert torch.equal(pixels, expected)
    batch = torch.zeros(2, 3, 64, 64)
    assert resize_and_pad(image, 64, batch[1])[1] == inside
    assert torch.equal(batch[1], expected)
    assert not batch[0].any()


def test_every_way_to_fit_clip_can_be_set() -> None:
    assert PpmSettings.__dataclass_fields__["clip_fit"].metadata["choices"] == tuple(CLIP_FITS)


@pytest.mark.filterwarnings("error")
def test_an_array_that_cannot_be_written_gives_no_warning() -> None:
    image = np.asarray(Image.new("RGB", (64, 64), "red"))
    assert not image.flags.writeable
    assert resize_and_pad(image, 64)[1] == (64, 64)
