"""What a policy over layers can learn on a checkpoint, and how fast each learning method learns it.

    python scripts/dev/study_policy.py --version runs/tiny/merged --config configs/tiny.yaml

Computes states and rewards of all layers' maps (at their own resolution) for training samples of --config, and prints

- the signal: reward per layer, how often each layer is best, the gain of choosing the best layer for each [SEG];
- the noise: the spread of rewards over [SEG], and variance and signal-to-noise ratio of one step's gradient estimate by
  baseline, for a uniform policy and for the checkpoint's (baselines fitted on one half of the steps, measured on the
  other);
- the scale: how far one step of Adam moves each layer's score (the L1 norm of its states);
- learning: new gates, trained for --steps on these states and rewards, all else frozen, without gradient clipping:
  the share of the possible gain that their policy reaches (0 = uniform, 1 = each [SEG]'s own best layer).

Legend: N [SEG] tokens, L hidden states, D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.config import GroundingConfig
from model.layer_rules import StochasticSkip
from model.loading.pretrained import load
from model.objective import Objective
from model.PPM import LayerSamples, PolicyPromptedMasking, gumbel_noise
from model.settings import METHOD_FIELDS
from model.structures import EPSILON
from utils.command_line.parser import Parser
from utils.config import Config, load_config, make_parser
from utils.datasets.mixture import make_mixture
from utils.inference import cli
from utils.plotting.text_tables import mean_cell

SAMPLES = 4  # of leave-one-out, in the table of noise
REPORTED = (30, 60, 90, 120, 180)  # steps
# What methods differ in, or learning depends on: the paper's values, whatever the checkpoint was trained with.
PAPER = {
    name: METHOD_FIELDS[name].default
    for name in (
        "layer_selection",
        "policy_gradient",
        "policy_samples",
        "reward",
        "reward_terms",
        "baseline",
        "baseline_start",
        "baseline_decay",
        "critic_width",
        "scale_advantage",
        "policy_loss_weight",
    )
}


@dataclass(frozen=True)
class Method:
    """A learning method: settings beside ``PAPER``, a factor of the gate's learning rate, RMS-normalized states."""

    settings: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    normalised: bool = False


METHODS = {  # by their names in docs/results.md
    "REINFORCE (paper)": Method(),
    "--baseline critic": Method({"baseline": "critic"}),
    "--baseline state_critic": Method({"baseline": "state_critic"}),
    "--baseline_start first": Method({"baseline_start": "first"}),
    "first, state_critic": Method({"baseline": "state_critic", "baseline_start": "first"}),
    "--scale_advantage true": Method({"scale_advantage": True}),
    "--gate_lr_factor 10": Method(rate=10.0),
    "first, rate x 10": Method({"baseline_start": "first"}, rate=10.0),
    "states of one length": Method(normalised=True),
    "--policy_gradient leave_one_out": Method({"policy_gradient": "leave_one_out"}),
    "--policy_gradient exact": Method({"policy_gradient": "exact"}),
    "exact, rate x 10": Method({"policy_gradient": "exact"}, rate=10.0),
}


