"""Drawn scenes with exact masks, and texts about them whose answers are known.

A scene is a few colored shapes on a noisy gray background. From its shapes alone follow short phrases that fit exactly
one of them, questions that take a thought, phrases that fit several or none, captions, and questions with short
answers. Everything is a function of the generator that is passed in. ``scripts/pretrain_tiny.py`` draws scenes on the
fly, ``scripts/make_demo_data.py`` writes them in the formats of the real data sets.

Margins keep the texts true to the eye: "largest", "leftmost" or "farthest" is asked only where the runner-up is clearly
behind. The pairs of ``HELD_OUT`` are never drawn or named unless a held-out scene is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np

KINDS = ("circle", "square", "triangle", "star", "cross", "diamond")
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
MAX_TEXTS = 8

_CANVASES = ((1.0, 1.0),) * 6 + ((1.0, 0.75), (0.75, 1.0), (1.0, 0.8), (0.8, 1.0))  # (width, height) / long side
_TEXTURE_ODDS = ("plain",) * 3 + ("striped", "dotted")
_SUPERSAMPLING = 8
_TILT = math.radians(5)


@dataclass(frozen=True)
class Shape:
    """One drawn shape; ``center`` (x, y) and ``radius`` in pixels, ``angle`` in radians (a few degrees at most)."""

    kind: str
    color: str
    size: str
    texture: str
    center: tuple[float, float]
    radius: float
    angle: float

    @property
    def held_out(self) -> bool:
        """Whether this pair of color and kind is kept out of ordinary scenes."""
        return (self.color, self.kind) in HELD_OUT

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """Size, texture, color and kind: the order of the words in a phrase."""
        return self.size, self.texture, self.color, self.kind

    @property
    def reach(self) -> float:
        """The distance of the outermost point from the center, in pixels."""
        return self.radius * _REACH[self.kind]

    @property
    def area(self) -> float:
        """The area of the whole shape in square pixels, whatever hides it."""
        return self.radius**2 * _AREA[self.kind]


@dataclass
class Scene:
    """An image and what is in it.

    Attributes:
        image: [H, W, 3] uint8, RGB.
        shapes: n shapes in drawing order (a later one may hide a part of an earlier one).
        masks: [n, H, W] bool, the visible pixels of each shape: those it covers by half or more.
    """

    image: np.ndarray
    shapes: tuple[Shape, ...]
    masks: np.ndarray

    @property
    def held_out(self) -> bool:
        """Whether a pair of ``HELD_OUT`` is in the scene; its texts are then about that shape."""
        return any(shape.held_out for shape in self.shapes)


@dataclass(frozen=True)
class Query:
    """A text and the indices of the shapes that it means (none: absent)."""

    text: str
    targets: tuple[int, ...]
    family: str
    is_sentence: bool


# ---------------------------------------------------------------------------------------------------------- drawing


def _outlines() -> dict[str, np.ndarray]:
    """Outline [K, 2] per kind for radius 1, scaled so that kinds of one radius look about equally large."""

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
    }


def _polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


_OUTLINES = _outlines()
_REACH = {kind: float(np.abs(points).max()) for kind, points in _OUTLINES.items()}
_AREA = {kind: _polygon_area(points) for kind, points in _OUTLINES.items()}


def _pick(rng: np.random.Generator, options):
    return options[int(rng.random() * len(options))]


def _shuffled(rng: np.random.Generator, items: list) -> list:
    return [items[i] for i in rng.permutation(len(items))] if items else []


def draw_scene(rng: np.random.Generator, held_out: bool = False, long_side: int = 120) -> Scene:
    """Draws 3 to 6 shapes, each at least 60% visible, some of which share attributes.

    Args:
        rng: the only source of chance.
        held_out: exactly one shape has a pair of color and kind of ``HELD_OUT``; otherwise none has.
        long_side: of the canvas, in pixels; shapes grow with it.
    """
    while True:
        across, down = _pick(rng, _CANVASES)
        width, height = round(across * long_side), round(down * long_side)
        shapes = _place(rng, _attributes(rng, held_out), width, height, long_side / 120)
        if len(shapes) < 3 or held_out != any(shape.held_out for shape in shapes) or not _some_share(shapes):
            continue
        image = _background(rng, width, height)
        masks, visible = _paint(rng, image, shapes, long_side / 120)
        if visible < MIN_VISIBLE:
            continue
        noise = np.frombuffer(rng.bytes(height * width), np.uint8).reshape(height, width) & 15
        cv2.add(image, cv2.merge([noise, noise, noise]), dst=image)
        return Scene(image, shapes, masks)


def _some_share(shapes: tuple[Shape, ...]) -> bool:
    return any(len({getattr(s, name) for s in shapes}) < len(shapes) for name in ("color", "kind"))


def _attributes(rng: np.random.Generator, held_out: bool) -> list[tuple[str, str, str, str]]:
    """Size, texture, color and kind of 3 to 6 shapes; most take color or kind (or both) from an earlier one."""
    count = 3 + int(rng.random() * 4)
    names = tuple(COLORS)
    pairs = [_pick(rng, sorted(HELD_OUT))] if held_out else []
    while len(pairs) < count:
        color, kind = _pick(rng, names), _pick(rng, KINDS)
        luck = rng.random()
        if pairs and luck < 0.3:
            color = _pick(rng, pairs)[0]
        elif pairs and luck < 0.6:
            kind = _pick(rng, pairs)[1]
        elif pairs and luck < 0.66:
            color, kind = _pick(rng, pairs)
        if (color, kind) not in HELD_OUT:
            pairs.append((color, kind))
    attributes = []
    for color, kind in _shuffled(rng, pairs):
        size, texture = _pick(rng, SIZES), _pick(rng, _TEXTURE_ODDS)
        slender = size == "small" and kind in ("star", "cross")  # too thin to tell stripes from dots
        attributes.append((size, "plain" if slender else texture, color, kind))
    return attributes


def _place(rng: np.random.Generator, attributes: list, width: int, height: int, scale: float) -> tuple[Shape, ...]:
    """Finds a place for each shape, inside the canvas, at most slightly over another; leaves out what finds none."""
    shapes: list[Shape] = []
    for size, texture, color, kind in attributes:
        low, high = RADII[size]
        radius = (low + (high - low) * rng.random()) * scale
        reach = radius * _REACH[kind] + 1
        partner = _pick(rng, shapes) if shapes and rng.random() < 0.3 else None
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
    """How near a shape of ``color`` may come to another: the distance of the centers in sums of the radii."""
    if other.color == color:
        return 1.3  # never touching: nobody could see where the one ends
    return 0.68 if may_overlap else 1.0


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """[H, W, 3] uint8: gray with a slight tint, a gradient in some direction, and soft blotches."""
    cells = 10
    slope = (rng.random(2) - 0.5) * 50
    ramp = np.linspace(-1, 1, cells)
    field = (70 + 65 * rng.random()) + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    field = field + 9 * rng.standard_normal((cells, cells))
    field = field[:, :, None] + (rng.random(3) - 0.5) * 18
    coarse = np.clip(field, 30, 165).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def _paint(rng: np.random.Generator, image: np.ndarray, shapes: tuple[Shape, ...], scale: float):
    """Paints ``shapes`` onto ``image`` in place -> (visible masks [n, H, W] bool, the smallest visible share)."""
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
    """[h, w] uint8: how much of each pixel of a window at (x0, y0) the shape covers, 255 = all."""
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    points = _OUTLINES[shape.kind] @ np.array([[cos, sin], [-sin, cos]]) * shape.radius
    points += (shape.center[0] - x0, shape.center[1] - y0)
    # Pixel (0, 0) of OpenCV is centered at 0, ours spans 0 to 1: hence the half pixel at the finer scale.
    fine = np.rint((points * _SUPERSAMPLING - 0.5) * 16).astype(np.int32)
    canvas = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    cv2.fillPoly(canvas, [fine], 255, lineType=cv2.LINE_8, shift=4)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)


def _surface(rng: np.random.Generator, shape: Shape, inside: np.ndarray, scale: float) -> np.ndarray:
    """Color per pixel of a window whose mask is ``inside`` [h, w] -> [h, w, 3] or [1, 1, 3] float32.

    Dark stripes or dots on the shape's color, which keeps a rim of one pixel, so that its outline stays clear.
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


