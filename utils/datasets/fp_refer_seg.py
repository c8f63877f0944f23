"""neg_refer_seg and correct_refer_seg: referring expressions with false premises (docs/data.md).

Files, index and evaluation are those of refer_seg; each sentence has a flag that tells whether it is true.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.structures import Turn
from utils.datasets.refer_seg import ReferSegTrain
from utils.datasets.templates import denial, sample_question


class FpReferSegTrain(ReferSegTrain):
    """Training data of R-RefCOCO(+/g) and FP-RefCOCO(+/g).

    A false premise is answered by a rejection without [SEG]; for FP-RefCOCO it also offers the true expression that
    the false one was derived from.
    """

    def turn(self, sentence: dict[str, Any], targets: int, rng: np.random.Generator) -> Turn:
        if not sentence["false_premise"]:
            return super().turn(sentence, targets, rng)
        text, correction = sentence["sent"], sentence.get("gt_sent") or ""
        return Turn(sample_question("phrase", text, rng), denial(text, correction, rng))
