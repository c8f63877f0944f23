"""Many small records in two arrays, and the cache that keeps them between starts.

An annotation file of hundreds of MB takes half a minute and gigabytes to parse; what a data set needs of it is a tenth.
The first start writes that to ``~/.cache/uground`` (not beside the data, which are often read-only and shared); later
ones map the file into memory, where all processes and workers of a machine share it. ``UGROUND_CACHE`` names another
folder, or ``off``. Entries are JSON, and hold nothing that could run code.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import logging
import mmap
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from utils.datasets.base import DataError, DatasetRow, find_paths, warn_unusable
from utils.datasets.images import find_image

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "UGROUND_CACHE"
MAGIC = b"UGROUND1"  # of the file's layout; how records are made is covered by _code()
MIN_CACHED_BYTES = 8 * 2**20  # bytes of annotations; less is parsed as fast as it is looked up
DEFLATED = 512  # bytes of a record's text from which it is compressed
ZLIB = b"x"  # compressed data begin so; JSON cannot
MIN_SOURCE_AGE = 2.0  # seconds since the last change of a source; a younger file may still be written

Notes = dict[str, Any]


class PackedRecords:
    """Many small JSON-able records in two numpy arrays.

    Worker processes share the arrays' memory; lists of Python objects would be copied page by page, because reading an
    object writes its reference count. A record with polygons is deflated to less than half of its text, and read again
    in microseconds.
    """

    def __init__(self, records: Iterable[Any]) -> None:
        texts = (json.dumps(record, separators=(",", ":"), default=_json_value).encode() for record in records)
        chunks = [zlib.compress(text, 1) if len(text) >= DEFLATED else text for text in texts]
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(chunks), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        chunk = self._bytes[self._ends[index - 1] if index else 0 : self._ends[index]].tobytes()
        return json.loads(zlib.decompress(chunk) if chunk[:1] == ZLIB else chunk)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class MappedRecords(PackedRecords):
    """Records in an entry of the cache, mapped into memory; an unpickled copy maps the same entry again.

    Args:
        file: the entry, already verified.
        ends: where its ends begin, in bytes.
        count: of the records.
    """

    def __init__(self, file: BinaryIO, ends: int, count: int) -> None:
        self._state = file.name, os.fstat(file.fileno()).st_ino, ends, count
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = np.frombuffer(content, dtype=np.int64, count=count, offset=ends)
        self._bytes = np.frombuffer(content, dtype=np.uint8, offset=ends + self._ends.nbytes)

    def __reduce__(self) -> tuple:
        return _map_again, self._state


def _map_again(path: str, inode: int, ends: int, count: int) -> MappedRecords:
    """What a worker process does that is spawned, not forked."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_ino == inode:
                return MappedRecords(file, ends, count)
    except OSError:
        pass
    raise DataError(f"{path}, an index of annotations, was replaced while the run started; start it again")


def _json_value(value: Any) -> Any:
    """For ``json.dumps``: RLE counts as bytes, and numpy scalars."""
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    if isinstance(value, np.generic):
        return value.item()
    raise DataError(f"an annotation holds a {type(value).__name__}; expected lists, dicts, numbers and strings")


# -- the cache ---------------------------------------------------------------------------------------------------------


def load_records(
    name: str, sources: Sequence[Path], settings: Any, build: Callable[[], tuple[Iterable[Any], Notes]]
) -> tuple[PackedRecords, Notes]:
    """What ``build()`` makes of the source files, from the cache where it holds just that.

    An entry counts only if the sources have the same path, size and times, and this package the same code, as when it
    was written, and if its checksum fits; otherwise it is built again and replaced. Of several processes one builds.

    Args:
        name: of the data set and split, for messages; part of the key.
        sources: all files that ``build`` reads.
        settings: what else its result depends on; JSON-able.
        build: returns the records and notes about all of them (counts, problems), both JSON-able.

    Raises:
        DataError: whatever ``build`` raises; nothing is kept of it.
    """
    identity = _identity(name, sources, settings)
    path = _entry(identity)
    if path is None or sum(size for _, size, *_ in identity["sources"]) < MIN_CACHED_BYTES:
        return _pack(build)
    if found := _read_entry(path, identity):
        return found
    with _alone(path):
        if found := _read_entry(path, identity):  # another process was first
            return found
        logger.info("%s: reading %s; later starts use %s", name, ", ".join(map(str, sources)), path)
        begun = time.time()
        records, notes = _pack(build)
        newest = max(mtime for _, _, mtime, _ in identity["sources"]) / 1e9
        if _identity(name, sources, settings) != identity or begun - newest < MIN_SOURCE_AGE:
            return records, notes  # they are being written: not to be relied on at the next start
        return (_read_entry(path, identity) if _write(path, identity, records, notes) else None) or (records, notes)


