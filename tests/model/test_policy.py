"""The layer policy's gradient: unbiased, less noisy with a baseline, on the gate alone, equal on all ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import WORDS, build_tiny_model, drawn_sample
from forks import called
from torch import distributed

from model.backbones.llava import ClipReader
from model.layer_rules import StochasticSkip
from model.loading.pretrained import with_settings
from model.loading.weights import base_fingerprints, report
from model.lora import add_lora, set_trainable
from model.opened import predict
from model.PPM import LayerSamples, gumbel_noise
from model.processing.processor import UGroundProcessor
from model.structures import Turn
from utils.demo.tiny_model import train_tokenizer

BEST = 3


@pytest.fixture
def states():
    """[3, 5, 32] states of three [SEG] tokens."""
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rewards():
    """[3, 5] rewards of every layer, far from zero as -(BCE + dice) is."""
    return -2 + 0.5 * torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


def gradient(model, states, sampled, log_policy, layers, layer_rewards=None) -> torch.Tensor:
    """Gradient of the mean of the policy's term, in the direction that raises the reward."""
    model.ppm.gate.grad = None
    model.objective.gate_terms(sampled, layers, log_policy, layer_rewards)["policy"].mean().backward()
    return -model.ppm.gate.grad


def estimates(model, states, rewards, trials: int = 40, copies: int = 200) -> torch.Tensor:
    """[trials, L, D] REINFORCE estimates, each the mean over ``copies`` of the states."""
    gradients = []
    for trial in range(trials):
        many, table = states.repeat(copies, 1, 1), rewards.repeat(copies, 1)
        log_policy = model.ppm.log_policy(many)
        layers = StochasticSkip().choose(log_policy, gumbel_noise([trial], [0] * len(many), 5))
        sampled = table[torch.arange(len(many)), layers]
        gradients.append(gradient(model, many, sampled, log_policy, layers))
    return torch.stack(gradients)


def test_reinforce_estimates_the_gradient_of_the_expected_reward(make_model, states, rewards):
    """Against the analytic gradient over all layers; a baseline changes the variance, not the expectation."""
    exact = make_model(policy_gradient="exact")
    whole = gradient(exact, states, rewards[:, 0], exact.ppm.log_policy(states), torch.zeros(3).long(), rewards)
    expected_reward = (exact.ppm.log_policy(states).exp() * rewards).sum(-1).mean()
    (analytic,) = torch.autograd.grad(expected_reward, exact.ppm.gate)
    torch.testing.assert_close(whole, analytic)

    model, variance = make_model(baseline_decay=1.0), {}  # a decay of 1 keeps the baseline constant
    for name, baseline in (("without", 0.0), ("with", float(rewards.mean()))):
        model.ppm.baseline.fill_(baseline)
        estimated = estimates(model, states, rewards)
        assert float(model.ppm.baseline) == pytest.approx(baseline)
        error = estimated.std(0) / len(estimated) ** 0.5
        used = error > 0  # the embeddings are no candidate
        assert used[1:].all()
        assert not whole[0].any()
        deviation = ((estimated.mean(0) - whole)[used] / error[used]).square().mean().sqrt()
        assert deviation < 1.5, name  # 1 in expectation, over 128 numbers
        variance[name] = float(estimated.var(0).sum())
    assert variance["with"] < 0.3 * variance["without"]


@pytest.mark.parametrize("count", [2, 3])
def test_leave_one_out_estimates_the_gradient_of_the_expected_reward(make_model, states, rewards, count):
    """Exactly: the mean over all ways to sample layers, each weighted by its probability."""
    model = make_model(policy_gradient="leave_one_out", policy_samples=count)
    log_policy = model.ppm.log_policy(states)
    (exact,) = torch.autograd.grad((log_policy.exp() * rewards).sum(-1).mean(), model.ppm.gate, retain_graph=True)
    mean = torch.zeros_like(exact)
    for n in range(3):
        log_policy = model.ppm.log_policy(states[n : n + 1])
        for drawn in itertools.product(range(1, 5), repeat=count):
            layers = torch.tensor([drawn])
            samples = LayerSamples(layers, rewards[n : n + 1].gather(1, layers))
            terms = model.objective.gate_terms(samples.rewards[:, 0], layers[:, 0], log_policy, None, None, samples)
            (estimate,) = torch.autograd.grad(-terms["policy"].mean(), model.ppm.gate, retain_graph=True)
            mean += log_policy.detach().gather(1, layers).sum().exp() * estimate / 3
    torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["both", "mask", "mask_iou"])
