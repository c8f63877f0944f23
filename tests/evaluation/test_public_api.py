"""What is imported from the packages themselves: ``load`` and ``evaluate``, as their docstrings show them."""

import subprocess
import sys

from tiny_run import ROOT, environment

from model import load
from utils.datasets import get_eval_dataset
from utils.evaluation import evaluate


def test_a_benchmark_in_three_calls(version, val_data):
    opened = load(version, "fp32", "cpu")
    result = evaluate(opened.model, opened.processor, get_eval_dataset("ReasonSeg|val", val_data))
    assert {"gIoU", "cIoU"} <= result.metrics.keys()
    assert len(result.records) == 5


def test_reading_results_loads_no_model():
    command = "import sys, utils.evaluation.results; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], env=environment(), cwd=ROOT, check=True)
