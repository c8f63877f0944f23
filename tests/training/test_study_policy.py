"""What a policy can learn: on synthetic rewards with known statistics, and on those of a model."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import drawn_sample

from model.PPM import LayerSamples
from scripts.dev import study_policy
from scripts.dev.study_policy import METHODS, Method, Rewarded
from utils.config import load_config

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/tiny.yaml")
BEST, STEPS = 2, 60
LEAST, OWN_MEAN = "the best baseline that depends on the [SEG] alone", "each [SEG]'s own mean reward"
CRITIC = "critic of the state, fitted to the other half of the steps"


@pytest.fixture
def batches():
    """Layer 2 pays 0.1 more than the others, about -1.3; [SEG] differ more than layers do."""
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        rewards = -1.3 + 0.1 * torch.eye(5)[BEST] + 0.2 * torch.randn(6, 1, generator=generator)
        batches.append(Rewarded(torch.randn(6, 5, 32, generator=generator) + 1, rewards.expand(6, 5)))
    return batches


@pytest.fixture
def config():
    return load_config(["--config", TINY, "--warmup_steps", "5", "--lr", "1e-2"])


def test_a_gate_finds_the_best_layer_each_in_its_own_time(make_model, batches, config):
    model_config, curves = make_model().config, {}
    for name in ("REINFORCE (paper)", "--policy_gradient exact"):
        curves[name] = study_policy.learn(model_config, config, batches, METHODS[name], STEPS, seed=0)
        assert set(curves[name]) == {30, STEPS}
    assert curves["--policy_gradient exact"][30] > curves["REINFORCE (paper)"][30] > 0  # of a uniform policy
    assert curves["--policy_gradient exact"][STEPS] > 0.9
    again = study_policy.learn(model_config, config, batches, METHODS["REINFORCE (paper)"], STEPS, 0)
    assert again == curves["REINFORCE (paper)"]


def test_the_best_layer_may_differ_between_segs(make_model, config):
    """Layer 1 or 3, which the states tell: the share is that of each [SEG]'s own best layer."""
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        states, kind = 0.3 * torch.randn(6, 1, 32, generator=generator), torch.randint(2, (6,), generator=generator)
        states[:, 0, 0] += 4 * kind - 2
        rewards = -1.3 + 0.1 * torch.eye(5)[1 + 2 * kind]
        batches.append(Rewarded(states.expand(6, 5, 32), rewards))
    learned = study_policy.learn(make_model().config, config, batches, METHODS["exact, rate x 10"], STEPS, 0)
    assert 0.9 < learned[STEPS] <= 1


def test_normalised_states_are_those_of_the_measure(make_model, batches, config):
    """The scale of a layer's states does not matter, neither to the steps nor to the share."""
    scales = 10.0 ** -(torch.arange(5)[:, None] % 3)
    scaled = [Rewarded(batch.states * scales, batch.rewards) for batch in batches]
    model_config, method = make_model().config, Method({"policy_gradient": "exact"}, normalised=True)
    plain, other = (study_policy.learn(model_config, config, part, method, STEPS, 0) for part in (batches, scaled))
    assert plain[STEPS] > 0.9
    assert other == pytest.approx(plain, abs=1e-3)


def test_the_noise_of_a_step(make_model, batches, config):
    """Against estimates from sampled layers; states say nothing about these rewards, so that the critic cannot help."""
    ppm = make_model(baseline="state_critic", baseline_start="first").ppm
    study_policy.fit_critic(ppm, config, batches, STEPS)
    noise = study_policy.gradient_noise(ppm, batches, slice(1, 5))
    variance, ratio = ({name: pair[part] for name, pair in noise.items()} for part in (0, 1))
    assert 0 < variance[LEAST] <= variance[OWN_MEAN]
    assert ratio["exact gradient"] > ratio[OWN_MEAN] > ratio["moving average"] > ratio["0"] > 0
    assert variance["exact gradient"] == 0
    sampled = []
    for trial in range(40):
        for batch in batches:
            policy = ppm.log_policy(batch.states).detach().exp()
            layers = torch.multinomial(policy, 1, generator=torch.Generator().manual_seed(trial))
            score = torch.zeros_like(policy).scatter_(1, layers, 1.0) - policy
            weights = (batch.rewards.gather(1, layers) - ppm.baseline) * score
            sampled.append(torch.einsum("nl,nld->ld", weights, batch.states) / len(policy))
    by_trial = torch.stack(sampled).unflatten(0, (40, -1))
    assert float(by_trial.var(0).sum((1, 2)).mean()) == pytest.approx(variance["moving average"], rel=0.1)
    text = study_policy.describe_rewards(batches, slice(1, 5))
    assert "360 [SEG], layers 1 to 4" in text
    assert re.search(r"the best layer of a \[SEG\], in per cent: 0.0, 100.0, 0.0, 0.0", text)
    assert "residual 0.0000" in text