# ------------------------------------------------------------------------------------------------------------ words

_NOUNS = ("shape", "object", "thing")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
_SUBSETS = tuple(s for k in range(1, 5) for s in combinations(range(4), k))
# How often a phrase names which attributes (positions in size, texture, color, kind): color and kind come first.
_SUBSET_ODDS = {
    (2, 3): 6.0,
    (0, 2, 3): 3.0,
    (0, 3): 2.5,
    (1, 3): 2.5,
    (1, 2, 3): 2.5,
    (0, 2): 2.0,
    (1, 2): 1.5,
    (3,): 1.5,
    (2,): 1.5,
}


def _bits(shapes: tuple[Shape, ...]) -> dict[str, int]:
    """For each attribute word, the shapes that have it, as the bits of a number."""
    table: dict[str, int] = {}
    for index, shape in enumerate(shapes):
        for word in shape.attributes:
            table[word] = table.get(word, 0) | 1 << index
    return table


def _matches(bits: dict[str, int], words: tuple[str, ...]) -> int:
    found = -1
    for word in words:
        found &= bits.get(word, 0)
    return found


def _members(found: int) -> tuple[int, ...]:
    return tuple(i for i in range(found.bit_length()) if found >> i & 1)


def _noun_phrase(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """The words in order, closed by a general noun when no kind is among them."""
    text = " ".join(words)
    return text if words[-1] in KINDS else f"{text} {_pick(rng, _NOUNS)}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _with_article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def _names(shapes: tuple[Shape, ...], bits: dict[str, int]) -> dict[int, list[tuple[str, ...]]]:
    """Per shape, the sets of its words that no other shape has all of."""
    names: dict[int, list[tuple[str, ...]]] = {}
    for index, shape in enumerate(shapes):
        words = shape.attributes
        found = [tuple(words[p] for p in subset) for subset in _SUBSETS]
        names[index] = [name for name in found if _matches(bits, name) == 1 << index]
    return names


def _short_names(rng: np.random.Generator, shapes: tuple[Shape, ...], bits: dict[str, int]) -> dict[int, str]:
    """For each shape that can be named, a unique phrase: color and kind where they do, else the shortest."""
    names = {}
    for index, found in _names(shapes, bits).items():
        shape = shapes[index]
        if not found:
            continue
        pair = (shape.color, shape.kind)
        names[index] = "the " + _noun_phrase(rng, pair if pair in found else found[0])
    return names


# ---------------------------------------------------------------------------------------------------------- queries


def attribute_queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """Noun phrases that fit exactly one shape ("the small striped circle"), mostly such that others fit in part."""
    bits = _bits(scene.shapes)
    ranked = []
    for index, shape in enumerate(scene.shapes):
        if scene.held_out and not shape.held_out:
            continue
        words = shape.attributes
        for subset in _SUBSETS:
            if scene.held_out and not {2, 3} <= set(subset):
                continue  # the held-out pair is what such a scene is about
            name = tuple(words[p] for p in subset)
            if _matches(bits, name) != 1 << index:
                continue
            shared = sum(bits[word] != 1 << index for word in name)
            minimal = shared == len(name)
            odds = _SUBSET_ODDS.get(subset, 1.0) * (0.3 + shared) * (1.0 if minimal else 0.5)
            ranked.append((rng.random() ** (1 / odds), index, name))
    ranked.sort(reverse=True)
    queries = []
    for _, index, name in ranked[:MAX_TEXTS]:
        text = _noun_phrase(rng, name)
        queries.append(Query(text if rng.random() < 0.2 else f"the {text}", (index,), "attribute", False))
    return queries


_ABSENT_SUBSETS = ((2, 3),) * 5 + ((0, 2, 3), (1, 2, 3), (0, 3), (1, 3), (0, 2))


def absent_queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """Phrases like those of ``attribute_queries`` that fit no shape; most words of most of them fit some shape."""
    bits = _bits(scene.shapes)
    texts: dict[str, Query] = {}
    for _ in range(3 * MAX_TEXTS):
        near = rng.random() < 0.8
        words = [_pick(rng, scene.shapes).attributes[p] for p in range(4)]
        if not near:
            words = [_pick(rng, options) for options in (SIZES, TEXTURES, tuple(COLORS), KINDS)]
        if (words[2], words[3]) in HELD_OUT:
            continue
        name = tuple(words[p] for p in _pick(rng, _ABSENT_SUBSETS))
        if _matches(bits, name):
            continue
        text = _noun_phrase(rng, name)
        text = text if rng.random() < 0.2 else f"the {text}"
        texts[text] = Query(text, (), "absent", False)
        if len(texts) == MAX_TEXTS:
            break
    return list(texts.values())


def multi_queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """Phrases for two or more shapes, though not for all: one kind of them, or two named ones."""
    shapes, bits = scene.shapes, _bits(scene.shapes)
    everything = (1 << len(shapes)) - 1
    groups: dict[str, tuple[str, ...]] = {word: (word,) for word in bits if word != "plain"}
    groups |= {f"{s.size} {s.kind}": (s.size, s.kind) for s in shapes}
    groups |= {f"{s.size} {s.color}": (s.size, s.color) for s in shapes}
    groups |= {f"{s.color} {s.kind}": (s.color, s.kind) for s in shapes}
    queries = []
    for words in groups.values():
        found = _matches(bits, words)
        if found == everything or found.bit_count() < 2:
            continue
        one, number = _noun_phrase(rng, words), _NUMBERS[found.bit_count()]
        forms = [f"all the {_plural(one)}", f"every {one}", f"the {number} {_plural(one)}", f"all {_plural(one)}"]
        queries.append(Query(_pick(rng, forms), _members(found), "multi", False))
    names = _short_names(rng, shapes, bits)
    pairs = [(i, j) for i in names for j in names if i != j]
    for i, j in _shuffled(rng, pairs)[: MAX_TEXTS // 2]:
        queries.append(Query(f"{names[i]} and {names[j]}", (i, j), "multi", False))
    if scene.held_out:
        queries = [q for q in queries if any(shapes[i].held_out for i in q.targets)]
    return _shuffled(rng, queries)[:MAX_TEXTS]


def reasoning_queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """Whole questions with exactly one answer: relations to a named shape, superlatives, common sense."""
    queries = []
    for family in (_relations, _superlatives, _commonsense):
        found = family(scene, rng)
        if scene.held_out:
            found = [q for q in found if scene.shapes[q.targets[0]].held_out]
        queries += _shuffled(rng, found)[:3]
    return _shuffled(rng, queries)[:MAX_TEXTS]


_FARTHEST = (
    "which {noun} is farthest from {name}?",
    "which {noun} is the farthest away from {name}?",
    "what is farthest from {name}?",
)
_NEAREST = (
    "which {noun} is nearest to {name}?",
    "which {noun} is closest to {name}?",
    "what is nearest to {name}?",
)
_SIDES = (  # axis, direction, wordings: the target is the only shape on that side of the named one
    (0, -1, ("what is to the left of {name}?", "which {noun} is left of {name}?")),
    (0, 1, ("what is to the right of {name}?", "which {noun} is right of {name}?")),
    (1, -1, ("what is above {name}?", "which {noun} is above {name}?")),
    (1, 1, ("what is below {name}?", "which {noun} is below {name}?")),
)


def _relations(scene: Scene, rng: np.random.Generator) -> list[Query]:
    shapes, unit = scene.shapes, max(scene.image.shape) / 120
    queries = []

    def ask(wordings, name: str, target: int) -> None:
        text = _pick(rng, wordings).format(noun=_pick(rng, _NOUNS), name=name)
        queries.append(Query(text, (target,), "relation", True))

    for index, name in _short_names(rng, shapes, _bits(shapes)).items():
        x, y = shapes[index].center
        others = [(math.hypot(s.center[0] - x, s.center[1] - y), i) for i, s in enumerate(shapes) if i != index]
        others.sort()
        if others[-1][0] - others[-2][0] > 12 * unit:
            ask(_FARTHEST, name, others[-1][1])
        if others[1][0] - others[0][0] > 12 * unit:
            ask(_NEAREST, name, others[0][1])
        for axis, direction, wordings in _SIDES:
            steps = sorted(((shapes[i].center[axis] - (x, y)[axis]) * direction, i) for _, i in others)
            if steps[-1][0] > 12 * unit and steps[-2][0] < 0:
                ask(wordings, name, steps[-1][1])
    return queries


_LARGEST = (
    "which {noun} is the largest?",
    "what is the biggest {noun}?",
    "which {noun} is bigger than all the others?",
)
_SMALLEST = ("which {noun} is the smallest?", "what is the smallest {noun}?", "what is smaller than all the others?")
_EXTREMES = (
    (0, -1, ("which {noun} is farthest to the left?", "what is the leftmost {noun}?")),
    (0, 1, ("which {noun} is farthest to the right?", "what is the rightmost {noun}?")),
    (1, -1, ("which {noun} is at the very top?", "what is the topmost {noun}?", "what is the highest {noun}?")),
    (1, 1, ("which {noun} is at the very bottom?", "what is the lowest {noun}?")),
)


def _superlatives(scene: Scene, rng: np.random.Generator) -> list[Query]:
    shapes, unit = scene.shapes, max(scene.image.shape) / 120
    queries = []

    def ask(wordings, target: int) -> None:
        queries.append(Query(_pick(rng, wordings).format(noun=_pick(rng, _NOUNS)), (target,), "superlative", True))

    visible = scene.masks.sum(axis=(1, 2)).tolist()
    # Radius, whole area and visible area must agree, so that no reading of "large" gives another answer.
    order = sorted(range(len(shapes)), key=lambda i: shapes[i].radius)
    first, second, before_last, last = order[0], order[1], order[-2], order[-1]
    if shapes[last].radius > 1.2 * shapes[before_last].radius and all(
        shapes[last].area > 1.3 * shapes[i].area and visible[last] > 1.15 * visible[i] for i in order[:-1]
    ):
        ask(_LARGEST, last)
    if shapes[second].radius > 1.2 * shapes[first].radius and all(
        shapes[i].area > 1.3 * shapes[first].area and visible[i] > 1.15 * visible[first] for i in order[1:]
    ):
        ask(_SMALLEST, first)
    for axis, direction, wordings in _EXTREMES:
        places = sorted((s.center[axis] * direction, i) for i, s in enumerate(shapes))
        edges = [s.center[axis] * direction + s.reach for s in shapes]
        (runner_up, _), (place, index) = places[-2:]
        # Its center and its edge must both be the outermost.
        if place - runner_up > 8 * unit and edges[index] >= max(edges) - 0.5:
            ask(wordings, index)
    return queries


_COMMONSENSE = (  # attribute words, any of which answers the questions beside them
    (("circle",), ("which object could roll down a hill?", "which shape has no corners?", "what looks like a wheel?")),
    (("triangle",), ("which shape has exactly three corners?", "what looks like a mountain?")),
    (("star",), ("which shape shines in the night sky?", "what could sit on top of a christmas tree?")),
    (("cross",), ("which shape looks like a plus sign?", "which shape could mark a hospital?")),
    (("square",), ("which shape looks like a box?", "what could be a window?")),
    (("diamond",), ("which shape looks like a kite?", "what looks like a precious gem?")),
    (("square", "diamond"), ("which shape has exactly four corners?",)),
    (("green",), ("which object has the color of grass?", "what has the color of a leaf?")),
    (("yellow",), ("which object has the color of a ripe banana?", "what has the color of a lemon?")),
    (("red",), ("which object has the color of a tomato?", "what has the color of a fire truck?")),
    (("white",), ("which object has the color of snow?", "what has the color of milk?")),
    (("orange",), ("which object has the color of a carrot?", "what has the color of a pumpkin?")),
    (("purple",), ("which object has the color of a plum?", "what has the color of grapes?")),
    (("striped",), ("which object has stripes like a zebra?",)),
    (("dotted",), ("which object has spots like a leopard?",)),
)


def _commonsense(scene: Scene, rng: np.random.Generator) -> list[Query]:
    bits = _bits(scene.shapes)
    queries = []
    for words, wordings in _COMMONSENSE:
        found = 0
        for word in words:
            found |= bits.get(word, 0)
        if found.bit_count() == 1:
            queries.append(Query(_pick(rng, wordings), _members(found), "commonsense", True))
    return queries


# ----------------------------------------------------------------------------------------------- captions, questions

_CAPTIONS = (
    "there is {}.",
    "the picture shows {}.",
    "an image of {}.",
    "here you can see {}.",
    "a scene with {}.",
)
CAPTION_REQUESTS = (
    "describe the picture.",
    "what can you see in this image?",
    "what is in the picture?",
    "describe this scene.",
)


def explanation(scene: Scene, query: Query) -> str:
    """A text answer to a query with one target: that shape in full."""
    shape = scene.shapes[query.targets[0]]
    return "it is the " + " ".join(word for word in shape.attributes if word != "plain") + "."


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence that lists the shapes in reading order, with color and kind, sometimes size and texture too."""
    band = scene.image.shape[0] / 3
    order = sorted(scene.shapes, key=lambda s: (int(s.center[1] / band), s.center[0]))
    with_size, with_texture = rng.random() < 0.4, rng.random() < 0.5
    parts = []
    for shape in order:
        words = [shape.size] if with_size else []
        words += [shape.texture] if with_texture and shape.texture != "plain" else []
        parts.append(_with_article(" ".join([*words, shape.color, shape.kind])))
    return _pick(rng, _CAPTIONS).format(", ".join(parts[:-1]) + " and " + parts[-1])


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions with an answer of one word: counts, what a named shape is like, what there is, what is where."""
    shapes, bits = scene.shapes, _bits(scene.shapes)
    pairs = [_counting(scene, rng, bits) for _ in range(2)] + _yes_or_no(scene, rng, bits)
    for index, found in _names(shapes, bits).items():
        found = [name for name in found if len(name) < 4]
        if found:
            pairs.append(_attribute_question(rng, shapes[index], _pick(rng, found)))
    names = _short_names(rng, shapes, bits)
    couples = _shuffled(rng, [(i, j) for i in names for j in names if i != j])[:2]
    unit = max(scene.image.shape) / 120
    for i, j in couples:
        dx, dy = (a - b for a, b in zip(shapes[i].center, shapes[j].center))
        if abs(dx) > max(12 * unit, abs(dy)):
            pairs.append((f"is {names[i]} left or right of {names[j]}?", "left" if dx < 0 else "right"))
        elif abs(dy) > max(12 * unit, abs(dx)):
            pairs.append((f"is {names[i]} above or below {names[j]}?", "above" if dy < 0 else "below"))
    return _shuffled(rng, list(dict(pairs).items()))[:MAX_TEXTS]


def _counting(scene: Scene, rng: np.random.Generator, bits: dict[str, int]) -> tuple[str, str]:
    word = _pick(rng, [*KINDS, *COLORS, "striped", "dotted", *bits, *bits, ""])
    if not word or word == "plain":
        return f"how many {_plural(_pick(rng, _NOUNS))} are there?", _NUMBERS[len(scene.shapes)]
    noun = _plural(_noun_phrase(rng, (word,)))
    return f"how many {noun} are there?", _NUMBERS[_matches(bits, (word,)).bit_count()]


def _yes_or_no(scene: Scene, rng: np.random.Generator, bits: dict[str, int]) -> list[tuple[str, str]]:
    """ "is there a red star?": one that is there and one whose color and kind are there, but not together."""
    shape = _pick(rng, scene.shapes)
    pairs = [(f"is there {_with_article(f'{shape.color} {shape.kind}')}?", "yes")]
    for _ in range(4):
        name = (_pick(rng, scene.shapes).color, _pick(rng, KINDS))
        if not _matches(bits, name) and name not in HELD_OUT:
            return [*pairs, (f"is there {_with_article(' '.join(name))}?", "no")]
    return pairs


def _attribute_question(rng: np.random.Generator, shape: Shape, name: tuple[str, ...]) -> tuple[str, str]:
    """Asks for an attribute of a shape that its name does not give away."""
    text = "the " + _noun_phrase(rng, name)
    asked = [
        (shape.color, f"what color is {text}?"),
        (shape.kind, f"what shape is {text}?"),
        (shape.size, f"is {text} small or large?"),
        (shape.texture, f"is {text} plain, striped or dotted?"),
    ]
    return _pick(rng, [(question, word) for word, question in asked if word not in name])


def corpus(rng: np.random.Generator, n: int) -> Iterator[str]:
    """All texts about ``n`` scenes: what a tokenizer has to know. 500 scenes hold every word that there is."""
    for _ in range(n):
        scene = draw_scene(rng)
        yield _pick(rng, CAPTION_REQUESTS)
        yield caption(scene, rng)
        for generate in (attribute_queries, reasoning_queries, multi_queries, absent_queries):
            yield from (query.text for query in generate(scene, rng))
        yield from (explanation(scene, query) for query in attribute_queries(scene, rng)[:1])
        for question, answer in questions(scene, rng):
            yield question
            yield answer
