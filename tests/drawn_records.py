"""Evaluation records of given masks."""

import numpy as np

from utils.datasets.masks import encode_mask
from utils.evaluation import metrics
from utils.evaluation.metrics import Record

SHAPE = (13, 17)


def make_record(predicted, target=None, index=0, query_id="0", rejected=False, meta=None) -> Record:
    """A record as the engine makes it; ``target`` None = the target is absent."""
    empty = target is None
    pixels = metrics.count_pixels(predicted, np.zeros(SHAPE, np.uint8) if empty else target)
    masks = [encode_mask(predicted)]
    return Record(
        index, f"image {index}", str(index), query_id, "q", "q?", "a", [3], rejected, empty, *pixels, masks, meta or {}
    )
