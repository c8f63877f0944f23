"""Records as the evaluation makes them, of masks that a test draws."""

import numpy as np

from utils.datasets.masks import encode_mask
from utils.evaluation import metrics
from utils.evaluation.metrics import Record

SHAPE = (13, 17)


def make_record(predicted, target=None, index=0, query_id="0", rejected=False, meta=None) -> Record:
    """A record as the engine makes it; no target = nothing is there."""
    empty = target is None
    both, either, p, g = metrics.count_pixels(predicted, np.zeros(SHAPE, np.uint8) if empty else target)
    masks = [encode_mask(predicted)]
    return Record(
        index, f"image {index}", str(index), query_id, "q", "q?", "a", [3], rejected, empty, both, either, p, g, masks,
        meta or {},
    )  # fmt: skip
