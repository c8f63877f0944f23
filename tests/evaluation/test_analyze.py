"""analyze.py: its numbers against the evaluation engine and brute force, its files and error messages."""

import csv
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from model.loading import pretrained
from model.loading.hub import Resolved
from model.loading.weights import load_original_sam
from model.structures import EvalQuery, EvalSample, Prompts, Turn
from scripts.dev import study_uncertainty
from utils.datasets.spec import Spec
from utils.evaluation import ceiling_pass, metrics
from utils.evaluation.benchmarks import BENCHMARKS
from utils.evaluation.engine import RunOptions, evaluate
from utils.evaluation.layer_analysis import THRESHOLDS, LayerAnalyzer, best_threshold
from utils.evaluation.predictions import InferenceOptions, predict_queries
from utils.inference import cli

ROOT = Path(__file__).resolve().parents[2]


class DrawnDataset:
    """Images with a rectangle; with ``absent``, each has a second query whose target is absent."""

    skipped, unusable, not_found = [], [], []

    def __init__(self, benchmark="ReasonSeg", absent=False, size=3):
        self.absent, self.size = absent, size
        self.spec, self.num_queries = Spec(benchmark, ("val",)), size * (1 + absent)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 255, (40 + 4 * index, 52, 3), dtype=np.uint8)
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[5 : 20 + index, 8:30], mask[0] = 1, 255
        queries = [EvalQuery("0", "where is the red star", mask[None], meta={"family": "odd" if index % 2 else "even"})]
        if self.absent:
            queries.append(EvalQuery("1", "the blue square", np.zeros((0, *mask.shape), np.uint8)))
        return EvalSample(f"drawn/{index}", f"{index}", image, queries)


def analyzer(model, processor, **settings):
    return LayerAnalyzer(model, processor, InferenceOptions("teacher_forced"), batch_size=2, **settings)


def evaluated(model, processor, dataset, layer_policy):
    return evaluate(
        model, processor, dataset, InferenceOptions("teacher_forced", layer_policy), RunOptions(batch_size=2)
    )


@pytest.mark.parametrize(("benchmark", "absent"), [("ReasonSeg", False), ("grefcoco", True)])
def test_a_forced_layer_scores_the_same_as_in_an_evaluation(tiny_model, tiny_processor, benchmark, absent):
    dataset = DrawnDataset(benchmark, absent)
    study = analyzer(tiny_model, tiny_processor).study(dataset)
    assert study.num_layers == tiny_model.ppm.num_layers
    for layer in range(study.num_layers):
        result = evaluated(tiny_model, tiny_processor, dataset, f"fixed:{layer}")
        assert study.by_layer[layer] == result.records
        assert study.scores(study.by_layer[layer])["cIoU"] == result.metrics["cIoU"]
    own = evaluated(tiny_model, tiny_processor, dataset, "argmax")
    assert study.records == own.records
    assert len({record.P for records in study.by_layer for record in records}) > 3  # layers differ at all


def test_table_2_equals_evaluations_with_other_prompts(make_model, tiny_processor):
    model, dataset = make_model(), DrawnDataset("grefcoco", absent=True)
    study = analyzer(model, tiny_processor).study(dataset)
    for column, settings in (("M_prompt", (False, True)), ("SEG_prompt", (True, False))):
        model.config.seg_prompt, model.config.mask_prompt = settings
        for row, policy in (("chosen", "argmax"), ("last", "last")):
            records = evaluated(model, tiny_processor, dataset, policy).records
            present = [record for record in records if not record.expected_empty]
            assert [(r.I, r.U) for r in study.table[column, row]] == [(r.I, r.U) for r in present]
        model.config.seg_prompt = model.config.mask_prompt = True


def test_the_best_threshold_agrees_with_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(5):
        similarity = rng.random((12, 15)).astype(np.float32).round(2)  # many values equal a threshold
        truth = rng.choice([0, 1, 255], (12, 15), p=[0.5, 0.4, 0.1]).astype(np.uint8)
        ious = []
        for threshold in THRESHOLDS:
            intersection, union, *_ = metrics.count_pixels(similarity > threshold, truth)
            ious.append(intersection / union if union else 1.0)
        assert best_threshold(similarity, truth) == THRESHOLDS[int(np.argmax(ious))]


