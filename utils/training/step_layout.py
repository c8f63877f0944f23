"""How the images of an optimizer step are divided among processes and micro steps, which may change on resuming."""

from __future__ import annotations

from dataclasses import dataclass

from model import layer_rules
from utils.config import Config
from utils.wording import counted


@dataclass(frozen=True)
class StepLayout:
    """The three factors of a step's images: per micro step and process, micro steps, processes."""

    batch_size: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, config: Config, processes: int) -> StepLayout:
        return cls(config.train.batch_size, config.train.grad_accumulation_steps, processes)

    @property
    def images(self) -> int:
        """Per step. With it, sample i belongs to the same step in every layout."""
        return self.batch_size * self.accumulation * self.processes

    def __str__(self) -> str:
        processes = counted(self.processes, "process", "processes")
        return f"batch_size {self.batch_size} x grad_accumulation_steps {self.accumulation} x {processes}"


def difference(now: StepLayout, before: StepLayout) -> str | None:
    """Why a run cannot go on in another layout: its steps would have other images. None if it can."""
    if now.images == before.images:
        return None
    per_process, rest = divmod(before.images, now.processes)
    fix = f"give --batch_size and --grad_accumulation_steps whose product is {per_process}"
    if rest:
        fix = f"start a number of processes that divides {before.images}"
    return f"images per step: {before.images} in the checkpoint ({before}), now {now.images} ({now}); {fix}"


def effects(config: Config, now: StepLayout, before: StepLayout) -> list[str]:
    """What a step computes otherwise in another layout of the same images, beyond the order of its sums."""
    model, method, found = config.model, config.method, []
    if now != before and model.lora_r and model.lora_dropout:
        found.append(f"dropout (--lora_dropout {model.lora_dropout:g}) draws other units")
    gate = layer_rules.parse(method["layer_selection"], use="training").gate
    by_rewards = config.grpo.objective == "grpo"  # an answer's advantage is that within its group
    if gate != "policy" or method["policy_gradient"] == "exact" or by_rewards:
        return found
    leave_one_out = method["policy_gradient"] == "leave_one_out"
    if now.batch_size != before.batch_size and method["reward"] == "batch":
        found.append("the reward of a batch is that of another batch (--reward batch)")
    if now.batch_size != before.batch_size and method["baseline"] == "critic":
        found.append("the critic estimates the reward of another batch (--baseline critic)")
    if now.accumulation != before.accumulation and method["baseline"] != "critic" and not leave_one_out:
        found.append("the reward's moving average advances once per micro step")
    if now.accumulation != before.accumulation and method["scale_advantage"]:
        found.append("advantages are scaled per micro step (--scale_advantage)")
    return found
