"""Training with sampled answers: what a run logs, resumes and divides, and the settings that it refuses."""

from __future__ import annotations

import pytest
import torch
from tiny_run import ROOT, arguments, killed_after_saving, launch, log_lines

import train_ds
from utils.config import ConfigError, load_config
from utils.training import checkpoint as checkpoints

pytestmark = pytest.mark.usefixtures("no_report")
SHORT = {"lora_dropout": 0.0, "no_eval": "true", "val_pictures": 0, "grpo_tokens": 8, "grpo_answers": 4}
TERMS = (
    "grpo",
    "grpo_entropy",
    "grpo_reward",
    "grpo_reward_mask_iou",
    "grpo_reward_rejection",
    "grpo_reward_format",
    "grpo_tokens",
    "grpo_equal",
    "grpo_segs",
    "grpo_layer_entropy",
)
NEEDED = ["--version", "v", "--vision_tower", "t", "--vision_pretrained", "p", "--dataset_dir", "d"]
GRPO = ["--objective", "grpo", "--lora_dropout", "0"]


@pytest.fixture
def run_here(base, data, tmp_path):
    def run(code: int = 0, **settings):
        assert train_ds.main(arguments(base, data, tmp_path, **SHORT | settings)) == code
        return tmp_path / str(settings.get("exp_name", "run"))

    return run


def weights(run):
    return checkpoints.trained_weights(checkpoints.find_checkpoint(run, "latest"))


def assert_same(run, other, names, tolerance: float) -> None:
    for line, its in zip(log_lines(run, "train"), log_lines(other, "train"), strict=True):
        assert line["layers"] == its["layers"]
        assert line.keys() == its.keys()
        for name in set(names) & line.keys():  # a step without [SEG] has no entropy of layers
            assert line[name] == pytest.approx(its[name], rel=tolerance, abs=tolerance), (line["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo", "both"])
def test_a_run_logs_rewards_and_resumes_as_if_it_had_not_stopped(run_here, objective):
    settings = {"objective": objective, "epochs": 2, "steps_per_epoch": 4, "grpo_updates": 2, "grpo_clip": 0.1}
    whole = run_here(exp_name="whole", **settings)
    lines = log_lines(whole, "train")
    assert set(TERMS) <= set().union(*lines)
    assert ("mask_bce" in lines[0]) == (objective == "both")
    assert all(0 < line["grpo_tokens"] <= 8 for line in lines)
    with killed_after_saving():
        run_here(code=130, exp_name="cut", **settings)
    cut = run_here(exp_name="cut", auto_resume="true", **settings)
    assert_same(cut, whole, TERMS, 1e-6)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(cut).items())


@pytest.mark.slow
def test_two_processes_are_one(run_here, base, data, tmp_path):
    settings = {"objective": "both", "epochs": 1, "steps_per_epoch": 6}
    one = run_here(exp_name="one", batch_size=2, **settings)
    launch(*arguments(base, data, tmp_path, exp_name="two", batch_size=1, **SHORT | settings))
    two = tmp_path / "two"
    assert_same(two, one, (*TERMS, "loss", "gradient"), 5e-4)
    assert any(line["grpo_equal"] < 1 for line in log_lines(one, "train"))


@pytest.mark.slow
def test_shards_of_zero_3_change_nothing(run_here):
    """Weights are whole while answers are sampled, and shards again where they are learned from."""
    frozen = {"freeze": "embed_tokens||lm_head", "grpo_kl": 0.1, "gradient_checkpointing": "true"}
    settings = {"objective": "both", "epochs": 1, "steps_per_epoch": 4, "grpo_updates": 2} | frozen
    two = run_here(exp_name="two", **settings)
    three = run_here(exp_name="three", deepspeed_config=ROOT / "configs/deepspeed/zero3.json", **settings)
    assert_same(three, two, (*TERMS, "grpo_kl", "loss"), 1e-4)


