"""The protocols of docs/evaluation.md: each example of that page, from masks and logits to the numbers.

Sources: henghuiding/ReLA gres_model/evaluation/refer_evaluation.py (``rela``, ``grefcoco``); LeapLabTHU/GSVA and
rui-qian/UGround ``eval_gres`` (``published`` of gRefCOCO); MaverickRen/PixelLM and rui-qian/UGround ``ar_validate``
(``published`` of MUSE); dvlab-research/LISA ``validate`` (``published`` of ReasonSeg); jianzongwu/robust-ref-seg
utils/validation.py (R-RefCOCO); see-say-segment/sesame (the first of several [SEG]).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from model.structures import EvalQuery, EvalSample
from utils.evaluation import metrics
from utils.evaluation.benchmarks import BENCHMARKS
from utils.evaluation.predictions import QueryPrediction, score
from utils.evaluation.result_text import format_table
from utils.evaluation.results import Provenance, read_results, summarize, to_lines

GUIDE = (Path(__file__).resolve().parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
SHAPE = (10, 20)


def region(first: int, count: int) -> np.ndarray:
    """A mask [H, W] of ``count`` pixels from pixel number ``first`` on."""
    mask = np.zeros(SHAPE, np.uint8)
    mask.ravel()[first : first + count] = 1
    return mask


def logits_of(mask: np.ndarray, high: float = 3.0) -> np.ndarray:
    return np.where(mask == 1, high, -3.0).astype(np.float32)


def answer(benchmark, predicted, targets, rejected=False, index=0, query_id="7_0", meta=None):
    """The record of an answer: ``predicted`` are logits [H, W], ``targets`` masks."""
    masks = np.stack(targets) if targets else np.zeros((0, *SHAPE), np.uint8)
    query = EvalQuery(query_id, "q", masks, meta=meta or {})
    sample = EvalSample(f"{index}.jpg", str(index), np.zeros((*SHAPE, 3), np.uint8), [query])
    logits = np.stack(predicted) if predicted else np.zeros((0, *SHAPE), np.float32)
    prediction = QueryPrediction("q?", "a", logits, logits, [3] * len(logits), rejected)
    return score(index, sample, query, prediction, BENCHMARKS[benchmark])


def rescored(tmp_path, benchmark, records, protocol="", several_seg="union", without_target=0):
    """Metrics recomputed from the JSONL alone, rounded as in the guide."""
    mode = BENCHMARKS[benchmark].mode
    origin = Provenance(f"{benchmark}|val", mode, "argmax", 64, 0, "", "abc", "float32", 3, len(records))
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(to_lines(dataclasses.replace(origin, without_target=without_target), records)))
    saved, read = read_results(path)
    assert read == records
    protocol = BENCHMARKS[benchmark].protocol(protocol, mode)
    summary = summarize(dataclasses.replace(saved, protocol=protocol, several_seg=several_seg), read)
    return {name: round(value, 3) for name, value in summary.metrics.items()}, summary


def assert_in_guide(label: str, values: list[float]) -> None:
    """The guide has a row with these numbers."""
    cells = " | ".join(f"{value:.3f}" for value in values)
    assert f"| {label} | {cells} |" in GUIDE, f"| {label} | {cells} |"


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("gsva", {"gIoU": 0.812, "cIoU": 0.538, "N-acc": 1, "T-acc": 0.5}),
        ("grefcoco", {"gIoU": 0.75, "cIoU": 0.385, "N-acc": 1, "T-acc": 0.5}),
        ("published", {"gIoU": 0.562, "cIoU": 0.538, "N-acc": 0.5, "T-acc": 0.5}),
        ("rela", {"gIoU": 0.5, "cIoU": 0.385, "N-acc": 0.5, "T-acc": 0.5}),
    ],
)
def test_grefcoco(tmp_path, protocol, expected):
    target = region(0, 25)
    records = [
        answer("grefcoco", [logits_of(target)], [target], index=0),
        answer("grefcoco", [logits_of(region(15, 25))], [target], rejected=True, index=1),
        answer("grefcoco", [logits_of(region(0, 0))], [], index=2),
        answer("grefcoco", [logits_of(region(60, 9))], [], rejected=True, index=3),
    ]
    found, summary = rescored(tmp_path, "grefcoco", records, protocol)
    assert {name: found[name] for name in expected} == expected
    assert_in_guide(f"`{protocol}`", list(expected.values()))
    assert summary.mode_label == f"teacher_forced, {protocol}"
    assert summary.counts["predicted_empty"] == (2 if protocol in ("published", "rela") else 3)


def test_r_refcoco(tmp_path):
    benchmark, target = "R-refcoco", region(0, 40)
    records = [
        answer(benchmark, [logits_of(region(0, 30))], [target], query_id="1_0"),
        answer(benchmark, [logits_of(region(30, 10))], [target], query_id="1_1"),
        answer(benchmark, [], [], rejected=True, query_id="1_2"),
        answer(benchmark, [logits_of(region(50, 20))], [], query_id="1_3"),
        answer(benchmark, [logits_of(region(0, 20))], [region(0, 20)], query_id="2_0"),
        answer(benchmark, [], [], rejected=True, query_id="2_1"),
    ]
    found, summary = rescored(tmp_path, benchmark, records)
    expected = {"mIoU": 0.75, "oIoU": 0.6, "r": 0.75, "rIoU": 0.7}
    assert {name: found[name] for name in expected} == expected
    assert (found["See"], found["RR"]) == (0.833, 0.667)  # over sentences instead of refs
    assert_in_guide("R-RefCOCO", list(expected.values()))
    assert summary.breakdown == {}
    lone = [records[2], dataclasses.replace(records[0], index=1)]  # refs with false, and with true sentences only
    assert {name: metrics.compute(lone, BENCHMARKS[benchmark])[name] for name in expected} == {
        "mIoU": 0.75,
        "oIoU": 0.75,
        "r": 1,
        "rIoU": 0.75,
    }


def test_refs_are_told_apart_by_their_ids():
    """Ids of refs and sentences may be strings with an underscore; the same ref id may be on two images."""
    benchmark, target = "R-refcoco", region(0, 40)
    found = [
        answer(benchmark, [logits_of(target)], [target], query_id="a_b_c", meta={"ref": "a"}),
        answer(benchmark, [], [target], query_id="a_d", meta={"ref": "a"}),
        answer(benchmark, [], [target], query_id="a_d", meta={"ref": "a"}, index=1),
    ]
    assert metrics.compute(found, BENCHMARKS[benchmark])["mIoU"] == (0.5 + 0) / 2


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("strict", {"gIoU": 0.45, "cIoU": 0.429}), ("published", {"gIoU": 0.562, "cIoU": 0.638})],
)
def test_muse(tmp_path, protocol, expected):
    surplus = logits_of(region(100, 50))
    surplus.ravel()[100:104] = (0.5, 0.7, 0.9, 1.0)  # of 50 positive logits, the published code counts these
    first = [logits_of(region(0, 30)), logits_of(region(40, 20)), surplus]
    second = [logits_of(region(0, 10))]
    records = [
        answer("MultiReasonSeg", first, [region(0, 40), region(40, 20)], query_id="0", meta={"targets": 2}),
        answer("MultiReasonSeg", second, [region(0, 20), region(150, 10)], query_id="1", meta={"targets": 2}),
    ]
    assert [(record.pairs, record.surplus) for record in records] == [
        ([[30, 40], [20, 20], [0, 50]], [4]),
        ([[10, 20], [0, 10]], []),
    ]
    found, summary = rescored(tmp_path, "MultiReasonSeg", records, protocol)
    assert found == expected
    assert_in_guide(f"MUSE, `{protocol}`", list(expected.values()))
    assert summary.mode_label == ("generate" if protocol == "strict" else "generate, published")
    old = [dataclasses.replace(record, surplus=[]) for record in records]
    assert metrics.compute(old, BENCHMARKS["MultiReasonSeg"])["gIoU"] == 0.45
    with pytest.raises(ValueError, match="older version; evaluate again"):
        rescored(tmp_path, "MultiReasonSeg", old, "published")


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("strict", {"gIoU": 0.667, "cIoU": 0.6}), ("published", {"gIoU": 0.5, "cIoU": 0.462})],
)
def test_reasonseg(tmp_path, protocol, expected):
    drawn = [(region(0, 30), region(0, 40)), (region(0, 20), region(0, 20)), (region(0, 10), region(0, 40))]
    records = [answer("ReasonSeg", [logits_of(p)], [g], index=k) for k, (p, g) in enumerate(drawn)]
    nothing = answer("ReasonSeg", [logits_of(region(50, 30))], [region(0, 0)], index=3, meta={"without_target": True})
    found, summary = rescored(tmp_path, "ReasonSeg", [*records, nothing], protocol, without_target=1)
    assert found == expected
    assert_in_guide(f"ReasonSeg, `{protocol}`", list(expected.values()))
    images = 3 + (protocol == "published")
    assert (summary.counts["masks"], summary.counts["images"], summary.counts["split_images"]) == (images,) * 3
    if protocol == "published":
        with pytest.raises(ValueError, match="older version"):
            rescored(tmp_path, "ReasonSeg", records, protocol, without_target=None)


@pytest.mark.parametrize(("several_seg", "iou"), [("union", 0.636), ("first", 0.75)])
def test_several_seg_for_one_target(tmp_path, several_seg, iou):
    predicted = [logits_of(region(0, 30)), logits_of(region(35, 20))]
    records = [answer("fprefcoco", predicted, [region(0, 40)]), answer("fprefcoco", [], [], True, query_id="7_1")]
    found, summary = rescored(tmp_path, "fprefcoco", records, several_seg=several_seg)
    assert found == {"See": 1, "Segment": iou}
    assert_in_guide(f"`--several_seg {several_seg}`", [iou])
    assert summary.to_dict()["several_seg"] == several_seg
    assert summary.mode_label == ("generate" if several_seg == "union" else "generate, first [SEG]")
    old = [dataclasses.replace(record, first=[]) for record in records]
    if several_seg == "first":
        with pytest.raises(ValueError, match="older version; evaluate again"):
            rescored(tmp_path, "fprefcoco", old, several_seg=several_seg)


def shares(benchmark: str, *counts: tuple[int, int], meta: dict | None = None) -> list:
    """Present targets of 40 pixels or fewer that are found by I / U of ``counts``, an image each."""
    return [
        answer(benchmark, [logits_of(region(0, i))], [region(0, u)], index=k, meta=meta)
        for k, (i, u) in enumerate(counts)
    ]


def absent(benchmark: str, index: int, drawn: int = 0):
    """An absent target that is rejected, or for which pixels are drawn."""
    predicted = [logits_of(region(0, drawn))] if drawn else []
    return answer(benchmark, predicted, [], rejected=not drawn, index=index)


def test_giou_and_ciou(tmp_path):
    found, _ = rescored(tmp_path, "refcoco", shares("refcoco", (30, 40), (20, 20), (10, 40)))
    assert found == {"gIoU": 0.667, "cIoU": 0.6}
    assert_in_guide("three masks", list(found.values()))


def test_fp_refcoco(tmp_path):
    records = [*shares("fprefcoco", (30, 40)), absent("fprefcoco", 1, drawn=20), absent("fprefcoco", 2)]
    found, _ = rescored(tmp_path, "fprefcoco", records)
    assert found == {"See": 0.667, "Segment": 0.5}
    assert_in_guide("FP-RefCOCO", [0.667, 0.5])


def test_ref_zom(tmp_path):
    records = [*shares("refzom", (30, 40), (20, 20)), absent("refzom", 2), absent("refzom", 3, drawn=9)]
    found, _ = rescored(tmp_path, "refzom", records)
    assert found == {"oIoU": 0.833, "mIoU": 0.875, "Acc": 0.5}
    assert_in_guide("Ref-ZOM", [0.833, 0.875, 0.5])


def test_precision_of_grefcoco(tmp_path):
    records = [
        *shares("grefcoco", (17, 20), (15, 20)),
        answer("grefcoco", [], [region(0, 20)], rejected=True, index=2),
        absent("grefcoco", 3),
    ]
    expected = {"Pr@0.7": 0.667, "Pr@0.8": 0.333, "Pr@0.9": 0}
    for some in (records, records[:3]):  # absent targets are in neither count
        found, _ = rescored(tmp_path, "grefcoco", some, "grefcoco")
        assert {name: found[name] for name in expected} == expected
    assert_in_guide("gRefCOCO", list(expected.values()))
    assert rescored(tmp_path, "grefcoco", shares("grefcoco", (9, 10)), "grefcoco")[0]["Pr@0.9"] == 1  # "at least"


def test_precision_agrees_with_relas_definition_on_random_masks():
    """Of ReLA's samples with a target, the share whose I / U is at least the threshold; rejected ones have I = 0."""
    rng = np.random.default_rng(1)
    records, ious = [], []
    for index in range(200):
        g, p = (region(0, int(rng.integers(1, 60))) for _ in range(2))
        is_absent, rejected = rng.random(2) < 0.3
        ious += [] if is_absent else [0.0 if rejected else (g & p).sum() / (g | p).sum()]
        records.append(answer("grefcoco", [logits_of(p)], [] if is_absent else [g], bool(rejected), index))
    found = metrics.compute(records, BENCHMARKS["grefcoco"], "rela")
    for threshold in (0.7, 0.8, 0.9):
        assert found[f"Pr@{threshold}"] == pytest.approx(np.mean(np.array(ious) >= threshold))


