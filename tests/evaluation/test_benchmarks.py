"""The table of benchmarks: complete, consistent, and the only place that knows a benchmark by its name."""

import ast
from pathlib import Path

import pytest

from utils.datasets import DATASETS, TYPES, Spec
from utils.evaluation.benchmarks import BENCHMARKS, MODES, TABLES, Benchmark, benchmark_of
from utils.evaluation.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
MAY_NAME_THEM = (  # the two tables, what generates data, and studies
    "utils/evaluation/benchmarks.py",
    "utils/datasets/__init__.py",
    "utils/demo",
    "scripts/make_demo_data.py",
    "scripts/bench.py",
    "scripts/dev/study_",
)


@pytest.mark.parametrize("row", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_every_row_names_existing_types_metrics_and_splits(row):
    assert TYPES[DATASETS[row.name].type].evaluate
    assert {*row.metrics.values(), *row.published.values()} <= set(METRICS)
    assert set(row.published) <= set(row.metrics)
    assert {row.mode, *row.protocols} <= set(MODES)
    assert {split for name, part in row.parts.items() for split in (name, part.whole)} <= set(row.splits)
    if row.table:
        assert row.table in TABLES
        assert set(row.table.metrics) <= set(row.metrics)
        assert all(row.splits.values())


def test_a_data_set_without_a_row_is_a_default_benchmark():
    assert benchmark_of(Spec("refclef")) == Benchmark("refclef", {"gIoU": "gIoU", "cIoU": "cIoU"}, "teacher_forced")


def test_protocols_apply_only_where_they_are_defined():
    found = {mode: [BENCHMARKS["grefcoco"].protocol(name, mode) for name in (None, "gsva", "grefcoco")]
             for mode in MODES}  # fmt: skip
    assert found == {"teacher_forced": ["gsva", "gsva", "grefcoco"], "generate": ["grefcoco"] * 3}
    assert BENCHMARKS["refzom"].protocol("gsva") == ""
    for name in ("ReasonSeg", "MultiReasonSeg"):
        assert [BENCHMARKS[name].protocol(asked) for asked in (None, "published", "gsva")] == [
            "strict",
            "published",
            "strict",
        ]
    with pytest.raises(ValueError, match="unknown protocol 'voc'; use grefcoco or gsva or published or rela or strict"):
        BENCHMARKS["refzom"].protocol("voc")


def test_no_other_code_names_a_benchmark():
    """A new benchmark needs one row here and one in DATASETS, because no other code compares names."""
    found = []
    for path in [
        *ROOT.glob("*.py"),
        *(path for part in ("model", "utils", "scripts") for path in (ROOT / part).rglob("*.py")),
    ]:
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith(MAY_NAME_THEM):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            constants = [node for node in nodes if isinstance(node, ast.Constant) and node.value in BENCHMARKS]
            found += [f"{place}:{node.lineno}: {node.value!r}" for node in constants]
    assert not found, "\n".join(found)