def test_m_iou_uses_the_best_threshold_of_each_map(tiny_model, tiny_processor):
    dataset = DrawnDataset()
    study = analyzer(tiny_model, tiny_processor).study(dataset)
    for policy, records in (("argmax", study.table["M_IoU", "chosen"]), ("fixed:2", study.maps_by_layer[2])):
        for index, record in enumerate(records):
            sample = dataset[index]
            options = InferenceOptions("teacher_forced", policy)
            [[answer]] = predict_queries(
                tiny_model, tiny_processor, [sample], [index], BENCHMARKS["ReasonSeg"], options
            )
            [truth] = sample.queries[0].masks
            counts = [metrics.count_pixels(answer.similarities[0] > threshold, truth) for threshold in THRESHOLDS]
            assert (
                pytest.approx(max(intersection / union for intersection, union, *_ in counts if union), abs=0.01)
                == record.I / record.U
            )


def test_map_losses_equal_those_that_training_logs(tiny_model, tiny_processor, tiny_samples):
    """Batch of one image with one [SEG]: ``layer_losses`` of the training step are this [SEG]'s."""
    sample = tiny_samples[1]
    batch = tiny_processor.collate([sample])
    logged = tiny_model(batch, all_layers=True).layer_losses
    turns = [[turn for (turn,) in sample.conversations]]
    prompts = tiny_processor.prompts([sample.image], turns)
    maps = torch.cat([prediction.layer_maps for prediction in tiny_model.predict(prompts)[0]])
    losses = tiny_model.objective.map_losses([torch.from_numpy(sample.masks)], [maps])
    torch.testing.assert_close(losses.mean(0), logged.detach())


# -- the ceiling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("benchmark", "absent"), [("ReasonSeg", False), ("grefcoco", True)])
def test_the_ceiling_measures_what_an_evaluation_does(make_model, tiny_processor, benchmark, absent):
    """Masks, maps at their best threshold, rewards and policy of the candidate layers, present targets only."""
    model, dataset = make_model(), DrawnDataset(benchmark, absent)
    with torch.no_grad():
        model.ppm.gate.normal_(std=0.01)
    studied = analyzer(model, tiny_processor)
    measured = ceiling_pass.measure(studied, dataset, ["last"])
    assert (measured.layers, measured.images.tolist()) == ([1, 2, 3, 4], [0, 1, 2])
    assert measured.kinds.tolist() == ["even", "odd", "even"]
    study = studied.study(dataset)
    queries = [n for n, record in enumerate(study.records) if not record.expected_empty]
    for column, layer in enumerate(measured.layers):
        expected = [metrics.iou(study.by_layer[layer][n], study.benchmark.protocol()) for n in queries]
        assert measured.mask[:, column].tolist() == expected
        assert measured.map[:, column].tolist() == [metrics.iou(record) for record in study.maps_by_layer[layer]]
    np.testing.assert_array_equal(measured.rules["last"], [measured.mask[:, -1], measured.map[:, -1]])
    tokens = [study.tokens[n][0] for n in queries]
    np.testing.assert_allclose(measured.policy, [token.policy[1:] for token in tokens])
    np.testing.assert_allclose(-measured.rewards["both"], [token.map_loss[1:] for token in tokens])
    assert measured.states.shape == (3, 4, model.config.hidden_size)
    np.testing.assert_allclose(np.square(measured.states).mean(-1), 1, rtol=1e-3)
    lowest, highest = measured.halves.min(0), measured.halves.max(0)
    assert ((lowest - 0.02 <= measured.mask) & (measured.mask <= highest + 0.02)).all()


def test_the_ceiling_of_answers_without_seg(make_model, tiny_processor):
    model = make_model()
    with torch.no_grad():
        model.ppm.gate.zero_()
    options = InferenceOptions("generate", max_new_tokens=2)
    measured = ceiling_pass.measure(LayerAnalyzer(model, tiny_processor, options), DrawnDataset())
    assert not measured.answered.any()
    assert not measured.mask.any()
    assert not measured.map.any()
    assert np.isnan(measured.rewards["iou"]).all()
    assert measured.policy is None  # an untrained gate has no row


