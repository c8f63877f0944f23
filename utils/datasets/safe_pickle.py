"""Pickles of plain data: an unpickler that builds containers, numbers and strings, and runs no code.

Time and memory are bounded by the file's size. Otherwise a few bytes can stand for 10^9 items, for a tuple whose hash
takes years, or (a single flipped bit) for a memo of 60 GB. Hence Python's own unpickler, whose memo is a dict and whose
steps can be replaced; it takes a second per 10 MB, before the index is cached (``utils.datasets.records``).
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from utils.datasets.base import DataError

MAX_GROWTH = 64  # items and characters per byte; a name that is referred to takes 2 bytes


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


def _list(items: Iterable[Any] = ()) -> list[Any]:
    return list(items)


def _dict(pairs: Iterable[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    return _checked_dict([value for pair in pairs for value in pair])


def _checked_dict(values: list[Any]) -> dict[Any, Any]:
    """A dict of keys and values in turn; keys must be atoms, because hashing a nested tuple can take for ever."""
    if not all(type(key) in _ATOMS or type(key) is bytes for key in values[::2]):
        raise pickle.UnpicklingError("a key of a dict is neither a number nor a string")
    return dict(zip(values[::2], values[1::2], strict=True))


_ATOMS = frozenset((str, int, float, bool, type(None)))
_ALLOWED = {
    ("numpy", "dtype"): _ScalarType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): _list,
    ("builtins", "frozenset"): _list,
    ("__builtin__", "set"): _list,  # written by Python 2
    ("__builtin__", "frozenset"): _list,
    ("collections", "OrderedDict"): _dict,
}


class _PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined]  # the one in Python
    """Sets become lists, so that nothing but the keys of dicts is hashed."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    stack: list[Any]  # of the base class, which has no annotations
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"refers to {module}.{name}, which could run code")
        return _ALLOWED[module, name]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1].update(_checked_dict([key, value]))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_checked_dict(items))

    def load_dict(self) -> None:
        items = self.pop_mark()  # first: it replaces self.append
        self.append(_checked_dict(items))

    def load_empty_set(self) -> None:
        self.append([])

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].extend(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(items)

    def load_bytearray8(self) -> None:
        raise DataError("contains a bytearray")

    for opcode, step in (
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.EMPTY_SET, load_empty_set),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
        (pickle.BYTEARRAY8, load_bytearray8),
    ):
        dispatch[opcode[0]] = step


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
        return _Plain(MAX_GROWTH * len(raw)).convert(_PlainUnpickler(io.BytesIO(raw), encoding="bytes").load())
    except DataError as error:
        raise DataError(f"{path} is rejected: it {error}; expected plain lists, dicts, numbers and strings") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} is not a readable pickle ({error}); it may be truncated: download it again") from error


class _Plain:
    """Converts tuples to lists, and Python 2's byte strings to text.

    Args:
        room: maximum number of items and characters; those of what is referred to several times count each time.
    """

    def __init__(self, room: int) -> None:
        self.room = room

    def convert(self, value: Any) -> Any:
        kind = type(value)
        self.room -= 1 + (len(value) if kind is str or kind is bytes else 0)
        if self.room < 0:
            raise DataError(f"stands for more than {MAX_GROWTH} times its size")
        if kind is str:
            return value
        if kind is int:
            if not -(2**63) <= value < 2**63:
                raise DataError("contains an integer of more than 64 bits")
            return value
        if kind is list or kind is tuple:
            return [self.convert(item) for item in value]
        if kind is dict:
            return {self.convert(key): self.convert(item) for key, item in value.items()}
        if kind is bytes:
            return _decode_text(value)
        if kind in _ATOMS:
            return value
        raise DataError(f"contains a {kind.__name__}")
