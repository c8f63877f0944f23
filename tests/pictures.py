"""Images of noise, as arrays and as uploaded files."""

import numpy as np
from PIL import Image


def picture(seed=0, size=(48, 64)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def upload(folder, name="photo.png", seed=0, size=(48, 64)):
    path = folder / name
    Image.fromarray(picture(seed, size)).save(path)
    return str(path)