def test_a_target_of_ignored_pixels_alone_is_none(make_model, tiny_processor, monkeypatch):
    """It has no reward, and its IoU says nothing: the ceiling, Table 2 and the uncertainties leave it out."""
    dataset = DrawnDataset("custom", absent=True)
    samples = [dataset[index] for index in range(3)]
    samples[1].queries[1].masks = np.full((1, *samples[1].image.shape[:2]), 255, np.uint8)
    monkeypatch.setattr(DrawnDataset, "__getitem__", lambda _, index: samples[index])
    studied = analyzer(make_model(), tiny_processor)
    measured = ceiling_pass.measure(studied, dataset)
    assert measured.images.tolist() == [0, 1, 2]
    assert np.isfinite(measured.rewards["both"]).all()
    study = studied.study(dataset)
    of_targets = [*study.maps_by_layer, *study.table.values()]
    assert [[record.index for record in records] for records in of_targets] == [[0, 1, 2]] * len(of_targets)
    _, _, images = study_uncertainty.measure(studied, dataset, SimpleNamespace(limit=None, samples=2))
    assert images.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("trained", "last", "requested", "expected"),
    [
        (False, -1, None, []),
        (True, -1, None, []),  # argmax is the policy's mode
        (False, -1, "argmax", ["argmax"]),
        (True, -1, "soft", ["soft"]),
        (True, -1, "fixed:2", []),
        (True, -1, "fixed:0", ["fixed:0"]),
        (False, 3, None, ["last"]),
        (True, 3, "last", ["last"]),
    ],
)
def test_rules_beside_the_candidate_layers(make_model, trained, last, requested, expected):
    model = make_model()
    model.config.last_candidate_layer = last
    with torch.no_grad():
        model.ppm.gate.fill_(float(trained))
    assert ceiling_pass.rules_of(model, requested) == expected


def test_the_policy_by_group(tiny_model, tiny_processor):
    study = analyzer(tiny_model, tiny_processor).study(DrawnDataset())
    groups = study.groups()
    assert list(groups) == [("all", "ReasonSeg"), ("family", "even"), ("family", "odd")]
    everything = study.policy(groups["all", "ReasonSeg"])
    assert everything["segs"] == 3
    assert everything["shares"].sum() == pytest.approx(1)
    assert everything["probability"].sum() == pytest.approx(1)
    assert everything["candidates"] == 4
    token = study.tokens[0][0]
    assert token.entropy == pytest.approx(-sum(p * np.log(p) for p in token.policy if p > 0), rel=1e-5)
    assert study.policy(groups["family", "odd"])["segs"] == 1


def test_other_prompts_and_another_sam_last_for_one_call(tiny_model, tiny_processor, tiny_samples, make_model):
    trained, before = tiny_model.visual_model, tiny_model.config.to_dict()
    prompts = tiny_processor.prompts([tiny_samples[0].image], [[Turn("where is the red star", "it is [SEG].")]])
    language_pass = tiny_model.answer(prompts)

    def logits(**options) -> torch.Tensor:
        return tiny_model.decode_masks(language_pass, **options)[0][0].mask_logits

    own, by_map = logits(), logits(prompts=Prompts(seg=False))
    assert not torch.equal(by_map, own)
    assert not torch.equal(logits(prompts=Prompts(seg=False), sam=make_model(1).visual_model), by_map)
    assert torch.equal(logits(), own)
    assert tiny_model.visual_model is trained
    assert tiny_model.config.to_dict() == before
    assert tiny_model.config.seg_prompt
    assert tiny_model.config.mask_prompt


