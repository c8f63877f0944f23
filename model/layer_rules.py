"""Layer rules: which layer's hidden state and similarity map a [SEG] token uses. ``RULES`` is the table of them.

``layer_selection`` names a rule for training; ``layer_policy``, chat's ``/layer`` and the dashboard's menu name one for
inference. Help texts are built from the table, and ``python -m model.layer_rules`` prints it. To add a rule, write one
class and add it to ``RULES``.

Legend: N [SEG] tokens, L hidden states (embeddings first).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch


Use = Literal["training", "inference"]
Gate = Literal["", "policy", "classifier", "masks"]
EITHER: tuple[Use, ...] = ("training", "inference")


@dataclass(frozen=True)
class LayerRule:
    """A rule with its argument; a subclass is a row of the table. Defaults are those of the policy's mode (``argmax``).

    Attributes:
        name: as users write it.
        argument: as help texts spell it after the colon (``K``, ``A-B``); an integer per field.
        help: the layer that is used, for ``--help`` and the table.
        uses: ``training``, ``inference`` or both.
        gate: what trains the gate in training with this rule: the objective's term ``policy`` or ``classifier``, the
            ``masks`` (through ``weights``), or nothing.
    """

    name: ClassVar[str]
    argument: ClassVar[str] = ""
    help: ClassVar[str]
    uses: ClassVar[tuple[Use, ...]] = EITHER
    gate: ClassVar[Gate] = ""

    def __str__(self) -> str:
        argument = "-".join(str(getattr(self, field.name)) for field in fields(self))
        return f"{self.name}:{argument}" if argument else self.name

    @classmethod
    def spelling(cls) -> str:
        """The rule with its argument's letters: ``last``, ``fixed:K``."""
        return f"{cls.name}:{cls.argument}" if cls.argument else cls.name

    @classmethod
    def match(cls, text: str) -> LayerRule | None:
        """``text`` as an instance of this rule; None if it names another one."""
        pattern = "-".join([r"(-?\d+)"] * len(fields(cls)))
        matched = re.fullmatch(f"{cls.name}:{pattern}" if pattern else cls.name, text, re.ASCII)
        return cls(*map(int, matched.groups())) if matched else None

    @classmethod
    def examples(cls, num_layers: int) -> list[LayerRule]:
        """Instances that a menu offers for a model of ``num_layers`` layers."""
        return [cls()]

    def check(self, num_layers: int | None, candidates: range | None) -> None:
        """Checks the argument; None = not known.

        Raises:
            ValueError: if the argument is out of range, for any model or for these layers and candidates.
        """

    def choose(self, log_policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """One layer per [SEG]; for a rule that fuses layers, the one with the largest weight, which is reported.

        Args:
            log_policy: [N, L], -inf for layers that are no candidates.
            noise: [N, L] standard Gumbel noise to sample with (argmax of log pi + noise is a sample of pi).

        Returns:
            [N] int64.
        """
        return log_policy.argmax(-1)

    def weights(self, log_policy: torch.Tensor) -> torch.Tensor | None:
        """[N, L] weights of a rule that fuses layers, rows sum to 1; None for a rule that chooses one layer."""
        return None

    def tried(self, log_policy: torch.Tensor) -> torch.Tensor | None:
        """[N, L] bool, the layers that are all decoded, to keep the mask that SAM rates best; None = only one is."""
        return None

    @property
    def samples(self) -> int:
        """T, the number of sampled layers that the mask is the mean of; 0 = the mask of a single choice."""
        return 0

    @property
    def at_inference(self) -> str:
        """The rule of inference after training with this one."""
        return str(self)

    def words(self, layer: int) -> str:
        """The source of a mask in words, for a person; ``layer`` is the reported one."""
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
        return _constant(log_policy, log_policy.shape[1] - 1)


@dataclass(frozen=True)
class UniformLayer(LayerRule):
    name = "uniform"
    help = "one layer sampled uniformly from the candidates"

    def choose(self, log_policy: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return noise.masked_fill(~log_policy.isfinite(), -math.inf).argmax(-1)


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
        return _constant(log_policy, self.layer)


@dataclass(frozen=True)
class SoftGating(LayerRule):
    """Soft gating (Table 9): the gate trains through SAM."""

    name = "soft"
    help = "all layers, weighted by the policy; as a selection, the gate trains through SAM (Table 9)"
    gate: ClassVar[Gate] = "masks"

    def weights(self, log_policy: torch.Tensor) -> torch.Tensor | None:
        return log_policy.exp()

    def words(self, layer: int) -> str:
        return f"all layers, most weight on {layer}"


@dataclass(frozen=True)
class GateClassifier(SoftGating):
    """Soft gating by a classifier of the best layer (appendix B.1); its cross-entropy alone trains the gate."""

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
    """Soft gating over a few layers: K = 1 is ``argmax``, K = all candidates is ``soft``."""

    count: int = 3

    name = "blend"
    argument = "K"
    help = "the K most probable layers, weighted by the policy"
    uses = ("inference",)

    @classmethod
    def examples(cls, num_layers: int) -> list[LayerRule]:
        return [cls(min(cls.count, num_layers))]

    def check(self, num_layers: int | None, candidates: range | None) -> None:
        _check_count(self, "blends", self.count, num_layers)

    def weights(self, log_policy: torch.Tensor) -> torch.Tensor | None:
        highest, layers = _most_probable(log_policy, self.count)
        return log_policy.new_zeros(log_policy.shape).scatter(-1, layers, highest.softmax(-1))

    def words(self, layer: int) -> str:
        if self.count == 1:
            return super().words(layer)
        return f"the {self.count} most probable layers, most weight on {layer}"


@dataclass(frozen=True)
class BestRated(LayerRule):
    """SAM's mask decoder predicts the IoU of its own mask: K masks are decoded, and the best rated one is kept."""

    count: int = 4

    name = "best"
    argument = "K"
    help = "of the K most probable layers, the one whose mask SAM rates best by its predicted IoU"
    uses = ("inference",)

    @classmethod
    def examples(cls, num_layers: int) -> list[LayerRule]:
        return [cls(min(cls.count, num_layers))]

    def check(self, num_layers: int | None, candidates: range | None) -> None:
        _check_count(self, "decodes", self.count, num_layers)

    def tried(self, log_policy: torch.Tensor) -> torch.Tensor | None:
        _, layers = _most_probable(log_policy, self.count)
        most = log_policy.new_zeros(log_policy.shape).scatter(-1, layers, 1.0) > 0
        return most & log_policy.isfinite()

    def words(self, layer: int) -> str:
        return f"layer {layer}, rated best of {self.count}"


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
    BestRated,
    PolicyWindow,
)


def parse(
    text: str, num_layers: int | None = None, candidates: range | None = None, use: Use = "inference"
) -> LayerRule:
    """``"fixed:3"`` -> ``FixedLayer(3)``.

    Args:
        num_layers: L of the model; candidates: the layers that its policy can choose. None = not known.
        use: where the rule is used.

    Raises:
        ValueError: if the rule is unknown or not for this use, or its argument out of range.
    """
    for kind in rules_for(use):
        if (rule := kind.match(text)) is not None:
            rule.check(num_layers, candidates)
            return rule
    raise ValueError(f"unknown layer rule for {use}: {text!r} is not one of {names(use)}")


def rules_for(use: Use) -> list[type[LayerRule]]:
    """Rows of the table that may be named in this use."""
    return [kind for kind in RULES if use in kind.uses]


def names(use: Use) -> str:
    """``argmax, sample, ..., mc:T``, for error messages."""
    return ", ".join(kind.spelling() for kind in rules_for(use))


def describe(use: Use) -> str:
    """``argmax = the policy's most probable layer; ...``, for help texts."""
    return "; ".join(f"{kind.spelling()} = {kind.help}" for kind in rules_for(use))


def menu(num_layers: int) -> list[str]:
    """Rules of inference to choose from; those with many instances (``fixed:K`` of each layer) come last."""
    examples = sorted((kind.examples(num_layers) for kind in rules_for("inference")), key=len)
    return [str(rule) for rules in examples for rule in rules]


def table() -> str:
    """All rules as a Markdown table."""
    rows = ["| rule | layer | in training | at inference |", "|---|---|---|---|"]
    for kind in RULES:
        training, inference = ("yes" if use in kind.uses else "no" for use in EITHER)
        rows.append(f"| `{kind.spelling()}` | {kind.help} | {training} | {inference} |")
    return "\n".join(rows)


def _constant(log_policy: torch.Tensor, layer: int) -> torch.Tensor:
    """[N] times ``layer``."""
    return log_policy.argmax(-1).fill_(layer)


def _most_probable(log_policy: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and layers [N, count], in order; of equal ones the lower layer, as in ``argmax``."""
    ranked = log_policy.sort(dim=-1, descending=True, stable=True)
    return ranked.values[:, :count], ranked.indices[:, :count]


def _check_count(rule: LayerRule, verb: str, count: int, num_layers: int | None) -> None:
    if count < 1:
        raise ValueError(f"'{rule}' {verb} no layer; use {rule.name}:1 or more")
    if num_layers is not None and count > num_layers:
        raise ValueError(f"'{rule}' {verb} more layers than there are; use at most {rule.name}:{num_layers}")


def _check_layer(layer: int, num_layers: int | None) -> None:
    if layer < 0 or (num_layers is not None and layer >= num_layers):
        last = "the last" if num_layers is None else f"{num_layers - 1} (last)"
        raise ValueError(f"layer {layer} does not exist: choose 0 (embeddings) to {last}")


if __name__ == "__main__":
    print(table())
