"""What a policy over layers can learn on a checkpoint, and how fast each learning method learns it.

    python scripts/dev/study_policy.py --version runs/tiny/merged --config configs/tiny.yaml

Computes states and rewards of all layers' maps (at their own resolution) for training samples of --config, and prints

- the signal: reward per layer, how often each layer is best, the gain of choosing the best layer for each [SEG];
- the noise: the spread of rewards over [SEG], and the signal-to-noise ratio of one step's gradient estimate;
- the scale: how far one step of Adam moves each layer's score (the L1 norm of its states);
- learning: new gates, trained for --steps on these states and rewards, all else frozen, without gradient clipping.

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

from model.config import UGroundConfig
from model.layer_rules import StochasticSkip
from model.loading.pretrained import load
from model.objective import Objective
from model.PPM import PolicyPromptedMasking, gumbel_noise
from utils.command_line.parser import Parser
from utils.config import Config, load_config, make_parser
from utils.datasets.mixture import make_mixture
from utils.inference import cli
from utils.plotting.text_tables import mean_cell

REPORTED = (30, 60, 90, 120, 180)  # steps


@dataclass(frozen=True)
class Method:
    """A learning method: settings of ``UGroundConfig``, a factor of the gate's learning rate, RMS-normalized states."""

    settings: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    normalised: bool = False


