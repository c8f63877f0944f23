"""Policy-Prompted Masking (paper section 4.1, Algorithm 1).

Stochastic Skip Connection (SSC): a policy over layers, one action per [SEG] token. Mask as Prompt (MasP): the chosen
layer's similarity map between the token and the image prompts SAM, is constrained by a loss and gives the reward. Soft
gating (Table 9, appendix B.1) weights all layers with the same gate instead of choosing one.

Legend: B rows, T tokens, V of them of the image, N [SEG] tokens, L hidden states (the embeddings first, the last one
after the final norm), P cells of a map, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import distributed, nn

from model.config import GroundingConfig
from model.structures import EPSILON, Batch


class StateCritic(nn.Module):
    """b(s) of ``baseline: state_critic``: the moving average plus a [SEG]'s own deviation from it.

    A head predicts (reward - average) / spread. So it learns numbers of size one, whatever the reward's offset and
    scale, and the baseline starts as the moving average: the head's last layer starts at zero.
    """

    spread: torch.Tensor

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden = nn.Linear(config.text.hidden_size, config.critic_width)
        # parameters, not a Linear: transformers would initialize that one with noise
        self.weight = nn.Parameter(torch.zeros(config.critic_width))
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("spread", torch.zeros((), dtype=torch.float32))  # 0 until the first reward

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.spread = self.spread.float()  # as ``PolicyPromptedMasking.baseline``
        return self

    def forward(self, seg_states: torch.Tensor) -> torch.Tensor:
        """[N, L, D] states, detached here: the head's error trains the head only -> [N] float32 deviations."""
        candidates = self.config.candidates
        states = seg_states.detach()[:, candidates.start : candidates.stop].float()
        # Norms grow with depth: without RMS normalisation the mean over layers would be the last layers' state. The
        # mean keeps D inputs, where all layers side by side would be L x D (0.5 million weights of 7B, not 17).
        features = F.rms_norm(states, states.shape[-1:]).mean(1).to(self.weight.dtype)
        return (F.relu(self.hidden(features)) @ self.weight + self.bias).float()

    def update(self, residual: torch.Tensor) -> None:
        """Updates the spread, the root of a moving mean square, with [N] rewards minus their average of all ranks."""
        mean_square, count = _mean_over_ranks(residual.square())
        decay = self.config.baseline_decay
        updated = decay * self.spread.square() + (1 - decay) * mean_square
        updated = torch.where(self.spread == 0, mean_square, updated).sqrt()
        self.spread.copy_(torch.where(count > 0, updated, self.spread))


