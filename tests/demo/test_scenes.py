"""Synthetic scenes: exact masks and correct texts, verified by brute force over the shapes."""

from __future__ import annotations

import math
import re

import cv2
import numpy as np
import pytest

from utils.demo import scene_texts as T
from utils.demo import scenes as S

COUNT = 120
GENERATORS = (T.attribute_queries, T.reasoning_queries, T.multi_queries, T.absent_queries)


def _draw(index: int, held_out: bool = False) -> tuple[S.Scene, np.random.Generator]:
    rng = np.random.default_rng([5, int(held_out), index])
    return S.sample_scene(rng, held_out), rng


@pytest.fixture(scope="module")
def scenes() -> list[tuple[S.Scene, np.random.Generator]]:
    return [_draw(i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def held_out_scenes() -> list[tuple[S.Scene, np.random.Generator]]:
    return [_draw(i, held_out=True) for i in range(COUNT // 2)]


def _fitting(shapes: tuple[S.Shape, ...], phrase: str) -> list[int]:
    """Indices of the shapes that have every attribute word of a phrase (singular or plural)."""
    words = {re.sub(r"(?<=cross)es$|s$", "", word) if word != "cross" else word for word in phrase.split()}
    words &= {*S.SIZES, *S.TEXTURES, *S.COLORS, *S.KINDS}
    assert words, phrase
    return [i for i, shape in enumerate(shapes) if words <= set(shape.attributes)]


def _texts(scene: S.Scene, rng: np.random.Generator) -> list[str]:
    queries = [query.text for generate in GENERATORS for query in generate(scene, rng)]
    return [T.caption(scene, rng), *queries, *(text for pair in T.questions(scene, rng) for text in pair)]


def test_the_same_generator_gives_the_same_scene_and_texts():
    for held_out in (False, True):
        (scene, rng), (again, rng_again) = _draw(3, held_out), _draw(3, held_out)
        assert np.array_equal(scene.image, again.image)
        assert np.array_equal(scene.masks, again.masks)
        assert scene.shapes == again.shapes
        assert _texts(scene, rng) == _texts(again, rng_again)
    assert not np.array_equal(_draw(3)[0].masks, _draw(4)[0].masks)


def test_scenes_have_the_promised_form(scenes):
    sizes, overlaps = set(), 0
    for scene, _ in scenes:
        height, width = scene.image.shape[:2]
        sizes.add((width, height))
        assert scene.image.dtype == np.uint8
        assert max(height, width) == 120
        assert 3 <= len(scene.shapes) <= 6
        assert scene.masks.shape == (len(scene.shapes), height, width)
        assert scene.masks.dtype == bool
        assert scene.masks.sum(axis=0).max() == 1, "a pixel belongs to one shape"
        colors, kinds = ({getattr(s, name) for s in scene.shapes} for name in ("color", "kind"))
        assert min(len(colors), len(kinds)) < len(scene.shapes), "a distractor shares an attribute"
        for shape, mask in zip(scene.shapes, scene.masks):
            low, high = S.RADII[shape.size]
            assert low <= shape.radius <= high
            share = mask.sum() / shape.area
            assert 0.57 < share < 1.15, (shape, share)  # 60% of the pixels, whose number is not quite the area
            overlaps += share < 0.93
    assert len(sizes) >= 4
    assert overlaps > COUNT / 10


def test_masks_are_what_was_painted(scenes):
    """Inside a plain shape's mask pixels have its color up to noise; pixels next to all masks are gray."""
    for scene, _ in scenes:
        image = scene.image.astype(int)
        for shape, mask in zip(scene.shapes, scene.masks):
            core = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
            if shape.texture == "plain" and core.any():
                off = np.abs(image[core] - S.COLORS[shape.color]).max(axis=1) > 27
                assert off.mean() < 0.05  # the tip of a shape above may tint a pixel without owning it
        near = cv2.dilate(scene.masks.any(axis=0).astype(np.uint8), np.ones((3, 3))).astype(bool)
        assert np.ptp(image[~near], axis=1).max() < 40


def test_a_mask_is_half_coverage():
    """An axis-aligned square at integer coordinates covers exactly the pixels between its edges."""
    shape = S.Shape("square", "red", "large", "plain", (50.0, 40.0), 20 / 0.86, 0.0)
    masks, visible = S._paint_shapes(np.random.default_rng(0), np.zeros((90, 120, 3), np.uint8), (shape,), 1.0)
    expected = np.zeros((90, 120), bool)
    expected[20:60, 30:70] = True
    assert np.array_equal(masks[0], expected)
    assert visible == 1


def test_a_larger_canvas_draws_larger_shapes():
    scene = S.sample_scene(np.random.default_rng(1), long_side=240)
    assert max(scene.image.shape) == 240
    assert all(2 * S.RADII[s.size][0] <= s.radius <= 2 * S.RADII[s.size][1] for s in scene.shapes)


def test_attribute_phrases_fit_exactly_one_shape(scenes):
    helpful = total = 0
    for scene, rng in scenes:
        for query in T.attribute_queries(scene, rng):
            assert _fitting(scene.shapes, query.text) == list(query.targets), query
            assert (query.family, query.is_sentence) == ("attribute", False)
            words = set(query.text.split())
            shared = [s for i, s in enumerate(scene.shapes) if i not in query.targets and words & set(s.attributes)]
            helpful += bool(shared)
            total += 1
    assert helpful > 0.85 * total, "most phrases have a distractor that fits in part"


def test_absent_phrases_fit_nothing(scenes):
    near = total = 0
    for scene, rng in scenes:
        for query in T.absent_queries(scene, rng):
            assert query.targets == ()
            assert _fitting(scene.shapes, query.text) == [], query
            words = set(query.text.split()) & {*S.SIZES, *S.TEXTURES, *S.COLORS, *S.KINDS}
            near += words <= {word for shape in scene.shapes for word in shape.attributes}
            total += 1
    assert total > 4 * COUNT
    assert near > 0.5 * total


def test_multi_phrases_fit_what_they_name(scenes):
    for scene, rng in scenes:
        for query in T.multi_queries(scene, rng):
            assert len(query.targets) >= 2
            parts = query.text.split(" and ")
            matches = [_fitting(scene.shapes, part) for part in parts]
            if len(parts) == 2:
                assert [len(f) for f in matches] == [1, 1], query
            assert [i for f in matches for i in f] == list(query.targets), query
            number = re.match(r"the (two|three|four|five|six) ", query.text)
            if number:
                assert T.NUMBERS.index(number[1]) == len(query.targets)


def _check_relation(scene: S.Scene, query: T.Query) -> None:
    shapes, target = scene.shapes, query.targets[0]
    (reference,) = _fitting(shapes, query.text.split(" the ")[-1].rstrip("?"))
    x, y = shapes[reference].center
    others = [i for i in range(len(shapes)) if i != reference]
    far = {i: math.hypot(shapes[i].center[0] - x, shapes[i].center[1] - y) for i in others}
    if "farthest" in query.text:
        assert target == max(far, key=far.get)
    elif "nearest" in query.text or "closest" in query.text:
        assert target == min(far, key=far.get)
    else:
        word = next(w for w in ("left", "right", "above", "below") if w in query.text)
        axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[word]
        assert [i for i in others if (shapes[i].center[axis] - (x, y)[axis]) * sign > 0] == [target]


def _check_superlative(scene: S.Scene, query: T.Query) -> None:
    areas = scene.masks.sum(axis=(1, 2))
    centers = np.array([shape.center for shape in scene.shapes])
    tests = (
        (r"largest|biggest|bigger", areas),
        (r"smallest|smaller", -areas),
        (r"left", -centers[:, 0]),
        (r"right", centers[:, 0]),
        (r"top|highest", -centers[:, 1]),
        (r"bottom|lowest", centers[:, 1]),
    )
    (scores,) = [scores for pattern, scores in tests if re.search(pattern, query.text)]
    assert int(np.argmax(scores)) == query.targets[0], query


def test_questions_of_all_families_have_the_one_right_answer(scenes):
    families = {"relation": 0, "superlative": 0, "commonsense": 0}
    answers = {text: words for words, wordings in T._COMMONSENSE for text in wordings}
    for scene, rng in scenes:
        for query in T.reasoning_queries(scene, rng):
            assert query.is_sentence
            assert len(query.targets) == 1
            families[query.family] += 1
            if query.family == "relation":
                _check_relation(scene, query)
            elif query.family == "superlative":
                _check_superlative(scene, query)
            else:
                words = set(answers[query.text])
                assert [i for i, s in enumerate(scene.shapes) if words & set(s.attributes)] == list(query.targets)
    assert min(families.values()) > COUNT


def test_visual_questions_have_the_right_answer(scenes):
    for scene, rng in scenes:
        for question, answer in T.questions(scene, rng):
            body = question.rstrip("?")
            if body.startswith("how many"):
                named = {*S.SIZES, *S.TEXTURES, *S.COLORS, *S.KINDS, *map(T.plural, S.KINDS)} & set(body.split())
                count = len(_fitting(scene.shapes, body)) if named else len(scene.shapes)
                assert answer == T.NUMBERS[count], question
            elif body.startswith("is there"):
                assert answer == ("yes" if _fitting(scene.shapes, body) else "no"), question
            elif body.endswith(("small or large", "plain, striped or dotted")) or body.startswith("what"):
                subject = re.sub(r" (small or large|plain, striped or dotted)$", "", body)
                (index,) = _fitting(scene.shapes, subject)
                assert answer in scene.shapes[index].attributes, question
            else:
                first, second = (_fitting(scene.shapes, part)[0] for part in re.split(r" of | below ", body))
                axis = 0 if "left or right" in body else 1
                before = scene.shapes[first].center[axis] < scene.shapes[second].center[axis]
                assert answer == (("left", "right"), ("above", "below"))[axis][not before], question


def test_captions_name_every_shape(scenes):
    for scene, rng in scenes:
        text = T.caption(scene, rng)
        for shape in scene.shapes:
            assert f"{shape.color} {shape.kind}" in text
        assert text.count(",") + 2 == len(scene.shapes)


def test_held_out_pairs_are_neither_drawn_nor_named_elsewhere(scenes):
    assert len(S.HELD_OUT) == 6
    names = [f"{color} {kind}" for color, kind in S.HELD_OUT]
    for scene, rng in scenes:
        assert not scene.held_out
        for text in _texts(scene, rng):
            assert not any(name in text for name in names), text


def test_a_held_out_scene_is_about_its_pair(held_out_scenes):
    for scene, rng in held_out_scenes:
        special = [i for i, shape in enumerate(scene.shapes) if (shape.color, shape.kind) in S.HELD_OUT]
        assert len(special) == 1
        shape = scene.shapes[special[0]]
        queries = T.attribute_queries(scene, rng)
        assert queries
        for query in queries:
            assert list(query.targets) == special
            assert f"{shape.color} {shape.kind}" in query.text
        assert all(list(query.targets) == special for query in T.reasoning_queries(scene, rng))
        assert all(special[0] in query.targets for query in T.multi_queries(scene, rng))


def test_texts_come_from_a_small_closed_vocabulary():
    def words(seed: int, count: int) -> set[str]:
        return set(re.findall(r"[^\s?.,]+", " ".join(T.corpus(np.random.default_rng(seed), count))))

    large = words(0, 500)
    assert large == {word.lower() for word in large}
    assert 120 < len(large) < 180
    assert words(1, 100) <= large


def test_an_explanation_describes_its_target():
    scene, rng = _draw(0)
    for query in T.attribute_queries(scene, rng):
        assert query.targets[0] in _fitting(scene.shapes, T.explanation(scene, query).rstrip("."))
