"""neg_refer_seg and correct_refer_seg: expressions of which some are false of the image (docs/data.md).

Files, index and evaluation are those of refer_seg; sentences say themselves whether they are true.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.structures import Turn
from utils.datasets.base import pick
from utils.datasets.refer_seg import ReferSegTrain
from utils.datasets.templates import QUESTIONS, denial, fill_template


class FpReferSegTrain(ReferSegTrain):
    """R-RefCOCO(+/g) and FP-RefCOCO(+/g) to train on.

    A false premise gets a denial without [SEG]; FP-RefCOCO's also offers the expression that it was derived from.
    """

    def turn(self, sentence: dict[str, Any], targets: int, rng: np.random.Generator) -> Turn:
        if not sentence["false_premise"]:
            return super().turn(sentence, targets, rng)
        text, correct = sentence["sent"], sentence.get("gt_sent") or ""
        return Turn(fill_template(pick(QUESTIONS["phrase"], rng), query=text), denial(text, correct, rng))
