"""Random damage to the content of files, from a ``random.Random``: what disks, downloads and edits by hand do."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from disk import H, W

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7.5, 10**30, 10**400, 1e308, -1e308, float("inf"), float("nan"), "", " ", "x", "7",
    "x" * 300, "é" * 200, "\ud800", "a\0b", "../a.jpg", "../..", "/", "a.jpg", "b.jpg", [], {}, [[]], [None], [1, 2, 3],
    [[[[1]]]], [[1, 1], [9, 1], [9, 9]], [10**400] * 6, {"x": 1}, {"counts": "x", "size": [H, W]},
    {"counts": "o" * 3000, "size": [H, W]},
)  # fmt: skip
EDGE = 4096  # bytes at the beginning and the end of a file, where half of the damage falls: headers and indices


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Bits flipped, or a part cut out, repeated, zeroed or overwritten, or the end cut off."""
    damaged, kind = bytearray(raw), rng.randrange(6)
    start, length = place(len(raw), rng), rng.choice((rng.randint(1, 12), rng.randint(1, 4096)))
    part = slice(start, start + length)
    if kind == 0:
        for position in (start, *(place(len(raw), rng) for _ in range(rng.randrange(3)))):
            damaged[position] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del damaged[part]
    elif kind == 2:
        damaged[start:start] = damaged[part]
    elif kind == 3:
        damaged[part] = bytes(len(damaged[part]))
    elif kind == 4:
        damaged[start:start] = rng.randbytes(length)
    else:
        del damaged[start:]
    return bytes(damaged)


def place(size: int, rng: random.Random) -> int:
    """A position in a file of that size, which is not empty."""
    near = rng.randrange(min(size, EDGE))
    return rng.choice((rng.randrange(size), rng.randrange(size), near, size - 1 - near))


def damaged_json(raw: bytes, rng: random.Random) -> bytes:
    """A JSON value replaced by an odd one, removed, renamed, doubled, nested or turned into text."""
    try:
        root = {"root": json.loads(raw)}
    except ValueError:
        return damaged_bytes(raw, rng)
    *above, key = random_path(root["root"], rng)
    parent: Any = root
    for step in above:
        parent = parent[step]
    change = rng.randrange(8)
    if change == 0 and above:
        del parent[key]
    elif change == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif change == 2 and isinstance(parent, dict) and above:
        parent[f"{key}x"] = parent.pop(key)
    elif change == 3:
        parent[key] = [parent[key]]
    elif change == 4:
        parent[key] = str(parent[key])
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(root["root"]).encode()


def random_path(value: Any, rng: random.Random) -> list:
    """The keys to a random value below ``{"root": value}``; short lists and deep values are as likely as long ones."""
    path: list = ["root"]
    while isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        path.append(rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value)))
        value = value[path[-1]]
    return path


def damaged(raw: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Any of the above; sometimes the content of another file, or nothing at all."""
    if not raw or rng.random() < 0.05:
        return rng.choice((other, b"", bytes(len(raw)), raw + other))
    return (damaged_json if raw[:1] in b"{[" and rng.random() < 0.6 else damaged_bytes)(raw, rng)
