"""Result files: round trip, and errors for truncated, damaged or mixed files."""

import dataclasses
import json

import numpy as np
import pytest

from scripts import score
from utils.datasets.masks import decode_mask, encode_mask
from utils.evaluation import metrics
from utils.evaluation.metrics import Record
from utils.evaluation.results import Journal, Provenance, read_results, result_path, to_lines

PROVENANCE = Provenance("grefcoco|unc|val", "generate", "argmax", 64, 0, "gsva", "abc", "float32", 3, 6)


def make_record(index, query_id) -> Record:
    mask = np.random.default_rng(index).random((5, 6)) < 0.5
    intersection, union, p, g = metrics.count_pixels(mask, np.ones((5, 6), np.uint8))
    text = 'line\u2028separator, "quotes" and \n newline, größer ✓'
    masks, meta = [encode_mask(mask)], {"targets": 1}
    return Record(
        index,
        "a.jpg",
        "1",
        query_id,
        text,
        "q?",
        "[SEG]",
        [3],
        False,
        False,
        intersection,
        union,
        p,
        g,
        masks,
        meta,
        [[1, 2]],
    )


@pytest.fixture
def records():
    return [make_record(index, query_id) for index in range(3) for query_id in "ab"]


@pytest.fixture
def path(tmp_path, records):
    path = result_path(tmp_path, PROVENANCE.spec, "generate")
    path.write_text("".join(to_lines(PROVENANCE, records)), encoding="utf-8")
    return path


def test_records_round_trip(path, records):
    assert path.name == "grefcoco_unc_val.generate.jsonl"
    assert read_results(path) == (PROVENANCE, records)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(lines) == 6
    assert lines[0]["predicted_empty"] is False
    assert lines[0]["IoU"] == metrics.iou(records[0])
    assert lines[0]["origin"] == dataclasses.asdict(PROVENANCE)
    assert decode_mask(lines[0]["masks"][0]).sum() == records[0].P


def test_a_truncated_line_is_named(path, records):
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        ValueError, match=r"generate\.jsonl, line 6 is not a result .*it is cut off: test.py --resume continues"
    ):
        read_results(path)
    assert read_results(path, allow_truncated=True) == (PROVENANCE, records[:5])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: ["{}\n", *lines], "line 1 is not a result .*evaluate again"),
        (lambda lines: [lines[0][20:], *lines[1:]], "line 1 is not a result"),
        (lambda lines: [*lines, "[]\n"], "line 7 is not a result"),
        (lambda lines: [*lines, lines[2]], "line 7: query 'a' of a.jpg is a duplicate"),
        (lambda lines: [*lines[:5], lines[5].replace('"abc"', '"def"')], "line 6 is of another evaluation than line 1"),
        (
            lambda lines: [lines[0].replace('"P": ', '"P": 0.'), *lines[1:]],
            "line 1 is not a result .P: of another type",
        ),
        (lambda lines: [line.replace('"seed": 0', '"seed": "0"') for line in lines], "seed: of another type"),
        (lambda lines: [], "holds no results"),
    ],
)
def test_damaged_files_are_named(path, damage, message):
    lines = [line + "\n" for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    path.write_text("".join(damage(lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_results(path)


def test_a_journal_leaves_out_the_last_image_of_an_unfinished_file(path, records):
    assert Journal(path).read(PROVENANCE) == records
    path.write_text("".join(to_lines(PROVENANCE, records[:5])), encoding="utf-8")
    assert Journal(path).read(PROVENANCE) == records[:4]


def test_a_journal_merges_the_files_of_all_processes(path, records):
    journal = Journal(path)
    part = path.with_name("grefcoco_unc_val.generate.rank_1.jsonl")
    path.write_text("".join(to_lines(PROVENANCE, records[:3])), encoding="utf-8")
    part.write_text("".join(to_lines(PROVENANCE, [*records[:2], *records[4:]])), encoding="utf-8")
    assert journal.rank_files() == [part]
    assert journal.read(PROVENANCE) == records[:2]  # the last image of both files is predicted again
    other = dataclasses.replace(records[0], I=0)
    part.write_text("".join(to_lines(PROVENANCE, [other, records[4]])), encoding="utf-8")
    with pytest.raises(ValueError, match="has another answer in another file"):
        journal.read(PROVENANCE)
    journal.replace(PROVENANCE, records)
    assert not part.exists()
    assert read_results(path) == (PROVENANCE, records)


def test_nothing_to_resume_from(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    assert journal.read(PROVENANCE) == []
    (tmp_path / "a.jsonl").write_text('{"index": 0, "ima')  # killed while the first line was written
    assert journal.read(PROVENANCE) == []


@pytest.mark.parametrize(("measure", "aurc"), [("ambiguity", 0.125), ("predicted_iou", 0.375)])
def test_score_ranks_errors_by_other_measures(tmp_path, capsys, measure, aurc):
    """The better of two answers (IoU 1 and 0.5) comes first by ambiguity, and second by SAM's rating."""
    spec = "ReasonSeg|val_short"
    provenance = dataclasses.replace(PROVENANCE, benchmark=spec, protocol="strict")
    pairs = [(4, [0.1], [0.2]), (2, [0.6], [0.9])]
    records = [
        dataclasses.replace(
            make_record(n, "a"), I=right, U=4, pairs=[], masks=[], ambiguity=ambiguity, predicted_iou=predicted
        )
        for n, (right, ambiguity, predicted) in enumerate(pairs)
    ]
    path = result_path(tmp_path, provenance.spec, "generate")
    path.write_text("".join(to_lines(provenance, records)), encoding="utf-8")
    assert "AURC" not in score.rescore(path).metrics
    assert score.rescore(path, rank_by=measure).metrics["AURC"] == pytest.approx(aurc)
    assert score.main([str(path), "--rank_by", measure]) == 0
    assert f"AURC and AUSE rank the answers by {measure}." in capsys.readouterr().out
    assert score.main([str(path), "--rank_by", measure, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["rank_by"] == measure
    with pytest.raises(ValueError, match="layers needs answers of --layer_policy mc:T"):
        score.rescore(path, rank_by="layers")
