"""Answers of any model: what test.py wrote scores the same, others are matched by name, and bad lines are named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_run import ROOT

import test as evaluation
from scripts import compare, make_demo_data, score
from utils.datasets import get_eval_dataset
from utils.datasets.base import DataError
from utils.datasets.masks import encode_mask
from utils.evaluation.answers import decode_masks, parse_answer
from utils.evaluation.any_model import score_file
from utils.evaluation.results import Summary, read_results

SPEC = "grefcoco|unc|val"
FOLLOWS = ("benchmark", "mode", "protocol", "metrics", "intervals", "breakdown", "counts", "layers", "layer_policy")


@pytest.fixture(scope="module")
def queries(data, tmp_path_factory) -> list[dict]:
    """The lines of ``--list_queries``."""
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    assert score.main(["--benchmark", SPEC, "--dataset_dir", str(data), "--list_queries", str(path)]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def truth(data) -> dict[tuple[str, str], np.ndarray]:
    """image_id, query_id -> the target [H, W], empty where there is none."""
    dataset = get_eval_dataset(SPEC, data)
    samples = [dataset[index] for index in range(len(dataset))]
    none = np.zeros((1, 1), np.uint8)
    return {
        (s.image_id, q.query_id): q.masks.max(axis=0, initial=0)
        if len(q.masks)
        else np.broadcast_to(none, s.image.shape[:2])
        for s in samples
        for q in s.queries
    }


def perfect(queries: list[dict], truth: dict) -> list[dict]:
    lines = []
    for query in queries:
        mask = truth[query["image_id"], query["query_id"]]
        lines.append(query | {"masks": [encode_mask(mask)] if mask.any() else [], "answer": "It is [SEG]."})
    return lines


def scored(lines: list[dict], data: Path, folder: Path, *flags: str) -> dict:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = score_file(get_eval_dataset(SPEC, data), path)
    return result.metrics


@pytest.mark.slow
def test_what_test_py_wrote_scores_the_same(version, tmp_path, capsys):
    """On every benchmark, to the last digit; matched masks (MUSE) have lost their logits."""
    data, output = tmp_path / "data", tmp_path / "eval"
    sizes = ("--train", "2", "--val", "2", "--test", "2")
    assert make_demo_data.main(["--out", str(data), "--all_types", *sizes]) == 0
    flags = ["--version", str(version), "--dataset_dir", str(data), "--suite", "all", "--mode", "both"]
    assert evaluation.main([*flags, "--output", str(output), "--max_new_tokens", "8"]) == 0
    capsys.readouterr()
    files = sorted(output.glob("*.jsonl"))
    assert len(files) > 30
    for file in files:
        spec = read_results(file)[0].benchmark
        if spec.startswith("MultiReasonSeg"):
            continue
        source = ["--benchmark", spec, "--dataset_dir", str(data), "--predictions", str(file)]
        assert score.main([*source, "--json", "--output", str(tmp_path / "again")]) == 0
        [again] = json.loads(capsys.readouterr().out)
        saved = Summary.load(file.with_suffix(".json")).to_dict()
        assert {name: again.get(name) for name in FOLLOWS} == {name: saved.get(name) for name in FOLLOWS}, file.name
        assert Summary.load(tmp_path / "again" / file.with_suffix(".json").name).to_dict() == again
        assert (tmp_path / "again" / file.name).read_text().count("\n") == file.read_text().count("\n")


def test_names_and_texts_find_their_query(queries, truth, data, tmp_path):
    """By ids; by file name and text alone, in any folder, format and case."""
    lines = perfect(queries, truth)
    assert {line["image_id"] for line in lines} != {line["image"] for line in lines}
    by_text = [
        {
            "image": "C:\\photos\\" + Path(line["image"]).with_suffix(".png").name,
            "query": line["query"].upper() + " .",
            "masks": line["masks"],
        }
        for line in lines
    ]
    for given in (lines, by_text, [{k: v for k, v in line.items() if k not in ("query", "image")} for line in lines]):
        metrics = scored(given, data, tmp_path)
        assert set(metrics.values()) == {1.0}


def test_an_answer_without_masks_rejects(queries, data, tmp_path):
    metrics = scored([query | {"masks": []} for query in queries], data, tmp_path)
    assert metrics["N-acc"] == 1.0
    assert metrics["T-acc"] == 0.0


def test_masks_of_every_form(tmp_path):
    """The same rectangle as RLE, polygon, box, PNG; and an empty mask, which counts like no mask."""
    rectangle = np.zeros((20, 30), np.uint8)
    rectangle[5:15, 10:25] = 1
    cv2.imwrite(str(tmp_path / "mask.png"), rectangle * 255)
    forms = [
        encode_mask(rectangle > 0),
        {
            "size": [20, 30],
            "counts": np.diff(
                np.flatnonzero(np.diff(rectangle.T.ravel(), prepend=0, append=0)), prepend=0, append=600
            ).tolist(),
        },
        [10, 5, 25, 5, 25, 15, 10, 15],
        [[[10, 5], [25, 5], [25, 15], [10, 15]]],
        {"box": [10, 5, 25, 15]},
        "mask.png",
    ]
    for form in forms:
        answer, _ = parse_answer(json.dumps({"image": "a", "query": "b", "masks": [form]}), "line 1")
        np.testing.assert_array_equal(decode_masks(answer, tmp_path, 20, 30), rectangle[None] > 0, str(form))
    empty, _ = parse_answer(
        json.dumps({"image": "a", "query": "b", "masks": [{"size": [20, 30], "counts": [600]}]}), ""
    )
    assert decode_masks(empty, tmp_path, 20, 30).sum() == 0
    assert not empty.rejected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(), r"1 queries of grefcoco\|unc\|val have no answer"),
        (lambda lines: lines.append(lines[0] | {"masks": []}), r"line \d+ answers the query of line 1 again"),
        (
            lambda lines: lines[0].update(image="another.jpg"),
            r"line 1: image_id \d+ is .* in the data, not another.jpg",
        ),
        (lambda lines: lines.append(lines[0] | {"query_id": "new"}), r"1 answers are about no query.*\n.*, line \d+: "),
        (lambda lines: lines[0].update(query="another"), r"line 1: query_id \w+ is '.*' in the data, not 'another'"),
        (lambda lines: lines[0].update(image_id="x", image="y"), "no answer"),
        (lambda lines: lines[0].pop("masks"), "line 1: 'masks' must be a list .* but is missing"),
        (lambda lines: lines[0].update(masks=[[1, 2, 3, 4]]), "line 1, mask 1: a polygon has 2 points"),
        (lambda lines: lines[0].update(masks=[{"box": [9, 9, 3, 3]}]), r"write \[x0, y0, x1, y1\]"),
        (lambda lines: lines[0].update(masks=[{"box": [900, 900, 903, 903]}]), "outside its .* image"),
        (lambda lines: lines[0].update(masks=[{"size": [2, 2], "counts": [4]}]), r"line 1, mask 1: an RLE has size"),
        (lambda lines: lines[0].update(masks=[{"box": [0, 0, 0.5, 1]}]), "boxes count pixels, not fractions"),
        (lambda lines: lines[0].update(masks=["no.png"]), "no.png cannot be read: it does not exist"),
        (lambda lines: lines[0].update(rejected="yes"), "'rejected' must be true or false"),
        (lambda lines: lines[0].update(ambiguity=[float("nan")]), "line 1: 'ambiguity' holds NaN or infinity"),
        (lambda lines: lines[0].update(uncertainty="high"), "uncertainty: of another type"),
        (lambda lines: lines[0].update(origin={}), "line 2: its 'origin' is another"),
        (lambda lines: [line.update(origin={"benchmark": 3}) for line in lines], "'origin' is not test.py's"),
        (lambda lines: lines.clear(), "holds no answer"),
    ],
)
def test_lines_that_do_not_fit_are_named(queries, truth, data, tmp_path, change, message):
    lines = [dict(line) for line in perfect(queries, truth)]
    change(lines)
    with pytest.raises(DataError, match=message):
        scored(lines, data, tmp_path)


def test_equal_answers_count_once_and_gray_masks_are_refused(queries, truth, data, tmp_path):
    lines = perfect(queries, truth)
    assert set(scored([*lines, *lines], data, tmp_path).values()) == {1.0}
    cv2.imwrite(str(tmp_path / "soft.png"), np.arange(100, dtype=np.uint8).reshape(10, 10))
    lines[0]["masks"] = ["soft.png"]
    with pytest.raises(DataError, match=r"line 1, mask 1: soft\.png has 100 values; a mask has two"):
        scored(lines, data, tmp_path)


def test_images_of_one_name_in_several_folders(tmp_path):
    """Answers in their own order, about images that differ in their folder alone."""
    for number, folder in enumerate(("a", "b", "c")):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "1.png"), np.full((20, 20, 3), 50 * number, np.uint8))
    boxes = {f"{folder}/1.png": [[x, 2, x + 6, 2, x + 6, 9, x, 9]] for x, folder in ((1, "a"), (5, "b"), (9, "c"))}
    lines = [{"image": image, "query": "it", "masks": mask} for image, mask in boxes.items()]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = get_eval_dataset(f"custom|{tmp_path}/own.jsonl", tmp_path)
    path = tmp_path / "answers.jsonl"
    for prefix, ending in (("", ".png"), ("/elsewhere/photos/", ".jpg"), ("x\\", ".png")):
        given = [line | {"image": prefix + line["image"].replace(".png", ending)} for line in lines[::-1]]
        path.write_text("".join(json.dumps(line) + "\n" for line in given))
        for limit in (None, 1):
            assert score_file(dataset, path, limit=limit).metrics["gIoU"] == 1.0
    for names in ({"image": "1.png"}, {"image": "d/1.png"}):
        path.write_text("".join(json.dumps(line | names | {"query": "it"}) + "\n" for line in lines[:1]))
        with pytest.raises(DataError, match=r"may be .* or .*; give image_id"):
            score_file(dataset, path)


def test_protocols_are_those_that_were_asked_for(queries, truth, data, tmp_path):
    """Of a rejecting answer with a mask, gsva scores the mask; what a benchmark lacks is refused."""
    path = tmp_path / "answers.jsonl"
    lines = [line | {"rejected": True} for line in perfect(queries, truth)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = get_eval_dataset(SPEC, data)
    found = {name: score_file(dataset, path, name) for name in (None, "gsva", "grefcoco", "published", "rela")}
    assert {name: result.summary.protocol for name, result in found.items()} == {
        None: "grefcoco",
        **{name: name for name in found if name},
    }
    assert [found[name].metrics["cIoU"] for name in ("gsva", "published", "grefcoco", "rela")] == [1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"--protocol strict: grefcoco\|unc\|val .* has the protocols: grefcoco, rela"):
        score_file(dataset, path, "strict")
    with pytest.raises(ValueError, match="has the protocols: none"):
        score_file(get_eval_dataset("refcoco|unc|val", data), path, "gsva")


def test_what_is_written_is_read_and_never_replaced(queries, truth, data, tmp_path, capsys):
    path, output = tmp_path / "answers.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(line) + "\n" for line in perfect(queries, truth)))
    flags = ["--benchmark", SPEC, "--dataset_dir", str(data)]
    assert score.main([*flags, "--predictions", str(path), "--output", str(output)]) == 0
    written = next(output.glob("*.jsonl"))
    assert score.main([str(written)]) == 0
    assert compare.main([f"a={output}", f"b={output}"]) == 0
    assert "grefcoco|unc|val (generate, grefcoco)" in capsys.readouterr().out
    content = written.read_bytes()
    with pytest.raises(ValueError, match="exists; give another --output"):
        score.main([*flags, "--predictions", str(written), "--output", str(output), "--limit", "1"])
    with pytest.raises(ValueError, match="exists; give another file"):
        score.main([*flags, "--list_queries", str(path)])
    assert written.read_bytes() == content


def test_unreadable_images_can_be_left_out(queries, truth, data, tmp_path, capsys):
    copy, path = tmp_path / "data", tmp_path / "answers.jsonl"
    shutil.copytree(data, copy)
    [image] = copy.rglob(Path(queries[0]["image"]).name)
    image.unlink()
    lines = [line for line in perfect(queries, truth) if line["image_id"] != queries[0]["image_id"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--benchmark", SPEC, "--dataset_dir", str(copy), "--predictions", str(path)]
    with pytest.raises(DataError, match="cannot be evaluated"):
        score.main(flags)
    assert score.main([*flags, "--allow_missing"]) == 0
    assert "(1 missing)" in capsys.readouterr().out


def test_missing_answers_can_be_left_out_and_are_counted(queries, truth, data, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in perfect(queries, truth)[2:]))
    flags = ["--benchmark", SPEC, "--dataset_dir", str(data), "--predictions", str(path)]
    assert score.main([*flags, "--allow_missing"]) == 0
    assert "(2 missing)" in capsys.readouterr().out


# -- a Python function -------------------------------------------------------------------------------------------------

MODULE = '''
import numpy as np

calls = []


def answer(image, query):
    """The upper half; nothing for a query with a vowel at its end."""
    calls.append(query)
    height, width = image.shape[:2]
    mask = np.zeros((1, height, width), bool)
    mask[:, : height // 2] = True
    return (mask[:0], "no") if query[-1] in "aeiou" else (mask, "yes")


def logits(image, query):
    return np.random.randn(1, *image.shape[:2]), ""


def small(image, query):
    return np.zeros((1, 8, 8)), ""


def text(image, query):
    return "no"


def broken(image, query):
    raise ValueError("shapes do not agree")
'''


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_model", raising=False)
    return tmp_path


def ask(data: Path, name: str, *flags: str) -> int:
    return score.main(["--benchmark", SPEC, "--dataset_dir", str(data), "--callable", name, "--output", "out", *flags])


def test_a_function_is_asked_and_an_interruption_loses_nothing(own_module, queries, data, capsys):
    assert ask(data, "own_model:answer", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    path = own_module / "out" / "answers" / "grefcoco_unc_val.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["query_id"] for line in lines] == [query["query_id"] for query in queries]
    assert {json.loads(line)["rejected"] for line in lines} == {True, False}
    import own_model

    assert own_model.calls == [query["query"] for query in queries]
    with pytest.raises(ValueError, match=r"answers.grefcoco_unc_val\.jsonl exists: --resume"):
        ask(data, "own_model:answer")
    path.write_text("".join(lines[:2]) + lines[2][:20])  # killed in the middle of a line
    own_model.calls.clear()
    assert ask(data, "own_model:answer", "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out) == first
    assert own_model.calls == [query["query"] for query in queries[2:]]
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_the_example_of_the_docs_knows_colors(data, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/scoring.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    assert code.count("\n") <= 30
    (tmp_path / "my_model.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert ask(data, "my_model:answer", "--json") == 0
    [result] = json.loads(capsys.readouterr().out)
    assert result["metrics"]["gIoU"] > 0.3  # all objects: 0.2
    assert (tmp_path / "out" / "grefcoco_unc_val.generate.json").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_model:logits", r"masks hold other values than 0 and 1; threshold them \(logits > 0\)"),
        ("own_model:small", r"masks are \(1, 8, 8\); the image needs \(N, "),
        ("own_model:text", r"must return \(masks, text\), not no"),
        ("own_model:missing", r"own_model.py has no function missing"),
        ("no_such_model:answer", "no module no_such_model here"),
        ("own_model", "write module:function"),
        (".own_model:answer", "write module:function"),
        ("no_such.model:answer", "no module no_such.model here"),
    ],
)
def test_functions_that_do_not_fit_are_named(own_module, data, name, message):
    with pytest.raises(ValueError, match=message):
        ask(data, name)


def test_a_function_that_fails_is_told_at_which_query(own_module, queries, data):
    with pytest.raises(RuntimeError, match=f"failed on .*{re.escape(repr(queries[0]['query']))}") as raised:
        ask(data, "own_model:broken")
    assert str(raised.value.__cause__) == "shapes do not agree"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give test.py's JSONL files, or --benchmark"),
        (["x.jsonl", "--benchmark", SPEC], "leave --benchmark out"),
        (["--predictions", "x", "--callable", "a:b"], "one of --predictions"),
        (["--predictions", __file__], "--predictions needs --benchmark"),
        (["--predictions", "x", "--benchmark", SPEC, "--dataset_dir", "d"], "--predictions x: no such file"),
        (["--callable", "a:b", "--benchmark", SPEC, "--dataset_dir", "d"], "--callable needs --output"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        score.main(flags)
