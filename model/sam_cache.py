"""Cache of SAM's image embeddings on disk: the encoder is frozen, so that an image is encoded only once.

An entry's name is a hash of the image's pixels, the encoder's weights and the precision. Entries are written atomically
and carry a checksum; damaged ones are computed again. Any number of processes can share a folder. The least recently
used entries are evicted when it exceeds its limit.
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
STALE = 3600.0  # seconds after which an unfinished entry is considered abandoned by a killed process


def image_key(image: np.ndarray) -> str:
    """Key of an image [H, W, 3] uint8: a hash of its shape and pixels."""
    digest = hashlib.blake2b(str(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


class FeatureCache:
    """A folder of embeddings.

    Args:
        folder: created if it does not exist.
        gigabytes: limit of all entries together (2^30 bytes); the least recently used are evicted first. A process
            checks the folder whenever it has written half a percent of the limit, so that N processes can exceed it by
            N halves of a percent.
        encoder: fingerprint of the encoder's weights, and of what else its features depend on.

    Attributes:
        hits, misses: images that were read from the cache, and encoded.

    Raises:
        ValueError: if the folder cannot be created or written to, or the limit is not positive.
    """

    def __init__(self, folder: str | Path, gigabytes: float, encoder: str) -> None:
        self.folder, self.limit, self.encoder = Path(folder), int(gigabytes * GB), encoder
        if self.limit <= 0:
            raise ValueError(f"--sam_feature_cache_gb {gigabytes:g}: nothing fits into it; give more than 0")
        self.hits = self.misses = 0
        self._unchecked = self.limit  # bytes written since the folder was last checked; the first write checks it
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--sam_feature_cache {folder}: cannot be created: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"--sam_feature_cache {folder}: cannot be written to")

    def get(
        self, keys: Sequence[str], images: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The embeddings of a batch; ``encode`` is called for the images without an entry, if any.

        Args:
            keys: B keys of ``image_key``.
            images: [B, 3, R, R]; their dtype is the precision.
            encode: [b, 3, R, R] images -> [b, ...] in their dtype (SAM: [b, E, G, G]).

        Returns:
            [B, ...] on the images' device.
        """
        paths = [self._path(key, images) for key in keys]
        embeddings = [self._read(path, images.dtype) for path in paths]
        missing = [b for b, embedding in enumerate(embeddings) if embedding is None]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        if missing:
            for b, embedding in zip(missing, encode(images[missing] if len(missing) < len(keys) else images)):
                embeddings[b] = embedding
                self._write(paths[b], embedding)
        return torch.stack([row.to(images.device, non_blocking=True) for row in embeddings if row is not None])

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
            os.utime(path)  # marks it as recently used
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
        """Removes the least recently used entries, down to 90% of the limit, if their total exceeds it."""
        with contextlib.suppress(OSError), (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if another process is evicting
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
