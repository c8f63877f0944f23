"""The comparison page: its numbers are those of compare.py and test.py, and it works in a browser, from one file."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts import compare, score
from utils.datasets import get_eval_dataset
from utils.datasets.masks import encode_mask
from utils.evaluation import comparison, metrics
from utils.evaluation.benchmarks import BENCHMARKS
from utils.evaluation.results import NONE, Provenance, Summary, check_has_logits
from utils.plotting.overlays import TRUTH_COLOR

SPEC = "grefcoco|unc|val"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>document.title = 'changed'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folders(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Answers of a model that is right, and of one that answers every second query with the upper half."""
    root, dataset = tmp_path_factory.mktemp("answers"), get_eval_dataset(SPEC, data)
    where = ["--benchmark", SPEC, "--dataset_dir", str(data)]
    for name in ("right", "half"):
        lines, number = [], 0
        for index in range(len(dataset)):
            sample = dataset[index]
            for query in sample.queries:
                masks = [mask == 1 for mask in query.masks]
                if name == "half" and number % 2:
                    upper = np.zeros(sample.image.shape[:2], bool)
                    upper[: len(upper) // 2] = True
                    masks = [upper]
                line = {"image_id": sample.image_id, "query_id": query.query_id, "answer": f"{name} {HOSTILE}"}
                lines.append(
                    line | {"masks": [encode_mask(m) for m in masks], "ambiguity": [0.1 * number] * len(masks)}
                )
                number += 1
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert score.main([*where, "--predictions", str(path), "--output", str(root / name)]) == 0
    return {name: root / name for name in ("right", "half")}


def written(folders: dict[str, Path], path: Path, *flags: str) -> dict[str, Any]:
    """The data of the page that compare.py writes."""
    named = [f"{name}={folder}" for name, folder in folders.items()]
    assert compare.main([*named, "--html", str(path), *flags]) == 0
    text = path.read_text(encoding="utf-8")
    [content] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(content)


def test_numbers_are_those_of_the_results(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    content = written(folders, tmp_path / "page.html", "--dataset_dir", str(data))
    [section] = content["sections"]
    for model, folder in zip(section["models"], folders.values(), strict=True):
        summary = Summary.load(folder / "grefcoco_unc_val.generate.json")
        assert (model["scores"], model["intervals"]) == (summary.metrics, summary.intervals)
        assert sum(model["confusion"].values()) == summary.counts["queries"]
    right, half = (comparison.read_folder(name, folder) for name, folder in folders.items())
    records = [metrics.select(each[SPEC, "generate"].records, "grefcoco") for each in (right, half)]
    expected = metrics.difference(*records, BENCHMARKS["grefcoco"], "grefcoco")
    assert {name: tuple(gain) for name, gain in section["models"][1]["gains"].items()} == expected
    assert section["models"][0]["gains"] is None
    assert section["models"][0]["confusion"] == {
        "present answered": 4,
        "present rejected": 0,
        "absent answered": 0,
        "absent rejected": 2,
    }
    groups = {(row["key"], row["group"]): row for row in section["groups"]}
    present = [r for r in records[1] if r.meta["targets"] == 1]
    assert groups["targets", "1"]["scores"][1] == metrics.compute(present, BENCHMARKS["grefcoco"], "grefcoco")
    assert sum(row["queries"] for key, row in groups.items() if key[0] == "size of the target") == 6
    worst = [
        min(a["iou"] for a in sample["answers"]) - max(a["iou"] for a in sample["answers"])
        for sample in section["samples"]
    ]
    assert worst == sorted(worst)
    assert worst[0] < 0
    assert section["quoted"] == []  # of drawn data


def test_a_model_that_lacks_a_benchmark_and_no_data(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    path = tmp_path / "reason.jsonl"
    dataset = get_eval_dataset("ReasonSeg|val", data)
    samples = [dataset[index] for index in range(len(dataset))]
    path.write_text(
        "".join(json.dumps({"image": s.source, "query": s.queries[0].text, "masks": []}) + "\n" for s in samples)
    )
    where = ["--benchmark", "ReasonSeg|val", "--dataset_dir", str(data), "--predictions", str(path)]
    assert score.main([*where, "--output", str(other)]) == 0
    content = written(folders | {"other": other}, tmp_path / "page.html", "--samples", "2")
    first, second = content["sections"]
    assert (first["benchmark"], second["benchmark"]) == (SPEC, "ReasonSeg|val")
    assert [model is None for model in first["models"]] == [False, False, True]
    assert [model is None for model in second["models"]] == [True, True, False]
    assert len(first["samples"]) == 2
    assert first["samples"][0]["picture"] is None
    assert first["samples"][0]["answers"][2] is None
    assert first["quoted"] == []  # what was answered is not known to be the published data


def test_published_figures_stand_beside_data_that_are_not_drawn(folders, data: Path, tmp_path: Path, capsys) -> None:
    real = tmp_path / "real"
    shutil.copytree(data, real)
    (real / "demo_data.json").unlink()
    [section] = written(folders, tmp_path / "page.html", "--dataset_dir", str(real))["sections"]
    [row] = [row for row in section["quoted"] if row["method"] == "UGround-LLaVA1.5-7B (ft)"]
    assert row["scores"] == {"gIoU": 0.7246, "cIoU": 0.6556, "N-acc": 0.7453}
    shutil.rmtree(real / "refer_seg")
    [section] = written(folders, tmp_path / "page.html", "--dataset_dir", str(real))["sections"]
    assert section["samples"][0]["picture"] is None
    assert "without images: grefcoco|unc|val" in capsys.readouterr().err


def test_only_finished_results_count(folders: dict[str, Path], tmp_path: Path) -> None:
    """What an interrupted evaluation left is none, nor is a process's own file; a name may hold anything."""
    folder = tmp_path / "DATA"
    shutil.copytree(folders["right"], folder)
    whole = (folder / "grefcoco_unc_val.generate.jsonl").read_text().splitlines(keepends=True)
    (folder / "grefcoco_unc_val.generate.rank_1.jsonl").write_text(whole[0])
    (folder / "refcoco_unc_val.generate.jsonl").write_text(whole[0].replace("grefcoco|", "refcoco|"))
    content = written({"DATA TITLE": folder}, tmp_path / "page.html")
    assert [section["benchmark"] for section in content["sections"]] == [SPEC]
    assert content["sections"][0]["models"][0]["masks"] == len(whole)
    (folder / "grefcoco_unc_val.generate.jsonl").unlink()
    with pytest.raises(ValueError, match=r"generate\.jsonl is missing beside"):
        comparison.read_folder("x", folder)


def test_matched_masks_of_another_model_have_no_published_score() -> None:
    run = Provenance("MultiReasonSeg|val", "generate", NONE, 0, 0, "published", "", "", 1, 1)
    with pytest.raises(ValueError, match="protocol published counts logits"):
        check_has_logits(run, "published")
    check_has_logits(run, "strict")
    check_has_logits(replace(run, layer_policy="argmax"), "published")


def test_thin_objects_stay_in_the_picture() -> None:
    mask = np.zeros((1000, 1500), bool)
    mask[:, 700:703] = True
    picture = Image.open(io.BytesIO(base64.b64decode(comparison._mask(mask, (1, 2, 3)).partition(",")[2])))
    alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    assert max(alpha.shape) == comparison.SIDE
    assert (alpha > 0).any(axis=1).all()


def test_fourteen_models_have_colors_of_their_own() -> None:
    colors = np.array([TRUTH_COLOR, *(comparison.model_color(number) for number in range(14))])
    apart = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(15)
    assert apart.min() > 80
    assert colors.min() >= 0
    assert colors.max() <= 255


def test_reliability_has_bins_of_equally_many_answers() -> None:
    records = [
        metrics.Record(
            0, "", "", str(k), "", "", "", [], False, False, 10 - k % 10, 10, 10, 10, [], ambiguity=[k % 10 / 10]
        )
        for k in range(100)
    ]
    [curve] = comparison.reliability(records, "").values()
    assert curve == [[k / 10, (10 - k) / 10, 10] for k in range(10)]
    assert comparison.reliability(records[:5], "") == {}
    records[0].ambiguity = [float("nan")]
    assert sum(count for *_, count in comparison.reliability(records, "")["ambiguity"]) == 99


def test_published_figures_have_sources_and_known_benchmarks() -> None:
    rows = comparison.read_quoted(comparison.QUOTED)
    for spec, quoted in rows.items():
        benchmark = BENCHMARKS[spec.partition("|")[0]]
        assert spec.partition("|")[2] in benchmark.splits
        for row in quoted:
            assert "arXiv" in row["source"]
            assert row["scores"]
            assert set(row["scores"]) <= set(benchmark.metrics)
            assert all(0 < value < 1 for value in row["scores"].values())


def test_files_and_empty_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results"):
        compare.main([str(tmp_path), "--html", str(tmp_path / "page.html")])
    files = [str(next(folder.glob("*.generate.jsonl"))) for folder in folders.values()]
    with pytest.raises(ValueError, match="--html compares folders"):
        compare.main([*files, "--html", str(tmp_path / "page.html")])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_in_a_browser(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    path, trouble = tmp_path / "page.html", []
    content = written(folders, path, "--dataset_dir", str(data))
    [section] = content["sections"]
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        page = playwright.chromium.launch(executable_path=CHROMIUM, args=flags).new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else trouble.append(request.url),
        )
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.goto(path.as_uri())
        assert page.title() == "right and half"
        assert page.inner_text("#name") == f"{SPEC}, generate, grefcoco"
        assert page.locator("#samples article").count() == 6
        assert HOSTILE in page.locator("figcaption").nth(1).inner_text()  # as text
        assert page.locator("#scores .gain").count() == len(section["models"][1]["gains"])

        def shown(**chosen: str) -> int:
            for name, value in chosen.items():
                field = page.locator(f"#{name}")
                field.fill(value) if name in ("text", "least") else field.select_option(value)
            return page.locator("#samples article").count()

        wrong = sum(sample["answers"][1]["iou"] < sample["answers"][0]["iou"] for sample in section["samples"])
        assert shown(order="0") == wrong == shown(order="", least="0.01")
        assert shown(least="0", label="targets: 0") == 2
        assert page.inner_text("#shown") == "2 of 6 samples of this page"
        word = section["samples"][0]["query"]
        assert shown(label="", text=word.upper()) == sum(word in sample["query"] for sample in section["samples"])
        shown(text="")
        page.locator('input[data-layer="1"]').uncheck()
        assert page.locator('figure[data-layer="1"]:visible').count() == 0
        assert page.locator('figure[data-layer="0"]:visible').count() == 6
        assert page.input_value("#group-metric") == "gIoU"
        page.select_option("#group-metric", "N-acc")
        cells = page.locator("#breakdown tbody tr").first.locator("td").all_inner_texts()
        first = section["groups"][0]
        values = [f"{each['N-acc']:.3f}" for each in first["scores"]]
        assert cells == [f"{first['key']}: {first['group']}", str(first["queries"]), *values]
        wide = page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.set_viewport_size({"width": 390, "height": 800})
        assert wide
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not trouble
