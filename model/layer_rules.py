"""Layer rules: which layer's hidden state and similarity map a [SEG] token uses. ``RULES`` is the one table of them.

``layer_selection`` names a rule for training, ``layer_policy`` one for inference, as do chat's ``/layer`` and the
dashboard's menu. Help texts come from here, and ``python -m model.layer_rules`` prints the table. A new rule is one
class and its place in ``RULES``.

Legend: N [SEG] tokens, L hidden states (embeddings first).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch

Use = Literal["training", "inference"]
Gate = Literal["", "policy", "classifier", "masks"]
EITHER: tuple[Use, ...] = ("training", "inference")


@dataclass(frozen=True)
class LayerRule:
    """One rule with its argument; a subclass is a row of the table. What it does not say is as for the policy's mode.

    Attributes:
        name: as users write it; argument: what stands behind its colon (``K``, ``A-B``), a whole number for each field.
        help: what it does, for ``--help`` and the table.
        uses: where it may be named.
        gate: what trains the gate where this rule trains, if anything does: the objective's term ``policy`` or
            ``classifier``, or the ``masks`` through the weights.
    """

    name: ClassVar[str]
    argument: ClassVar[str] = ""
    help: ClassVar[str]
    uses: ClassVar[tuple[Use, ...]] = EITHER
    gate: ClassVar[Gate] = ""

    def __str__(self) -> str:
        numbers = "-".join(str(getattr(self, field.name)) for field in fields(self))
        return f"{self.name}:{numbers}" if numbers else self.name

    @classmethod
    def spelling(cls) -> str:
        """``last``, ``fixed:K``."""
        return f"{cls.name}:{cls.argument}" if cls.argument else cls.name

    @classmethod
    def match(cls, text: str) -> LayerRule | None:
        """The rule that ``text`` spells, if it is this one."""
        numbers = "-".join([r"(-?\d+)"] * len(fields(cls)))
        found = re.fullmatch(f"{cls.name}:{numbers}" if numbers else cls.name, text, re.ASCII)
        return cls(*map(int, found.groups())) if found else None

    @classmethod
    def examples(cls, num_layers: int) -> list[LayerRule]:
        """What a menu offers."""
        return [cls()]

    def check(self, num_layers: int | None, candidates: range | None) -> None:
        """Raises ValueError if the argument has no meaning, or none for a model of so many layers and candidates."""

    def choose(self, log_policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """One layer per [SEG]; for a rule that fuses layers the one of the largest weight, to be reported.

        Args:
            log_policy: [N, L], -inf for layers that are no candidates.
            noise: [N, L] standard Gumbel noise to sample with (argmax of log pi + noise is a sample of pi).

        Returns:
            [N] int64.
        """
        return log_policy.argmax(-1)

    def weights(self, log_policy: torch.Tensor) -> torch.Tensor | None:
        """[N, L] weights of a rule that fuses layers, rows sum up to 1; None for one that chooses a single layer."""
        return None

    @property
    def samples(self) -> int:
        """How many sampled layers the mask is the mean of; 0 = the mask is that of one choice."""
        return 0

    @property
    def at_inference(self) -> str:
        """The rule that inference takes after training with this one."""
        return str(self)

    def words(self, layer: int) -> str:
        """Where a mask comes from, for a person; ``layer`` is the one reported."""
        return f"layer {layer}"


@dataclass(frozen=True)
class PolicyMode(LayerRule):
    name = "argmax"
    help = "the policy's most probable layer"
    uses = ("inference",)


@dataclass(frozen=True)
class PolicySample(LayerRule):
    name = "sample"
    help = "one layer sampled from the policy"
    uses: ClassVar[tuple[Use, ...]] = ("inference",)

    def choose(self, log_policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (log_policy + noise).argmax(-1)


@dataclass(frozen=True)
class StochasticSkip(PolicySample):
    name = "policy"
    help = "one layer sampled from the policy, which trains on its reward (SSC)"
    uses = ("training",)
    gate = "policy"
    at_inference = "argmax"


@dataclass(frozen=True)
class LastLayer(LayerRule):
    name = "last"
    help = "the last layer"

    def choose(self, log_policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return _every(log_policy, log_policy.shape[1] - 1)


@dataclass(frozen=True)
class UniformLayer(LayerRule):
    name = "uniform"
    help = "one layer sampled uniformly from the candidates"

    def choose(self, log_policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return torch.where(log_policy.isfinite(), noise, -torch.inf).argmax(-1)


@dataclass(frozen=True)
class FixedLayer(LayerRule):
    layer: int

    name = "fixed"
    argument = "K"
    help = "layer K, 0 = the embeddings"

    @classmethod
    def examples(cls, num_layers: int) -> list[LayerRule]:
        return [cls(layer) for layer in range(num_layers)]

    def check(self, num_layers: int | None, candidates: range | None) -> None:
        _check_layer(self.layer, num_layers)

    def choose(self, log_policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return _every(log_policy, self.layer)


@dataclass(frozen=True)
class SoftGating(LayerRule):
    """Soft gating (Table 9): the gate trains through SAM."""

    name = "soft"
    help = "all layers, weighted by the policy, which trains through SAM (Table 9)"
    gate: ClassVar[Gate] = "masks"

    def weights(self, log_policy: torch.Tensor) -> torch.Tensor | None:
        return log_policy.exp()

    def words(self, layer: int) -> str:
        return f"all layers, most weight on {layer}"


@dataclass(frozen=True)
class GateClassifier(SoftGating):
    """Soft gating by a classifier of the best layer (appendix B.1), which its cross-entropy alone trains."""

    name = "ce_soft"
    help = "all layers, weighted by the policy, which trains as a classifier of the best layer (appendix B.1)"
    uses = ("training",)
    gate = "classifier"
    at_inference = "soft"

    def weights(self, log_policy: torch.Tensor) -> torch.Tensor | None:
        return log_policy.exp().detach()


@dataclass(frozen=True)
class MonteCarloMean(PolicySample):
    samples: int = 16

    name = "mc"
    argument = "T"
    help = "the mean mask of T layers sampled from the policy, and its uncertainty"
    uses = ("inference",)

    def check(self, num_layers: int | None, candidates: range | None) -> None:
        if self.samples < 1:
            raise ValueError(f"'{self}' samples no layer; use mc:1 or more")

    def words(self, layer: int) -> str:
        return f"sampled layers, most often {layer}"


@dataclass(frozen=True)
class PolicyBlend(LayerRule):
    """Soft gating over a few layers: 1 is the policy's mode, all candidates are ``soft``."""

    count: int = 3

    name = "blend"
    argument = "K"
    help = "the K most probable layers, weighted by the policy"
    uses = ("inference",)

    @classmethod
    def examples(cls, num_layers: int) -> list[LayerRule]:
        return [cls(min(cls.count, num_layers))]

    def check(self, num_layers: int | None, candidates: range | None) -> None:
        if self.count < 1:
            raise ValueError(f"'{self}' blends no layer; use blend:1 or more")
        if num_layers is not None and self.count > num_layers:
            raise ValueError(f"'{self}' blends more layers than there are; use at most blend:{num_layers}")

    def weights(self, log_policy: torch.Tensor) -> torch.Tensor | None:
        highest, layers = log_policy.topk(self.count)
        return torch.zeros_like(log_policy).scatter(-1, layers, highest.softmax(-1))

    def words(self, layer: int) -> str:
        return f"the {self.count} most probable layers, most weight on {layer}"