def test_the_original_sam_must_be_the_checkpoints(make_model, tmp_path):
    model, other = make_model(), make_model(seed=1)
    torch.save(model.visual_model.state_dict(), tmp_path / "own.pth")
    torch.save(other.visual_model.state_dict(), tmp_path / "other.pth")
    original = load_original_sam(str(tmp_path / "own.pth"), model)
    assert all(torch.equal(*pair) for pair in zip(original.parameters(), model.visual_model.parameters()))
    with pytest.raises(ValueError, match="not the checkpoint's"):
        load_original_sam(str(tmp_path / "other.pth"), model)


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, make_model, tiny_processor):
    """analyze.py's module, with random models instead of folders: their seed is the folder's name."""
    spec = importlib.util.spec_from_file_location("analyze", ROOT / "scripts/analyze.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "analyze", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(pretrained.hub, "resolve_folder", lambda folder, _: Resolved(Path(folder), folder))
    monkeypatch.setattr(pretrained, "kind_of", lambda _: "drawn")
    monkeypatch.setitem(
        pretrained.LOADERS, "drawn", lambda folder, *_: (make_model(int(folder.name)), tiny_processor, {})
    )
    monkeypatch.setattr(module, "get_eval_dataset", lambda spec, _: DrawnDataset(spec.name, absent="ref" in spec.name))
    return module


def run(program, output, *more, data="ReasonSeg|val"):
    flags = ["--version", "0", "--dataset_dir", "x", "--val_dataset", data, "--output", str(output), "--device", "cpu"]
    return cli.run(program.main, [*flags, *more])


@pytest.mark.slow
def test_two_checkpoints_side_by_side(program, tmp_path):
    more = ("--against", "1", "--names", "ours,<b>", "--samples", "1", "--animate", "--limit", "2")
    assert run(program, tmp_path, *more) == 0
    index = (tmp_path / "index.md").read_text()
    for picture in tmp_path.glob("*.png"):
        assert picture.name in index
        with Image.open(picture) as opened:
            caption = opened.info["Description"]
            assert "ours (" in caption
            assert "Split:" in caption
            assert "Command:" in caption
            assert opened.width < 1700
    with Image.open(tmp_path / "ReasonSeg_val.maps_1.gif") as moving:
        assert moving.n_frames == 4  # candidates: layer 0 is none
    with (tmp_path / "table_2.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["split"], row["checkpoint"], row["layer"]) for row in rows][:3] == [
        ("ReasonSeg|val", "ours", "chosen"),
        ("ReasonSeg|val", "ours", "last"),
        ("ReasonSeg|val", "<b>", "chosen"),
    ]
    assert "TRAINED" in index
    with (tmp_path / "ReasonSeg_val.layers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 10


def test_query_ids_and_wrong_names(program, tmp_path, capsys):
    assert run(program, tmp_path, "--ids", "2/0", "--limit", "3") == 0
    assert len(list(tmp_path.glob("*.maps_*.png"))) == 1
    assert run(program, tmp_path, "--ids", "nothing") == 2
    assert "no query 'nothing'" in capsys.readouterr().err
    assert run(program, tmp_path, "--names", "a,b") == 2
    with pytest.raises(SystemExit):
        run(program, tmp_path, "--batch_size", "0")


def test_the_ceiling_of_a_model_before_training(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "get_eval_dataset", lambda spec, _: DrawnDataset(spec.name, size=9))
    assert run(program, tmp_path, "--what", "ceiling", "--limit", "8") == 0
    printed = capsys.readouterr().out
    assert "ReasonSeg|val: A policy over layers 1 to 4 can gain at most" in printed
    index = (tmp_path / "index.md").read_text()
    assert printed.splitlines()[0].removeprefix("ReasonSeg|val: ") in index
    assert "| best layer per kind, cross-fitted" in index
    for name in ("ceiling.csv", "ceiling.png", "ceiling_layers.csv", "ceiling_rewards.csv"):
        assert f"(ReasonSeg_val.{name})" in index
    with (tmp_path / "ReasonSeg_val.ceiling.csv").open() as file:
        rows = {(row["name"], row["on"]): row for row in csv.DictReader(file)}
    assert rows["oracle", "mask"]["queries"] == "8"
    assert float(rows["oracle", "map"]["gain"]) >= float(rows["best fixed layer", "map"]["gain"]) == 0
    with Image.open(tmp_path / "ReasonSeg_val.ceiling.png") as opened:
        assert "Checkpoint: 0 (" in opened.info["Description"]
        assert opened.width < 900


@pytest.mark.parametrize(
    ("flags", "data", "message"),
    [
        (["--sam", "x", "--samples", "0"], "ReasonSeg|val", "--samples and --sam: no effect with --what ceiling"),
        (["--max_image_tokens", "9"], "ReasonSeg|val", "--max_image_tokens: no effect with --what ceiling"),
        ([], "MultiReasonSeg|val", "MultiReasonSeg matches several masks"),
        (["--layer_policy", "fixed:9"], "ReasonSeg|val", "layer 9 does not exist"),
        ([], "ReasonSeg|val", "3 queries with a target in 3 images; the ceiling needs at least 8"),
    ],
)
def test_what_has_no_ceiling(program, tmp_path, capsys, flags, data, message):
    try:
        code = run(program, tmp_path, "--what", "ceiling", *flags, data=data)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_an_answer_without_seg_can_be_inspected(make_model, tiny_processor):
    """Generated answers of a random model have no [SEG]."""
    model, dataset = make_model(), DrawnDataset(size=1)
    analyzer = LayerAnalyzer(model, tiny_processor, InferenceOptions("generate", max_new_tokens=2))
    study = analyzer.study(dataset)
    assert study.tokens == [[]]
    assert not study.records[0].layers
    view = analyzer.inspect(dataset, study.records[0])
    assert not view.mask.any()
    assert view.maps.shape == (5, *view.truth.shape)
    assert np.isnan(study.map_loss()).all()
