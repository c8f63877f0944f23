"""The evaluation engine against a fake model whose answers are known pixel by pixel."""

import json
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import called

from model.structures import EvalQuery, EvalSample, MaskUncertainty, Prediction
from utils.datasets.base import DataError
from utils.datasets.masks import decode_mask
from utils.datasets.spec import Spec
from utils.evaluation import metrics
from utils.evaluation.benchmarks import BENCHMARKS, SUITES, benchmark_of
from utils.evaluation.controls import HEADINGS, ShuffledPrompts, query_agnostic_baselines
from utils.evaluation.engine import EvalRunner, RunOptions, evaluate
from utils.evaluation.panels import panels
from utils.evaluation.paper_tables import fill
from utils.evaluation.predictions import InferenceOptions
from utils.evaluation.result_text import format_table
from utils.evaluation.results import Journal, Summary, read_results, summarize

SHAPE = (20, 30)


# -- a data set whose pixels encode the objects: object k is painted with gray value k --------------------------------


def paint_objects(index: int) -> np.ndarray:
    """[H, W] with 0 for background and objects 1 to 3."""
    rng = np.random.default_rng(index)
    canvas = np.zeros(SHAPE, np.uint8)
    for k in (1, 2, 3):
        y, x = rng.integers(0, 10, 2)
        canvas[y : y + 6 + k, 9 * (k - 1) + x // 3 : 9 * k] = k
    return canvas


@dataclass
class FakeDataset:
    """``size`` images; image i has i % 3 + 1 queries "object K", and with ``absent`` one more for an object 9."""

    size: int = 7
    benchmark: str = "fake"
    absent: bool = False
    broken: tuple[int, ...] = ()
    skipped: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    not_found: list[str] = field(default_factory=list)

    @property
    def spec(self):
        return Spec(self.benchmark, ("val",))

    def __len__(self):
        return self.size

    @property
    def num_queries(self):
        return sum(i % 3 + 1 + self.absent for i in range(self.size))

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f"image {index}.jpg cannot be decoded")
        canvas = paint_objects(index)
        queries = [
            EvalQuery(
                f"{k}", f"object {k}", (canvas == k)[None].astype(np.uint8), meta={"family": "odd" if k % 2 else "even"}
            )
            for k in range(1, index % 3 + 2)
        ]
        if self.absent:
            queries.append(EvalQuery("9", "object 9", np.zeros((0, *SHAPE), np.uint8)))
        return EvalSample(f"fake/{index}.jpg", str(index), np.repeat(canvas[..., None], 3, 2), queries)


class FakeBatch:
    def __init__(self, images, turns, sample_ids):
        self.images, self.turns, self.sample_ids = images, turns, sample_ids

    def to(self, device, dtype):
        return self


class FakeProcessor:
    """Passes prompts through; tokens are the answer's characters."""

    def prompts(self, images, turns, sample_ids, seen=None):
        return FakeBatch(images, turns, sample_ids)

    def check_image(self, source, image):
        if image.shape[1] == 7 * image.shape[0]:
            raise ValueError(f"{source}: too wide")

    def decode(self, ids):
        return "".join(map(chr, ids))

    def split_thought(self, text, complete=False):
        return "", text


class FakeModel:
    """Segments the object that the question names, without its ``missing`` top rows; records its calls.

    Args:
        wordings: object k -> generated answer ("it is [SEG]" by default); object 9 is always answered by "[REJ]".
        query_agnostic: segments object 1 for any question.
        noisy: flips random pixels, seeded by the image's index alone (a stand-in for sampled layers).
    """

    device, dtype, training = torch.device("cpu"), torch.float32, False

    def __init__(self, missing=2, wordings=None, query_agnostic=False, noisy=False, reject_below=0):
        self.missing, self.wordings, self.query_agnostic, self.noisy = missing, wordings or {}, query_agnostic, noisy
        self.reject_below, self.calls = reject_below, []

    def eval(self):
        return self

    def train(self, mode):
        return self

    def predict(self, batch, layer_policy="argmax", max_new_tokens=64, seed=0, on_token=None):
        self.calls.append((len(batch.images), layer_policy, seed))
        predictions = [
            [self.answer(image, turn.question, turn.answer, sample_id + seed) for turn in row]
            for image, row, sample_id in zip(batch.images, batch.turns, batch.sample_ids, strict=True)
        ]
        for prediction in (p for row in predictions for p in row if layer_policy.startswith("mc")):
            for k, mask in enumerate(prediction.mask_logits.sigmoid()):
                score = 0.1 * k + 0.01 * prediction.layers[k]
                prediction.uncertainty.append(MaskUncertainty(mask, mask * (1 - mask), torch.ones(5) / 5, score))
        return predictions

    def predict_rounds(self, batches, answered=0, **options):
        for batch in batches[answered:]:
            yield self.predict(batch, **options)

    def answer(self, image, question, given_answer, noise_seed):
        named = [int(word.strip(",.?")) for word in question.split() if word.strip(",.?").isdigit()]
        named = [1] * len(named) if self.query_agnostic else named
        text = given_answer or (self.wordings.get(named[0], "it is [SEG]") if named[0] != 9 else "no: [REJ]")
        count = text.count("[SEG]")
        targets = named if len(named) == count else named[:1] * count  # one question may name several objects
        masks = (
            np.stack([self.find(image, k, noise_seed) for k in targets]) if targets else np.zeros((0, *image.shape[:2]))
        )
        logits = torch.from_numpy(np.where(masks > 0, 1.5, -1.5)).float()
        rejected = [bool(mask.sum() < self.reject_below) for mask in masks]
        return Prediction(
            "",
            [ord(c) for c in text],
            logits,
            logits.sigmoid(),
            [k % 5 for k in targets],
            torch.ones(count, 5),
            torch.zeros(count, 5, 4),
            rejected,
        )

    def find(self, image, k, noise_seed):
        mask = image[..., 0] == k
        rows = np.flatnonzero(mask.any(1))[: self.missing]
        mask[rows] = False
        if self.noisy:
            mask ^= np.random.default_rng(noise_seed).random(mask.shape) < 0.1
        return mask