def test_leave_one_out_compares_the_rewards_of_sampled_layers(make_model, tiny_processor, tiny_samples, kind):
    """Each as if it had been the only one; its layers depend on seed and sample index, not on the batch."""
    settings = {"policy_gradient": "leave_one_out", "reward_terms": kind, "policy_samples": 3}
    model, batch = make_model(**settings), tiny_processor.collate(tiny_samples)
    seen, gate_terms = [], model.objective.gate_terms
    model.objective.gate_terms = lambda *inputs: seen.append(inputs) or gate_terms(*inputs)
    whole = model(batch)
    samples = seen.pop()[-1]
    assert samples.layers.shape == samples.rewards.shape == (5, 3)
    assert torch.equal(samples.layers[:, 0], whole.layers)
    assert len({tuple(column) for column in samples.layers.T.tolist()}) == 3
    for layer in range(1, 5):
        fixed = make_model(layer_selection=f"fixed:{layer}", reward_terms=kind)
        rewards, there = fixed(batch).rewards, samples.layers == layer
        expected = rewards[:, None].expand(5, 3)[there]
        # maps are compared at their own resolution, masks at the image's
        tolerance = {"rtol": 0.1, "atol": 0.02} if kind == "both" else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(samples.rewards[there], expected, **tolerance)
    if kind != "both":
        assert torch.equal(samples.rewards[:, 0], whole.rewards)
    for n, sample in enumerate(tiny_samples[:2]):
        model(tiny_processor.collate([sample]))
        alone, first = seen.pop()[-1], (0, 3)[n]
        assert torch.equal(alone.layers, samples.layers[first : first + len(alone.layers)])
    model(tiny_processor.collate([drawn_sample(8, segs=(0,))])).loss.backward()
    assert seen.pop()[-1].rewards.shape == (0, 3)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, {"ppm.gate"}),
        ({"baseline": "critic"}, {"ppm.gate", "ppm.critic"}),
        ({"baseline": "state_critic"}, {"ppm.gate", "ppm.critic"}),
        ({"policy_gradient": "exact"}, {"ppm.gate"}),
        ({"policy_gradient": "leave_one_out"}, {"ppm.gate"}),
        ({"policy_gradient": "leave_one_out", "reward_terms": "mask", "scale_advantage": True}, {"ppm.gate"}),
        ({"reward_terms": "mask_iou"}, {"ppm.gate"}),
        ({"entropy_bonus": 1.0, "scale_advantage": True}, {"ppm.gate"}),
        ({"layer_selection": "ce_soft"}, {"ppm.gate"}),
    ],
)
def test_the_policys_loss_reaches_the_gate_and_the_critic_alone(
    make_model, tiny_processor, tiny_samples, settings, trained
):
    model = make_model(text_loss_weight=0.0, mask_loss_weight=0.0, map_terms=(), **settings)
    output = model(tiny_processor.collate(tiny_samples))
    assert not output.rewards.requires_grad
    output.loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {".".join(name.split(".")[:2]) for name in touched} == trained