@pytest.mark.slow
def test_micro_steps_are_one_batch(run_here):
    settings = {"objective": "grpo", "epochs": 1, "steps_per_epoch": 4}
    one = run_here(exp_name="one", batch_size=4, **settings)
    parts = run_here(exp_name="parts", batch_size=1, grad_accumulation_steps=4, **settings)
    assert_same(parts, one, (*TERMS, "loss"), 2e-4)


@pytest.mark.slow
def test_the_reference_needs_no_second_model(run_here):
    """The divergence is 0 at the start, where LoRA is, and grows."""
    frozen = {"freeze": "embed_tokens||lm_head", "grpo_kl": 0.1, "grpo_rewards": "length:1||format:1"}
    run = run_here(objective="grpo", epochs=1, steps_per_epoch=6, lr=0.1, **frozen)
    divergences = [line["grpo_kl"] for line in log_lines(run, "train")]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"grpo_tokens": 3000}, "--grpo_tokens 3000: must be"),
        ({"dataset": "vqa", "refer_seg_data": ""}, "no question whose answers could be rewarded"),
        ({"grpo_think": "on"}, "--grpo_think on needs a model that writes thoughts"),
    ],
    ids=["long", "no target", "no thoughts"],
)
def test_a_run_that_could_learn_nothing_ends(run_here, capsys, settings, problem):
    run_here(code=2, objective="grpo", epochs=1, **settings)
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--objective", "grpo"], "lora_dropout"),
        ([*GRPO, "--grpo_rewards", "iou:1"], "'iou' is no reward; known: mask_iou"),
        ([*GRPO, "--grpo_kl", "0.1"], "freeze embed_tokens||lm_head"),
        ([*GRPO, "--grpo_kl", "0.1", "--freeze", "embed_tokens,lm_head", "--lora_r", "0"], "lora_r above 0"),
        ([*GRPO, "--grpo_kl", "0.1", "--freeze", "embed_tokens,lm_head", "--clip_resize", "448"], "the projector, too"),
        ([*GRPO, "--grpo_weight", "2"], "grpo_weight: has no effect"),
        ([*GRPO, "--grpo_clip", "0.3"], "grpo_updates 1"),
        ([*GRPO, "--thought_format", "text", "--thought_probability", "0.5"], "grpo_think says whether they think"),
        ([*GRPO, "--grpo_layers", "apart", "--layer_selection", "last"], "trains no policy"),
        ([*GRPO, "--grpo_layers", "apart", "--policy_loss_weight", "0"], "apart has no effect"),
        ([*GRPO, "--policy_gradient", "exact"], "policy_gradient: has no effect with objective grpo"),
        ([*GRPO, "--dice_loss_weight", "1"], "dice_loss_weight: has no effect with objective grpo"),
        ([*GRPO, "--policy_loss_weight", "1"], "policy_loss_weight: has no effect with objective grpo"),
        ([*GRPO, "--recipe", "recommended"], "recommended changes nothing"),
        (["--grpo_answers", "4"], "set objective grpo or both"),
        ([*GRPO, "--grpo_answers", "1"], "at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, problem):
    with pytest.raises(ConfigError, match=problem.replace("|", r"\|")):
        load_config([*NEEDED, *flags])


def test_what_shapes_the_ground_truths_loss_stays_with_both():
    both = ["--objective", "both", "--lora_dropout", "0", "--policy_gradient", "exact", "--dice_loss_weight", "1"]
    assert load_config([*NEEDED, *both]).method["policy_gradient"] == "exact"
    apart = [*GRPO, "--grpo_layers", "apart", "--policy_loss_weight", "1"]
    assert load_config([*NEEDED, *apart]).loss.policy_loss_weight == 1


def test_a_model_that_thinks_needs_no_thoughts_in_the_data():
    config = load_config([*NEEDED, *GRPO, "--thought_format", "tokens", "--grpo_think", "on"])
    assert config.updates_per_step == 1