@pytest.mark.parametrize(
    ("protocol", "expected", "exchanged"),
    [("strict", [0.783, 0.75], [0.783, 0.75]), ("published", [0.733, 0.75], [0.3, 0.225])],
)
def test_mmr(tmp_path, protocol, expected, exchanged):
    """Targets of a question that lie apart; by union it does not matter in which order they are found."""
    targets = [region(0, 8), region(100, 8)]
    predicted = [logits_of(region(0, 10)), logits_of(region(104, 4))]
    last = answer("MMR", [logits_of(region(0, 10))], [region(0, 9)], index=1)
    for drawn, values in ((predicted, expected), (predicted[::-1], exchanged)):
        records = [answer("MMR", drawn, targets), last]
        found, summary = rescored(tmp_path, "MMR", records, protocol)
        assert list(found.values()) == values
        assert summary.counts["masks"] == (2 if protocol == "strict" else 3)
        assert ("several [SEG]" in format_table([summary])) == (protocol == "strict")
    assert_in_guide(f"MMR, `{protocol}`", expected)


def test_masks_that_lack_or_are_too_many_in_mmr(tmp_path):
    targets = [region(0, 8), region(100, 8)]
    one, three = [logits_of(region(0, 8))], [*map(logits_of, [*targets, region(150, 8)])]
    for drawn, giou in ((one, 0.5), (three, 1), ([], 0)):
        records = [answer("MMR", drawn, targets, rejected=not drawn)]
        assert rescored(tmp_path, "MMR", records, "published")[0] == {"gIoU": giou, "cIoU": giou}
    rejected = answer("MMR", three, targets, rejected=True)  # as a file of another model may say
    assert rescored(tmp_path, "MMR", [rejected], "published")[0] == {"gIoU": 0, "cIoU": 0}
    old = [dataclasses.replace(records[0], in_order=[])]
    with pytest.raises(ValueError, match="answered by an older version, or is given by counts"):
        rescored(tmp_path, "MMR", old, "published")
    _, summary = rescored(tmp_path, "MMR", [answer("MMR", three, targets)], "published", several_seg="first")
    assert summary.mode_label == "generate, published"  # each mask counts, whatever the flag says


