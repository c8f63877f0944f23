"""Words of messages."""

import pytest

from utils.wording import counted


@pytest.mark.parametrize(
    ("number", "nouns", "expected"),
    [
        (0, ("image",), "0 images"),
        (1, ("image",), "1 image"),
        (2500, ("mask",), "2,500 masks"),
        (1, ("query", "queries"), "1 query"),
        (2, ("query", "queries"), "2 queries"),
    ],
)
def test_one_and_many(number, nouns, expected):
    assert counted(number, *nouns) == expected
