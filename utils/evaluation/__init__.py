"""Evaluation: inference on a benchmark, scoring, results on disk, tables and figures.

from model import load
from utils.datasets import get_eval_dataset
from utils.evaluation import evaluate

opened = load("runs/tiny/merged")
result = evaluate(opened.model, opened.processor, get_eval_dataset("ReasonSeg|val", "data/demo"))
print(result.metrics)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utils.evaluation.engine import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from utils.evaluation.engine import evaluate  # deferred: reading results does not import the model

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