def test_mmr_agrees_with_the_authors_loop_on_random_masks(tmp_path):
    """gIoU: a running mean over all target masks; cIoU: sums; U = 0 counts as 1; masks in order, without matching."""
    rng = np.random.default_rng(0)

    def mask():
        return (rng.random(SHAPE) < rng.choice([0, 0.02, 0.5, 1])).astype(np.uint8)

    records, ious, total = [], [], np.zeros(2, int)
    for index in range(60):
        targets = [mask() for _ in range(rng.integers(1, 5))]
        targets[0][0, 0] = 1
        predicted = [mask() for _ in targets]
        for p, g in zip(predicted, targets, strict=True):
            i, u = int((p & g).sum()), int((p | g).sum())
            total += i, u
            ious.append(i / u if u else 1)
        records.append(answer("MMR", list(map(logits_of, predicted)), targets, index=index))
    assert min(ious) == 0
    assert max(ious) == 1
    found = metrics.compute(records, BENCHMARKS["MMR"], "published")
    assert found == pytest.approx({"gIoU": np.mean(ious), "cIoU": total[0] / total[1]})
    assert np.mean([v for r in records for v in metrics.ious(r, "published")]) == pytest.approx(found["gIoU"])
    assert metrics.count_masks(records, "published") == len(ious)


