"""The benchmarks of evaluation alone, and MMR: read in the layouts that are published, scored as their authors do."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.structures import EvalQuery, EvalSample
from scripts import convert_answers, make_demo_data
from scripts import score as score_answers
from utils.datasets import DataOptions, get_eval_dataset, get_train_dataset
from utils.datasets.base import UNIT, DataError
from utils.datasets.hallu_seg_bench import SETTINGS
from utils.datasets.masks import encode_mask
from utils.demo.scenes import COLORS
from utils.evaluation.any_model import write_queries
from utils.evaluation.benchmarks import BENCHMARKS
from utils.evaluation.controls import ShuffledPrompts
from utils.evaluation.metrics import Record, compute, intervals, iou, select
from utils.evaluation.predictions import QueryPrediction, score, turns_of

SPECS = ["GSEval|test", "ReasonSeg-R|test", "ReasonSeg-X|train", "ReasonSeg-X|val", "refcoco-m|val", "MMR|val"]
PAIRS = Path("hallusegbench/refer_seg")
PARQUET = [spec for spec in SPECS if spec.startswith(("ReasonSeg", "refcoco"))]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("drawn") / "data"
    sizes = ("--train", "60", "--val", "2", "--test", "2")  # 6 images a small training split, 2 of each other
    assert make_demo_data.main(["--out", str(folder), "--all_types", *sizes]) == 0
    return folder


@pytest.fixture
def own(drawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(
        drawn, tmp_path / "data", ignore=shutil.ignore_patterns("ade20k", "cocostuff", "mapillary", "vlpart")
    )
    return tmp_path / "data"


@pytest.mark.parametrize("spec", SPECS)
def test_every_query_has_its_target_at_the_images_size(spec: str, drawn: Path) -> None:
    dataset = get_eval_dataset(spec, drawn)
    samples = [dataset[index] for index in range(len(dataset))]
    queries = [query for sample in samples for query in sample.queries]
    assert len(queries) == dataset.num_queries >= len(samples) >= 2
    assert len({sample.image_id for sample in samples}) == len(samples)
    for sample in samples:
        assert max(sample.image.shape) == 120
        assert len({query.query_id for query in sample.queries}) == len(sample.queries)
        for query in sample.queries:
            assert query.text
            assert query.masks.shape[1:] == sample.image.shape[:2]
            assert query.masks.any(axis=(1, 2)).all()
            inside = sample.image[query.masks.max(0) == 1].astype(float)
            assert (
                np.abs(inside.mean(0) - sample.image.reshape(-1, 3).mean(0)).max() > 10
            )  # a shape, not the background
    again = pickle.loads(pickle.dumps(dataset))  # as in the processes of a loader
    assert np.array_equal(again[1].queries[0].masks, samples[1].queries[0].masks)


def test_groups_are_those_of_the_files(drawn: Path) -> None:
    def values(spec: str, key: str) -> set[str]:
        dataset = get_eval_dataset(spec, drawn)
        return {query.meta.get(key, "") for index in range(len(dataset)) for query in dataset[index].queries}

    assert values("GSEval|test", "class") == {"multi", "single"}
    assert values("ReasonSeg-X|train", "reasoning_type") <= {"relation", "superlative", "commonsense"}
    assert values("ReasonSeg-R|test", "reasoning_type") == {""}


def test_sentences_of_a_sample_share_its_mask(drawn: Path) -> None:
    dataset = get_eval_dataset("refcoco-m|val", drawn)
    queries = [query for index in range(len(dataset)) for query in dataset[index].queries]
    pairs = [(a, b) for a, b in itertools.pairwise(queries) if a.query_id.split("_")[0] == b.query_id.split("_")[0]]
    assert pairs
    assert all(np.array_equal(a.masks, b.masks) and a.text != b.text for a, b in pairs)


def test_hallusegbench_asks_both_images_for_both_objects(drawn: Path) -> None:
    dataset = get_eval_dataset("HalluSegBench|refer_seg", drawn)
    samples = [dataset[index] for index in range(len(dataset))]
    assert [len(sample.queries) for sample in samples] == [2] * 4
    assert dataset.num_queries == 8
    for factual, edited in (samples[:2], samples[2:]):
        queries = {query.meta["setting"]: query for query in [*factual.queries, *edited.queries]}
        assert set(queries) == set(SETTINGS)
        assert len({query.meta["pair"] for query in queries.values()}) == 1
        assert queries["orgl_orgi"].text == queries["orgl_edti"].text != queries["edtl_edti"].text
        for sample, there, gone in ((factual, "orgl_orgi", "edtl_orgi"), (edited, "edtl_edti", "orgl_edti")):
            target, absent = queries[there], queries[gone]
            assert target.is_present
            assert not absent.is_present
            assert absent.reference is not None
            assert np.array_equal(target.masks[0], absent.reference)
            assert absent.reference.shape == sample.image.shape[:2]
            inside = sample.image[absent.reference == 1].astype(float).mean(0)
            color = COLORS[target.text.split()[0]]
            assert np.abs(inside - color).max() < 60
    assert samples[2].image.shape[0] * 2 == samples[3].image.shape[0]  # an edit may have another size
    sentences = get_eval_dataset("HalluSegBench|reason_seg_val", drawn)[0].queries
    assert all(query.is_sentence and query.text.endswith("?") for query in sentences)


def test_mmr_trains_with_the_text_of_its_answers(drawn: Path) -> None:
    dataset = get_train_dataset("MMR", drawn, DataOptions())
    sample = dataset.sample(0, np.random.default_rng(0))
    [turn] = sample.conversations[0]
    assert turn.answer.count("[SEG]") == len(sample.masks) > 1
    assert turn.answer.startswith("the ")


# -- numbers, by hand --------------------------------------------------------------------------------------------------


def region(*pixels: int) -> np.ndarray:
    """[1, 40] with these many first pixels after each other: on, off, on, ..."""
    mask = np.zeros(40, bool)
    start = 0
    for number, count in enumerate(pixels):
        mask[start : start + count] = number % 2 == 0
        start += count
    return mask[None]


def record(
    benchmark: str, targets: list[np.ndarray], predicted: list[np.ndarray], rejected: bool = False, **meta: str
) -> Record:
    masks = np.stack(targets).astype(np.uint8) if targets else np.zeros((0, 1, 40), np.uint8)
    sample = EvalSample("a.jpg", "a", np.zeros((1, 40, 3), np.uint8), [])
    logits = np.stack(predicted).astype(np.float32) - 0.5 if predicted else np.zeros((0, 1, 40), np.float32)
    prediction = QueryPrediction("", "", logits, logits, [], rejected)
    return score(0, sample, EvalQuery("1", "q", masks, meta=dict(meta)), prediction, BENCHMARKS[benchmark])


def hallucination(
    targets: tuple[np.ndarray, np.ndarray],
    predicted: dict[str, np.ndarray | None],
    pair: str = "0",
    drawn: np.ndarray | None = None,
) -> list[Record]:
    """Answers to a pair with these targets in the image and in its edit; None = rejected, with the mask ``drawn``."""
    answers = []
    for number, (setting, mask) in enumerate(predicted.items()):
        truth = targets[setting.endswith("edti")].astype(np.uint8)[None]
        there = setting in ("orgl_orgi", "edtl_edti")
        query = EvalQuery(
            setting,
            "q",
            truth if there else truth[:0],
            meta={"pair": pair, "setting": setting, UNIT: pair},
            reference=None if there else truth[0],
        )
        shown = [each for each in (drawn if mask is None else mask,) if each is not None]
        logits = (
            np.zeros((len(shown), *truth[0].shape), np.float32) - 0.5 + np.array(shown).reshape(-1, *truth[0].shape)
        )
        sample = EvalSample("a.jpg", "a", np.zeros((*truth[0].shape, 3), np.uint8), [])
        prediction = QueryPrediction("", "", logits, logits, [], mask is None)
        answers.append(score(2 * int(pair) + number // 2, sample, query, prediction, BENCHMARKS["HalluSegBench"]))
    return answers


def published_hallucination(
    targets: tuple[np.ndarray, np.ndarray], predicted: dict[str, np.ndarray | None]
) -> tuple[float, float, float, float]:
    """A pair's two differences of IoU and two confusion scores, by the definitions of the paper."""

    def values(mask: np.ndarray | None, truth: np.ndarray) -> tuple[float, float]:
        mask = np.zeros_like(truth) if mask is None else mask
        union, outside = (mask | truth).sum(), (mask & ~truth).sum()
        overlap = (mask & truth).sum()
        return (overlap / union if union else 0.0), (3 * overlap + outside) / (3 * truth.sum())

    there, _ = values(predicted["orgl_orgi"], targets[0])
    other_text, confusion_text = values(predicted["edtl_orgi"], targets[0])
    other_image, confusion_image = values(predicted["orgl_edti"], targets[1])
    return there - other_text, there - other_image, confusion_text, confusion_image