@pytest.mark.parametrize("selection", ["last", "uniform", "fixed:2", "soft", "ce_soft"])
def test_a_critic_has_no_effect_where_no_policy_is_sampled(make_model, tiny_processor, tiny_samples, selection):
    """Otherwise the error of a frozen or unused critic would be added to the loss."""
    model, batch = add_lora(make_model(baseline="critic"), r=2), tiny_processor.collate(tiny_samples)
    model.config.layer_selection = selection
    set_trainable(model)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "critic" in name)
    critic = model(batch)
    model.config.baseline = "average"
    average = model(batch)
    assert critic.terms.keys() == average.terms.keys()
    torch.testing.assert_close(critic.loss, average.loss, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"baseline": "critic"},
        {"baseline": "state_critic"},
        {"baseline": "state_critic", "scale_advantage": True},
        {"scale_advantage": True},
        {"baseline_start": "first"},
        {"policy_gradient": "exact"},
    ],
)
def test_a_bandit_finds_its_best_arm(make_model, settings):
    """One layer has a higher reward than the others, with noise; states differ from [SEG] to [SEG]."""
    model, generator = make_model(**settings), torch.Generator().manual_seed(2)
    torch.nn.init.zeros_(model.ppm.gate)
    optimizer = torch.optim.Adam(model.ppm.parameters(), lr=0.05)
    centres = torch.randn(5, 32, generator=generator)
    pays = -1 - 0.5 * (torch.arange(5) != BEST).float()
    for step in range(120):
        states = centres + 0.5 * torch.randn(16, 5, 32, generator=generator)
        log_policy = model.ppm.log_policy(states)
        if step == 0:
            torch.testing.assert_close(log_policy.exp()[0], torch.tensor([0, 0.25, 0.25, 0.25, 0.25]))
        layers = StochasticSkip().choose(log_policy, gumbel_noise([step], [0] * 16, 5))
        rewards = pays[layers] + 0.2 * torch.randn(16, generator=generator)
        table = pays.expand(16, 5) if "policy_gradient" in settings else None
        terms = model.objective.gate_terms(rewards, layers, log_policy, table, states)
        optimizer.zero_grad()
        sum(term.mean() for term in terms.values()).backward()
        optimizer.step()
    fresh = model.ppm.log_policy(centres + 0.5 * torch.randn(50, 5, 32, generator=generator))
    assert (fresh.argmax(-1) == BEST).all()
    assert fresh[:, BEST].exp().mean() > 0.8


