"""Every path of the model on the strict device: what it computes, and where it waits."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_masks
from opening import load_pretrained
from pixellm import make_pixellm, make_processor
from stretched import CONFIGS, make_stretched, make_stretched_processor, write_source
from strict_device import DeviceTensor, strict_device

from model import grounding
from model.layer_rules import StochasticSkip
from model.loading.pretrained import load
from model.lora import add_lora, base_of
from model.opened import cache_sam_features
from model.settings import RECIPES, GrpoSettings
from model.structures import Prediction, Turn
from scripts.merge_lora import merge
from utils.datasets import get_eval_dataset
from utils.diagnostics import benchmark, costs, device_checks
from utils.evaluation.ceiling_pass import measure
from utils.evaluation.engine import evaluate
from utils.evaluation.layer_analysis import LayerAnalyzer
from utils.evaluation.predictions import InferenceOptions
from utils.inference.session import ImageSession
from utils.training.group_samples import generated_answers, packed_answers
from utils.training.run_log import Meter

SETTINGS = {
    "policy": {},
    "exact": {"policy_gradient": "exact"},
    "critic": {"baseline": "critic", "scale_advantage": True},
    "state_critic": {"baseline": "state_critic", "scale_advantage": True},
    "leave one out": {"policy_gradient": "leave_one_out", "reward_terms": "mask", "scale_advantage": True},
    "leave one out of maps": {"policy_gradient": "leave_one_out", "reward_terms": "iou"},
    "mask reward": {"reward_terms": "mask_iou", "iou_loss_weight": 1.0},
    "soft": {"layer_selection": "soft"},
    "ce_soft": {"layer_selection": "ce_soft"},
    "lisa": {"layer_selection": "last", "mask_prompt": False, "map_terms": ()},
    "released": RECIPES["released"],
    "all terms": {"map_terms": ("bce", "dice", "gaussian_bce", "gaussian_dice"), "reward_terms": "iou"},
}
PIXELLM = {
    "as published": {"overlap_weight": 2.0},
    "unpooled": {"image_pool": 1},
    "policy": {"layer_selection": "policy", "mask_prompt": True, "map_terms": ("gaussian_bce",)},
    "soft": {"layer_selection": "soft", "iou_loss_weight": 1.0},
    "leave one out": {"layer_selection": "policy", "policy_gradient": "leave_one_out", "reward_terms": "mask"},
}
STRETCHED = {  # SAM 2, SAM 3's tracker: settings, and whether features are cached
    "policy": ({}, False),
    "cached": ({}, True),
    "points": ({"point_prompts": 2}, True),
    "lisa": ({"mask_prompt": False}, True),
}
RULES = ("argmax", "sample", "mc:4", "best:3", "soft", "blend:2", "fixed:1", "window:1-2")


# -- the device --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda here, there: here + there,
        lambda here, there: there + here,
        lambda here, there: there.add_(here[0]),  # a number on the device does not come to the host by itself
        lambda here, there: here @ there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.stack([here[0], there[0]]),
        lambda here, there: torch.where(there > 0, here, 0.0),
        lambda here, there: here.index_select(0, torch.zeros(1, dtype=torch.int64)),
        lambda here, there: here.gather(0, torch.zeros(1, dtype=torch.int64)),
        lambda here, there: there[here.long()],
        lambda here, there: F.linear(there[None], here[None]),
        lambda here, there: here.numpy(),
    ],
)
def test_the_strict_device_refuses_what_cuda_refuses(call):
    with strict_device():
        here, there = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises(RuntimeError, match=r"same device|not supported for tensor subclasses"):
            call(here, there)


def test_the_strict_device_computes_and_reports_where_it_waits():
    with strict_device() as waits:
        here, number = torch.arange(3.0, device="cuda"), torch.tensor(2.0)
        pinned = torch.ones(3).to("cuda", non_blocking=True)
        assert (here.device, type(here * number)) == (torch.device("cuda:0"), DeviceTensor)
        here = torch.where(here > 0, here, number).masked_fill(here > 1, number).add_(pinned)
        here[here > 5] = 0.0
        assert not waits
        for call, expected in (
            (lambda: here.tolist(), 1),
            (lambda: here.cpu(), 1),
            (lambda: float(here.sum()), 1),
            (lambda: bool(here.any()), 1),
            (lambda: here[here > 0], 1),
            (lambda: here.nonzero(), 1),
            (lambda: here[torch.tensor([0, 1])], 1),
            (lambda: torch.tensor([1, 2], device="cuda"), 1),
            (lambda: torch.equal(here, here), 1),
            (lambda: torch.tensor([], device="cuda"), 0),
            (lambda: here[:, None] + here, 0),
        ):
            waits.clear()
            call()
            assert len(waits) == expected
        assert here.tolist() == [3.0, 2.0, 3.0]


# -- training ----------------------------------------------------------------------------------------------------------


def train(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of an optimizer step, and the gradients."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, fused=True)
    loss = model(batch).loss
    loss.backward()
    optimizer.step()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare_step(model, batch) -> list[str]:
    """Where a training step on the device waits, after comparing it with the CPU's."""
    there = copy.deepcopy(model)
    wanted, gradients = train(model, batch)
    with strict_device() as waits:
        there.to("cuda")
        waits.clear()
        loss, found = train(there, batch.to("cuda"))
        result = list(waits)
        torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-5, atol=0)
        assert found.keys() == gradients.keys()
        weights = dict(there.named_parameters())
        for name, gradient in gradients.items():
            noise = 1e-6 if name.endswith("k_proj.bias") else 1e-7  # it cancels in the softmax
            atol = 1e-4 * float(gradient.abs().max()) + noise
            torch.testing.assert_close(found[name].cpu(), gradient, rtol=0, atol=atol, msg=name)
            trained = weights[name].cpu()  # AdamW's first step is the learning rate, whatever the gradient
            torch.testing.assert_close(trained, model.get_parameter(name), rtol=0, atol=2.1e-3, msg=name)
    return result


