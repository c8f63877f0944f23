"""What a policy over layers can learn on a checkpoint, and how fast each way of learning it gets there.

    python scripts/dev/study_policy.py --version runs/tiny/merged --config configs/tiny.yaml --seeds 10

Reads training samples of --config once, with the rewards of all layers' maps at their own resolution, and prints

- what there is to learn: the reward per layer, how often each is best, what the best layer of each [SEG] would gain;
- the noise: the spread of rewards over [SEG], and the signal-to-noise ratio of one step's estimate of the gradient;
- the scale: how far one step of Adam moves each layer's score (the L1 norm of its states);
- learning: fresh gates, trained for --steps on these states and rewards, everything else frozen and nothing clipped.

Legend: N [SEG] tokens, L hidden states, D hidden size.
"""

from __future__ import annotations

import argparse
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
from utils.config import Config, load_config
from utils.datasets.mixture import make_mixture
from utils.inference import cli
from utils.plotting.text_tables import mean_cell

TOLD = (30, 60, 90, 120, 180)  # steps


@dataclass(frozen=True)
class Way:
    """A way to learn: settings of ``UGroundConfig``, the gate's rate, and whether it sees states of one length."""

    settings: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    normalised: bool = False


WAYS = {
    "REINFORCE (paper)": Way(),
    "baseline from the first reward": Way({"baseline_start": "first"}),
    "critic": Way({"baseline": "critic"}),
    "advantages scaled": Way({"scale_advantage": True}),
    "first reward, scaled": Way({"baseline_start": "first", "scale_advantage": True}),
    "gate's rate x 10": Way(rate=10.0),
    "first reward, rate x 10": Way({"baseline_start": "first"}, rate=10.0),
    "normalised states": Way(normalised=True),
    "first reward, normalised states": Way({"baseline_start": "first"}, normalised=True),
    "exact gradient": Way({"policy_gradient": "exact"}),
}


