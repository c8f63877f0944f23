"""Metrics against independent computations, on random and on degenerate masks."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
from drawn_records import SHAPE, make_record
from pycocotools import mask as coco_mask

from utils.datasets.masks import decode_mask, encode_mask
from utils.evaluation import metrics
from utils.evaluation.benchmarks import BENCHMARKS


def blob(rng, share=0.4):
    return rng.random(SHAPE) < share


@pytest.mark.parametrize("seed", range(5))
def test_counts_agree_with_pycocotools(seed):
    rng = np.random.default_rng(seed)
    predicted, true = blob(rng), blob(rng)
    intersection, union, p, g = metrics.count_pixels(predicted, true.astype(np.uint8))
    encoded = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in (predicted, true)]
    assert intersection / union == pytest.approx(coco_mask.iou(encoded[:1], encoded[1:], [0])[0, 0])
    assert (p, g) == tuple(coco_mask.area(encoded))


def test_ignored_pixels_count_nowhere():
    target = np.zeros(SHAPE, np.uint8)
    target[2:6, 2:6], target[6:10] = 1, 255
    predicted = np.zeros(SHAPE, bool)
    predicted[4:12, 2:6] = True
    assert metrics.count_pixels(predicted, target) == (8, 16 + 8, 16, 16)
    everything = np.full(SHAPE, 255, np.uint8)
    assert metrics.count_pixels(predicted, everything) == (0, 0, 0, 0)
    assert metrics.iou(make_record(predicted, everything)) == 1.0


def test_degenerate_masks():
    nothing, everything, pixel = np.zeros(SHAPE, bool), np.ones(SHAPE, bool), np.zeros(SHAPE, bool)
    pixel[0, 0] = True
    as_target = lambda mask: mask.astype(np.uint8)  # noqa: E731
    assert metrics.iou(make_record(nothing, as_target(nothing))) == 1.0
    assert metrics.iou(make_record(nothing, as_target(everything))) == 0.0
    assert metrics.iou(make_record(everything, as_target(nothing))) == 0.0
    assert metrics.iou(make_record(pixel, as_target(pixel))) == 1.0
    assert metrics.iou(make_record(everything, as_target(pixel))) == 1 / pixel.size


def test_sizes_must_agree():
    with pytest.raises(ValueError, match=r"\(13, 17\).*\(17, 13\)"):
        metrics.count_pixels(np.zeros(SHAPE, bool), np.zeros(SHAPE[::-1], np.uint8))


def test_giou_and_ciou_agree_with_float64_numpy_in_any_order():
    rng = np.random.default_rng(0)
    pairs = [(blob(rng, rng.random()), blob(rng, rng.random() / 2)) for _ in range(200)]
    records = [make_record(p, g.astype(np.uint8), index) for index, (p, g) in enumerate(pairs)]
    found = metrics.compute(records, BENCHMARKS["ReasonSeg"])
    ious = [(p & g).sum() / (p | g).sum() if (p | g).any() else 1.0 for p, g in pairs]
    assert found["gIoU"] == pytest.approx(np.mean(np.array(ious, np.float64)), rel=1e-12)
    total = sum((p | g).sum() for p, g in pairs)
    assert found["cIoU"] == sum((p & g).sum() for p, g in pairs) / total
    assert set(found) == {"gIoU", "cIoU"}
    for seed in range(5):
        shuffled = records.copy()
        random.Random(seed).shuffle(shuffled)
        assert metrics.compute(shuffled, BENCHMARKS["ReasonSeg"]) == found  # to the last bit


def test_sums_of_many_pixels_are_exact():
    record = dataclasses.replace(
        make_record(blob(np.random.default_rng(0))), I=2**40 + 1, U=2**41, expected_empty=False
    )
    found = metrics.compute([record] * 5000, BENCHMARKS["refcoco"])
    assert found["cIoU"] == found["gIoU"] == (2**40 + 1) / 2**41


@pytest.fixture
def grefcoco_records():
    """(what happened, record): every case of gRefCOCO's rules with masks that are easy to count."""
    target, half, off = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    target[:4, :10], half[:4, :5], off[8:10, :10] = 1, True, True
    nothing = np.zeros(SHAPE, bool)
    return {
        "half found": make_record(half, target, 0),
        "rejected although there": make_record(half, target, 1, rejected=True),
        "empty mask although there": make_record(nothing, target, 2),
        "rightly rejected": make_record(off, None, 3, rejected=True),
        "right by an empty mask": make_record(nothing, None, 4),
        "found although absent": make_record(off, None, 5),
    }


def test_grefcoco_rules(grefcoco_records):
    found = metrics.compute(list(grefcoco_records.values()), BENCHMARKS["grefcoco"], "grefcoco")
    assert found["gIoU"] == pytest.approx((0.5 + 0 + 0 + 1 + 1 + 0) / 6)
    assert found["cIoU"] == 20 / (40 + 40 + 40 + 20)  # the missed absent target adds its 20 pixels, the others nothing
    assert found["N-acc"] == 2 / 3
    assert found["T-acc"] == 1 / 3