def run(model=None, dataset=None, **options):
    inference_names = {field.name for field in fields(InferenceOptions)}
    inference = InferenceOptions(**{name: value for name, value in options.items() if name in inference_names})
    run_options = RunOptions(**{name: value for name, value in options.items() if name not in inference_names})
    return evaluate(model or FakeModel(), FakeProcessor(), dataset or FakeDataset(), inference, run_options)


def expected_counts(dataset, missing):
    """I and U by plain numpy, image by image."""
    pairs = []
    for index in range(len(dataset)):
        canvas = paint_objects(index)
        for k in range(1, index % 3 + 2):
            mask = canvas == k
            mask[np.flatnonzero(mask.any(1))[:missing]] = False
            pairs.append((int(mask.sum()), int((canvas == k).sum())))
    return pairs


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["generate", "teacher_forced"])
def test_numbers_are_exact(mode):
    result = run(mode=mode)
    pairs = expected_counts(FakeDataset(), 2)
    assert [(record.I, record.U) for record in result.records] == pairs
    assert result.metrics["gIoU"] == pytest.approx(np.mean([i / u for i, u in pairs]))
    assert result.metrics["cIoU"] == sum(i for i, _ in pairs) / sum(u for _, u in pairs)
    assert result.summary.counts["masks"] == len(pairs)
    assert result.summary.counts["images"] == 7


@pytest.mark.parametrize(("mode", "absent"), [("generate", False), ("generate", True), ("teacher_forced", True)])
def test_results_do_not_depend_on_batch_size_and_workers(mode, absent):
    dataset = FakeDataset(absent=absent, benchmark="grefcoco" if absent else "fake")
    results = [
        run(FakeModel(noisy=True, reject_below=40), dataset, mode=mode, batch_size=size, workers=workers, seed=3)
        for size, workers in ((1, 0), (3, 0), (8, 0), (3, 2))
    ]
    for other in results[1:]:
        assert other.records == results[0].records
        for key in ("metrics", "intervals", "breakdown", "counts", "layers"):
            assert getattr(other.summary, key) == getattr(results[0].summary, key)


@pytest.mark.parametrize(("device", "others"), [("cpu", False), ("cuda", True)])
def test_beside_a_gpu_other_processes_load_images(device, others):
    class Asked(FakeDataset):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), source=str(os.getpid()))

    model = FakeModel()
    model.device = torch.device(device)
    sources = {record.image for record in run(model, Asked()).records}
    assert (sources == {str(os.getpid())}) != others


def test_an_image_is_encoded_once_with_all_its_queries():
    model = FakeModel()
    run(model, batch_size=3)
    assert [count for count, *_ in model.calls] == [3, 3, 1]


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    run(workers=1)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def test_limit_takes_the_first_images():
    result = run(limit=2)
    assert [record.index for record in result.records] == [0, 1, 1]
    assert result.summary.limit == 2


def test_several_seg_are_united():
    model = FakeModel(missing=0)
    model.find = lambda image, k, noise_seed: image[..., 0] == next(model.turns)
    model.wordings, model.turns = {1: "[SEG] and [SEG]"}, iter((1, 2))
    record = run(model, limit=1).records[0]
    canvas = paint_objects(0)
    assert ((canvas == 1) | (canvas == 2)).sum() == record.P
    assert len(record.masks) == 2
    assert record.I == record.G == (canvas == 1).sum()