class PolicyPromptedMasking(nn.Module):
    """The gate of Eq. 4, and the baseline of Eq. 5: a moving average, or a critic."""

    baseline: torch.Tensor

    def __init__(self, config: GroundingConfig) -> None:
        super().__init__()
        self.config, num_layers, width = config, config.num_layers, config.critic_width
        self.gate = nn.Parameter(torch.zeros(num_layers, config.text.hidden_size))  # zeros: the policy starts uniform
        self.register_buffer("baseline", torch.zeros((), dtype=torch.float32))
        self.critic: nn.Module | None = None
        if config.baseline == "critic":
            self.critic = nn.Sequential(nn.Linear(num_layers, width), nn.ReLU(), nn.Linear(width, 1))
        elif config.baseline == "state_critic":
            self.critic = StateCritic(config)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.baseline = self.baseline.float()  # bf16's 8 bits are too few for a moving average with decay 0.9
        return self

    @property
    def num_layers(self) -> int:
        return self.gate.shape[0]

    def log_policy(self, seg_states: torch.Tensor) -> torch.Tensor:
        """log pi(l | H_t*) of Eq. 4. States are detached: the policy's loss trains the gate only.

        Args:
            seg_states: [N, L, D].

        Returns:
            [N, L] float32 log-probabilities, -inf for layers that are no candidates.
        """
        scores = torch.einsum("nld,ld->nl", seg_states.detach().float(), self.gate.float())
        layers, candidates = torch.arange(self.num_layers, device=scores.device), self.config.candidates
        outside = (layers < candidates.start) | (layers >= candidates.stop)
        return scores.masked_fill(outside, -torch.inf).log_softmax(-1)

    def advantage(self, rewards: torch.Tensor) -> torch.Tensor:
        """A = r - b per [SEG]; updates b first, with the mean reward over all ranks (Algorithm 1, line 9).

        A collective operation: every rank must call it, also one without [SEG].

        Args:
            rewards: [N] float32, detached.

        Returns:
            [N] float32.
        """
        mean, count = _mean_over_ranks(rewards)
        decay = self.config.baseline_decay
        updated = decay * self.baseline + (1 - decay) * mean
        if self.config.baseline_start == "first":
            updated = torch.where(self.baseline == 0, mean, updated)  # 0 until the first reward
        self.baseline.copy_(torch.where(count > 0, updated, self.baseline))
        return rewards - self.baseline

    def state_advantage(self, rewards: torch.Tensor, seg_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A = r - b(s) per [SEG] with the state's critic, and the critic's squared error.

        The moving average is updated first, as in Algorithm 1. Head and spread enter b(s) as they were before these
        rewards. A collective operation: every rank must call it, also one without [SEG].

        Args:
            rewards: [N] float32, detached; seg_states: [N, L, D].

        Returns:
            advantages [N], detached, and errors [N] in units of the squared spread, both float32.
        """
        assert isinstance(self.critic, StateCritic)
        residual, deviation = self.advantage(rewards), self.critic(seg_states)
        advantage = residual - self.critic.spread * deviation.detach()
        self.critic.update(residual)
        return advantage, (deviation - residual / self.critic.spread.clamp(min=EPSILON)).square()

    def state_baseline(self, seg_states: torch.Tensor) -> torch.Tensor:
        """b(s) of the state's critic: [N, L, D] -> [N] float32."""
        assert isinstance(self.critic, StateCritic)
        return self.baseline + self.critic.spread * self.critic(seg_states)

    def scaled(self, advantage: torch.Tensor) -> torch.Tensor:
        """Advantages divided by their root mean square over the [SEG] tokens of all ranks.

        The gate's steps then do not depend on the scale of the reward. A collective operation: every rank must call it.

        Args:
            advantage: float32, detached, of any shape.

        Returns:
            the same shape.
        """
        mean_square, _ = _mean_over_ranks(advantage.square())
        return advantage / mean_square.sqrt().clamp(min=EPSILON)

    def expected_reward(self, log_policy: torch.Tensor) -> torch.Tensor:
        """The critic's estimate of the reward, a scalar, from the batch's mean policy (section 4.1).

        The policy is detached: the estimate's error trains the critic only.

        Args:
            log_policy: [N, L]; with N = 0 the estimate is meaningless, but has a gradient.
        """
        policy = log_policy.detach().exp().sum(0) / max(1, len(log_policy))
        assert self.critic is not None
        return self.critic(policy.to(self.gate.dtype)).float()[0]


@dataclass
class LayerSamples:
    """K independently sampled layers per [SEG], the first of them the one whose mask is trained.

    Attributes:
        layers: [N, K]; rewards: [N, K] float32, detached.
    """

    layers: torch.Tensor
    rewards: torch.Tensor

    def advantage(self) -> torch.Tensor:
        """[N, K] each reward minus the mean of the [SEG]'s other rewards (REINFORCE leave-one-out, Kool et al. 2019).

        Unbiased, as the others do not depend on the sample; a baseline of this [SEG] that needs no critic.
        """
        count = self.rewards.shape[1]
        return (self.rewards - self.rewards.mean(1, keepdim=True)) * (count / (count - 1))


def _mean_over_ranks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of all values over all ranks (0 without any), and their number, both 0-d."""
    total = torch.stack([values.sum(), values.new_full((), values.numel())])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total[0] / total[1].clamp(min=1), total[1]


def policy_entropy(log_policy: torch.Tensor) -> torch.Tensor:
    """Of each row of log-probabilities, in nats: [N, L] -> [N]. -inf, of layers that are no candidates, counts as 0."""
    return -(log_policy.exp() * log_policy.clamp(min=-1e4)).sum(-1)


def gumbel_noise(sample_ids: list[int], rows: list[int], num_layers: int, seed: int = 0) -> torch.Tensor:
    """[N, L] float32 standard Gumbel noise, a function of (seed, sample index, index of the [SEG] in its sample) alone.

    It does not depend on rank, batch or device: the same run on another number of processes samples the same layers.

    Args:
        sample_ids: sample index per row.
        rows: [N] row of each [SEG], ascending.
    """
    blocks = []
    for row, sample_id in enumerate(sample_ids):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + sample_id * 7919 + 17) % 2**63)
        uniform = torch.rand(rows.count(row), num_layers, generator=generator).clamp(1e-10, 1 - 1e-7)
        blocks.append(-(-uniform.log()).log())
    return torch.cat(blocks) if blocks else torch.zeros(0, num_layers)


def similarity_of_all_layers(
    hidden: tuple[torch.Tensor, ...], seg_states: torch.Tensor, seg_rows: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Eq. 6 for every layer at once: S[n, l, p] = <h_seg[n, l], h_img[row(n), l, p]>, 0 where a cell has no token.

    L x V x D multiplications per [SEG] are negligible beside the language model. Computing them for all layers needs
    no copy of the image states per [SEG], nor a synchronization with the device to know which layer was chosen.

    Args:
        hidden: L tensors [B, T, D].
        seg_states: [N, L, D].
        seg_rows: [N] row of each [SEG].
        batch: tells the image's tokens and their cells.

    Returns:
        [N, L, P] float32.
    """
    scores = []
    for layer, states in enumerate(hidden):
        # in float32: an image's states are alike, and min-max scaling their small differences leaves little of 8 bits
        every_row = torch.einsum("bvd,nd->nbv", batch.image_states(states).float(), seg_states[:, layer].float())
        scores.append(every_row[torch.arange(len(seg_rows), device=seg_rows.device), seg_rows])
    of_tokens = torch.stack(scores, 1)  # [N, L, V]
    cells = batch.image_cells[seg_rows][:, None].expand(of_tokens.shape)
    return of_tokens.new_zeros(*of_tokens.shape[:2], batch.valid.shape[1]).scatter(2, cells, of_tokens)


def rows_of(counts: list[int]) -> list[int]:
    """[2, 0, 1] -> [0, 0, 2]: the row of each [SEG], from the number per row."""
    return [row for row, count in enumerate(counts) for _ in range(count)]


@dataclass
class Grounding:
    """The [SEG] tokens of a batch with what PPM knows about them before a layer is chosen.

    Attributes:
        states: [N, L, D]; scores: [N, L, P] similarities (Eq. 6); log_policy: [N, L].
        rows: [N] row of each [SEG], on the model's device; counts: [SEG] tokens per row, on the host.
        fused: with soft gating, the weighted average of all layers: its [SEG] states [N, D] and similarities [N, P].
        codebook: [N, K, L, D] with several [SEG] tokens per target, of which ``states`` is the mean; else None.
        weights: [N, L] with soft gating.
    """

    states: torch.Tensor
    scores: torch.Tensor
    log_policy: torch.Tensor
    rows: torch.Tensor
    counts: list[int]
    fused: tuple[torch.Tensor, torch.Tensor] | None = None
    codebook: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def select_layers(self, layers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[SEG] states [N, D] and similarities [N, P] of the chosen layers [N]; the fused ones with soft gating."""
        if self.fused is not None:
            return self.fused
        index = torch.arange(len(layers), device=layers.device)
        return self.states[index, layers], self.scores[index, layers]

    def select_codebook(self, layers: torch.Tensor) -> torch.Tensor:
        """States [N, K, D] of a target's tokens in the chosen layers [N]; the weighted average with soft gating."""
        assert self.codebook is not None
        if self.weights is not None:
            return torch.einsum("nl,nkld->nkd", self.weights.to(self.codebook.dtype), self.codebook)
        return self.codebook[torch.arange(len(layers), device=layers.device), :, layers]

    def select_tokens(self, segs: list[int]) -> Grounding:
        """The [SEG] tokens at ``segs`` (ascending indices, repetitions allowed), without ``fused``."""
        index = torch.tensor(segs, dtype=torch.int64, device=self.rows.device)
        rows = rows_of(self.counts)
        selected_rows = [rows[n] for n in segs]
        counts = [selected_rows.count(row) for row in range(len(self.counts))]
        codebook = None if self.codebook is None else self.codebook[index]
        chosen = self.states[index], self.scores[index], self.log_policy[index], self.rows[index]
        return Grounding(*chosen, counts, codebook=codebook)


def fuse_layers(
    hidden: tuple[torch.Tensor, ...],
    seg_states: torch.Tensor,
    weights: torch.Tensor,
    seg_rows: torch.Tensor,
    batch: Batch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft gating (Table 9): h = sum_l w_l h_l of the [SEG] and of every image token, and their similarities.

    A product with a sum is the sum of the products: no fused copy of the image states is made, which would hold
    P x D numbers for each [SEG].

    Args:
        weights: [N, L], rows sum to 1; the others as in ``similarity_of_all_layers``.

    Returns:
        the fused [SEG] states [N, D] and their similarities [N, P], float32.
    """
    fused = torch.einsum("nl,nld->nd", weights.to(seg_states.dtype), seg_states)
    scores = similarity_of_all_layers(hidden, fused[:, None].expand_as(seg_states), seg_rows, batch)
    return fused, torch.einsum("nl,nlp->np", weights, scores)
