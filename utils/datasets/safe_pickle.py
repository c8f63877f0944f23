"""Pickles of plain data: an unpickler that builds containers, numbers and strings, and runs no code."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from utils.datasets.base import DataError


class _ScalarType:
    """Replaces ``numpy.dtype`` in a pickle: stores the type and byte order of a scalar, and nothing else."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code, self.order = _decode_text(code), "<"

    def __setstate__(self, state: tuple) -> None:
        order = _decode_text(state[1])
        self.order = order if order in "<>" else "<"


def _scalar(kind: _ScalarType, data: bytes | str) -> int | float | bool | str | bytes:
    if not isinstance(kind, _ScalarType) or not re.fullmatch(r"[biufSU]\d+", kind.code):
        raise pickle.UnpicklingError("a numpy scalar of an unknown kind")
    data = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype=np.dtype(kind.order + kind.code), count=1)[0].item()


def _encode(text: str, codec: str | bytes = "latin-1") -> bytes:
    if _decode_text(codec) not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in codec {codec!r}")
    return text.encode("latin-1")


def _decode_text(value: str | bytes) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("cp1252", "replace")
    return value


_ALLOWED = {
    ("numpy", "dtype"): _ScalarType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,  # written by Python 2
    ("__builtin__", "frozenset"): frozenset,
    ("collections", "OrderedDict"): dict,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"refers to {module}.{name}, which could run code")
        return _ALLOWED[module, name]


def read_pickle(path: Path) -> Any:
    """Reads a pickle of plain containers, numbers, strings and numpy scalars; rejects any other type by name.

    Such files come from the internet, and the standard unpickler would execute code in them. Files of Python 2 are
    supported; numpy scalars become Python numbers.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return _plain(_PlainUnpickler(io.BytesIO(raw), encoding="bytes").load())
    except DataError as error:
        raise DataError(f"{path} is rejected: it {error}; expected plain lists, dicts, numbers and strings") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is not a readable pickle ({error}); it may be truncated: download it again") from error


_ATOMS = frozenset((str, int, float, bool, type(None)))


def _plain(value: Any) -> Any:
    """Converts sets and tuples to lists, and Python 2's byte strings to text; atoms take a shortcut for speed."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in (list, tuple, set, frozenset):
        return [item if type(item) in _ATOMS else _plain(item) for item in value]
    if kind is dict:
        return {_plain(key): item if type(item) in _ATOMS else _plain(item) for key, item in value.items()}
    if kind is bytes:
        return _decode_text(value)
    raise DataError(f"contains a {kind.__name__}")