@dataclass
class Rewarded:
    """The [SEG] of a batch of images: states [N, L, D] and the reward of each layer's map [N, L]."""

    states: torch.Tensor
    rewards: torch.Tensor


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(program="train_ds.py", description=__doc__)
    add = parser.add_argument
    add("--version", required=True, metavar="DIR", help="merged model, as scripts/merge_lora.py writes it")
    add("--config", required=True, metavar="FILE", help="YAML of train_ds.py: data, batch size, rates")
    add("--steps", type=int, default=180, metavar="N", help="of the optimizer (default: 180)")
    add("--seeds", type=int, default=10, metavar="N", help="fresh gates per way to learn (default: 10)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    args, settings = parser.parse_with_settings(make_parser(), argv)
    if args.steps < 1 or args.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    config = load_config(["--config", args.config, *settings], needs=("data",))
    opened = load(args.version, "fp32", args.device)
    model, processor = opened.model, opened.processor
    batches = [batch for batch in compute_rewards(model, processor, config, args.steps) if len(batch.states)]
    print(describe_rewards(batches, candidates(model.config)))
    print(describe_noise(model.config, config, batches, model.ppm.gate.detach().float().cpu(), args.steps))
    print(
        "\nlearning method | share of the possible gain in reward after steps "
        + ", ".join(map(str, reported_steps(args.steps)))
    )
    for name, method in METHODS.items():
        runs = [learn(model.config, config, batches, method, args.steps, seed) for seed in range(args.seeds)]
        print(
            f"{name} | " + " | ".join(mean_cell([run[step] for run in runs], 2) for step in reported_steps(args.steps))
        )
    return 0


@torch.no_grad()
def compute_rewards(model, processor, config: Config, steps: int) -> list[Rewarded]:
    """States and rewards of the first training batches, under the current model."""
    mixture, size, rewarded = make_mixture(config), config.train.batch_size, []
    for step in range(steps):
        batch = processor.collate([mixture[step * size + k] for k in range(size)]).to(model.device)
        output = model.forward_language(batch)
        grounding = model.ground_targets(output, batch, StochasticSkip())
        maps, objective = model.layer_maps(grounding, batch), model.objective
        terms = objective.layer_terms(batch.masks, [objective.soft_target(masks) for masks in batch.masks], maps)
        rewarded.append(Rewarded(grounding.states.float().cpu(), -(terms["map_bce"] + terms["map_dice"]).cpu()))
    return rewarded


def candidates(config: GroundingConfig) -> slice:
    """The candidate layers."""
    return slice(config.candidates.start, config.candidates.stop)


def describe_rewards(batches: Sequence[Rewarded], layers: slice) -> str:
    """Text about the rewards of the candidate layers, their noise, and the scale of the states."""
    states = torch.cat([batch.states for batch in batches])
    rewards = torch.cat([batch.rewards for batch in batches])[:, layers]
    by_layer, by_seg = rewards.mean(0), rewards.mean(1)
    residual = rewards - by_layer - by_seg[:, None] + rewards.mean()
    best = torch.bincount(rewards.argmax(1), minlength=rewards.shape[1]) / len(rewards)
    return "\n".join(
        [
            f"{len(rewards)} [SEG], layers {layers.start} to {layers.stop - 1}",
            f"mean reward per layer: {numbers(by_layer, 4)}",
            f"the best layer of a [SEG], in per cent: {numbers(100 * best, 1)}",
            f"reward of the best layer {by_layer.max():.4f}, of each [SEG]'s own best {rewards.amax(1).mean():.4f}",
            f"spread (standard deviation): over layers {by_layer.std(correction=0):.4f}, over [SEG] "
            f"{by_seg.std():.4f}, residual {residual.std():.4f}",
            f"L1 norm of the states per layer, embeddings first: {numbers(states.abs().sum(-1).mean(0), 0)}",
        ]
    )


def describe_noise(
    model_config: GroundingConfig, config: Config, batches: Sequence[Rewarded], gate: torch.Tensor, steps: int
) -> str:
    """A table of ``gradient_noise``, for a uniform policy and for that of ``gate`` [L, D]."""
    columns = {}
    for name, weights in (("uniform policy", torch.zeros_like(gate)), ("this gate", gate)):
        settings = PAPER | {"baseline": "state_critic", "baseline_start": "first"}
        torch.manual_seed(0)
        ppm = PolicyPromptedMasking(type(model_config)(**model_config.to_dict() | settings))
        ppm.gate.data.copy_(weights)
        half = max(1, len(batches) // 2)
        fit_critic(ppm, config, batches[:half], steps)
        columns[name] = gradient_noise(ppm, batches[half:] or batches, candidates(model_config))
    average = {name: noise["moving average"][0] for name, noise in columns.items()}
    lines = [
        "",
        "a step's gradient estimate: variance from sampling layers (1 = with the moving average), signal / noise",
        " | ".join(["estimate, or baseline of REINFORCE", *columns]),
    ]
    for row in next(iter(columns.values())):
        cells = []
        for name, noise in columns.items():
            variance, ratio = noise[row]
            cells.append(f"{variance / average[name]:.3f}, {ratio:.2f}")
        lines.append(" | ".join([row, *cells]))
    return "\n".join(lines)


def fit_critic(ppm: PolicyPromptedMasking, config: Config, batches: Sequence[Rewarded], steps: int) -> None:
    """Trains the state's critic, and the moving average, on rewards of layers that the fixed policy samples."""
    assert ppm.critic is not None
    objective, train = Objective(ppm.config, ppm), config.train
    optimizer = torch.optim.AdamW(ppm.critic.parameters(), lr=train.lr, betas=(train.beta1, train.beta2))
    for step in range(1, steps + 1):
        batch = batches[(step - 1) % len(batches)]
        log_policy = ppm.log_policy(batch.states).detach()
        layers = StochasticSkip().choose(log_policy, gumbel_noise([step], [0] * len(batch.states), ppm.num_layers))
        sampled = batch.rewards.gather(1, layers[:, None])[:, 0]
        optimizer.zero_grad()
        objective.gate_terms(sampled, layers, log_policy, None, batch.states)["critic"].mean().backward()
        optimizer.param_groups[0]["lr"] = train.lr * rate_at(step, train.warmup_steps, steps)
        optimizer.step()


@torch.no_grad()
def gradient_noise(
    ppm: PolicyPromptedMasking, batches: Sequence[Rewarded], layers: slice
) -> dict[str, tuple[float, float]]:
    """Noise of a step's estimate of the gate's gradient, by baseline, under the policy of ``ppm``; nothing is sampled.

    The estimate of a [SEG] that samples layer l is (r_l - b) (1[j = l] - pi_j) h_j for the gate's row j. Its variance
    over l is a sum over the layers, as all their rewards are known.

    Returns:
        estimate or baseline -> variance from sampling layers; norm of the expected gradient over the root mean square
        of a step's deviation from it, which other images cause, too.
    """
    variances: dict[str, list[torch.Tensor]] = {}
    exact = []
    for batch in batches:
        states, rewards = batch.states[:, layers], batch.rewards[:, layers]
        policy = ppm.log_policy(batch.states)[:, layers].exp()
        value = (policy * rewards).sum(1)
        gradients = torch.einsum("nl,nld->nld", policy * (rewards - value[:, None]), states)
        exact.append(gradients.mean(0))
        score = torch.eye(policy.shape[1]) - policy[:, None]  # [N, l, j]
        norms = torch.einsum("nlj,nj->nl", score.square(), states.square().sum(-1))  # of the score of layer l, squared
        weight = policy * norms
        variances.setdefault("exact gradient", []).append(torch.zeros(()))
        # The mean over pairs of samples: the variance of one pair's value, and of its mean given one of the two
        exact_square = gradients.square().sum((1, 2))
        pairs = policy[:, :, None] * policy[:, None] * (rewards[:, :, None] - rewards[:, None]).square()
        of_pair = 0.5 * (pairs.sum(2) * states.square().sum(-1)).sum(1) - exact_square
        of_mean = 0.25 * ((weight * (rewards - value[:, None]).square()).sum(1) - exact_square)
        variance = 2 * (2 * (SAMPLES - 2) * of_mean + of_pair) / (SAMPLES * (SAMPLES - 1))
        variances.setdefault(f"leave-one-out, {SAMPLES} samples", []).append(variance.sum() / len(rewards) ** 2)
        least_variance = (weight * rewards).sum(1) / weight.sum(1).clamp(min=EPSILON)
        baselines = {
            "the best baseline that depends on the [SEG] alone": least_variance,
            "each [SEG]'s own mean reward": value,
            "critic of the state, fitted to the other half of the steps": ppm.state_baseline(batch.states),
            "moving average": ppm.baseline.expand(len(rewards)),
            "0": torch.zeros(len(rewards)),
        }
        for name, baseline in baselines.items():
            second_moment = (weight * (rewards - baseline[:, None]).square()).sum(1)
            variance = (second_moment - exact_square).sum() / len(rewards) ** 2
            variances.setdefault(name, []).append(variance)
    expected = torch.stack(exact).mean(0)
    of_images = float((torch.stack(exact) - expected).square().sum((1, 2)).mean())
    sampling = {name: float(torch.stack(values).mean()) for name, values in variances.items()}
    noise = {name: max(value + of_images, EPSILON**2) ** 0.5 for name, value in sampling.items()}
    return {name: (value, float(expected.norm()) / noise[name]) for name, value in sampling.items()}


def learn(
    model_config: GroundingConfig, config: Config, batches: Sequence[Rewarded], method: Method, steps: int, seed: int
) -> dict[int, float]:
    """Trains a new gate; returns step -> ``share_of_gain`` of its policy."""
    settings = type(model_config)(**model_config.to_dict() | PAPER | method.settings)
    train, (num_layers, width) = config.train, batches[0].states.shape[1:]
    if method.normalised:
        batches = [Rewarded(torch.nn.functional.rms_norm(batch.states, (width,)), batch.rewards) for batch in batches]
    torch.manual_seed(seed)
    ppm = PolicyPromptedMasking(settings)
    objective = Objective(settings, ppm)
    others = [parameter for name, parameter in ppm.named_parameters() if name != "gate"]
    groups: list[dict[str, Any]] = [{"params": [ppm.gate], "lr": train.lr * method.rate}, {"params": others}]
    optimizer = torch.optim.AdamW(
        groups, lr=train.lr, betas=(train.beta1, train.beta2), weight_decay=train.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, train.warmup_steps, steps))
    order, curve = torch.randperm(len(batches)).tolist(), {}
    for step in range(1, steps + 1):
        batch = batches[order[(step - 1) % len(order)]]
        log_policy = ppm.log_policy(batch.states)
        trials = []
        for trial in range(settings.sampled_layers):
            noise = gumbel_noise([step], [0] * len(batch.states), num_layers, seed + 104_729 * trial)
            trials.append(StochasticSkip().choose(log_policy, noise))
        layers = torch.stack(trials, 1)
        sampled = batch.rewards.gather(1, layers)
        terms = objective.gate_terms(
            sampled[:, 0],
            layers[:, 0],
            log_policy,
            batch.rewards if settings.policy_gradient == "exact" else None,
            batch.states,
            LayerSamples(layers, sampled) if settings.sampled_layers > 1 else None,
        )
        optimizer.zero_grad()
        (settings.policy_loss_weight * sum((term.mean() for term in terms.values()), torch.zeros(()))).backward()
        optimizer.step()
        scheduler.step()
        if step in reported_steps(steps):
            curve[step] = share_of_gain(ppm, batches, candidates(settings))
    return curve


@torch.no_grad()
def share_of_gain(ppm: PolicyPromptedMasking, batches: Sequence[Rewarded], layers: slice) -> float:
    """Expected reward of the policy of ``ppm``: 0 = that of a uniform policy, 1 = of each [SEG]'s own best layer."""
    states, rewards = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("states", "rewards"))
    rewards = rewards[:, layers].double()
    uniform, best = rewards.mean(), rewards.amax(1).mean()
    expected = (ppm.log_policy(states)[:, layers].exp() * rewards).sum(1).mean()
    return float((expected - uniform) / (best - uniform).clamp(min=EPSILON))


def rate_at(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate: linear warm-up, then linear decay to 0, as in DeepSpeed's WarmupDecayLR."""
    return min(step / warmup, (total - step) / max(1, total - warmup))


def reported_steps(steps: int) -> list[int]:
    return sorted({step for step in REPORTED if step < steps} | {steps})


def numbers(values: torch.Tensor, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values.tolist())


if __name__ == "__main__":
    sys.exit(cli.run(main))