@dataclass
class Rewarded:
    """The [SEG] of a batch of images: states [N, L, D] and the reward of each layer's map [N, L]."""

    states: torch.Tensor
    rewards: torch.Tensor


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # --seed is a setting of train_ds.py, not short for another flag
    add = parser.add_argument
    add("--version", required=True, metavar="DIR", help="merged model, as scripts/merge_lora.py writes it")
    add("--config", required=True, metavar="FILE", help="YAML of train_ds.py: data, batch size, rates")
    add("--steps", type=int, default=180, metavar="N", help="of the optimizer (default: 180)")
    add("--seeds", type=int, default=10, metavar="N", help="fresh gates per way to learn (default: 10)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    args, settings = parser.parse_known_args(argv)
    if args.steps < 1 or args.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    config = load_config(["--config", args.config, *settings], needs=("data",))
    opened = load(args.version, "fp32", args.device)
    model, processor = opened.model, opened.processor
    batches = [batch for batch in read(model, processor, config, args.steps) if len(batch.states)]
    print(what_there_is(batches, candidates(model.config)))
    print("\nway to learn | probability of the best layer after steps " + ", ".join(map(str, steps_told(args.steps))))
    for name, way in WAYS.items():
        runs = [learn(model.config, config, batches, way, args.steps, seed) for seed in range(args.seeds)]
        print(f"{name} | " + " | ".join(mean_cell([run[step] for run in runs], 2) for step in steps_told(args.steps)))
    return 0


@torch.no_grad()
def read(model, processor, config: Config, steps: int) -> list[Rewarded]:
    """What training sees in its first steps, as the model is now."""
    mixture, size, found = make_mixture(config), config.train.batch_size, []
    for step in range(steps):
        batch = processor.collate([mixture[step * size + k] for k in range(size)]).to(model.device)
        output, valid = model.forward_language(batch)
        states = torch.stack([layer.flatten(0, 1)[batch.seg_positions] for layer in output.hidden], 1)
        counts = [len(masks) for masks in batch.masks]
        grounding = model.ground(output.hidden, states, batch.seg_rows, counts, batch.image_start, StochasticSkip())
        maps, objective = model.normalised(grounding.scores, valid[batch.seg_rows][:, None]), model.objective
        terms = objective.layer_terms(batch.masks, [objective.soft_target(masks) for masks in batch.masks], maps)
        found.append(Rewarded(states.float().cpu(), -(terms["map_bce"] + terms["map_dice"]).cpu()))
    return found


def candidates(config: UGroundConfig) -> slice:
    """The layers that can be chosen."""
    return slice(config.candidates.start, config.candidates.stop)


def what_there_is(batches: Sequence[Rewarded], layers: slice) -> str:
    """Rewards of the candidate layers, their noise, and the scale of states, in words."""
    states = torch.cat([batch.states for batch in batches])
    rewards = torch.cat([batch.rewards for batch in batches])[:, layers]
    by_layer, by_seg = rewards.mean(0), rewards.mean(1)
    rest = rewards - by_layer - by_seg[:, None] + rewards.mean()
    best = torch.bincount(rewards.argmax(1), minlength=rewards.shape[1]) / len(rewards)
    ratio = signal_to_noise(batches, layers)
    return "\n".join(
        [
            f"{len(rewards)} [SEG], layers {layers.start} to {layers.stop - 1}",
            f"mean reward per layer: {numbers(by_layer, 4)}",
            f"the best layer of a [SEG], in per cent: {numbers(100 * best, 1)}",
            f"reward of the best layer {by_layer.max():.4f}, of each [SEG]'s own best {rewards.amax(1).mean():.4f}",
            f"spread (standard deviation): over layers {by_layer.std(correction=0):.4f}, over [SEG] "
            f"{by_seg.std():.4f}, what neither explains {rest.std():.4f}",
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
        drawn = torch.multinomial(policy, 1, generator=generator)
        score = torch.zeros_like(policy).scatter_(1, drawn, 1.0) - policy
        weights = {"exact": policy * (rewards - rewards.mean(1, keepdim=True))}
        weights |= {"mean": (rewards.gather(1, drawn) - average) * score, "zero": rewards.gather(1, drawn) * score}
        for name, value in weights.items():
            steps.setdefault(name, []).append(torch.einsum("nl,nld->ld", value, states) / len(states))
    expected = torch.stack(steps["exact"]).mean(0)
    noise = {
        name: (torch.stack(found) - expected).flatten(1).square().sum(1).mean().sqrt() for name, found in steps.items()
    }
    return {name: float(expected.norm() / value) for name, value in noise.items()}


def learn(
    made: UGroundConfig, config: Config, batches: Sequence[Rewarded], way: Way, steps: int, seed: int
) -> dict[int, float]:
    """A fresh gate's mean probability of the layer that is best on average, after some steps."""
    settings = UGroundConfig(**made.to_dict() | {"layer_selection": "policy"} | way.settings)
    train, (num_layers, width) = config.train, batches[0].states.shape[1:]
    torch.manual_seed(seed)
    ppm = PolicyPromptedMasking(settings)
    objective = Objective(settings, ppm)
    everything = torch.cat([batch.rewards for batch in batches]).mean(0)
    best = settings.first_candidate_layer + int(everything[candidates(settings)].argmax())
    others = [parameter for name, parameter in ppm.named_parameters() if name != "gate"]
    groups: list[dict[str, Any]] = [{"params": [ppm.gate], "lr": train.lr * way.rate}, {"params": others}]
    optimizer = torch.optim.AdamW(
        groups, lr=train.lr, betas=(train.beta1, train.beta2), weight_decay=train.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, train.warmup_steps, steps))
    order, told = torch.randperm(len(batches)).tolist(), {}
    for step in range(1, steps + 1):
        batch = batches[order[(step - 1) % len(order)]]
        states = torch.nn.functional.rms_norm(batch.states, (width,)) if way.normalised else batch.states
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
        if step in steps_told(steps):
            told[step] = log_policy.exp()[:, best].mean().item()
    return told


def rate_at(step: int, warmup: int, total: int) -> float:
    """Of the learning rate: a linear rise, then a linear fall to 0, as DeepSpeed's WarmupDecayLR has it."""
    return min(step / warmup, (total - step) / max(1, total - warmup))


def steps_told(steps: int) -> list[int]:
    return sorted({step for step in TOLD if step < steps} | {steps})


def numbers(values: torch.Tensor, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values.tolist())


if __name__ == "__main__":
    sys.exit(cli.run(main))
