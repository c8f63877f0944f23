"""Synthetic scenes with exact masks: a few colored shapes on a noisy gray background.

Everything is a function of the random generator passed in. ``utils/demo/scene_texts.py`` generates texts about scenes.
``scripts/dev/pretrain_tiny.py`` samples scenes on the fly, ``scripts/make_demo_data.py`` writes them in the formats of
the real data sets. The (color, kind) pairs of ``HELD_OUT`` occur in held-out scenes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

KINDS = ("circle", "square", "triangle", "star", "cross", "diamond")
NEW_KINDS = ("heart",)  # in no pre-training and no demo data: what fine-tuning may teach (utils/demo/new_shape.py)
COLORS = {
    "red": (222, 30, 38),
    "green": (36, 170, 52),
    "blue": (32, 66, 226),
    "yellow": (248, 226, 36),
    "purple": (146, 44, 178),
    "orange": (252, 134, 14),
    "cyan": (40, 214, 226),
    "white": (248, 248, 248),
}
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
HELD_OUT = frozenset(
    {
        ("blue", "star"),
        ("green", "triangle"),
        ("purple", "circle"),
        ("yellow", "cross"),
        ("orange", "square"),
        ("cyan", "diamond"),
    }
)
RADII = {"small": (8.0, 10.5), "large": (16.0, 21.0)}  # px on a canvas whose long side is 120
MIN_VISIBLE = 0.6

_CANVASES = ((1.0, 1.0),) * 6 + ((1.0, 0.75), (0.75, 1.0), (1.0, 0.8), (0.8, 1.0))  # (width, height) / long side
_TEXTURE_ODDS = ("plain",) * 3 + ("striped", "dotted")
_SUPERSAMPLING = 8
_TILT = math.radians(5)


@dataclass(frozen=True)
class Shape:
    """A shape in a scene; ``center`` (x, y) and ``radius`` in pixels, ``angle`` in radians (a few degrees at most)."""

    kind: str
    color: str
    size: str
    texture: str
    center: tuple[float, float]
    radius: float
    angle: float

    @property
    def held_out(self) -> bool:
        """Whether its pair of color and kind is excluded from ordinary scenes."""
        return (self.color, self.kind) in HELD_OUT

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """Size, texture, color and kind, in the order of the words in a phrase."""
        return self.size, self.texture, self.color, self.kind

    @property
    def reach(self) -> float:
        """Largest coordinate distance of its outline from the center, in pixels."""
        return self.radius * _REACH[self.kind]

    @property
    def area(self) -> float:
        """Area of the whole shape in square pixels, including hidden parts."""
        return self.radius**2 * _AREA[self.kind]


@dataclass
class Scene:
    """An image with its shapes and their masks.

    Attributes:
        image: [H, W, 3] uint8, RGB.
        shapes: n shapes in drawing order (a later one may hide a part of an earlier one).
        masks: [n, H, W] bool, the visible pixels of each shape: those that it covers by at least half.
    """

    image: np.ndarray
    shapes: tuple[Shape, ...]
    masks: np.ndarray

    @property
    def held_out(self) -> bool:
        """Whether a shape of the scene is a held-out pair; all texts are then about that shape."""
        return any(shape.held_out for shape in self.shapes)


def _outlines() -> dict[str, np.ndarray]:
    """Outline [K, 2] of each kind for radius 1, scaled so that kinds of equal radius look about equally large."""

    def ring(radii: list[float], start: float = -math.pi / 2) -> np.ndarray:
        angles = start + 2 * math.pi * np.arange(len(radii)) / len(radii)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(radii)[:, None]

    arm, half = 1.1, 0.36
    corner = [(half, -arm), (half, -half), (arm, -half)]  # a quarter of the cross, then turned three times
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    quarters = [np.array(corner) @ np.linalg.matrix_power(turn, k) for k in range(4)]
    return {
        "circle": ring([0.97] * 40),
        "square": np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]),
        "triangle": ring([1.28] * 3) + np.array([0.0, 0.2]),
        "star": ring([1.32, 0.54] * 5),
        "cross": np.concatenate(quarters),
        "diamond": np.array([(0.0, -1.36), (0.82, 0.0), (0.0, 1.36), (-0.82, 0.0)]),
        "heart": _heart(),
    }


def _heart() -> np.ndarray:
    t = 2 * math.pi * np.arange(40) / 40
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -2.5 - y], axis=1) * 0.069


def _polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


_OUTLINES = _outlines()
_REACH = {kind: float(np.abs(points).max()) for kind, points in _OUTLINES.items()}
_AREA = {kind: _polygon_area(points) for kind, points in _OUTLINES.items()}


def one_of(rng: np.random.Generator, options):
    return options[int(rng.random() * len(options))]


def shuffled(rng: np.random.Generator, items: list) -> list:
    return [items[i] for i in rng.permutation(len(items))] if items else []


def sample_scene(
    rng: np.random.Generator, held_out: bool = False, long_side: int = 120, kinds: tuple[str, ...] = KINDS
) -> Scene:
    """Samples and renders a scene of 3 to 6 shapes, each at least 60% visible, some of which share attributes.

    Args:
        rng: the only source of randomness.
        held_out: whether exactly one shape has a (color, kind) pair of ``HELD_OUT``; otherwise none has.
        long_side: of the canvas, in pixels; shapes scale with it.
        kinds: the kinds to draw from; one listed twice is drawn twice as often.
    """
    while True:
        across, down = one_of(rng, _CANVASES)
        width, height = round(across * long_side), round(down * long_side)
        shapes = _place(rng, _attributes(rng, held_out, kinds), width, height, long_side / 120)
        if len(shapes) < 3 or held_out != any(shape.held_out for shape in shapes) or not _some_share(shapes):
            continue
        image = _background(rng, width, height)
        masks, visible = _paint_shapes(rng, image, shapes, long_side / 120)
        if visible < MIN_VISIBLE:
            continue
        noise = np.frombuffer(rng.bytes(height * width), np.uint8).reshape(height, width) & 15
        cv2.add(image, cv2.merge([noise, noise, noise]), dst=image)
        return Scene(image, shapes, masks)


def _some_share(shapes: tuple[Shape, ...]) -> bool:
    return any(len({getattr(s, name) for s in shapes}) < len(shapes) for name in ("color", "kind"))


def _attributes(rng: np.random.Generator, held_out: bool, kinds: tuple[str, ...]) -> list[tuple[str, str, str, str]]:
    """Samples attributes of 3 to 6 shapes; most copy color or kind (or both) from an earlier shape."""
    count = 3 + int(rng.random() * 4)
    names = tuple(COLORS)
    pairs = [one_of(rng, sorted(HELD_OUT))] if held_out else []
    while len(pairs) < count:
        color, kind = one_of(rng, names), one_of(rng, kinds)
        u = rng.random()
        if pairs and u < 0.3:
            color = one_of(rng, pairs)[0]
        elif pairs and u < 0.6:
            kind = one_of(rng, pairs)[1]
        elif pairs and u < 0.66:
            color, kind = one_of(rng, pairs)
        if (color, kind) not in HELD_OUT:
            pairs.append((color, kind))
    attributes = []
    for color, kind in shuffled(rng, pairs):
        size, texture = one_of(rng, SIZES), one_of(rng, _TEXTURE_ODDS)
        slender = size == "small" and kind in ("star", "cross")  # too thin to distinguish stripes from dots
        attributes.append((size, "plain" if slender else texture, color, kind))
    return attributes


def _place(rng: np.random.Generator, attributes: list, width: int, height: int, scale: float) -> tuple[Shape, ...]:
    """Samples a position for each shape within the canvas, with little overlap; drops shapes that do not fit."""
    shapes: list[Shape] = []
    for size, texture, color, kind in attributes:
        low, high = RADII[size]
        radius = (low + (high - low) * rng.random()) * scale
        reach = radius * _REACH[kind] + 1
        partner = one_of(rng, shapes) if shapes and rng.random() < 0.3 else None
        for x, y in rng.random((12, 2)).tolist():
            if partner:  # somewhere on its rim
                distance, angle = (0.7 + 0.2 * x) * (radius + partner.radius), 2 * math.pi * y
                x = min(max(partner.center[0] + distance * math.cos(angle), reach), width - reach)
                y = min(max(partner.center[1] + distance * math.sin(angle), reach), height - reach)
            else:
                x, y = reach + x * (width - 2 * reach), reach + y * (height - 2 * reach)
            if all(
                math.hypot(x - s.center[0], y - s.center[1]) > _closeness(s, color, s is partner) * (radius + s.radius)
                for s in shapes
            ):
                tilt = (2 * rng.random() - 1) * _TILT
                shapes.append(Shape(kind, color, size, texture, (x, y), radius, tilt))
                break
    return tuple(shapes)


def _closeness(other: Shape, color: str, may_overlap: bool) -> float:
    """Minimum distance of the centers of a shape of ``color`` and another shape, in units of the sum of their radii."""
    if other.color == color:
        return 1.3  # never touching: the border between them would be invisible
    return 0.68 if may_overlap else 1.0


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Background [H, W, 3], uint8: gray with a slight tint, a random gradient, and soft blotches."""
    cells = 10
    slope = (rng.random(2) - 0.5) * 50
    ramp = np.linspace(-1, 1, cells)
    field = (70 + 65 * rng.random()) + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    field = field + 9 * rng.standard_normal((cells, cells))
    field = field[:, :, None] + (rng.random(3) - 0.5) * 18
    coarse = np.clip(field, 30, 165).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def _paint_shapes(rng: np.random.Generator, image: np.ndarray, shapes: tuple[Shape, ...], scale: float):
    """Renders ``shapes`` onto ``image`` in place -> (visible masks [n, H, W] bool, smallest visible share)."""
    height, width = image.shape[:2]
    masks = np.zeros((len(shapes), height, width), bool)
    wholes = []
    for index, shape in enumerate(shapes):
        x0, y0 = (int(c - shape.reach * 1.1) - 1 for c in shape.center)
        x0, y0 = max(x0, 0), max(y0, 0)
        side = int(shape.reach * 2.2) + 4
        rows, columns = slice(y0, min(y0 + side, height)), slice(x0, min(x0 + side, width))
        window = image[rows, columns]
        coverage = _coverage(shape, x0, y0, *window.shape[:2])
        inside = coverage >= 128
        masks[:index, rows, columns] &= ~inside
        masks[index, rows, columns] = inside
        wholes.append(int(np.count_nonzero(inside)))
        paint = _surface(rng, shape, inside, scale)
        alpha = coverage.astype(np.float32)[:, :, None] * (1 / 255)
        window[:] = window + alpha * (paint - window) + 0.5
    visible = masks.reshape(len(shapes), -1).sum(axis=1) / np.array(wholes)
    return masks, float(visible.min())


