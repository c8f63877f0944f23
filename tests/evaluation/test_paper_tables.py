"""The paper's tables: their columns, filled from the benchmarks that were evaluated."""

import csv

from utils.datasets import DATASETS, TYPES
from utils.evaluation import paper_tables
from utils.evaluation.benchmarks import SUITES, TABLES
from utils.evaluation.results import Summary


def make_summary(benchmark, metrics, breakdown=None, missing=0, mode="teacher_forced", protocol="", limit=None):
    return Summary(
        benchmark, mode, protocol, "argmax", metrics, {}, {}, breakdown or {}, {"missing": missing}, {}, limit=limit
    )


def test_columns_are_those_of_the_paper():
    found = {table.number: [heading for heading, _, _ in paper_tables.columns(table)] for table in TABLES}
    assert list(found) == [3, 4, 5, 12, 13]
    assert found[3][:3] == ["val overall gIoU", "val overall cIoU", "test short query gIoU"]
    assert found[4] == [
        "refCOCO val", "refCOCO testA", "refCOCO testB", "refCOCO+ val", "refCOCO+ testA", "refCOCO+ testB",
        "refCOCOg val(U)", "refCOCOg test(U)",
    ]  # fmt: skip
    assert found[5][2:4] == ["Validation Set N-acc", "Test Set A gIoU"]
    assert found[12][2] == "Test few targets gIoU"
    assert found[13][2:4] == ["FP-RefCOCO+ See", "FP-RefCOCO+ Segment"]
    assert [len(found[number]) for number in found] == [8, 8, 9, 8, 6]
    assert len(SUITES["paper"]) == 2 + 8 + 3 + 2 + 3
    assert not set(paper_tables.PARTS) & set(SUITES["paper"])  # a test split is not evaluated twice


def test_all_benchmarks_are_in_a_suite():
    """All data sets that can be evaluated, except custom ones, which need a file."""
    suite = SUITES["all"]
    assert len(set(suite)) == len(suite)
    evaluated = {name for name, row in DATASETS.items() if TYPES[row.type].evaluate} - {"custom", "refclef"}
    assert {spec.name for spec in suite} == evaluated
    assert "R-refcocog|umd|test" in map(str, suite)


def test_parts_come_from_the_whole_split_unless_they_were_evaluated():
    groups = {"length": {"short": {"gIoU": 0.55149, "cIoU": 0.4, "masks": 3}, "long": {"gIoU": 0.7, "cIoU": 0.6}}}
    whole = make_summary("ReasonSeg|test", {"gIoU": 0.6, "cIoU": 0.5}, groups)
    [table] = paper_tables.fill("ours", [whole])
    assert table.rows[1:] == [
        ["ours", "teacher_forced, layer argmax", "-", "-", "55.1", "40.0", "70.0", "60.0", "60.0", "50.0"]
    ]
    [table] = paper_tables.fill("ours", [make_summary("ReasonSeg|test_short", {"gIoU": 0.1, "cIoU": 0.2})])
    assert table.rows[1][2:] == ["-", "-", "10.0", "20.0", "-", "-", "-", "-"]


def test_each_setup_has_its_row(tmp_path):
    scores = {"gIoU": 0.72461, "cIoU": 0.6, "N-acc": 0.5, "T-acc": 0.9}
    summaries = [
        make_summary("grefcoco|unc|val", scores, protocol="gsva"),
        make_summary("grefcoco|unc|val", scores | {"gIoU": 0.5}, protocol="gsva", mode="generate", limit=8),
        make_summary("fprefcoco|berkeley|val", {"See": 0.85, "Segment": 0.6}, missing=2, mode="generate"),
    ]
    five, thirteen = paper_tables.fill("a|b", summaries)
    assert [row[1] for row in five.rows[1:]] == [
        "teacher_forced, gsva, layer argmax",
        "generate, gsva, layer argmax, first 8 images",
    ]
    assert [row[2] for row in five.rows[1:]] == ["72.46", "50.00"]
    assert thirteen.rows[1][2:4] == ["85.00 (2 missing)", "60.00 (2 missing)"]
    lines = five.markdown().splitlines()
    assert lines[0] == "**Table 5: gRefCOCO (percent)**"
    assert lines[4].startswith("| a\\|b | teacher_forced, gsva, layer argmax | 72.46 | 60.00 | 50.00 | - |")
    assert {line.replace("\\|", "").count("|") for line in lines[2:]} == {12}
    assert five.text().splitlines()[:3] == [
        "Table 5: gRefCOCO (percent)",
        "                      teacher_forced, gsva, layer argmax  generate, gsva, layer argmax, first 8 images",
        "Validation Set gIoU                                72.46                                         50.00",
    ]
    paths = paper_tables.write(tmp_path, [five, thirteen], ["Not evaluated: x"])
    assert [path.name for path in paths] == ["tables.md", "table_5.csv", "table_13.csv"]
    with paths[1].open(newline="") as file:
        assert list(csv.reader(file)) == five.rows
    assert paths[0].read_text().endswith("\n\nNot evaluated: x\n")


def test_a_benchmark_without_a_table_gives_none():
    assert paper_tables.fill("ours", [make_summary("refzom|test", {"oIoU": 0.5})]) == []