def test_gsva_protocol_scores_the_mask_of_a_rejected_target(grefcoco_records):
    found = metrics.compute(list(grefcoco_records.values()), BENCHMARKS["grefcoco"], "gsva")
    assert found["gIoU"] == pytest.approx((0.5 + 0.5 + 0 + 1 + 1 + 0) / 6)
    assert found["cIoU"] == (20 + 20) / (40 + 40 + 40 + 20)
    assert (found["N-acc"], found["T-acc"]) == (2 / 3, 1 / 3)
    assert metrics.compute(list(grefcoco_records.values()), BENCHMARKS["grefcoco"]) == found  # as the paper reports it
    with pytest.raises(ValueError, match=r"'voc'.*grefcoco or gsva or published or rela or strict"):
        metrics.compute([], BENCHMARKS["grefcoco"], "voc")


def test_refzom_averages_over_targets_only(grefcoco_records):
    found = metrics.compute(list(grefcoco_records.values()), BENCHMARKS["refzom"])
    assert found == {"oIoU": 20 / 120, "mIoU": pytest.approx(0.5 / 3), "Acc": 2 / 3}


@pytest.mark.parametrize(
    "benchmark", ["fprefcoco", "fprefcoco+", "fprefcocog", "R-refcoco", "R-refcoco+", "R-refcocog"]
)
def test_false_premises(grefcoco_records, benchmark):
    """See: half found, rightly rejected and right by an empty mask are right of six; Segment is cIoU over all six."""
    found = metrics.compute(list(grefcoco_records.values()), BENCHMARKS[benchmark])
    expected = {"See": 3 / 6, "Segment": 20 / (40 + 40 + 40 + 20)}
    if benchmark.startswith("R-"):  # each query is a ref of its own here
        expected |= {"RR": 2 / 3, "mIoU": 0.5 / 3, "oIoU": 20 / 120, "r": 2 / 3, "rIoU": 0.5 / 3}
    assert found == expected


def test_matched_pairs_each_count_as_a_mask():
    """Two questions: I / U of 6/8 and of a target that nobody found, 0/4; and of one found, with one too many."""
    base = make_record(np.zeros(SHAPE, bool), np.zeros(SHAPE, np.uint8))
    records = [
        dataclasses.replace(base, I=6, U=12, pairs=[[6, 8], [0, 4]]),
        dataclasses.replace(base, I=5, U=10, index=1, pairs=[[5, 5], [0, 5], [0, 0]]),
    ]
    found = metrics.compute(records, BENCHMARKS["MultiReasonSeg"])
    assert found == {"gIoU": (0.75 + 0 + 1 + 0 + 1) / 5, "cIoU": 11 / 22}
    assert [metrics.iou(record) for record in records] == [0.375, 2 / 3]
    counts = metrics.count_records(records)
    assert (counts["masks"], counts["queries"], counts["images"]) == (5, 2, 2)
    assert metrics.intervals(records, BENCHMARKS["MultiReasonSeg"])["gIoU"] == [0.375, 2 / 3]


def test_a_metric_without_samples_is_absent(grefcoco_records):
    only_targets = [record for record in grefcoco_records.values() if not record.expected_empty]
    found = set(metrics.compute(only_targets, BENCHMARKS["grefcoco"]))
    assert found == set(BENCHMARKS["grefcoco"].metrics) - {"N-acc"}
    assert metrics.compute([], BENCHMARKS["ReasonSeg"]) == {}