@pytest.mark.parametrize("benchmark", ["grefcoco", "MultiReasonSeg"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_an_error(benchmark, value):
    class Broken(FakeModel):
        def answer(self, *what):
            prediction = super().answer(*what)
            prediction.mask_logits[..., 3, 4] = value
            return prediction

    dataset = FakeMuse() if benchmark == "MultiReasonSeg" else FakeDataset(benchmark=benchmark, absent=True)
    with pytest.raises(ValueError, match=r"fake/0.jpg, 'objects? 1.*': the mask's logits are NaN.*--precision"):
        run(Broken(), dataset)


def test_uncertainty_of_an_answer_is_that_of_its_most_uncertain_mask():
    united = run(FakeModel(wordings={2: "[SEG] and [SEG]"}), layer_policy="mc:4").records
    assert {len(record.uncertainty) for record in united} == {1, 2}
    assert all(record.max_uncertainty == max(record.uncertainty) for record in united)
    for mode in ("generate", "teacher_forced"):
        rejecting = run(FakeModel(reject_below=1000), FakeDataset(benchmark="grefcoco", absent=True), mode=mode,
                        layer_policy="mc:4")  # fmt: skip
        assert all(record.max_uncertainty == 0 for record in rejecting.records if record.rejected)
        assert any(record.rejected for record in rejecting.records)
    assert run().records[0].uncertainty == []
    assert "AUSE" not in run().metrics


def test_no_seg_is_an_empty_mask():
    result = run(FakeModel(wordings={1: "I cannot say"}), limit=1)
    record = result.records[0]
    assert (record.I, record.P, record.masks, record.layers) == (0, 0, [], [])
    assert record.U == record.G
    assert record.answer == "I cannot say"
    assert result.metrics["gIoU"] == 0
    assert result.summary.counts["answers_without_seg"] == 1


def test_generated_rejections():
    """[REJ] for the absent object (right) and for object 2 (wrong)."""
    dataset = FakeDataset(size=2, absent=True, benchmark="grefcoco")
    result = run(FakeModel(missing=0, wordings={2: "[REJ]"}), dataset)
    assert [record.rejected for record in result.records] == [False, True, False, True, True]
    assert result.metrics["N-acc"] == 1.0
    assert result.metrics["T-acc"] == 2 / 3
    assert result.metrics["gIoU"] == 4 / 5
    lost = int((paint_objects(1) == 2).sum())
    total = sum(record.G for record in result.records)
    assert result.metrics["cIoU"] == (total - lost) / total


def test_rej_beside_a_mask_does_not_reject():
    dataset = FakeDataset(size=1, absent=True, benchmark="grefcoco")
    record = run(FakeModel(wordings={1: "[REJ] or [SEG]"}), dataset).records[0]
    assert not record.rejected
    assert record.P > 0


def test_joint_question_reads_rejections_from_the_logits():
    dataset = FakeDataset(size=3, absent=True, benchmark="grefcoco")
    model = FakeModel(missing=0, reject_below=1)  # object 9 has no pixel
    result = run(model, dataset, mode="teacher_forced")
    assert [record.rejected for record in result.records] == [r.query_id == "9" for r in result.records]
    assert (result.metrics["N-acc"], result.metrics["T-acc"], result.metrics["gIoU"]) == (1, 1, 1)
    assert len({record.question for record in result.records}) == 3  # one question per image
    assert all("object 9" in record.question for record in result.records)


@dataclass
class FakeMuse(FakeDataset):
    """One question per image, "objects 1 2 3", with a target for each."""

    benchmark: str = "MultiReasonSeg"

    @property
    def num_queries(self):
        return self.size

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        masks = np.stack([paint_objects(index) == k for k in (1, 2, 3)]).astype(np.uint8)
        sample.queries = [EvalQuery(str(index), "objects 1 2 3", masks, True, {"targets": 3})]
        return sample


class InOrder(FakeModel):
    """Segments the given objects, in that order, for any question."""

    def __init__(self, *order):
        generated = " and ".join(["[SEG]"] * len(order)) or "none"
        super().__init__(missing=0, wordings=dict.fromkeys((1, 2, 3), generated))
        self.order = order

    def answer(self, image, question, given_answer, noise_seed):
        return super().answer(image, " ".join(map(str, self.order or (1,))), given_answer, noise_seed)


def test_several_targets_are_matched():
    result = run(InOrder(3, 1, 2), FakeMuse())
    assert result.metrics == {"gIoU": 1.0, "cIoU": 1.0}
    assert (result.summary.counts["masks"], result.summary.counts["queries"]) == (21, 7)
    sizes = [int((paint_objects(0) == k).sum()) for k in (1, 2, 3)]
    record = run(InOrder(2, 2), FakeMuse(size=1)).records[0]  # twice the same, 1 and 3 not at all
    assert sorted(map(tuple, record.pairs)) == sorted([(sizes[1], sizes[1]), (0, sizes[0] + sizes[1]), (0, sizes[2])])
    record = run(InOrder(1, 2, 3, 3), FakeMuse(size=1)).records[0]  # one too many
    assert record.pairs == [[size, size] for size in sizes] + [[0, sizes[2]]]
    record = run(InOrder(), FakeMuse(size=1)).records[0]
    assert record.pairs == [[0, size] for size in sizes]
    assert (record.I, record.P) == (0, 0)
    assert record.U == record.G == sum(sizes)


def test_a_teacher_forced_answer_to_muse_has_a_seg_for_each_target():
    result = run(FakeModel(missing=0, reject_below=10**6), FakeMuse(), mode="teacher_forced")
    assert {record.answer for record in result.records} == {"Sure, they are [SEG], [SEG] and [SEG]."}
    assert result.metrics == {"gIoU": 1.0, "cIoU": 1.0}


def test_several_targets_are_rejected_outside_muse():
    with pytest.raises(ValueError, match=r"fake/0\.jpg, 'objects 1 2 3' has 3 targets; fake expects one"):
        run(dataset=FakeMuse(benchmark="fake"))


@pytest.mark.parametrize(("benchmark", "mode"), [("R-refcoco", "generate"), ("fprefcocog", "teacher_forced")])
def test_false_premises(benchmark, mode):
    """Object 9 is false; object 2 is not seen although it is there."""
    model = FakeModel(missing=0, wordings={2: "no such thing"}, reject_below=1)
    result = run(model, FakeDataset(size=2, absent=True, benchmark=benchmark), mode=mode)
    seen = mode == "teacher_forced"  # the given answer asks about the mask, and the logits say that 2 is there
    assert [record.rejected for record in result.records] == [False, True, False, not seen, True]
    total = sum(record.G for record in result.records)
    expected = {"See": 1.0 if seen else 0.8, "Segment": 1.0 if seen else 1 - int((paint_objects(1) == 2).sum()) / total}
    if benchmark == "R-refcoco":  # an image is one ref here: the second has object 1 found and object 2 missed
        first, second = ((paint_objects(1) == k).sum() for k in (1, 2))
        oiou, riou = expected["Segment"], (1 + first / (first + second)) / 2
        expected |= {"RR": 1.0, "mIoU": (1 + 0.5) / 2, "oIoU": oiou, "r": 1.0, "rIoU": riou}
    assert result.metrics == pytest.approx(expected)


def test_special_tokens_in_a_query_add_no_mask(monkeypatch):
    def literal(self, index):
        sample = original(self, index)
        sample.queries[0].text = "[SEG] object 1 <image>"
        return sample

    original = FakeDataset.__getitem__
    monkeypatch.setattr(FakeDataset, "__getitem__", literal)
    dataset = FakeDataset(size=3, absent=True, benchmark="grefcoco")
    result = run(FakeModel(missing=0, reject_below=1), dataset, mode="teacher_forced")
    assert result.metrics["gIoU"] == 1
    assert result.records[0].query == "[SEG] object 1 <image>"


def test_a_teacher_forced_answer_never_rejects_on_benchmarks_without_rejection():
    result = run(FakeModel(missing=0, reject_below=10**6), mode="teacher_forced")
    assert result.metrics["gIoU"] == 1.0


def test_a_truncated_teacher_forced_answer_is_an_error():
    model = FakeModel()
    whole = model.answer
    model.answer = lambda image, question, given_answer, noise_seed: whole(image, question, "cut off", noise_seed)
    with pytest.raises(ValueError, match=r"fake/0\.jpg: 0 \[SEG\] instead of 1.*max_tokens"):
        run(model, mode="teacher_forced")


# -- controls ----------------------------------------------------------------------------------------------------------


def test_shuffled_prompts_are_a_derangement_with_unchanged_ground_truth():
    dataset = FakeDataset(size=7)
    shuffled = ShuffledPrompts(dataset, range(7))
    assert all(donor != image for image, donor in shuffled.donor.items())
    assert sorted(shuffled.donor.values()) == list(range(7))
    assert ShuffledPrompts(dataset, range(7)).donor == shuffled.donor
    assert sorted(ShuffledPrompts(dataset, [1, 4, 6]).donor) == [1, 4, 6]
    for index in range(7):
        own, mixed = dataset[index], shuffled[index]
        donated = [query.text for query in dataset[shuffled.donor[index]].queries]
        assert np.array_equal(mixed.image, own.image)
        assert all(np.array_equal(a.masks, b.masks) for a, b in zip(mixed.queries, own.queries, strict=True))
        assert [query.text for query in mixed.queries] == [donated[k % len(donated)] for k in range(len(own.queries))]


def test_the_control_exposes_a_query_agnostic_model():
    grounded = run(FakeModel(missing=0), FakeDataset(size=30), controls=["shuffled_prompts"])
    agnostic = run(FakeModel(missing=0, query_agnostic=True), FakeDataset(size=30), controls=["shuffled_prompts"])
    assert grounded.metrics["gIoU"] == 1.0
    assert grounded.summary.controls["shuffled_prompts"]["gIoU"] < 0.9
    assert agnostic.summary.controls["shuffled_prompts"] == agnostic.metrics


def test_a_control_is_asked_right_after_each_batch_is_on_disk(tmp_path):
    path, lines = tmp_path / "a.jsonl", []

    class Watching(FakeModel):
        def predict_rounds(self, batches, answered=0, **options):
            for predictions in super().predict_rounds(batches, answered, **options):
                lines.append(path.read_text().count("\n") if path.exists() else 0)
                yield predictions

    dataset = FakeDataset(size=4)  # images of 1, 2, 3 and 1 queries
    run(Watching(), dataset, batch_size=2, controls=["shuffled_prompts"], journal=Journal(path))
    assert lines == [0, 3, 3, 7]  # before its answers, and before the control's


@pytest.mark.parametrize("max_calls", [3, 6, 7])
def test_a_control_is_asked_about_all_images_when_an_evaluation_resumes(tmp_path, max_calls):
    """Batches of 2 images, the control after each; the last image on disk of an unfinished evaluation counts as cut."""
    options = {"batch_size": 2, "controls": ["shuffled_prompts"]}
    whole = run(FakeModel(noisy=True), **options)
    interrupted_run(tmp_path / "a.jsonl", max_calls, **options)
    model = FakeModel(noisy=True)
    again = run(model, journal=Journal(tmp_path / "a.jsonl"), resume=True, **options)
    finished = {3: 1, 6: 2, 7: 4}[max_calls]
    assert len(model.calls) == 8 - finished
    assert again.records == whole.records
    assert again.summary.controls == whole.summary.controls


def test_a_control_leaves_out_unreadable_images_also_as_donors():
    options = {"allow_missing": True, "batch_size": 2, "controls": ["shuffled_prompts"]}
    broken = run(FakeModel(noisy=True), FakeDataset(broken=(2, 5)), **options)
    readable = FakeDataset(broken=(2, 5))
    shuffled = ShuffledPrompts(readable, [0, 1, 3, 4, 6])
    runner = EvalRunner(FakeModel(noisy=True), FakeProcessor(), InferenceOptions(), RunOptions(batch_size=2))
    alone, _, _ = runner.gather(shuffled, [0, 1, 3, 4, 6])
    expected = metrics.compute(alone, benchmark_of(readable.spec), "")
    assert broken.summary.controls == {"shuffled_prompts": expected}


def test_query_agnostic_baselines_come_from_the_data(tmp_path):
    scores = {"all": {"gIoU": 0.25, "cIoU": 0.2}, "random": {"gIoU": 0.3, "cIoU": 0.4}}
    other = {"all": {"gIoU": 0.5, "cIoU": 0.2}, "random": {"gIoU": 0.6, "cIoU": 0.4}}
    rows = [
        {"set": "ReasonSeg", "split": "val", "kind": "short", "queries": 30, **scores},
        {"set": "ReasonSeg", "split": "val", "kind": "long", "queries": 10, **other},
        {"set": "ReasonSeg", "split": "val", "kind": "long: relation", "queries": 10, **other},
        {"set": "grefcoco", "split": "val", "kind": "all", "queries": 5, **scores},
        {"set": "grefcoco", "split": "val", "kind": "no target", "queries": 5, **other},
    ]
    assert query_agnostic_baselines(tmp_path, Spec.parse("ReasonSeg|val")) == {}
    (tmp_path / "demo_data.json").write_text(json.dumps({"text_blind": rows}))
    named = {"text_blind_all_objects": scores["all"], "text_blind_random_object": scores["random"]}
    assert query_agnostic_baselines(tmp_path, Spec.parse("ReasonSeg|val_short")) == named
    assert query_agnostic_baselines(tmp_path, Spec.parse("grefcoco|unc|val")) == named
    both = query_agnostic_baselines(tmp_path, Spec.parse("ReasonSeg|val"))
    assert both["text_blind_all_objects"] == {"gIoU": pytest.approx((30 * 0.25 + 10 * 0.5) / 40)}
    assert query_agnostic_baselines(tmp_path, Spec.parse("refcoco|unc|val")) == {}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_all_listed_and_give_no_result(workers):
    with pytest.raises(ValueError, match=r"fake\|val: 2 images.*\n.*1\.jpg.*\n.*5\.jpg"):
        run(dataset=FakeDataset(broken=(1, 5)), batch_size=2, workers=workers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "guess"}, "unknown mode 'guess'; use generate or teacher_forced"),
        ({"controls": ["upside_down"]}, "unknown control 'upside_down'; use shuffled_prompts"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit 0"),
        ({"limit": 1, "controls": ["shuffled_prompts"]}, "at least 2 images"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_missing_and_duplicate_records_are_an_error(monkeypatch):
    repeats = FakeDataset(size=2)
    duplicate = repeats[1]
    duplicate.queries[1].query_id = "1"
    monkeypatch.setattr(FakeDataset, "__getitem__", lambda self, index: duplicate)
    with pytest.raises(ValueError, match=r"with several: \[\(0, '1'\), \(1, '1'\)\]"):
        run(dataset=repeats)
    monkeypatch.undo()
    monkeypatch.setattr(FakeDataset, "num_queries", 99)
    with pytest.raises(ValueError, match="13 records for 99 queries"):
        run()


# -- output ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_policy", ["argmax", "mc:4"])
def test_saved_results_can_be_recomputed(tmp_path, layer_policy):
    dataset = FakeDataset(benchmark="grefcoco", absent=True, skipped=["fake/x.jpg: no polygon"])
    setup = {"controls": ["shuffled_prompts"], "checkpoint": "abc", "layer_policy": layer_policy}
    result = run(FakeModel(noisy=True), dataset, **setup)
    path = result.save(tmp_path / "new" / "folder")
    assert path.name == "grefcoco_val.generate.json"
    summary = json.loads(path.read_text())
    assert Summary.load(path) == result.summary
    provenance, records = read_results(path.with_suffix(".jsonl"))
    assert (provenance, records) == (result.provenance, result.records)
    assert (provenance.checkpoint, provenance.protocol, provenance.images, provenance.queries) == (
        "abc",
        "grefcoco",
        7,
        len(records),
    )
    again = json.loads(json.dumps(summarize(provenance, records).to_dict()))
    assert again.pop("controls") == {}
    assert again.pop("counts").items() <= summary["counts"].items()
    assert again.items() <= summary.items()  # to the last bit
    assert ({"AURC", "AUSE"} <= set(summary["intervals"])) == (layer_policy == "mc:4")
    assert summary["metrics"] == result.metrics
    assert (summary["counts"]["skipped"], summary["counts"]["missing"]) == (1, 0)
    assert (summary["benchmark"], summary["mode"]) == ("grefcoco|val", "generate")
    assert set(summary["controls"]) == {"shuffled_prompts"}
    target = {q.query_id: q for q in dataset[4].queries}["2"].masks[0]
    record = next(record for record in records if (record.index, record.query_id) == (4, "2"))
    mask = decode_mask(record.masks[0])
    assert ((mask & (target == 1)).sum(), (mask | (target == 1)).sum()) == (record.I, record.U)


def test_both_protocols_of_grefcoco():
    """Teacher forced, every target is rejected, although its mask is right."""
    dataset = FakeDataset(size=3, absent=True, benchmark="grefcoco")
    results = {
        name: run(FakeModel(missing=0, reject_below=10**6), dataset, mode="teacher_forced", protocol=name)
        for name in (None, "gsva", "grefcoco")
    }
    assert results[None].summary.protocol == results["gsva"].summary.protocol == "gsva"
    decoded, empty = ({f"Pr@{t}": share for t in (0.7, 0.8, 0.9)} for share in (1, 0))
    assert results["gsva"].metrics == {"gIoU": 1, "cIoU": 1, "N-acc": 1, "T-acc": 0, **decoded}
    assert results[None].metrics == results["gsva"].metrics
    assert results["grefcoco"].metrics == {"gIoU": 3 / 9, "cIoU": 0, "N-acc": 1, "T-acc": 0, **empty}
    assert results["grefcoco"].records == results["gsva"].records
    assert "teacher_forced, grefcoco" in format_table([results["grefcoco"].summary])
    generated = run(FakeModel(wordings={2: "[REJ]"}), dataset, protocol="gsva")  # a generated rejection has no mask
    assert generated.summary.protocol == "grefcoco"
    assert metrics.compute(generated.records, BENCHMARKS["grefcoco"], "gsva") == generated.metrics
    assert "protocol" not in run(protocol="gsva").summary.to_dict()  # other benchmarks have one only
    with pytest.raises(
        ValueError, match=r"unknown protocol 'voc'; use grefcoco or gsva or published or rela or strict"
    ):
        run(protocol="voc")


# -- interruptions -----------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class KilledModel(FakeModel):
    """Raises ``Killed`` after ``max_calls`` calls."""

    def __init__(self, max_calls, **options):
        super().__init__(**options)
        self.max_calls = max_calls

    def predict(self, batch, **options):
        if len(self.calls) == self.max_calls:
            raise Killed
        return super().predict(batch, **options)


def interrupted_run(path, max_calls, **options):
    with pytest.raises(Killed):
        run(KilledModel(max_calls, noisy=True), journal=Journal(path), **options)


@pytest.mark.parametrize("cut", [0, 1, 40, 700])
def test_a_killed_evaluation_resumes(tmp_path, cut):
    """Batches of 2 images; killed in the third of four, with the last lines cut anywhere."""
    path = tmp_path / "fake_val.generate.jsonl"
    whole = run(FakeModel(noisy=True), batch_size=2)
    interrupted_run(path, 2, batch_size=2)
    assert not path.with_suffix(".json").exists()
    path.write_bytes(path.read_bytes()[: -cut or None])
    model = FakeModel(noisy=True)
    again = run(model, batch_size=2, journal=Journal(path), resume=True)
    assert [count for count, *_ in model.calls] == [
        2,
        2,
        1,
    ]  # the last image's batch is predicted again, the first is not
    assert again.records == whole.records
    assert replace(again.summary, seconds=0) == replace(whole.summary, seconds=0)
    again.save(tmp_path)
    whole.save(tmp_path / "whole")
    assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_a_finished_evaluation_is_not_predicted_again(tmp_path):
    run(FakeModel(noisy=True), journal=Journal(tmp_path / "a.jsonl"))
    model = FakeModel(noisy=True)
    run(model, journal=Journal(tmp_path / "a.jsonl"), resume=True)
    assert model.calls == []


def test_without_resume_an_evaluation_starts_over(tmp_path):
    path = tmp_path / "fake_val.generate.jsonl"
    interrupted_run(path, 1, batch_size=2)
    result = run(FakeModel(missing=0), batch_size=2, journal=Journal(path))
    assert {record.I for record in read_results(path)[1]} == {record.I for record in result.records}
    assert len(read_results(path)[1]) == len(result.records)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": "new"}, "checkpoint: 'old' there, 'new' now"),
        ({"quantize": "8bit"}, "precision: 'float32' there, 'float32, 8bit' now"),
        ({"layer_policy": "last"}, "layer_policy: 'argmax' there, 'last' now"),
        ({"dataset": FakeDataset(size=8)}, "images: 7 there, 8 now; queries: 13 there, 15 now"),
    ],
)
def test_results_of_another_evaluation_are_rejected_and_kept(tmp_path, changed, message):
    path = tmp_path / "fake_val.generate.jsonl"
    interrupted_run(path, 1, batch_size=2, checkpoint="old")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{message}.*give the same settings, another --output, or leave --resume out"):
        run(**{"batch_size": 2, "checkpoint": "old", "journal": Journal(path), "resume": True} | changed)
    assert path.read_bytes() == before


def test_answers_to_other_annotations_are_rejected(tmp_path, monkeypatch):
    path = tmp_path / "fake_val.generate.jsonl"
    run(journal=Journal(path))
    before, read = path.read_bytes(), FakeDataset.__getitem__

    def changed(self, index):
        sample = read(self, index)
        sample.queries[-1].text += ", the red one" if index == 6 else ""
        return sample

    monkeypatch.setattr(FakeDataset, "__getitem__", changed)
    with pytest.raises(ValueError, match=r"fake/6.jpg has other queries now.*leave --resume out"):
        run(journal=Journal(path), resume=True)
    assert path.read_bytes() == before


def test_another_protocol_resumes_from_the_same_answers(tmp_path):
    dataset = FakeDataset(absent=True, benchmark="grefcoco")
    options = {"dataset": dataset, "mode": "teacher_forced", "journal": Journal(tmp_path / "a.jsonl")}
    run(FakeModel(reject_below=40), protocol="gsva", **options)
    again = run(None, protocol="grefcoco", resume=True, **options)
    assert again.metrics == run(FakeModel(reject_below=40), protocol="grefcoco", **options).metrics


# -- missing images ----------------------------------------------------------------------------------------------------


def test_the_number_of_missing_images_is_beside_every_metric(tmp_path):
    dataset = FakeDataset(broken=(1, 5), unusable=["fake/9.json is damaged"])
    result = run(
        FakeModel(noisy=True), dataset, allow_missing=True, batch_size=2, controls=["shuffled_prompts"],
        journal=Journal(tmp_path / "a.jsonl"),
    )  # fmt: skip
    whole = run(FakeModel(noisy=True), batch_size=2)
    assert result.records == [record for record in whole.records if record.index not in (1, 5)]
    assert [text.split()[0] for text in result.summary.missing] == ["fake/9.json", "image", "image"]
    assert result.summary.counts | {"missing": 3, "images": 5, "split_images": 7} == result.summary.counts
    lines = format_table([result.summary]).splitlines()
    assert " 5/7 " in lines[3]
    assert all("(3 missing)" in line for line in lines[3:-2])  # the result, its intervals, control and groups
    again = run(None, dataset, allow_missing=True, batch_size=2, journal=Journal(tmp_path / "a.jsonl"), resume=True)
    assert len(again.records) == len(result.records)


def test_a_split_without_readable_images_is_an_error():
    with pytest.raises(ValueError, match="2 images cannot be evaluated"):
        run(dataset=FakeDataset(size=2, broken=(0, 1)), allow_missing=True)


# -- tables and pictures -----------------------------------------------------------------------------------------------


def test_tables_show_results_controls_and_groups():
    """A table per setup and set of metrics."""
    result = run(dataset=FakeDataset(size=5), controls=["shuffled_prompts"], layer_policy="mc:4")
    table = format_table([result.summary, run(dataset=FakeDataset(benchmark="grefcoco", absent=True)).summary])
    first, second = (part.splitlines() for part in table.split("\n\n")[:2])
    assert first[0] == "generate, layer mc:4"
    assert first[1].split() == ["benchmark", "images", "masks", "gIoU", "cIoU", "AURC", "AUSE"]
    assert first[3].split()[:4] == ["fake|val", "5", "9", f"{result.metrics['gIoU']:.3f}"]
    low, high = result.summary.intervals["gIoU"]
    assert first[4].split()[:4] == ["95%", "interval:", "from", f"{low:.3f}"]
    assert first[5].split()[:4] == ["95%", "interval:", "to", f"{high:.3f}"]
    assert first[6].startswith("  prompts shuffled ")
    assert "family: even" in first[7]
    assert second[0] == "generate, grefcoco, layer argmax"
    assert second[1].split()[3:] == ["gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"]
    assert "1.000" in second[3]  # N-acc


def test_tables_of_all_benchmarks_fit_a_terminal():
    """With all metrics of a benchmark, uncertainty among them, and images that are missing."""
    summaries = []
    for spec in SUITES["all"]:
        protocol = benchmark_of(spec).protocol()
        scores = dict.fromkeys([*benchmark_of(spec).metrics, "AURC", "AUSE"], 0.123)
        intervals = {name: [0.1, 0.2] for name in scores}
        counts = {"images": 1500, "split_images": 1500, "masks": 10834, "missing": 12}
        controls = dict.fromkeys(HEADINGS, scores)
        summaries.append(
            Summary(str(spec), "teacher_forced", protocol, "mc:16", scores, intervals, controls, {}, counts, {})
        )
    text = "\n".join([format_table(summaries), *(table.text() for table in fill("tiny", summaries))]).splitlines()
    assert 100 < max(map(len, text)) <= 120
    assert sum(line.startswith("R-refcocog|umd|test") for line in text) == 1


def test_panels_run_from_the_worst_to_the_best():
    dataset, model = FakeDataset(size=9), FakeModel(noisy=True)
    result = run(model, dataset)
    sample_panels = panels(model, FakeProcessor(), dataset, result.records, 4, InferenceOptions())
    ious = [metrics.iou(record) for record, _ in sample_panels]
    everything = sorted(map(metrics.iou, result.records))
    assert ious == sorted(ious)
    assert (ious[0], ious[-1], len(ious)) == (everything[0], everything[-1], 4)
    for record, panel in sample_panels:
        assert panel.masks.sum() == record.P  # the same answer as the one that was scored
        assert panel.notes[0] == f"IoU {metrics.iou(record):.2f}"
    assert len(panels(model, FakeProcessor(), dataset, result.records, 99, InferenceOptions())) == len(result.records)
    model.calls.clear()
    together = panels(model, FakeProcessor(), dataset, result.records, 4, InferenceOptions(), batch_size=3)
    assert [count for count, *_ in model.calls] == [3, 1]
    assert [record for record, _ in together] == [record for record, _ in sample_panels]
    assert all(np.array_equal(a.masks, b.masks) for (_, a), (_, b) in zip(together, sample_panels))


def test_default_modes_are_those_of_the_paper():
    names = ("ReasonSeg", "refcoco", "grefcoco", "fprefcoco+", "MultiReasonSeg")
    assert [BENCHMARKS[name].mode for name in names] == ["teacher_forced"] * 3 + ["generate"] * 2


# -- processes ---------------------------------------------------------------------------------------------------------


def _evaluate_in_process(rank: int, world: int, store: str, out: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = FakeModel(noisy=True)
    result = run(model, FakeDataset(), batch_size=2, controls=["shuffled_prompts"])
    assert len(model.calls) == 2 * 2  # 4 and 3 images, twice
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump({**result.summary.to_dict(), "records": [vars(record) for record in result.records]}, file)
    try:
        run(dataset=FakeDataset(broken=(1,)), batch_size=2)  # of rank 1 alone
    except ValueError as error:
        assert "1.jpg" in str(error)  # noqa: PT017
        with open(f"{out}/{rank}.failed", "w"):
            pass
    journal = Journal(Path(out) / "fake_val.generate.jsonl")
    with pytest.raises(Killed):  # after images 0 and 1, 2 and 3
        run(KilledModel(2, noisy=True), batch_size=1, journal=journal)
    torch.distributed.barrier()
    assert len(journal.rank_files()) == 1
    torch.distributed.barrier()
    result = run(FakeModel(noisy=True), batch_size=2, journal=journal, resume=True)
    if rank == 0:
        result.save(Path(out))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_same_result_and_fail_and_resume_together(tmp_path):
    called(_evaluate_in_process, 2, str(tmp_path / "store"), str(tmp_path), processes=2)
    alone = run(FakeModel(noisy=True), batch_size=2, controls=["shuffled_prompts"])
    records = [vars(record) for record in alone.records]
    expected = json.loads(json.dumps({**alone.summary.to_dict(), "records": records}))
    for rank in (0, 1):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["settings"].pop("processes") == 2
        for values in (result, expected):
            values.pop("seconds", None)
        expected["settings"].pop("processes", None)
        assert result == expected
        assert (tmp_path / f"{rank}.failed").exists()
    assert read_results(tmp_path / "fake_val.generate.jsonl")[1] == alone.records
    assert [path.name for path in tmp_path.glob("*rank*")] == []
