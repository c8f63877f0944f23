"""Texts about synthetic scenes, with known answers.

Generated from the shapes of a scene: phrases that refer to exactly one shape, questions that require reasoning, phrases
that refer to several shapes or none, captions, and questions with short answers. Everything is a function of the random
generator passed in.

Margins make the answers visually unambiguous: "largest", "leftmost" or "farthest" is asked only if the runner-up is
clearly behind. The pairs of ``HELD_OUT`` are named in held-out scenes only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from utils.demo.scenes import (
    COLORS,
    HELD_OUT,
    KINDS,
    NEW_KINDS,
    SIZES,
    TEXTURES,
    Scene,
    Shape,
    one_of,
    sample_scene,
    shuffled,
)

MAX_TEXTS = 8


@dataclass(frozen=True)
class Query:
    """A text and the indices of its target shapes (empty = absent), and of the shape that a relation names."""

    text: str
    targets: tuple[int, ...]
    family: str
    is_sentence: bool
    reference: int | None = None


# ------------------------------------------------------------------------------------------------------------ words

_NOUNS = ("shape", "object", "thing")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
_SUBSETS = tuple(s for k in range(1, 5) for s in combinations(range(4), k))
# Relative frequency of the attributes in a phrase (positions in size, texture, color, kind); color and kind dominate.
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
    """Maps each attribute word to the shapes that have it, as a bit mask."""
    table: dict[str, int] = {}
    for index, shape in enumerate(shapes):
        for word in shape.attributes:
            table[word] = table.get(word, 0) | 1 << index
    return table


def _matches(bits: dict[str, int], words: tuple[str, ...]) -> int:
    """Bit mask of the shapes that have all words."""
    matches = -1
    for word in words:
        matches &= bits.get(word, 0)
    return matches


def _members(matches: int) -> tuple[int, ...]:
    return tuple(i for i in range(matches.bit_length()) if matches >> i & 1)


def _noun_phrase(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """Joins the words; adds a general noun if none of them is a kind."""
    text = " ".join(words)
    return text if words[-1] in KINDS + NEW_KINDS else f"{text} {one_of(rng, _NOUNS)}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _with_article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def _distinguishing_words(shapes: tuple[Shape, ...], bits: dict[str, int]) -> dict[int, list[tuple[str, ...]]]:
    """Per shape, the combinations of its words that identify it uniquely."""
    names: dict[int, list[tuple[str, ...]]] = {}
    for index, shape in enumerate(shapes):
        words = shape.attributes
        candidates = [tuple(words[p] for p in subset) for subset in _SUBSETS]
        names[index] = [name for name in candidates if _matches(bits, name) == 1 << index]
    return names


def short_names(rng: np.random.Generator, shapes: tuple[Shape, ...]) -> dict[int, str]:
    """A unique phrase for each shape that has one: color and kind if they identify it, else the shortest."""
    names = {}
    for index, unique in _distinguishing_words(shapes, _bits(shapes)).items():
        shape = shapes[index]
        if not unique:
            continue
        pair = (shape.color, shape.kind)
        names[index] = "the " + _noun_phrase(rng, pair if pair in unique else unique[0])
    return names


# ---------------------------------------------------------------------------------------------------------- queries


def attribute_queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """Noun phrases that refer to exactly one shape ("the small striped circle"); most match others in part."""
    bits = _bits(scene.shapes)
    ranked = []
    for index, shape in enumerate(scene.shapes):
        if scene.held_out and not shape.held_out:
            continue
        words = shape.attributes
        for subset in _SUBSETS:
            if scene.held_out and not {2, 3} <= set(subset):
                continue  # texts of a held-out scene name the held-out pair
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
    """Phrases like those of ``attribute_queries`` that match no shape; most of their words match some shape."""
    bits = _bits(scene.shapes)
    texts: dict[str, Query] = {}
    for _ in range(3 * MAX_TEXTS):
        near = rng.random() < 0.8
        words = [one_of(rng, scene.shapes).attributes[p] for p in range(4)]
        if not near:
            words = [one_of(rng, options) for options in (SIZES, TEXTURES, tuple(COLORS), KINDS)]
        if (words[2], words[3]) in HELD_OUT:
            continue
        name = tuple(words[p] for p in one_of(rng, _ABSENT_SUBSETS))
        if _matches(bits, name):
            continue
        text = _noun_phrase(rng, name)
        text = text if rng.random() < 0.2 else f"the {text}"
        texts[text] = Query(text, (), "absent", False)
        if len(texts) == MAX_TEXTS:
            break
    return list(texts.values())


def multi_queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """Phrases that refer to two or more shapes but not all: shapes with shared attributes, or two named shapes."""
    shapes, bits = scene.shapes, _bits(scene.shapes)
    everything = (1 << len(shapes)) - 1
    groups: dict[str, tuple[str, ...]] = {word: (word,) for word in bits if word != "plain"}
    groups |= {f"{s.size} {s.kind}": (s.size, s.kind) for s in shapes}
    groups |= {f"{s.size} {s.color}": (s.size, s.color) for s in shapes}
    groups |= {f"{s.color} {s.kind}": (s.color, s.kind) for s in shapes}
    queries = []
    for words in groups.values():
        matches = _matches(bits, words)
        if matches == everything or matches.bit_count() < 2:
            continue
        one, number = _noun_phrase(rng, words), NUMBERS[matches.bit_count()]
        forms = [f"all the {plural(one)}", f"every {one}", f"the {number} {plural(one)}", f"all {plural(one)}"]
        queries.append(Query(one_of(rng, forms), _members(matches), "multi", False))
    names = short_names(rng, shapes)
    pairs = [(i, j) for i in names for j in names if i != j]
    for i, j in shuffled(rng, pairs)[: MAX_TEXTS // 2]:
        queries.append(Query(f"{names[i]} and {names[j]}", (i, j), "multi", False))
    if scene.held_out:
        queries = [q for q in queries if any(shapes[i].held_out for i in q.targets)]
    return shuffled(rng, queries)[:MAX_TEXTS]


def reasoning_queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """Questions with exactly one answer: relations to a named shape, superlatives, common sense."""
    queries = []
    for family in (relation_queries, _superlatives, _commonsense):
        candidates = family(scene, rng)
        if scene.held_out:
            candidates = [q for q in candidates if scene.shapes[q.targets[0]].held_out]
        queries += shuffled(rng, candidates)[:3]
    return shuffled(rng, queries)[:MAX_TEXTS]


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
_DISTANCES = {"farthest": _FARTHEST, "nearest": _NEAREST}
_SIDES = (  # axis, direction, wordings: the target is the only shape on that side of the named one
    (0, -1, ("what is to the left of {name}?", "which {noun} is left of {name}?")),
    (0, 1, ("what is to the right of {name}?", "which {noun} is right of {name}?")),
    (1, -1, ("what is above {name}?", "which {noun} is above {name}?")),
    (1, 1, ("what is below {name}?", "which {noun} is below {name}?")),
)


def relation_queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """Questions about the position of a shape relative to a named one."""
    shapes, unit = scene.shapes, max(scene.image.shape) / 120
    queries = []
    names = short_names(rng, shapes)

    def ask(wordings, reference: int, target: int) -> None:
        text = one_of(rng, wordings).format(noun=one_of(rng, _NOUNS), name=names[reference])
        queries.append(Query(text, (target,), "relation", True, reference))

    for index in names:
        for distance, target in extreme_distances(scene, index).items():
            ask(_DISTANCES[distance], index, target)
        for axis, direction, wordings in _SIDES:
            position, others = shapes[index].center[axis], [i for i in range(len(shapes)) if i != index]
            steps = sorted(((shapes[i].center[axis] - position) * direction, i) for i in others)
            if steps[-1][0] > 12 * unit and steps[-2][0] < 0:
                ask(wordings, index, steps[-1][1])
    return queries


def extreme_distances(scene: Scene, index: int) -> dict[str, int]:
    """The shapes that are clearly ``farthest`` from shape ``index``, and ``nearest`` to it; a key may be missing."""
    shapes, unit = scene.shapes, max(scene.image.shape) / 120
    x, y = shapes[index].center
    others = sorted((math.hypot(s.center[0] - x, s.center[1] - y), i) for i, s in enumerate(shapes) if i != index)
    extremes = {}
    if others[-1][0] - others[-2][0] > 12 * unit:
        extremes["farthest"] = others[-1][1]
    if others[1][0] - others[0][0] > 12 * unit:
        extremes["nearest"] = others[0][1]
    return extremes


_LARGEST = (
    "which {noun} is the largest?",
    "what is the biggest {noun}?",
    "which {noun} is bigger than all the others?",
)
_SMALLEST = ("which {noun} is the smallest?", "what is the smallest {noun}?", "what is smaller than all the others?")
_EXTREMES = (
    (0, -1, "leftmost", ("which {noun} is farthest to the left?", "what is the leftmost {noun}?")),
    (0, 1, "rightmost", ("which {noun} is farthest to the right?", "what is the rightmost {noun}?")),
    (
        1,
        -1,
        "topmost",
        ("which {noun} is at the very top?", "what is the topmost {noun}?", "what is the highest {noun}?"),
    ),
    (1, 1, "lowest", ("which {noun} is at the very bottom?", "what is the lowest {noun}?")),
)
_SUPERLATIVES = {"largest": _LARGEST, "smallest": _SMALLEST} | {word: wordings for *_, word, wordings in _EXTREMES}


def _superlatives(scene: Scene, rng: np.random.Generator) -> list[Query]:
    queries = []
    for word, target in superlatives(scene).items():
        text = one_of(rng, _SUPERLATIVES[word]).format(noun=one_of(rng, _NOUNS))
        queries.append(Query(text, (target,), "superlative", True))
    return queries


def superlatives(scene: Scene) -> dict[str, int]:
    """Superlative -> the shape that clearly is it; those that no shape clearly is are missing."""
    shapes, unit = scene.shapes, max(scene.image.shape) / 120
    targets = {}
    order = by_size(scene, range(len(shapes)))
    if is_larger(scene, order[-1], order[:-1]):
        targets["largest"] = order[-1]
    if all(is_larger(scene, i, order[:1]) for i in order[1:]):
        targets["smallest"] = order[0]
    for axis, direction, word, _ in _EXTREMES:
        positions = sorted((s.center[axis] * direction, i) for i, s in enumerate(shapes))
        edges = [s.center[axis] * direction + s.reach for s in shapes]
        (runner_up, _), (position, index) = positions[-2:]
        # Both its center and its edge must be outermost.
        if position - runner_up > 8 * unit and edges[index] >= max(edges) - 0.5:
            targets[word] = index
    return targets


def by_size(scene: Scene, indices: Iterable[int]) -> list[int]:
    """The shapes by their radius, the smallest first."""
    return sorted(indices, key=lambda i: scene.shapes[i].radius)


def is_larger(scene: Scene, index: int, others: Iterable[int]) -> bool:
    """Whether a shape is clearly larger than the others: by radius, whole and visible area, however one reads it."""
    shape, visible = scene.shapes[index], scene.masks.sum(axis=(1, 2)).tolist()
    return all(
        shape.radius > 1.2 * scene.shapes[i].radius
        and shape.area > 1.3 * scene.shapes[i].area
        and visible[index] > 1.15 * visible[i]
        for i in others
    )


_COMMONSENSE = (  # attribute words, and questions that any of them answers
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
        matches = 0
        for word in words:
            matches |= bits.get(word, 0)
        if matches.bit_count() == 1:
            queries.append(Query(one_of(rng, wordings), _members(matches), "commonsense", True))
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
    """A text answer to a query with one target: all attributes of that shape."""
    shape = scene.shapes[query.targets[0]]
    return "it is the " + " ".join(word for word in shape.attributes if word != "plain") + "."


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence that lists the shapes in reading order, with color and kind, sometimes also size and texture."""
    band = scene.image.shape[0] / 3
    order = sorted(scene.shapes, key=lambda s: (int(s.center[1] / band), s.center[0]))
    with_size, with_texture = rng.random() < 0.4, rng.random() < 0.5
    parts = []
    for shape in order:
        words = [shape.size] if with_size else []
        words += [shape.texture] if with_texture and shape.texture != "plain" else []
        parts.append(_with_article(" ".join([*words, shape.color, shape.kind])))
    return one_of(rng, _CAPTIONS).format(", ".join(parts[:-1]) + " and " + parts[-1])


def questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions with one-word answers: counts, attributes, existence, and relative positions."""
    shapes, bits = scene.shapes, _bits(scene.shapes)
    pairs = [_counting(scene, rng, bits) for _ in range(2)] + _yes_or_no(scene, rng, bits)
    for index, unique in _distinguishing_words(shapes, bits).items():
        short = [name for name in unique if len(name) < 4]
        if short:
            pairs.append(_attribute_question(rng, shapes[index], one_of(rng, short)))
    names = short_names(rng, shapes)
    couples = shuffled(rng, [(i, j) for i in names for j in names if i != j])[:2]
    unit = max(scene.image.shape) / 120
    for i, j in couples:
        dx, dy = (a - b for a, b in zip(shapes[i].center, shapes[j].center))
        if abs(dx) > max(12 * unit, abs(dy)):
            pairs.append((f"is {names[i]} left or right of {names[j]}?", "left" if dx < 0 else "right"))
        elif abs(dy) > max(12 * unit, abs(dx)):
            pairs.append((f"is {names[i]} above or below {names[j]}?", "above" if dy < 0 else "below"))
    return shuffled(rng, list(dict(pairs).items()))[:MAX_TEXTS]


def _counting(scene: Scene, rng: np.random.Generator, bits: dict[str, int]) -> tuple[str, str]:
    word = one_of(rng, [*KINDS, *COLORS, "striped", "dotted", *bits, *bits, ""])
    if not word or word == "plain":
        return f"how many {plural(one_of(rng, _NOUNS))} are there?", NUMBERS[len(scene.shapes)]
    noun = plural(_noun_phrase(rng, (word,)))
    return f"how many {noun} are there?", NUMBERS[_matches(bits, (word,)).bit_count()]


def _yes_or_no(scene: Scene, rng: np.random.Generator, bits: dict[str, int]) -> list[tuple[str, str]]:
    """Questions such as "is there a red star?": one about a present shape and one about an absent combination."""
    shape = one_of(rng, scene.shapes)
    pairs = [(f"is there {_with_article(f'{shape.color} {shape.kind}')}?", "yes")]
    for _ in range(4):
        name = (one_of(rng, scene.shapes).color, one_of(rng, KINDS))
        if not _matches(bits, name) and name not in HELD_OUT:
            return [*pairs, (f"is there {_with_article(' '.join(name))}?", "no")]
    return pairs


def _attribute_question(rng: np.random.Generator, shape: Shape, name: tuple[str, ...]) -> tuple[str, str]:
    """Asks for an attribute of a shape that its name does not contain."""
    text = "the " + _noun_phrase(rng, name)
    candidates = [
        (shape.color, f"what color is {text}?"),
        (shape.kind, f"what shape is {text}?"),
        (shape.size, f"is {text} small or large?"),
        (shape.texture, f"is {text} plain, striped or dotted?"),
    ]
    return one_of(rng, [(question, word) for word, question in candidates if word not in name])


def corpus(rng: np.random.Generator, n: int) -> Iterator[str]:
    """Yields all texts about ``n`` scenes, to train a tokenizer. 500 scenes contain the whole vocabulary."""
    for _ in range(n):
        scene = sample_scene(rng)
        yield one_of(rng, CAPTION_REQUESTS)
        yield caption(scene, rng)
        for generate in (attribute_queries, reasoning_queries, multi_queries, absent_queries):
            yield from (query.text for query in generate(scene, rng))
        yield from (explanation(scene, query) for query in attribute_queries(scene, rng)[:1])
        for question, answer in questions(scene, rng):
            yield question
            yield answer