@dataclass(frozen=True)
class PolicyWindow(LayerRule):
    first: int
    last: int

    name = "window"
    argument = "A-B"
    help = "the policy's most probable layer from A to B"
    uses = ("inference",)

    @classmethod
    def examples(cls, num_layers: int) -> list[LayerRule]:
        return [cls(num_layers // 2, num_layers - 1)]

    def check(self, num_layers: int | None, candidates: range | None) -> None:
        for layer in (self.first, self.last):
            _check_layer(layer, num_layers)
        if self.first > self.last:
            raise ValueError(f"'{self}' is empty; use window:{self.last}-{self.first}")
        if candidates and not set(candidates) & set(range(self.first, self.last + 1)):
            raise ValueError(f"'{self}' holds no layer that the policy can choose: {candidates[0]} to {candidates[-1]}")

    def choose(self, log_policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return log_policy[:, self.first : self.last + 1].argmax(-1) + self.first


RULES: tuple[type[LayerRule], ...] = (
    StochasticSkip,
    PolicyMode,
    PolicySample,
    LastLayer,
    UniformLayer,
    FixedLayer,
    SoftGating,
    GateClassifier,
    MonteCarloMean,
    PolicyBlend,
    PolicyWindow,
)


def parse(
    text: str, num_layers: int | None = None, candidates: range | None = None, use: Use = "inference"
) -> LayerRule:
    """``"fixed:3"`` -> ``FixedLayer(3)``.

    Args:
        num_layers: L, and candidates: the layers that the policy can choose, of the model that is meant; None = any.

    Raises:
        ValueError: for a rule that there is not, or not for this use; for a layer outside [0, num_layers), or fewer
            than one Monte-Carlo sample.
    """
    for kind in rules_for(use):
        if (rule := kind.match(text)) is not None:
            rule.check(num_layers, candidates)
            return rule
    raise ValueError(f"unknown layer policy {text!r} for {use}: {text!r} is not one of {names(use)}")


def rules_for(use: Use) -> list[type[LayerRule]]:
    return [kind for kind in RULES if use in kind.uses]


def names(use: Use) -> str:
    """``argmax, sample, ..., mc:T``, for messages."""
    return ", ".join(kind.spelling() for kind in rules_for(use))


def describe(use: Use) -> str:
    """``argmax = the policy's most probable layer; ...``, for help texts."""
    return "; ".join(f"{kind.spelling()} = {kind.help}" for kind in rules_for(use))


def menu(num_layers: int) -> list[str]:
    """Rules to choose from at inference, those of which there are many (each layer) last."""
    offers = sorted((kind.examples(num_layers) for kind in rules_for("inference")), key=len)
    return [str(rule) for some in offers for rule in some]


def table() -> str:
    """All rules in Markdown."""
    rows = ["| rule | layer | in training | at inference |", "|---|---|---|---|"]
    for kind in RULES:
        training, inference = ("yes" if use in kind.uses else "no" for use in EITHER)
        rows.append(f"| `{kind.spelling()}` | {kind.help} | {training} | {inference} |")
    return "\n".join(rows)


def _every(log_policy: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.full(log_policy.shape[:1], layer, dtype=torch.int64, device=log_policy.device)


def _check_layer(layer: int, num_layers: int | None) -> None:
    if layer < 0 or (num_layers is not None and layer >= num_layers):
        last = "the last" if num_layers is None else f"{num_layers - 1} (last)"
        raise ValueError(f"layer {layer} does not exist: choose 0 (embeddings) to {last}")


if __name__ == "__main__":
    print(table())