def test_hallusegbench_agrees_with_its_definitions_on_random_masks() -> None:
    rng = np.random.default_rng(0)

    def mask(share: float) -> np.ndarray:
        return rng.random((7, 9)) < share

    answers, expected = list[Record](), []
    for pair in range(40):
        targets = mask(0.3) | (np.arange(63).reshape(7, 9) == 5), mask(0.9) | (np.arange(63).reshape(7, 9) == 6)
        predicted = {name: None if rng.random() < 0.2 else mask(rng.choice([0, 0.1, 0.6, 1])) for name in SETTINGS}
        answers += hallucination(targets, predicted, str(pair), drawn=mask(0.5) if pair % 2 else None)
        expected.append(published_hallucination(targets, predicted))
    benchmark = BENCHMARKS["HalluSegBench"]
    names = [name for name in benchmark.metrics if name[:3] in ("dIo", "CMS")]
    found = compute([answers[k] for k in rng.permutation(len(answers))], benchmark)
    assert [found[name] for name in names] == pytest.approx(np.mean(expected, axis=0).tolist())
    partly = compute([answer for answer in answers if answer.meta["setting"] != "edtl_orgi"], benchmark)
    assert "dIoU_t" not in partly
    assert partly["dIoU_v"] == found["dIoU_v"]