@pytest.mark.parametrize(
    "trained_with",
    [
        {"policy_gradient": "exact", "policy_loss_weight": 0.0},
        {"policy_gradient": "leave_one_out", "policy_samples": 2, "reward_terms": "mask"},
        {"layer_selection": "soft", "reward": "batch", "baseline": "critic", "critic_width": 8},
        {"baseline_start": "first", "baseline_decay": 0.5, "scale_advantage": True},
    ],
)
def test_how_the_model_was_trained_does_not_matter(make_model, batches, config, trained_with):
    model_configs = make_model().config, make_model(**trained_with).config
    for method in METHODS.values():
        plain, other = (study_policy.learn(each, config, batches[:4], method, 4, 0) for each in model_configs)
        assert other == plain
    gate = torch.zeros(5, 32)
    plain, other = (study_policy.describe_noise(each, config, batches[:4], gate, 4) for each in model_configs)
    assert other == plain


def test_the_noise_of_leave_one_out(make_model, batches):
    """Against estimates from sampled layers."""
    ppm, variances = make_model(baseline="state_critic").ppm, []
    for batch in batches[:20]:
        policy, gradients = ppm.log_policy(batch.states).detach().exp(), []
        for trial in range(100):
            layers = torch.multinomial(policy, 4, True, generator=torch.Generator().manual_seed(trial))
            advantage = LayerSamples(layers, batch.rewards.gather(1, layers)).advantage()
            weights = torch.zeros_like(policy).scatter_add_(1, layers, advantage / 4)
            weights -= policy * advantage.mean(1, keepdim=True)
            gradients.append(torch.einsum("nl,nld->ld", weights, batch.states) / len(policy))
        variances.append(float(torch.stack(gradients).var(0).sum()))
    computed, _ = study_policy.gradient_noise(ppm, batches[:20], slice(1, 5))["leave-one-out, 4 samples"]
    assert sum(variances) / 20 == pytest.approx(computed, rel=0.1)


def test_a_critic_of_the_state_pays_where_states_tell_rewards(make_model, config):
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        states = torch.randn(6, 1, 32, generator=generator)
        rewards = -1.3 + 0.1 * torch.eye(5)[BEST] + 0.2 * states[:, :, 0]
        batches.append(Rewarded(states + 0.3 * torch.randn(6, 5, 32, generator=generator), rewards))
    text = study_policy.describe_noise(make_model().config, config, batches, torch.zeros(5, 32), 4 * STEPS)
    assert "estimate, or baseline of REINFORCE | uniform policy | this gate" in text
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines()}
    assert rows[CRITIC][0] == rows[CRITIC][1]  # a gate of zeros is uniform
    share = {name: float(rows[name][0].split(",")[0]) for name in list(rows)[-5:]}
    assert share[LEAST] <= share[OWN_MEAN] < share[CRITIC] < 0.6
    assert share["moving average"] == 1 < share["0"]


def test_layers_that_cannot_be_chosen_are_left_out(make_model, batches, config):
    model_config = make_model(first_candidate_layer=0, last_candidate_layer=1).config
    assert study_policy.candidates(model_config) == slice(0, 2)
    assert study_policy.candidates(make_model().config) == slice(1, 5)
    assert "per cent: 100.0, 0.0\n" in study_policy.describe_rewards(
        batches, study_policy.candidates(model_config)
    )  # equal: the first
    learned = study_policy.learn(model_config, config, batches, METHODS["--policy_gradient exact"], STEPS, seed=0)
    assert learned[STEPS] == pytest.approx(0, abs=1e-3)  # nothing to choose; layer 2, the best of all, is no candidate


def test_a_model_is_read(make_model, tiny_processor, monkeypatch, capsys):
    """All layers' rewards of its training samples, then a line per learning method."""
    mixture = [drawn_sample(number) for number in range(4)]
    monkeypatch.setattr(study_policy, "make_mixture", lambda config: mixture)
    opened = SimpleNamespace(model=make_model(), processor=tiny_processor)
    monkeypatch.setattr(study_policy, "load", lambda *_: opened)
    flags = ["--version", "x", "--config", TINY, "--steps", "2", "--seeds", "2", "--device", "cpu"]
    assert study_policy.main([*flags, "--batch_size", "2", "--warmup_steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" | ")[0] for line in lines[-len(METHODS) :]] == list(METHODS)
    assert lines[0].endswith("[SEG], layers 1 to 4")
    assert "-" in lines[1]  # rewards are negative


def test_rows_are_those_of_the_results(make_model, batches):
    """In the same words and order."""
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = page.partition("### How fast each method learns")[2].partition("\n## ")[0]
    rows = [name.replace("`", "") for name in re.findall(r"^\| (.+?) \|", section, re.MULTILINE)]
    start = rows.index("learning method")
    assert rows[start + 1 :] == list(METHODS)
    noise = study_policy.gradient_noise(make_model(baseline="state_critic").ppm, batches[:2], slice(1, 5))
    assert [name.partition(" (--")[0] for name in rows[1:start]] == list(noise)