def test_intervals_hold_the_value_and_repeat():
    rng = np.random.default_rng(1)
    records = [
        make_record(blob(rng), blob(rng).astype(np.uint8), index=k // 3, query_id=str(k)) for k in range(90)
    ]  # 3 queries per image
    found, bounds = metrics.compute(records, BENCHMARKS["refcoco"]), metrics.intervals(records, BENCHMARKS["refcoco"])
    for name in ("gIoU", "cIoU"):
        low, high = bounds[name]
        assert low < found[name] < high
        assert high - low < 0.1
    assert metrics.intervals(records[::-1], BENCHMARKS["refcoco"]) == bounds
    assert metrics.intervals(records, BENCHMARKS["refcoco"], seed=1) != bounds
    assert metrics.intervals(records[:3], BENCHMARKS["refcoco"]) == {}  # one image says nothing about others


def test_intervals_of_images_not_of_queries():
    """30 equal queries on each of two images carry no more information than two."""
    good, bad = np.ones(SHAPE, bool), np.zeros(SHAPE, bool)
    target = np.ones(SHAPE, np.uint8)
    records = [make_record(mask, target, k, str(n)) for k, mask in enumerate((good, bad)) for n in range(30)]
    assert metrics.intervals(records, BENCHMARKS["refcoco"])["gIoU"] == [0.0, 1.0]


def test_a_paired_difference_is_surer_than_two_intervals():
    """Two models that differ by the same small gain on images of very different difficulty."""
    rng = np.random.default_rng(3)
    before, after = [], []
    for k in range(60):
        target = blob(rng)
        hits = target & (rng.random(SHAPE) < rng.random())
        more = hits | (target & (rng.random(SHAPE) < 0.05))
        before.append(make_record(hits, target.astype(np.uint8), k // 2, str(k)))
        after.append(make_record(more, target.astype(np.uint8), k // 2, str(k)))
    found = metrics.difference(before, after[::-1], BENCHMARKS["refcoco"])
    for name, value in metrics.compute(after, BENCHMARKS["refcoco"]).items():
        gain, (low, high) = found[name]
        assert gain == value - metrics.compute(before, BENCHMARKS["refcoco"])[name]
        assert 0 < low < gain < high
        assert high - low < 0.2 * np.diff(metrics.intervals(before, BENCHMARKS["refcoco"])[name])
    assert metrics.difference(before, before, BENCHMARKS["refcoco"]) == {"gIoU": (0, [0, 0]), "cIoU": (0, [0, 0])}
    resampled = [metrics.resample(part, BENCHMARKS["refcoco"])["cIoU"] for part in (before, after)]
    assert found["cIoU"][1] == np.percentile(resampled[1] - resampled[0], [2.5, 97.5]).tolist()
    with pytest.raises(ValueError, match="1 are in only one of them, the first: 'q' about image 29"):
        metrics.difference(before, after[:-1], BENCHMARKS["refcoco"])


def test_resampling_agrees_with_an_evaluation_of_the_drawn_images():
    rng = np.random.default_rng(4)
    records = [make_record(blob(rng), blob(rng).astype(np.uint8), k // 2, str(k)) for k in range(10)]
    resampled = np.random.default_rng(0).multinomial(5, np.full(5, 1 / 5), metrics.RESAMPLES)
    values = metrics.resample(records, BENCHMARKS["refcoco"])
    for number in range(20):
        repeated = [record for record in records for _ in range(resampled[number, record.index])]
        for name, value in metrics.compute(repeated, BENCHMARKS["refcoco"]).items():
            assert values[name][number] == pytest.approx(value, rel=1e-12)


def test_breakdown_by_family():
    rng = np.random.default_rng(2)
    families = ["relation", "attribute", "relation", "attribute", "relation"]
    records = [
        make_record(blob(rng), blob(rng).astype(np.uint8), k, meta={"family": family, "length": "short"})
        for k, family in enumerate(families)
    ]
    found = metrics.breakdown(records, BENCHMARKS["ReasonSeg"])
    assert list(found) == ["family"]  # all are short: nothing to compare
    assert found["family"]["relation"]["masks"] == 3
    relations = [record for record in records if record.meta["family"] == "relation"]
    assert found["family"]["relation"]["gIoU"] == math.fsum(map(metrics.iou, relations)) / 3


def test_masks_survive_rle():
    mask = blob(np.random.default_rng(3))
    rle = json.loads(json.dumps(encode_mask(mask)))
    assert np.array_equal(decode_mask(rle), mask)


def test_targets_merge():
    assert metrics.merge_targets(np.zeros((0, 2, 3), np.uint8), 2, 3).tolist() == [[0, 0, 0], [0, 0, 0]]
    two = np.array([[[1, 0, 255]], [[255, 0, 0]]], np.uint8)
    assert metrics.merge_targets(two, 1, 3).tolist() == [[1, 0, 255]]


def test_uncertainty_ranks_answers():
    """Errors that are uncertain rank well; a bootstrap and a paired difference come with it."""
    rng, records = np.random.default_rng(0), []
    for index in range(30):
        true = blob(rng)
        noise = rng.random(SHAPE) < index / 60
        records.append(make_record(true ^ noise, true.astype(np.uint8), index))
    good = [dataclasses.replace(r, uncertainty=[0.0, 1 - metrics.iou(r)]) for r in records]
    bad = [dataclasses.replace(r, uncertainty=[metrics.iou(r)]) for r in records]
    found = [metrics.compute(part, BENCHMARKS["ReasonSeg"]) for part in (good, bad)]
    assert found[0]["AUSE"] == 0 < found[1]["AUSE"]
    assert found[0]["AURC"] < 1 - found[0]["gIoU"] < found[1]["AURC"]
    random.Random(0).shuffle(shuffled := list(bad))
    assert metrics.compute(shuffled, BENCHMARKS["ReasonSeg"]) == found[1]
    low, high = metrics.intervals(bad, BENCHMARKS["ReasonSeg"])["AUSE"]
    assert low < found[1]["AUSE"] < high
    assert metrics.difference(bad, good, BENCHMARKS["ReasonSeg"])["AUSE"][0] == -found[1]["AUSE"]
    assert set(metrics.difference(records, good, BENCHMARKS["ReasonSeg"])) == {"gIoU", "cIoU"}
    assert set(metrics.difference(good, records, BENCHMARKS["ReasonSeg"])) == {"gIoU", "cIoU"}
