"""Fewer threads for small work on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread

import torch

SMALL_PRODUCT = 2**23  # multiplications: below, waking another thread takes about as long as it saves
FEWEST_ROWS = 16  # of fewer rows, reading the weights takes as long


@contextmanager
def fewer_threads(rows: int, weights: int) -> Iterator[None]:
    """One thread inside, if no product of its layers is large enough for several. Results may differ by rounding.

    The number of threads is global: programs that compute outside of their main thread keep theirs.

    Args:
        rows, weights: of the largest product in a layer, of a matrix of so many rows with so many weights.
    """
    threads = torch.get_num_threads()
    small = max(rows, FEWEST_ROWS) * weights <= SMALL_PRODUCT
    if not small or threads == 1 or current_thread() is not main_thread():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
