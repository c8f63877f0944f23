"""Compares measures of uncertainty of a mask: how well does each rank the errors?

    python scripts/dev/study_uncertainty.py --version DIR --dataset_dir data/demo --val_dataset "ReasonSeg|val"

All measures rank the same answers, the masks of the policy's most probable layer; their risk is 1 - IoU. Prints AURC
and AUSE (``utils.evaluation.risk_coverage``; lower is better) with 95% bootstrap intervals over images:

- layers: disagreement of the masks of T sampled layers (``mc:T``, the paper's section B.3), the mean standard deviation
  of their probabilities, and the policy's entropy;
- one mask: how far its probabilities are from 0 or 1 (mean |p - 0.5|), over the image and where p > 0.05, and the IoU
  that SAM's own head predicts;
- random order, and the ideal one.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from utils.command_line.parser import Parser
from utils.datasets import Spec, get_eval_dataset
from utils.datasets.base import EvalDataset
from utils.evaluation import metrics
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.layer_analysis import LayerAnalyzer, LayerProbe
from utils.evaluation.predictions import InferenceOptions, QueryPrediction, score
from utils.evaluation.risk_coverage import ranking
from utils.inference import cli
from utils.plotting import text_tables

RESAMPLES = 500


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    datasets = [get_eval_dataset(spec, args.dataset_dir) for spec in Spec.parse_list(args.val_dataset)]
    opened = cli.open_model(args)
    analyzer = LayerAnalyzer(opened.model, opened.processor, InferenceOptions(args.mode), batch_size=16)
    for dataset in datasets:
        measures, risk, images = measure(analyzer, dataset, args)
        print(f"\n{dataset.spec}: {len(risk)} masks, gIoU {1 - risk.mean():.3f}\n\n{table(measures, risk, images)}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(program="scripts/dev/study_uncertainty.py", description=__doc__)
    add = parser.add_argument
    cli.add_model_flags(parser)
    add("--dataset_dir", required=True, metavar="DIR", help="folder that holds reason_seg/, refer_seg/, ...")
    add("--val_dataset", required=True, metavar="SPEC", help='"ReasonSeg|val"; several joined by "||"')
    add("--mode", choices=("generate", "teacher_forced"), default="teacher_forced", help="default: %(default)s")
    add("--limit", type=cli.whole(1), metavar="N", help="the first N images of each split")
    add("--samples", type=cli.whole(1), default=16, metavar="T", help="sampled layers (default: 16)")
    return parser.parse_args(argv)


def measure(
    analyzer: LayerAnalyzer, dataset: EvalDataset, args: argparse.Namespace
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Name -> [Q] values of each measure; [Q] risks; [Q] images. Queries with a target and a [SEG] alone."""
    values: dict[str, list[float]] = defaultdict(list)
    risk, images, benchmark = [], [], benchmark_of(dataset.spec)
    size = min(len(dataset), args.limit or len(dataset))
    for start in tqdm(range(0, size, analyzer.batch_size), desc=str(dataset.spec), disable=None):
        indices = range(start, min(size, start + analyzer.batch_size))
        probe = LayerProbe(analyzer, indices, [dataset[index] for index in indices], benchmark)
        several, single = probe.predict(f"mc:{args.samples}"), probe.predict("argmax")
        for b, (index, sample) in enumerate(zip(indices, probe.samples)):
            for k, query in enumerate(sample.queries):
                answer, sampled = single[b][k], several[b][k]
                if not query.is_present or not answer.layers:
                    continue
                record = score(index, sample, query, answer, benchmark)
                risk.append(1 - metrics.iou(record, benchmark.protocol()))
                images.append(index)
                policy = probe.policy_and_maps(b, k)[0].numpy()
                for name, value in measures_of(answer, sampled, policy).items():
                    values[name].append(value)
    return {name: np.array(column) for name, column in values.items()}, np.array(risk), np.array(images)


def measures_of(answer: QueryPrediction, sampled: QueryPrediction, policy: np.ndarray) -> dict[str, float]:
    """The measures of an answer; policy: [N, L] of its [SEG] tokens. Of several masks, the most uncertain counts."""
    probability = 1 / (1 + np.exp(-answer.logits.astype(np.float64)))
    doubt = 1 - 2 * np.abs(probability - 0.5)  # 0 where the mask is sure, 1 at p = 0.5
    deviations = sampled.deviations
    assert deviations is not None
    entropy = -(policy * np.log(np.maximum(policy, 1e-12))).sum(-1)
    return {
        "layers: disagreement (mc:T)": max(each.score for each in sampled.uncertainty),
        "layers: mean standard deviation": float(deviations.mean((1, 2)).max()),
        "layers: entropy of the policy": float(entropy.max()),
        "one mask: |p - 0.5| over the image": float(doubt.mean((1, 2)).max()),
        "one mask: |p - 0.5| where p > 0.05": max(answer.ambiguity),
        "one mask: SAM's predicted IoU": 1 - min(answer.predicted_iou),
    }


def table(measures: dict[str, np.ndarray], risk: np.ndarray, images: np.ndarray) -> str:
    """AURC and AUSE of each measure, with 95% intervals over images."""
    names, positions = np.unique(images, return_inverse=True)
    generator = np.random.default_rng(0)
    draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)[:, positions]
    rows = [["ranked by", "AURC", "AUSE"]]
    for name, values in {**measures, "random order": np.zeros(len(risk)), "ideal order": risk}.items():
        of_all, of_draws = ranking(values, risk), [ranking(values, risk, counts) for counts in draws]
        cells = []
        for key in ("AURC", "AUSE"):
            low, high = np.percentile([each[key] for each in of_draws], [2.5, 97.5])
            cells.append(f"{of_all[key]:.3f} [{low:.3f}, {high:.3f}]")
        rows.append([name, *cells])
    return text_tables.markdown(rows)


if __name__ == "__main__":
    sys.exit(cli.run(main))