def _coverage(shape: Shape, x0: int, y0: int, height: int, width: int) -> np.ndarray:
    """Coverage [h, w], uint8, of each pixel of a window at (x0, y0) by the shape; 255 = fully covered."""
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    points = _OUTLINES[shape.kind] @ np.array([[cos, sin], [-sin, cos]]) * shape.radius
    points += (shape.center[0] - x0, shape.center[1] - y0)
    # Pixel (0, 0) of OpenCV is centered at 0, ours spans 0 to 1: hence the half pixel at the finer scale.
    fine = np.rint((points * _SUPERSAMPLING - 0.5) * 16).astype(np.int32)
    canvas = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    cv2.fillPoly(canvas, [fine], 255, lineType=cv2.LINE_8, shift=4)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)


def _surface(rng: np.random.Generator, shape: Shape, inside: np.ndarray, scale: float) -> np.ndarray:
    """Surface color of a window whose mask is ``inside`` [h, w] -> [h, w, 3] or [1, 1, 3] float32.

    Dark stripes or dots on the shape's color, except on a rim of one pixel, so that the outline stays visible.
    """
    color = np.array(COLORS[shape.color], np.float32) + (rng.random(3, np.float32) - 0.5) * 20
    color = np.clip(color, 0, 248).reshape(1, 1, 3)
    if shape.texture == "plain":
        return color
    x = np.arange(inside.shape[1], dtype=np.float32)[None, :]
    y = np.arange(inside.shape[0], dtype=np.float32)[:, None]
    if shape.texture == "striped":
        period, angle = 5.5 * scale, rng.random() * math.pi
        dark = (x * math.cos(angle) + y * math.sin(angle) + rng.random() * period) % period < 0.45 * period
    else:
        period = 6.0 * scale
        u = (x + rng.random() * period) % period - period / 2
        v = (y + rng.random() * period) % period - period / 2
        dark = u * u + v * v < (0.31 * period) ** 2
    dark &= cv2.erode(inside.view(np.uint8), np.ones((3, 3), np.uint8), borderValue=0).view(bool)
    return np.where(dark[:, :, None], color * 0.3, color)