def load_single_file(
    name: str,
    row: DatasetRow,
    dataset_dir: Path,
    what: str,
    read: Callable[[str, Path], tuple[list[dict[str, Any]], Notes]],
) -> tuple[list[Path], PackedRecords, Notes]:
    """Folders of images, records and notes of a data set whose ``row.path`` is one file.

    Args:
        what: the file holds, for the message that it is not there.
        read: (name, file) -> its records, each with its ``image``, and notes, among them ``problems``.

    Raises:
        DataError: if the file or the first record's image is not there, or whatever ``read`` raises.
    """
    (path,) = find_paths(name, {what: [dataset_dir / row.path]})
    folders = [dataset_dir / images for images in row.images]
    records, notes = load_records(name, [path], None, lambda: read(name, path))
    warn_unusable(name, notes["problems"])
    find_image(name, records[0]["image"], folders)  # a wrong folder shows now, not at the first step
    return folders, records, notes


def _pack(build: Callable[[], tuple[Iterable[Any], Notes]]) -> tuple[PackedRecords, Notes]:
    """Builds without Python's garbage collector, which would go over millions of new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        records, notes = build()
        return PackedRecords(records), notes
    finally:
        if enabled:
            gc.enable()


def _identity(name: str, sources: Sequence[Path], settings: Any) -> dict[str, Any]:
    stats = [(str(path.resolve()), path.stat()) for path in sources]
    identity = {
        "name": name,
        "settings": settings,
        "code": _code(),
        "sources": [[path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats],
    }
    return json.loads(json.dumps(identity))  # as it will come back from the entry


@cache
def _code() -> str:
    """A hash of this package's source, which alone decides what records are made of a file."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _entry(identity: dict[str, Any]) -> Path | None:
    """The file for these sources, whatever is in them (so that a new version takes the place of the old one)."""
    setting = os.environ.get(CACHE_VARIABLE, "")
    if setting.lower() in ("off", "0", "none"):
        return None
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uground"
    except RuntimeError:  # no home
        return None
    key = json.dumps([identity["name"], identity["settings"], [path for path, *_ in identity["sources"]]])
    return (Path(setting) if setting else default) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.index"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets one process at a time in, where the file system knows locks; where it does not, they merely work twice."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield


def _write(path: Path, identity: dict[str, Any], records: PackedRecords, notes: Notes) -> bool:
    """Puts the entry in place at once and whole; False, with a warning, where that is not possible.

    Layout: magic, length of the header (int64), header (JSON, padded to 8), ends (int64 each), records, CRC-32 of all
    before it (uint32).
    """
    header = json.dumps({"identity": identity, "count": len(records), "notes": notes}).encode()
    header += b" " * (-len(header) % 8)
    parts: list[bytes | memoryview] = [
        MAGIC,
        np.int64(len(header)).tobytes(),
        header,
        records._ends.data,
        records._bytes.data,
    ]
    checksum = 0
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part)
                checksum = zlib.crc32(part, checksum)
            file.write(np.uint32(checksum).tobytes())
        temporary.replace(path)
        return True
    except OSError as error:
        logger.warning(
            "%s: its index is not kept (%s), so that every start reads the files again; set %s to a folder that can "
            "be written, or to off",
            identity["name"],
            error,
            CACHE_VARIABLE,
        )
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _read_entry(path: Path, identity: dict[str, Any]) -> tuple[MappedRecords, Notes] | None:
    """The entry, if it is whole and of this identity."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
            length = int(np.frombuffer(start[8:], dtype=np.int64)[0]) if len(start) == 16 else -1
            size = os.fstat(file.fileno()).st_size
            if start[:8] != MAGIC or not 0 <= length <= size or _damaged(file, size):
                return None
            file.seek(16)
            header = json.loads(file.read(length))
            if header["identity"] != identity:
                return None
            return MappedRecords(file, 16 + length, header["count"]), header["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _damaged(file: BinaryIO, size: int) -> bool:
    """Reads it all, through a small buffer: what is mapped here would count as this process's memory."""
    file.seek(0)
    checksum, left = 0, size - 4
    while left > 0 and (chunk := file.read(min(left, 2**20))):
        checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    return left != 0 or file.read() != np.uint32(checksum).tobytes()