def test_masks_in_the_folders_of_hallusegbench_score_as_its_code_does(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One PNG per answer, named by the factual image and its annotation; a file that is missing abstains."""
    spec, rng, expected = "HalluSegBench|refer_seg", np.random.default_rng(0), []
    for setting in SETTINGS:
        (tmp_path / "masks" / setting).mkdir(parents=True)
    for pair in json.loads((drawn / PAIRS / "data.json").read_text()):
        read = [
            np.asarray(Image.open(drawn / PAIRS / pair[f"{side}_mask_path"])) > 0
            for side in ("factual", "counterfactual")
        ]
        predicted: dict[str, np.ndarray | None] = dict.fromkeys(SETTINGS)
        for setting in SETTINGS[:3] if pair["ann_id"] == 0 else SETTINGS:
            predicted[setting] = rng.random(read[setting.endswith("edti")].shape) < 0.2
            name = f"{Path(pair['factual_image_path']).stem}_{pair['ann_id']}_mask.png"
            Image.fromarray(predicted[setting].astype(np.uint8) * 255).save(tmp_path / "masks" / setting / name)
        expected.append(published_hallucination((read[0], read[1]), predicted))
    where = ["--benchmark", spec, "--dataset_dir", str(drawn)]
    output = tmp_path / "answers.jsonl"
    assert convert_answers.main(["hallusegbench", str(tmp_path / "masks"), *where, "--output", str(output)]) == 0
    assert "8 answers" in capsys.readouterr().out
    assert score_answers.main([*where, "--predictions", str(output), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    values = [found["metrics"][name] for name in ("dIoU_t", "dIoU_v", "CMS_f", "CMS_c")]
    assert values == pytest.approx(np.mean(expected, axis=0).tolist())
    again = ["hallusegbench", str(tmp_path / "masks"), "--output", str(tmp_path / "b.jsonl")]
    with pytest.raises(DataError, match=r"refcoco\|unc\|val has no pairs"):
        convert_answers.main([*again, "--benchmark", "refcoco|unc|val", "--dataset_dir", str(drawn)])
    first, second = sorted((tmp_path / "masks" / SETTINGS[0]).iterdir())
    first.rename(first.with_name("1_mask.png"))
    with pytest.raises(DataError, match=r"1 files of .* belong to no pair"):
        convert_answers.main([*again, *where])
    first.with_name("1_mask.png").unlink()
    Image.fromarray(np.ones((3, 4), np.uint8)).save(second)
    with pytest.raises(DataError, match=r"mask.png is 4x3, its image \d+x\d+"):
        convert_answers.main([*again, *where])
    second.unlink()
    with pytest.raises(DataError, match="holds no PNG"):
        convert_answers.main([*again, *where])
    (tmp_path / "masks" / SETTINGS[0]).rmdir()
    with pytest.raises(DataError, match=f"no folder {SETTINGS[0]}"):
        convert_answers.main([*again, *where])


def test_counts_do_not_tell_what_hallusegbench_compares(drawn: Path, tmp_path: Path) -> None:
    spec, path = "HalluSegBench|refer_seg", tmp_path / "answers.jsonl"
    write_queries(get_eval_dataset(spec, drawn), path)
    lines = [json.loads(line) | {"counts": [0, 0], "rejected": True} for line in path.read_text().splitlines()]
    for line in lines[:1]:
        line["counts"] = [1, 10**4]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="give masks, not counts"):
        score_answers.main(["--benchmark", spec, "--dataset_dir", str(drawn), "--predictions", str(path)])


def test_an_edit_is_resampled_with_its_image() -> None:
    """Answers that are equal on both images of a pair are no more samples than pairs."""
    rng = np.random.default_rng(2)
    answers = list[Record]()
    for pair in range(60):
        mask = None if rng.random() < 0.5 else region(5)
        answers += hallucination((region(6), region(6)), dict.fromkeys(("edtl_orgi", "orgl_edti"), mask), str(pair))
    assert len({answer.index for answer in answers}) == 60
    benchmark = BENCHMARKS["HalluSegBench"]
    edits = [replace(answer, index=1000 + k) if k % 2 else answer for k, answer in enumerate(answers)]
    assert intervals(edits, benchmark)["N-acc"] == intervals(answers[::2], benchmark)["N-acc"]


def test_hallusegbench_scores_the_first_seg_alone_on_demand() -> None:
    record = hallucination((region(6), region(6)), {"orgl_edti": region(0, 3, 3)})[0]
    several = replace(record, masks=record.masks * 2, first=[0, 2, 2, 0], first_reference=[2, 6, 2, 6])
    [first] = select([several], several_seg="first")
    assert compute([first], BENCHMARKS["HalluSegBench"])["CMS_c"] == pytest.approx(6 / 18)


# -- files that do not fit ---------------------------------------------------------------------------------------------


def edit_line(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "groundingsuite/GroundingSuite-Eval.jsonl"
        first, *rest = path.read_text().splitlines()
        values = json.loads(first)
        change(values)
        path.write_text("\n".join([json.dumps(values), *rest]))

    return edit


def write_rows(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes the first row of a parquet file."""

    def edit(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        [path] = folder.glob(name)
        rows = pyarrow.parquet.read_table(path).to_pylist()
        change(rows[0])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    return edit


def edit_pair(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes the first pair of HalluSegBench."""

    def edit(folder: Path) -> None:
        path = folder / PAIRS / "data.json"
        pairs = json.loads(path.read_text())
        change(pairs[0])
        path.write_text(json.dumps(pairs))

    return edit


def save_pair_mask(mask: np.ndarray) -> Callable[[Path], None]:
    """Replaces the mask of the first pair's edit."""

    def edit(folder: Path) -> None:
        [path, _] = sorted((folder / PAIRS / "counterfactual_masks").iterdir())
        Image.fromarray(mask).save(path)

    return edit


R, M = "reason_seg/ReasonSeg-R/test/*.parquet", "refer_seg/refcoco-m/data/*.parquet"


@pytest.mark.parametrize(
    ("spec", "damage", "message"),
    [
        (
            "GSEval|test",
            edit_line(lambda v: v.pop("caption")),
            "line 1: 'caption' must be a non-empty string, not 'None'",
        ),
        ("GSEval|test", edit_line(lambda v: v.update(class_id=7)), "line 1: 'class_id' is 7"),
        ("GSEval|test", edit_line(lambda v: v.update(segmentation=[[1, 2]])), "line 1: 'segmentation' must be an RLE"),
        ("GSEval|test", edit_line(lambda v: v.update(image_path="../x.jpg")), "not a file name within its folder"),
        ("GSEval|test", edit_line(lambda v: v.update(image_path="unlabeled2017/x.jpg")), "no image x.jpg"),
        ("GSEval|val", lambda folder: None, "unknown split 'val'. Known: test"),
        ("ReasonSeg-X|test_long", lambda folder: None, "there are the splits test, val, train"),
        ("ReasonSeg-R|test", lambda folder: shutil.rmtree(folder / "reason_seg/ReasonSeg-R"), "no folder"),
        ("ReasonSeg-R|test", lambda folder: next(folder.glob(R)).write_bytes(b"PAR1"), "cannot be read .*complete"),
        ("ReasonSeg-R|test", write_rows(R, lambda row: row.update(text=" ")), "row 0 of group 0: no text"),
        (
            "refcoco-m|val",
            write_rows(M, lambda row: row["samples"][0].update(sentences=None)),
            "samples have not all of",
        ),
        ("refcoco-m|val", write_rows(M, lambda row: [s.update(id=1) for s in row["samples"]]), "have the same id"),
        ("HalluSegBench|test", lambda folder: None, "unknown split 'test'. Known: refer_seg"),
        (
            "HalluSegBench|refer_seg",
            edit_pair(lambda v: v.pop("counterfactual_label")),
            "item 0: 'counterfactual_label'",
        ),
        (
            "HalluSegBench|refer_seg",
            edit_pair(lambda v: v.pop("counterfactual_mask_path")),
            "'counterfactual_mask_path' is",
        ),
        ("HalluSegBench|refer_seg", edit_pair(lambda v: v.update(factual_image_path="../a.png")), "not a file name"),
        (
            "HalluSegBench|refer_seg",
            edit_pair(
                lambda v: v.update(factual_image_path=v["factual_image_path"].replace("970001", "970002"), ann_id=1)
            ),
            "two pairs called COCO_train2014_000000970002_1: give each an 'ann_id'",
        ),
        ("HalluSegBench|refer_seg", edit_pair(lambda v: v.update(ann_id="../x")), "'ann_id' is '../x'; it must be"),
        ("HalluSegBench|refer_seg", edit_pair(lambda v: v.update(ann_id=[1])), "'ann_id' is"),
        (
            "HalluSegBench|refer_seg",
            edit_pair(lambda v: v.update(counterfactual_label=v["factual_label"].upper())),
            "both texts are .* present and absent",
        ),
        ("HalluSegBench|refer_seg", edit_pair(lambda v: v.update(factual_mask_path="b.png")), "no image b.png"),
        ("MMR|test", lambda folder: None, "unknown split 'test'"),
        ("MMR|val", lambda folder: (folder / "multi_reason_seg/MMR/MMR_val.json").unlink(), "no MMR_val.json"),
    ],
)
def test_what_is_wrong_is_named_when_a_set_is_opened(spec: str, damage: Callable, message: str, own: Path) -> None:
    damage(own)
    with pytest.raises(DataError, match=message):
        get_eval_dataset(spec, own)


@pytest.mark.parametrize(
    ("spec", "damage", "message"),
    [
        (
            "ReasonSeg-R|test",
            write_rows(R, lambda row: row.update(mask=[[False] * 4] * 4)),
            r"test-00000.* row 0 .* 4x4",
        ),
        ("HalluSegBench|refer_seg", save_pair_mask(np.zeros((120, 120), np.uint8)), "newmask.png is empty"),
        ("HalluSegBench|refer_seg", save_pair_mask(np.ones((120, 30), np.uint8)), "newmask.png is 30x120, its image"),
        ("ReasonSeg-R|test", write_rows(R, lambda row: row["image"].update(bytes=b"x")), "its image cannot be read"),
        ("ReasonSeg-R|test", write_rows(R, lambda row: row["image"].update(bytes=None)), "no image inside"),
        (
            "refcoco-m|val",
            write_rows(M, lambda row: row["samples"][0].update(mask=encode_mask(np.ones((3, 3), bool)))),
            "an RLE has size",
        ),
        (
            "GSEval|test",
            edit_line(lambda v: v["segmentation"].update(counts="0")),
            "idx 0: an RLE covers",
        ),
    ],
)
def test_what_is_wrong_is_named_when_a_sample_is_read(spec: str, damage: Callable, message: str, own: Path) -> None:
    damage(own)
    dataset = get_eval_dataset(spec, own)
    with pytest.raises(DataError, match=message):
        [dataset[index] for index in range(len(dataset))]


def test_a_row_without_a_target_is_scored_as_its_authors_do(own: Path) -> None:
    """U = 0 counts as 1, and anything drawn as 0."""
    write_rows(R, lambda row: row.update(mask=np.zeros_like(row["mask"]).tolist()))(own)
    query = get_eval_dataset("ReasonSeg-R|test", own)[0].queries[0]
    assert query.masks.shape[0] == 0
    ious = [iou(record("ReasonSeg-R", [], predicted)) for predicted in ([], [region(0)], [region(5)])]
    assert ious == [1, 1, 0]


def test_hallusegbench_reads_what_its_files_have(own: Path) -> None:
    """Some name the mask otherwise; masks and images of an edit may have different sizes; the hub has a folder more."""
    before = get_eval_dataset("HalluSegBench|refer_seg", own)[1].queries[0].reference
    assert before is not None
    edit_pair(lambda v: v.update(counterfactual_mask=v["counterfactual_mask_path"], counterfactual_mask_path=None))(own)
    edit_pair(lambda v: v.update(question="a stray one"))(own)
    twice = np.kron(before, np.ones((2, 2), np.uint8)) * 7
    save_pair_mask(twice)(own)
    (own / "hallusegbench/test").mkdir()
    (own / PAIRS).rename(own / "hallusegbench/test/refer_seg")
    after = get_eval_dataset("HalluSegBench|refer_seg", own)[1].queries[0].reference
    assert np.array_equal(before, after)


def test_a_reasoning_pair_is_never_asked_by_its_labels(own: Path) -> None:
    path = own / "hallusegbench/reason_seg_val/data.json"
    pairs = json.loads(path.read_text())
    pairs[0]["question"] = ""
    path.write_text(json.dumps(pairs))
    with pytest.raises(DataError, match="'question' must be a non-empty string"):
        get_eval_dataset("HalluSegBench|reason_seg_val", own)


def test_mmr_without_the_text_of_an_answer_is_generated_alone(own: Path) -> None:
    path = own / "multi_reason_seg/MMR/MMR_val.json"
    items = json.loads(path.read_text())
    items[0]["text_answers"] = ["no place for a target"]
    path.write_text(json.dumps(items))
    sample = get_eval_dataset("MMR|val", own)[0]
    assert turns_of([sample], BENCHMARKS["MMR"], "generate")
    with pytest.raises(ValueError, match="has no annotated answer with a"):
        turns_of([sample], BENCHMARKS["MMR"], "teacher_forced")


def test_exchanged_questions_of_mmr_do_not_tell_the_own_targets(drawn: Path) -> None:
    dataset = get_eval_dataset("MMR|val", drawn)
    shuffled = ShuffledPrompts(dataset, range(2))
    for index in range(2):
        [own_query], [other], [asked] = dataset[index].queries, dataset[1 - index].queries, shuffled[index].queries
        assert (asked.text, asked.answer) == (other.text, other.answer)
        assert np.array_equal(asked.masks, own_query.masks)


def test_an_edit_does_not_get_the_texts_of_its_image(drawn: Path) -> None:
    dataset = get_eval_dataset("HalluSegBench|refer_seg", drawn)
    shuffled = ShuffledPrompts(dataset, range(len(dataset)))
    for index in range(len(dataset)):
        texts = [{query.text for query in data[index].queries} for data in (dataset, shuffled)]
        assert texts[0] != texts[1]
    pair = ShuffledPrompts(dataset, range(2))  # no other pair is there
    assert {query.text for query in pair[0].queries} == {query.text for query in dataset[1].queries}


def test_mmr_is_asked_as_it_is_trained(drawn: Path) -> None:
    sample = get_eval_dataset("MMR|val", drawn)[0]
    [[turn]] = turns_of([sample], BENCHMARKS["MMR"], "generate")
    assert "each of them" in turn.question
    [[given]] = turns_of([sample], BENCHMARKS["MMR"], "teacher_forced")
    assert given.question == turn.question
    assert given.answer.startswith("the ")  # the annotated text, which names the targets
    assert given.answer.count("[SEG]") == len(sample.queries[0].masks)


def test_they_are_no_training_data(drawn: Path) -> None:
    with pytest.raises(DataError, match="'GSEval' is for evaluation alone"):
        get_train_dataset("GSEval", drawn)