def test_the_baseline_starts_at_zero_or_at_the_first_reward(make_model):
    rewards, nothing = torch.tensor([-1.0, -2.0]), torch.zeros(0)
    zero, first = make_model().ppm, make_model(baseline_start="first").ppm
    torch.testing.assert_close(zero.advantage(rewards), rewards + 0.15)
    assert len(first.advantage(nothing)) == 0
    assert first.baseline == 0  # no reward yet
    torch.testing.assert_close(first.advantage(rewards), torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(first.advantage(rewards + 1), rewards + 1 - (0.9 * -1.5 + 0.1 * -0.5))


def test_advantages_are_scaled_to_one(tiny_model):
    advantage = torch.tensor([-3.0, 1.0, 0.5])
    scaled = tiny_model.ppm.scaled(advantage)
    assert float(scaled.square().mean()) == pytest.approx(1.0)
    torch.testing.assert_close(tiny_model.ppm.scaled(100 * advantage), scaled)
    assert len(tiny_model.ppm.scaled(torch.zeros(0))) == 0
    assert not tiny_model.ppm.scaled(torch.zeros(2)).any()


def test_argmax_is_deterministic_and_sampling_is_not(make_model, tiny_processor):
    model = make_model()
    torch.nn.init.zeros_(model.ppm.gate)  # uniform
    ask = ([drawn_sample(3).image], [[Turn("star", "[SEG] and [SEG] and [SEG]")]])

    def layers(policy: str) -> list[list[int]]:
        return [predict(model, tiny_processor, *ask, layer_policy=policy, seed=seed)[0][0].layers for seed in range(8)]

    assert len({tuple(chosen) for chosen in layers("argmax")}) == 1
    assert len({tuple(chosen) for chosen in layers("sample")}) > 4


# -- a critic of the state ---------------------------------------------------------------------------------------------


@pytest.fixture
def rewarded():
    """rewarded(step) -> states [64, 5, 32] and rewards [64], most of whose variance can be read off the states."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(32, generator=generator) / 32**0.5

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.randn(64, 1, 32, generator=generator)
        states = (1 + torch.arange(5))[:, None] * (own + 0.2 * torch.randn(64, 5, 32, generator=generator))
        return states, -1.3 + 0.1 * (own[:, 0] @ direction) + 0.03 * torch.randn(64, generator=generator)

    return draw


def test_a_critic_of_the_state_starts_as_the_moving_average(make_model, rewarded):
    for start in ("zero", "first"):
        average = make_model(baseline_start=start).ppm
        critic = make_model(baseline="state_critic", baseline_start=start).ppm
        for _ in range(3):
            states, rewards = rewarded()
            advantage, errors = critic.state_advantage(rewards, states)
            assert torch.equal(advantage, average.advantage(rewards))
            assert torch.equal(critic.state_baseline(states), average.baseline.expand(64))
            assert errors.shape == (64,)
        assert critic.baseline == average.baseline
    assert critic.critic.spread == pytest.approx(0.1, abs=0.05)


def test_a_critic_of_the_state_removes_the_variance_that_states_explain(make_model, rewarded):
    model = make_model(baseline="state_critic", baseline_start="first")
    optimizer, log_policy = torch.optim.Adam(model.ppm.critic.parameters(), lr=0.01), torch.zeros(64, 5).log_softmax(-1)
    for _ in range(200):
        states, rewards = rewarded()
        states.requires_grad_()
        terms = model.objective.gate_terms(rewards, torch.zeros(64).long(), log_policy, None, states)
        optimizer.zero_grad()
        terms["critic"].mean().backward()
        optimizer.step()
    assert states.grad is None
    assert not terms["critic_baseline"].requires_grad
    states, rewards = rewarded()
    before = model.ppm.state_baseline(states)
    advantage, _ = model.ppm.state_advantage(rewards, states)
    assert float(advantage.var()) < 0.3 * float((rewards - model.ppm.baseline).var())
    # of these rewards, the average alone has entered the baseline
    shift = rewards - advantage - before
    torch.testing.assert_close(shift, shift[:1].expand(64), rtol=0, atol=1e-6)


def test_what_the_head_learns_does_not_depend_on_the_rewards_scale(make_model, rewarded):
    errors, (states, rewards) = [], rewarded()
    for scale in (1, 1000):
        ppm = make_model(baseline="state_critic", baseline_start="first").ppm
        torch.nn.init.ones_(ppm.critic.weight)
        errors.append(ppm.state_advantage(scale * rewards, states)[1])
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-3, atol=1e-3)


def test_a_critic_of_the_state_logs_its_mean_baseline(make_model, tiny_processor, tiny_samples):
    model, batch = make_model(baseline="state_critic", baseline_start="first"), tiny_processor.collate(tiny_samples)
    for _ in range(2):
        output = model(batch)
    torch.testing.assert_close(output.terms["critic_baseline"], model.ppm.baseline)  # the head is still zero
    torch.nn.init.constant_(model.ppm.critic.bias, 2.0)
    spread = model.ppm.critic.spread.clone()
    output = model(batch)
    torch.testing.assert_close(output.terms["critic_baseline"], model.ppm.baseline + 2 * spread)
    assert torch.equal(output.terms["baseline"], model.ppm.baseline)
    assert output.terms["critic"] > 0


def test_a_critic_of_the_state_in_bf16_and_saved(make_model, tiny_processor, tiny_samples, tmp_path):
    from opening import load_pretrained

    model = make_model(baseline="state_critic").to(torch.bfloat16)
    loss = model(tiny_processor.collate(tiny_samples).to("cpu", torch.bfloat16)).loss
    loss.backward()
    assert loss.isfinite()
    assert model.ppm.critic.spread.dtype == torch.float32
    model.ppm.critic.spread.fill_(1.0 + 2**-12)  # not a bf16 number
    torch.nn.init.ones_(model.ppm.critic.weight)
    model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))[0].ppm
    for name, tensor in model.ppm.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name].float(), tensor.float(), rtol=0, atol=0)


def test_another_reward_starts_the_baseline_anew(make_model):
    """A finished model's moving average and critic know the scale of the reward that it was trained with."""
    model = make_model(baseline="state_critic")
    for buffer in (model.ppm.baseline, model.ppm.critic.spread):
        buffer.fill_(1.5)
    kept, new = with_settings(model, {"policy_loss_weight": 0.2}, "here")
    assert (kept.ppm.baseline, kept.ppm.critic.spread, new) == (1.5, 1.5, {})
    other, new = with_settings(model, {"reward_terms": "mask_iou"}, "here")
    assert (other.ppm.baseline, other.ppm.critic.spread, new) == (0, 0, {"ppm": "critic"})
    sources = dict.fromkeys(("ppm", "lm_head"), "a model")
    [same], [again] = (
        [row.fingerprint for row in report(m, sources, new) if row.module == "ppm"] for m in (model, other)
    )
    assert same == again  # the random critic is no part of the base, the gate is
    other.ppm.gate.data[0, 0] += 1
    assert base_fingerprints(report(other, sources, new))["ppm"] != same
    assert torch.equal(other.ppm.gate, model.ppm.gate)


# -- two processes -----------------------------------------------------------------------------------------------------

RANKED = {
    "average": {},
    "first": {"baseline_start": "first"},
    "scaled": {"scale_advantage": True},
    "exact": {"policy_gradient": "exact"},
    "ce_soft": {"layer_selection": "ce_soft"},
    "critic": {"baseline": "critic"},
    "leave_one_out": {"policy_gradient": "leave_one_out", "reward_terms": "mask", "scale_advantage": True},
    "state_critic": {"baseline": "state_critic", "baseline_start": "first"},
}
ROWS = {
    "both": (drawn_sample(0), drawn_sample(1, (64, 40), (2,))),
    "one": (drawn_sample(0), drawn_sample(2, segs=(0,))),
}


def gate_gradients(rank: int | None) -> dict[tuple[str, str], torch.Tensor]:
    """(setting, rows) -> gradients of gate and critic, baseline last; of one rank's row, or of both in one batch."""
    tokenizer = train_tokenizer([WORDS] * 4, vocab_size=340)
    processor = UGroundProcessor(tokenizer, ClipReader(40, 10), sam_side=64, system_prompt="")
    results = {}
    for name, settings in RANKED.items():
        for rows, samples in ROWS.items():
            model = build_tiny_model(processor, **settings)
            batch = processor.collate(list(samples) if rank is None else [samples[rank]])
            if rank is not None:
                distributed.all_reduce(batch.counts)
                batch.counts /= 2
            model(batch).loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in model.ppm.parameters()])
            if rank is not None:
                distributed.all_reduce(gradients)
                gradients /= 2
            buffers = [value.detach()[None] for value in reversed(list(model.ppm.buffers()))]  # the baseline last
            results[name, rows] = torch.cat([gradients, *buffers])
    return results


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(gate_gradients(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gate_one_gradient(tmp_path):
    """Also where a rank has no [SEG]. A critic's input is its own rank's policies: there, ranks only need to agree."""
    called(run_rank, str(tmp_path), processes=2)
    ranks, alone = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)], gate_gradients(None)
    for case, expected in alone.items():
        torch.testing.assert_close(ranks[0][case], ranks[1][case], msg=lambda m, c=case: f"{c}: {m}")
        assert ranks[0][case].isfinite().all()
        if case[0] != "critic" or case[1] == "one":
            torch.testing.assert_close(
                ranks[0][case], expected, rtol=1e-3, atol=1e-6, msg=lambda m, c=case: f"{c}: {m}"
            )
    assert alone["average", "both"][-1] != 0
