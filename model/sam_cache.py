"""SAM's image embeddings on disk: its encoder is frozen, so that an image seen again needs it no more.

An entry is named after the image's pixels, the encoder's weights and the precision. It is complete before it has its
name, and carries a checksum; a damaged one is computed again. Any number of processes may share a folder, and the
entries that were not used for the longest time go when it grows too large.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

logger = logging.getLogger(__name__)

GB = 2**30
CHECKSUM = 16  # bytes at the start of an entry
STALE = 3600.0  # seconds after which an unfinished entry is what a killed process left behind


def image_key(image: np.ndarray) -> str:
    """Names an image by its pixels, [H, W, 3] uint8."""
    digest = hashlib.blake2b(str(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


class FeatureCache:
    """A folder of embeddings.

    Args:
        folder: is made if it does not exist.
        gigabytes: that all entries may take; the least recently used go first. A process looks at the folder after each
            half a percent that it wrote, so that N processes may exceed this by N halves of a percent.
        encoder: fingerprint of the encoder's weights.

    Raises:
        ValueError: if the folder cannot be made or written to, or may hold nothing.
    """

    def __init__(self, folder: str | Path, gigabytes: float, encoder: str) -> None:
        self.folder, self.limit, self.encoder = Path(folder), int(gigabytes * GB), encoder
        if self.limit <= 0:
            raise ValueError(f"--sam_feature_cache_gb {gigabytes:g}: nothing fits into it; give more than 0")
        self.hits = self.misses = 0
        self._unchecked = self.limit  # bytes written since the last look at the folder: the first write looks
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--sam_feature_cache {folder}: cannot be made: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"--sam_feature_cache {folder}: cannot be written to")

    def get(
        self, keys: Sequence[str], images: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The embeddings of a batch; ``encode`` is called for the images that are not here, if any.

        Args:
            keys: B names from ``image_key``; images: [B, 3, R, R], their dtype is the precision.

        Returns:
            [B, E, G, G] on the images' device.
        """
        paths = [self._path(key, images) for key in keys]
        found = [self._read(path, images.dtype) for path in paths]
        missing = [b for b, embedding in enumerate(found) if embedding is None]
        self.hits, self.misses = self.hits + len(found) - len(missing), self.misses + len(missing)
        if missing:
            for b, embedding in zip(missing, encode(images[missing] if len(missing) < len(found) else images)):
                found[b] = embedding
                self._write(paths[b], embedding)
        return torch.stack([part.to(images.device, non_blocking=True) for part in found if part is not None])

    def _path(self, key: str, images: torch.Tensor) -> Path:
        name = f"{key} {self.encoder} {images.dtype} {images.shape[-1]}"
        return self.folder / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.sam"

    def _read(self, path: Path, dtype: torch.dtype) -> torch.Tensor | None:
        try:
            content = path.read_bytes()
            if content[:CHECKSUM] != _checksum(content[CHECKSUM:]):
                return None
            embedding = load(content[CHECKSUM:])["embedding"]
        except (OSError, SafetensorError, KeyError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now
        return embedding if embedding.dtype == dtype else None

    def _write(self, path: Path, embedding: torch.Tensor) -> None:
        content = save({"embedding": embedding.cpu().contiguous()})
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            unfinished.write_bytes(_checksum(content) + content)
            unfinished.replace(path)
        except OSError as error:  # a full disk must not end a run
            unfinished.unlink(missing_ok=True)
            logger.warning("--sam_feature_cache %s: an entry could not be written: %s", self.folder, error.strerror)
            return
        self._unchecked += len(content) + CHECKSUM
        if self._unchecked >= self.limit / 200:
            self._unchecked = 0
            self._evict()

    def _evict(self) -> None:
        """Removes the least recently used entries, down to 90% of the limit, if all together exceed it."""
        with contextlib.suppress(OSError), (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # taken: another process is at it
            entries = []
            for item in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    stat = item.stat()
                    if item.name.endswith(".sam"):
                        entries.append((stat.st_mtime_ns, stat.st_size, item.path))
                    elif item.name.endswith(".tmp") and time.time() - stat.st_mtime > STALE:
                        os.unlink(item.path)
            total = sum(size for _, size, _ in entries)
            if total <= self.limit:
                return
            for _, size, path in sorted(entries):
                Path(path).unlink(missing_ok=True)
                total -= size
                if total <= 0.9 * self.limit:
                    break


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM).digest()