METHODS = {
    "REINFORCE (paper)": Method(),
    "baseline from the first reward": Method({"baseline_start": "first"}),
    "critic": Method({"baseline": "critic"}),
    "advantages scaled": Method({"scale_advantage": True}),
    "first reward, scaled": Method({"baseline_start": "first", "scale_advantage": True}),
    "gate's rate x 10": Method(rate=10.0),
    "first reward, rate x 10": Method({"baseline_start": "first"}, rate=10.0),
    "normalised states": Method(normalised=True),
    "first reward, normalised states": Method({"baseline_start": "first"}, normalised=True),
    "exact gradient": Method({"policy_gradient": "exact"}),
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
    print(
        "\nlearning method | probability of the best layer after steps "
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
        output, valid = model.forward_language(batch)
        states = output.at(batch.seg_positions)
        counts = [len(masks) for masks in batch.masks]
        grounding = model.ground(output.hidden, states, batch.seg_rows, counts, batch.image_start, StochasticSkip())
        maps, objective = model.normalised(grounding.scores, valid[batch.seg_rows][:, None]), model.objective
        terms = objective.layer_terms(batch.masks, [objective.soft_target(masks) for masks in batch.masks], maps)
        rewarded.append(Rewarded(states.float().cpu(), -(terms["map_bce"] + terms["map_dice"]).cpu()))
    return rewarded


def candidates(config: UGroundConfig) -> slice:
    """The candidate layers."""
    return slice(config.candidates.start, config.candidates.stop)


def describe_rewards(batches: Sequence[Rewarded], layers: slice) -> str:
    """Text about the rewards of the candidate layers, their noise, and the scale of the states."""
    states = torch.cat([batch.states for batch in batches])
    rewards = torch.cat([batch.rewards for batch in batches])[:, layers]
    by_layer, by_seg = rewards.mean(0), rewards.mean(1)
    residual = rewards - by_layer - by_seg[:, None] + rewards.mean()
    best = torch.bincount(rewards.argmax(1), minlength=rewards.shape[1]) / len(rewards)
    ratio = signal_to_noise(batches, layers)
    return "\n".join(
        [
            f"{len(rewards)} [SEG], layers {layers.start} to {layers.stop - 1}",
            f"mean reward per layer: {numbers(by_layer, 4)}",
            f"the best layer of a [SEG], in per cent: {numbers(100 * best, 1)}",
            f"reward of the best layer {by_layer.max():.4f}, of each [SEG]'s own best {rewards.amax(1).mean():.4f}",
            f"spread (standard deviation): over layers {by_layer.std(correction=0):.4f}, over [SEG] "
            f"{by_seg.std():.4f}, residual {residual.std():.4f}",
            f"signal-to-noise ratio of a step's gradient, uniform policy: exact {ratio['exact']:.2f}, REINFORCE with "
            f"the mean reward as baseline {ratio['mean']:.2f}, with 0 {ratio['zero']:.2f}",
            f"L1 norm of the states per layer, embeddings first: {numbers(states.abs().sum(-1).mean(0), 0)}",
        ]
    )


def signal_to_noise(batches: Sequence[Rewarded], layers: slice) -> dict[str, float]:
    """Norm of the gate's expected gradient over the root mean square of a step's deviation from it, policy uniform."""
    generator = torch.Generator().manual_seed(0)
    average = torch.cat([batch.rewards for batch in batches])[:, layers].mean()
    steps: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        states, rewards = batch.states[:, layers], batch.rewards[:, layers]
        policy = torch.full_like(rewards, 1 / rewards.shape[1])
        sampled = torch.multinomial(policy, 1, generator=generator)
        score = torch.zeros_like(policy).scatter_(1, sampled, 1.0) - policy
        weights = {"exact": policy * (rewards - rewards.mean(1, keepdim=True))}
        weights |= {"mean": (rewards.gather(1, sampled) - average) * score, "zero": rewards.gather(1, sampled) * score}
        for name, value in weights.items():
            steps.setdefault(name, []).append(torch.einsum("nl,nld->ld", value, states) / len(states))
    expected = torch.stack(steps["exact"]).mean(0)
    noise = {
        name: (torch.stack(gradients) - expected).flatten(1).square().sum(1).mean().sqrt()
        for name, gradients in steps.items()
    }
    return {name: float(expected.norm() / value) for name, value in noise.items()}


def learn(
    model_config: UGroundConfig, config: Config, batches: Sequence[Rewarded], method: Method, steps: int, seed: int
) -> dict[int, float]:
    """Trains a new gate; returns step -> its mean probability of the layer that is best on average."""
    settings = UGroundConfig(**model_config.to_dict() | {"layer_selection": "policy"} | method.settings)
    train, (num_layers, width) = config.train, batches[0].states.shape[1:]
    torch.manual_seed(seed)
    ppm = PolicyPromptedMasking(settings)
    objective = Objective(settings, ppm)
    mean_rewards = torch.cat([batch.rewards for batch in batches]).mean(0)
    best = settings.first_candidate_layer + int(mean_rewards[candidates(settings)].argmax())
    others = [parameter for name, parameter in ppm.named_parameters() if name != "gate"]
    groups: list[dict[str, Any]] = [{"params": [ppm.gate], "lr": train.lr * method.rate}, {"params": others}]
    optimizer = torch.optim.AdamW(
        groups, lr=train.lr, betas=(train.beta1, train.beta2), weight_decay=train.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, train.warmup_steps, steps))
    order, curve = torch.randperm(len(batches)).tolist(), {}
    for step in range(1, steps + 1):
        batch = batches[order[(step - 1) % len(order)]]
        states = torch.nn.functional.rms_norm(batch.states, (width,)) if method.normalised else batch.states
        log_policy = ppm.log_policy(states)
        noise = gumbel_noise([step], [0] * len(states), num_layers, seed)
        layers = StochasticSkip().choose(log_policy, noise)
        sampled = batch.rewards.gather(1, layers[:, None])[:, 0]
        terms = objective.gate_terms(
            sampled, layers, log_policy, batch.rewards if settings.policy_gradient == "exact" else None
        )
        optimizer.zero_grad()
        (settings.policy_loss_weight * sum((term.mean() for term in terms.values()), torch.zeros(()))).backward()
        optimizer.step()
        scheduler.step()
        if step in reported_steps(steps):
            curve[step] = log_policy.exp()[:, best].mean().item()
    return curve


def rate_at(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate: linear warm-up, then linear decay to 0, as in DeepSpeed's WarmupDecayLR."""
    return min(step / warmup, (total - step) / max(1, total - warmup))


def reported_steps(steps: int) -> list[int]:
    return sorted({step for step in REPORTED if step < steps} | {steps})


def numbers(values: torch.Tensor, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values.tolist())


if __name__ == "__main__":
    sys.exit(cli.run(main))
