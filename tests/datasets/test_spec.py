"""Specs: parsing, printing, and file names."""

import pytest

from utils.datasets.spec import Spec


@pytest.mark.parametrize(
    ("text", "name", "split_by", "split", "slug"),
    [
        ("ReasonSeg|val_short", "ReasonSeg", "", "val_short", "ReasonSeg_val_short"),
        ("refcoco+|unc|testA", "refcoco+", "unc", "testA", "refcoco+_unc_testA"),
        ("custom|a/own.jsonl|val", "custom", "a/own.jsonl", "val", "custom_a_own.jsonl_val"),
        ("refcoco", "refcoco", "", "", "refcoco"),
    ],
)
def test_a_text_survives(text, name, split_by, split, slug):
    spec = Spec.parse(text)
    assert (spec.name, spec.split_by, spec.split, spec.slug) == (name, split_by, split, slug)
    assert str(spec) == text
    assert {spec: 1}[Spec.parse(text)] == 1


@pytest.mark.parametrize("text", ["", "|", "a||b", "a|b|c|d", "a|"])
def test_even_nonsense_is_shown_as_it_was_typed(text):
    assert str(Spec.parse(text)) == text


def test_several_are_joined_by_two_bars():
    assert Spec.parse_list(" ReasonSeg|val || refcoco|unc|val||") == [
        Spec("ReasonSeg", ("val",)),
        Spec("refcoco", ("unc", "val")),
    ]
    assert Spec.parse_list(" || ") == []