def test_gseval(tmp_path):
    records = shares("GSEval", (8, 10), (6, 10), meta={"class": "single"})
    records += [dataclasses.replace(shares("GSEval", (1, 10), meta={"class": "part"})[0], index=2)]
    found, summary = rescored(tmp_path, "GSEval", records)
    groups = summary.breakdown["class"]
    values = [found["gIoU"], groups["single"]["gIoU"], groups["part"]["gIoU"]]
    assert values == pytest.approx([0.5, 0.7, 0.1])
    assert_in_guide("GSEval", values)


def test_hallusegbench(tmp_path):
    factual, edited = region(0, 6), region(0, 5)
    settings = {"orgl_orgi": region(0, 8), "edtl_orgi": region(3, 4), "edtl_edti": edited, "orgl_edti": None}
    records = []
    for index, (setting, drawn) in enumerate(settings.items()):
        truth = edited if setting.endswith("edti") else factual
        masks, reference = (truth[None][:0], truth) if index % 2 else (truth[None], None)
        query = EvalQuery(setting, "q", masks, meta={"pair": "0", "setting": setting}, reference=reference)
        sample = EvalSample("a.jpg", "a", np.zeros((*SHAPE, 3), np.uint8), [query])
        logits = np.zeros((0, *SHAPE), np.float32) if drawn is None else logits_of(drawn)[None]
        prediction = QueryPrediction("q?", "a", logits, logits, [3] * len(logits), drawn is None)
        records.append(score(index // 2, sample, query, prediction, BENCHMARKS["HalluSegBench"]))
    found, _ = rescored(tmp_path, "HalluSegBench", records)
    expected = {"dIoU_t": 0.321, "dIoU_v": 0.75, "CMS_f": 0.556, "CMS_c": 0, "N-acc": 0.5, "T-acc": 1}
    assert found == expected
    assert_in_guide("HalluSegBench", list(expected.values())[:4])


def test_uncertainty(tmp_path):
    records = shares("refcoco", (40, 40), (20, 40), (30, 40))
    records = [dataclasses.replace(r, uncertainty=[value]) for r, value in zip(records, (0.1, 0.2, 0.3), strict=True)]
    found, _ = rescored(tmp_path, "refcoco", records)
    assert (found["AURC"], found["AUSE"]) == (0.167, 0.042)
    assert_in_guide("three answers", [0.167, 0.042])


def test_lines_of_an_older_version_are_read(tmp_path):
    record = answer("ReasonSeg", [logits_of(region(0, 30))], [region(0, 40)])
    origin = Provenance("ReasonSeg|val", "teacher_forced", "argmax", 64, 0, "", "abc", "float32", 1, 1)
    [line] = map(json.loads, to_lines(origin, [record]))
    for name in ("first", "surplus"):
        del line[name]
    for name in ("several_seg", "annotations", "without_target"):
        del line["origin"][name]
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert read_results(path) == (origin, [record])
