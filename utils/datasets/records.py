"""Packed records (many small records in two arrays), and their cache on disk.

Parsing an annotation file of hundreds of MB takes half a minute and gigabytes of memory; a data set needs a tenth of
it. The first start writes this index to ``~/.cache/uground`` (not beside the data, which are often read-only and
shared). Later starts map the file into memory, shared by all processes and workers of a machine. ``UGROUND_CACHE``
sets another folder, or ``off``. Entries are JSON, and contain nothing that could run code.
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
MAGIC = b"UGROUND1"  # version of the file layout; _source_hash() covers how records are made
MIN_CACHED_BYTES = 8 * 2**20  # bytes of annotations; smaller files are parsed as fast as the cache is read
MIN_COMPRESSED_BYTES = 512  # bytes; longer records are compressed
ZLIB_PREFIX = b"x"  # first byte of compressed data; never of JSON
MIN_SOURCE_AGE = 2.0  # seconds since the last change of a source; a younger file may still be written

Notes = dict[str, Any]


class PackedRecords:
    """A read-only sequence of small JSON-serializable records, packed in two numpy arrays.

    Worker processes share the memory of arrays. Lists of Python objects would be copied page by page, because reading
    an object writes its reference count. Compression halves a record with polygons, and decoding takes microseconds.
    """

    def __init__(self, records: Iterable[Any]) -> None:
        texts = (json.dumps(record, separators=(",", ":"), default=_json_value).encode() for record in records)
        chunks = [zlib.compress(text, 1) if len(text) >= MIN_COMPRESSED_BYTES else text for text in texts]
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(chunks), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        chunk = self._bytes[self._ends[index - 1] if index else 0 : self._ends[index]].tobytes()
        return json.loads(zlib.decompress(chunk) if chunk[:1] == ZLIB_PREFIX else chunk)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def checksum(self) -> int:
        """CRC-32 of all records, uncompressed: libraries compress differently."""
        crc, start = 0, 0
        for end in self._ends.tolist():
            chunk = self._bytes[start:end].tobytes()
            crc = zlib.crc32(zlib.decompress(chunk) if chunk[:1] == ZLIB_PREFIX else chunk, crc)
            start = end
        return crc


class MappedRecords(PackedRecords):
    """Packed records in a cache entry, mapped into memory; unpickling maps the same entry again.

    Args:
        file: the verified entry.
        ends: byte offset of the ends array.
        count: number of records.
    """

    def __init__(self, file: BinaryIO, ends: int, count: int) -> None:
        self._state = file.name, os.fstat(file.fileno()).st_ino, ends, count
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = np.frombuffer(content, dtype=np.int64, count=count, offset=ends)
        self._bytes = np.frombuffer(content, dtype=np.uint8, offset=ends + self._ends.nbytes)

    def __reduce__(self) -> tuple:
        return _reopen, self._state


def _reopen(path: str, inode: int, ends: int, count: int) -> MappedRecords:
    """Unpickles mapped records in a spawned (not forked) worker process."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_ino == inode:
                return MappedRecords(file, ends, count)
    except OSError:
        pass
    raise DataError(f"{path}, an index of annotations, was replaced while the run started; start it again")


def _json_value(value: Any) -> Any:
    """Converts RLE counts as bytes, and numpy scalars, for ``json.dumps``."""
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")
    if isinstance(value, np.generic):
        return value.item()
    raise DataError(f"an annotation contains a {type(value).__name__}; expected lists, dicts, numbers and strings")


# -- the cache ---------------------------------------------------------------------------------------------------------


def load_records(
    name: str, sources: Sequence[Path], settings: Any, build: Callable[[], tuple[Iterable[Any], Notes]]
) -> tuple[PackedRecords, Notes]:
    """Returns the records and notes of ``build()``, from the cache if it has a valid entry.

    An entry is valid if its checksum matches, and if path, size and times of the sources and the code of this package
    are unchanged; otherwise it is rebuilt and replaced. Among concurrent processes, one builds.

    Args:
        name: data set and split, for messages and the cache key.
        sources: all files that ``build`` reads.
        settings: other values that the result depends on; JSON-serializable.
        build: returns the records and notes about all of them (counts, problems), both JSON-serializable.

    Raises:
        DataError: if ``build`` raises it; nothing is cached.
    """
    fingerprint = _fingerprint(name, sources, settings)
    path = _cache_path(fingerprint)
    if path is None or sum(size for _, size, *_ in fingerprint["sources"]) < MIN_CACHED_BYTES:
        return _pack(build)
    if cached := _read_entry(path, fingerprint):
        return cached
    with _file_lock(path):
        if cached := _read_entry(path, fingerprint):  # another process has built it
            return cached
        logger.info("%s: reading %s; later starts use %s", name, ", ".join(map(str, sources)), path)
        start = time.time()
        records, notes = _pack(build)
        newest = max(mtime for _, _, mtime, _ in fingerprint["sources"]) / 1e9
        if _fingerprint(name, sources, settings) != fingerprint or start - newest < MIN_SOURCE_AGE:
            return records, notes  # the sources are still being written
        written = _write_entry(path, fingerprint, records, notes)
        return (_read_entry(path, fingerprint) if written else None) or (records, notes)