@pytest.fixture
def step(make_model, tiny_processor, tiny_samples):
    """step(**settings) -> ``compare_step`` of a UGround with these settings."""

    def run(checkpointing: bool = False, cache: Path | None = None, **settings) -> list[str]:
        base = make_model(**settings)
        model = add_lora(base, r=2, dropout=0.0).train()
        processor = copy.copy(tiny_processor)
        processor.keep_padding = base.config.reads_padding
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if cache is not None:
            cache_sam_features(base, processor, str(cache), 1.0)
        return compare_step(model, processor.collate(tiny_samples[:2]))  # neither is square

    return run


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_step_computes_what_the_cpu_does_and_never_waits(step, settings):
    assert step(**settings) == []


@pytest.mark.parametrize("settings", PIXELLM.values(), ids=PIXELLM)
def test_a_step_of_pixellm_computes_what_the_cpu_does_and_never_waits(settings, tiny_samples):
    processor = make_processor()
    model = add_lora(make_pixellm(processor, **settings), r=2, dropout=0.0).train()
    assert compare_step(model, processor.collate(tiny_samples)) == []


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("settings", "cached"), STRETCHED.values(), ids=STRETCHED)
def test_a_step_with_another_sam_computes_what_the_cpu_does_and_never_waits(
    name, settings, cached, tiny_tokenizer, tiny_samples, tmp_path
):
    processor = make_stretched_processor(tiny_tokenizer, name)
    base = make_stretched(processor, name, write_source(tmp_path / "source", name), **settings)
    model = add_lora(base, r=2, dropout=0.0).train()
    if cached:
        cache_sam_features(base, processor, str(tmp_path / "cache"), 1.0)
    assert compare_step(model, processor.collate(tiny_samples[:2])) == []


def test_answers_are_sampled_and_learned_from_as_on_the_cpu(make_model, tiny_processor, tiny_samples):
    """Answers may wait for their tokens, rewards for their masks; the loss does not."""
    settings = GrpoSettings(objective="grpo", grpo_answers=2, grpo_tokens=6, grpo_kl=0.1)
    batch, prompts = tiny_processor.collate(tiny_samples), tiny_processor.group_prompts(tiny_samples, 6)
    model = add_lora(make_model(), r=2, dropout=0.0).train()
    seg, rej, eos = tiny_processor.tokens.seg, tiny_processor.tokens.rej, tiny_processor.tokens.eos
    given = [[[seg, eos] if k % 2 else [rej, eos] for k in range(2 * len(row))] for row in prompts.questions]

    def learn(model, batch, waits):
        inner, count = base_of(model), torch.tensor(10.0, device=batch.input_ids.device)
        tokens = generated_answers(inner, tiny_processor, batch, prompts, settings, 0)
        answers = packed_answers(given, tiny_processor, batch, prompts, count, settings)
        losses = [model(batch, sampled=answers).loss]
        waits.clear()
        losses += [model(batch, sampled=answers).loss]  # rewards are known
        later.append(set(waits))
        losses[0].backward()
        return tokens, losses

    there = copy.deepcopy(model)
    later: list[set[str]] = []
    tokens, losses = learn(model, batch, [])
    with strict_device() as waits:
        there.to("cuda")
        waits.clear()
        batch = batch.to("cuda")
        found, device_losses = learn(there, batch, waits)
        assert not later[-1]
        assert found == tokens
        for loss, wanted in zip(device_losses, losses):
            torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-4, atol=1e-6)
        weights = dict(there.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(weights[name].grad.cpu(), parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_checkpointing_and_the_feature_cache_do_not_wait(step, tmp_path):
    assert step(checkpointing=True, cache=tmp_path) == []  # the CPU's step has filled the cache


def test_a_step_with_points_waits_where_segment_anything_selects_by_label(step):
    waits = step(point_prompts=2)
    operations, places = zip(*(wait.split(" at ") for wait in waits), strict=True)
    assert {operation.split(".")[1] for operation in operations} <= {"index", "index_put", "index_put_"}
    # the backward pass runs here
    assert {place.split(":")[0] for place in places} == {"segment_anything.py", "test_device.py"}


def test_the_meter_waits_when_it_is_read(make_model, tiny_processor, tiny_samples):
    model = make_model().train()
    with strict_device() as waits:
        model.to("cuda")
        meter = Meter(model.device, model.ppm.num_layers)
        output = model(tiny_processor.collate(tiny_samples[:2]).to("cuda"), all_layers=True)
        waits.clear()
        meter.add(output, 2)
        assert not waits
        assert sum(meter.collect()["layers"]) == 5
        assert len(waits) == 1


def test_a_tensor_on_the_wrong_device_is_found(step, monkeypatch):
    choose = StochasticSkip.choose
    monkeypatch.setattr(StochasticSkip, "choose", lambda self, log_policy, noise: choose(self, log_policy, noise.cpu()))
    with pytest.raises(RuntimeError, match="same device"):
        step()


def test_a_synchronization_is_found(step, monkeypatch):
    normalise = grounding.normalise_maps
    waits = lambda scores, valid: normalise(scores, valid) * scores.max().item()  # noqa: E731
    monkeypatch.setattr(grounding, "normalise_maps", waits)
    (wait,) = step()
    assert "_local_scalar_dense" in wait


def test_an_image_without_masks_needs_no_kernel_that_fails_on_zero_maps(
    make_model, tiny_processor, tiny_samples, monkeypatch
):
    resize, calls = F.interpolate, []

    def strict(values, *args, antialias=False, **options):
        calls.append(antialias)
        assert len(values) or not antialias, "CUDA error: invalid argument"  # as PyTorch 2.11 does
        return resize(values, *args, antialias=antialias, **options)

    monkeypatch.setattr(F, "interpolate", strict)
    answer = Turn("where is the star", "There is no such thing: [REJ]")
    absent = replace(tiny_samples[0], conversations=[(answer,)], masks=tiny_samples[0].masks[:0])
    model = add_lora(make_model(), r=2).train()
    model(tiny_processor.collate([absent, tiny_samples[1]])).loss.backward()
    assert True in calls
    model(tiny_processor.collate([absent])).loss.backward()


# -- inference ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(version):
    """(model, processor); every answer begins with [SEG]."""
    return load_pretrained(version)


def questions(samples, given: bool) -> list[list[Turn]]:
    return [[talk[0] if given else Turn(talk[0].question) for talk in sample.conversations] for sample in samples]


def assert_same(found: list[Prediction], wanted: list[Prediction]) -> None:
    assert [(p.token_ids, p.layers) for p in found] == [(p.token_ids, p.layers) for p in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert_same_masks(mine.mask_logits, theirs.mask_logits, tolerance=1e-2)
        for a, b in zip(mine.uncertainty, theirs.uncertainty, strict=True):
            torch.testing.assert_close(a.deviation, b.deviation, rtol=0, atol=1e-3)
            assert a.score == pytest.approx(b.score, abs=1e-3)


@pytest.mark.parametrize("given", [False, True], ids=["written", "given"])
def test_answers_of_a_batch_are_the_cpus(opened, tiny_samples, given):
    model, processor = opened
    batch = processor.prompts([sample.image for sample in tiny_samples], questions(tiny_samples, given))
    with strict_device():
        there = copy.deepcopy(model).to("cuda")
        for rule in RULES if given else ("argmax", "mc:4"):  # how an answer is written depends on no rule
            wanted = chain(*model.predict(batch, rule, max_new_tokens=5))
            found = chain(*there.predict(batch.to("cuda"), rule, max_new_tokens=5))
            assert_same(list(found), list(wanted))


@pytest.mark.parametrize("given", [False, True], ids=["written", "given"])
def test_answers_of_pixellm_are_the_cpus(tiny_samples, given):
    processor = make_processor()
    model = make_pixellm(processor)
    model.lm_head.weight.data[processor.codebook[0]] *= 30  # answers hold whole targets
    model.config.iou_loss_weight = 0.1  # its ratings count, for best:K
    batch = processor.prompts([sample.image for sample in tiny_samples], questions(tiny_samples, given))
    with strict_device():
        there = copy.deepcopy(model).to("cuda")
        for rule in ("argmax", "mc:4", "best:3", "soft") if given else ("argmax",):
            wanted = list(chain(*model.predict(batch, rule, max_new_tokens=10)))
            found = list(chain(*there.predict(batch.to("cuda"), rule, max_new_tokens=10)))
            assert any(len(prediction.masks) for prediction in wanted)
            assert_same(found, wanted)
        sessions = [ImageSession(each, processor, tiny_samples[0].image) for each in (model, there)]
        wanted, found = (each.ask("where is the star", max_new_tokens=10) for each in sessions)
        assert len(wanted.masks)
        assert_same([found], [wanted])


def test_a_token_costs_one_wait(opened, tiny_samples):
    model, processor = opened
    model.config.eos_token_id = None  # no answer ends
    batch = processor.prompts([sample.image for sample in tiny_samples], questions(tiny_samples, False))
    counts = {}
    with strict_device() as waits:
        model.to("cuda")
        for length in (3, 8):
            waits.clear()
            model.answer(batch.to("cuda"), max_new_tokens=length)
            counts[length] = len(waits)
    assert counts[8] - counts[3] == 5
    assert counts[3] < 16  # of a prompt of three images


def test_more_sampled_layers_cost_no_more_waits(opened, tiny_samples):
    model, processor = opened
    model.ppm.gate.data.zero_()  # a uniform policy, so that many layers are sampled
    batch = processor.prompts([tiny_samples[0].image], questions(tiny_samples[:1], True))
    counts, layers = {}, {}
    with strict_device() as waits:
        model.to("cuda")
        language_pass = model.answer(batch.to("cuda"))
        for rule in ("mc:1", "mc:8"):
            waits.clear()
            [[first, *_]] = model.decode_masks(language_pass, rule)
            counts[rule], layers[rule] = len(waits), int((first.uncertainty[0].layers > 0).sum())
    assert layers["mc:8"] > layers["mc:1"] == 1
    assert counts["mc:8"] == counts["mc:1"]


def test_a_conversation_is_the_cpus(opened, tiny_samples):
    model, processor = opened
    with strict_device() as waits:
        there = copy.deepcopy(model).to("cuda")
        sessions = [ImageSession(each, processor, tiny_samples[0].image) for each in (model, there)]
        for rule in ("argmax", "mc:4", "best:2"):
            wanted, found = (each.ask("where is the star", layer_policy=rule, max_new_tokens=4) for each in sessions)
            assert_same([found], [wanted])
            assert found.text == wanted.text
        waits.clear()
        assert_same([sessions[1].decode_again("last")], [sessions[0].decode_again("last")])
        assert len(waits) < 10
        assert found.masks.numpy().any() is not None


@pytest.mark.parametrize("mode", ["generate", "teacher_forced"])
def test_an_evaluation_is_the_cpus(opened, val_data, mode):
    model, processor = opened
    dataset, options = get_eval_dataset("ReasonSeg|val", val_data), InferenceOptions(mode, "mc:2", max_new_tokens=4)
    wanted = evaluate(model, processor, dataset, options)
    with strict_device():
        found = evaluate(model.to("cuda"), processor, dataset, options)
    assert found.summary.metrics == pytest.approx(wanted.summary.metrics, abs=1e-3)
    assert [record.answer for record in found.records] == [record.answer for record in wanted.records]


def test_the_analysis_of_layers_runs_on_the_device(opened, val_data):
    model, processor = opened
    dataset = get_eval_dataset("ReasonSeg|val", val_data)
    with strict_device():
        analyzer = LayerAnalyzer(model.to("cuda"), processor, InferenceOptions("teacher_forced"))
        study = analyzer.study(dataset, limit=2)
        assert analyzer.inspect(dataset, study.records[0]).ious
        assert len(measure(analyzer, dataset, ["argmax"], limit=2).images) == 2


def test_a_model_is_merged_on_the_device(make_model, tiny_processor):
    model = add_lora(make_model(), r=2).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with strict_device():
        merged, difference = merge(copy.deepcopy(model).to("cuda"), tiny_processor)
        wanted, _ = merge(model, tiny_processor)
        for name, weight in merged.named_parameters():
            torch.testing.assert_close(weight.cpu(), wanted.get_parameter(name))
    assert 0 < difference < 1e-4
    assert "lora" not in "".join(dict(merged.named_parameters()))


# -- scripts/gpu_check.py ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_driver(monkeypatch):
    """What scripts/gpu_check.py asks of the driver."""
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 1)


def test_a_folder_is_loaded_on_the_device(version):
    with strict_device():
        opened = load(version, "fp32", "cuda")
        state = opened.model.state_dict().values()
        assert {tensor.device.type for tensor in state} == {opened.model.device.type} == {"cuda"}
        assert opened.report()


def test_the_comparison_with_the_cpu_runs_on_the_device(monkeypatch):
    monkeypatch.setattr(device_checks, "METHODS", {"policy": device_checks.PAPER})
    with strict_device():
        findings = list(device_checks.check_training_numbers("cuda"))
    assert {finding.level for finding in findings} == {"ok"}, findings


@pytest.mark.slow
def test_the_benchmarks_run_on_the_device(no_driver, monkeypatch, tmp_path):
    shape = {"width": 32, "layers": 3, "heads": 2}
    small = replace(benchmark.PRESETS["tiny"], llama=shape, size=(48, 64), batch=1, questions=1)
    training = ("LISA", "release-like, checkpointing", "PixelLM")
    answering = ("LISA", "PixelLM")
    monkeypatch.setattr(costs, "CASES", [case for case in costs.CASES if case.name in training])
    monkeypatch.setattr(costs, "ANSWERING", [case for case in costs.ANSWERING if case.name in answering])
    monkeypatch.setattr(costs, "counts_at_7b", lambda method: {})
    monkeypatch.setattr(costs, "BATCH_SIZES", (2,))
    with strict_device() as waits:
        benches = costs.Benches(small, "cuda", str(tmp_path))
        bench = benches.sam
        calls = benchmark.cases(bench, compiled=False)
        for name in ("written without cache", "8 given", "SAM encoder"):
            calls[name]()
        waits.clear()
        calls["UGround"]()
        assert not waits
        assert tuple(costs.training_costs(benches, repeats=1, questions=2)) == training
        assert tuple(costs.answering_costs(benches, repeats=1, limit=2)) == answering