def load_single_file(
    name: str,
    row: DatasetRow,
    dataset_dir: Path,
    description: str,
    read: Callable[[str, Path], tuple[Iterable[dict[str, Any]], Notes]],
) -> tuple[list[Path], PackedRecords, Notes]:
    """Loads a data set whose ``row.path`` is one file: its image folders, records and notes.

    Args:
        name: of the data set, for messages and the cache key.
        row: the data set's row.
        dataset_dir: the root of all data.
        description: content of the file, for the message that it is missing.
        read: (name, file) -> records, each with a ``file_name``, and notes with ``problems``.

    Raises:
        DataError: if the file or the image of the first record is missing, or if ``read`` raises it.
    """
    (path,) = find_paths(name, {description: [dataset_dir / row.path]})
    folders = [dataset_dir / images for images in row.images]
    records, notes = load_records(name, [path], None, lambda: read(name, path))
    warn_unusable(name, notes["problems"])
    find_image(name, records[0]["file_name"], folders)  # fail at the start if the folder is wrong
    return folders, records, notes


def _pack(build: Callable[[], tuple[Iterable[Any], Notes]]) -> tuple[PackedRecords, Notes]:
    """Builds without Python's garbage collector, which would repeatedly scan millions of new objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        records, notes = build()
        return PackedRecords(records), notes
    finally:
        if enabled:
            gc.enable()


def _fingerprint(name: str, sources: Sequence[Path], settings: Any) -> dict[str, Any]:
    stats = [(str(path.resolve()), path.stat()) for path in sources]
    fingerprint = {
        "name": name,
        "settings": settings,
        "code": _source_hash(),
        "sources": [[path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats],
    }
    return json.loads(json.dumps(fingerprint))  # with JSON's types, for the comparison with an entry


@cache
def _source_hash() -> str:
    """Hash of this package's source code, which determines how records are made."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def code_version() -> str:
    """Short hash of the code that makes records: those of other versions may differ for the same files."""
    return _source_hash()[:8]


def _cache_path(fingerprint: dict[str, Any]) -> Path | None:
    """Path of the cache entry; independent of the sources' content, so that a new version replaces the old one."""
    setting = os.environ.get(CACHE_VARIABLE, "")
    if setting.lower() in ("off", "0", "none"):
        return None
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uground"
    except RuntimeError:  # no home
        return None
    key = json.dumps([fingerprint["name"], fingerprint["settings"], [path for path, *_ in fingerprint["sources"]]])
    return (Path(setting) if setting else default) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.index"


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Locks a cache entry for one process. Without file locks, concurrent processes merely repeat the work."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        yield


def _write_entry(path: Path, fingerprint: dict[str, Any], records: PackedRecords, notes: Notes) -> bool:
    """Writes the entry atomically; returns False, with a warning, if that fails.

    Layout: magic, length of the header (int64), header (JSON, padded to 8), ends (int64 each), records, CRC-32 of all
    preceding bytes (uint32).
    """
    header = json.dumps({"fingerprint": fingerprint, "count": len(records), "notes": notes}).encode()
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
            "%s: the index cannot be cached (%s), so every start parses the files again; set %s to a writable folder, "
            "or to off",
            fingerprint["name"],
            error,
            CACHE_VARIABLE,
        )
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _read_entry(path: Path, fingerprint: dict[str, Any]) -> tuple[MappedRecords, Notes] | None:
    """Reads the entry; None if it is missing, corrupt, or has another fingerprint."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
            length = int(np.frombuffer(start[8:], dtype=np.int64)[0]) if len(start) == 16 else -1
            size = os.fstat(file.fileno()).st_size
            if start[:8] != MAGIC or not 0 <= length <= size or _is_corrupt(file, size):
                return None
            file.seek(16)
            header = json.loads(file.read(length))
            if header["fingerprint"] != fingerprint:
                return None
            return MappedRecords(file, 16 + length, header["count"]), header["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_corrupt(file: BinaryIO, size: int) -> bool:
    """Verifies the checksum. Reads through a small buffer: mapped pages would count as this process's memory."""
    file.seek(0)
    checksum, remaining = 0, size - 4
    while remaining > 0 and (chunk := file.read(min(remaining, 2**20))):
        checksum, remaining = zlib.crc32(chunk, checksum), remaining - len(chunk)
    return remaining != 0 or file.read() != np.uint32(checksum).tobytes()
