"""UGroundConfig: the sizes of the three parts, the special tokens' ids, and the method's settings."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoConfig

from model import layer_rules
from model.llava import LlavaLlamaConfig
from model.points import READ_POINTS
from model.sam import SamShape

MAP_TERMS = ("gaussian_bce", "gaussian_dice", "bce", "dice")
CHOICES = {
    "map_normalization": ("valid", "all"),
    "phi_layer": ("chosen", "last"),
    "reward": ("seg", "batch"),
    "reward_terms": ("both", "bce", "dice", "iou"),
    "policy_gradient": ("reinforce", "exact"),
    "baseline": ("average", "critic"),
    "baseline_start": ("zero", "first"),
    "positive_weight": ("mask", "image"),
    "point_rule": ("extremes", *READ_POINTS),
    "clip_fit": ("pad", "crop"),
    "mm_projector_type": ("mlp2x_gelu", "linear"),
}
RELEASED = {  # how the paper's published checkpoints were trained and are evaluated, where that is not the paper
    "first_candidate_layer": 0,
    "eval_layer_policy": "last",
    "reward": "batch",
    "map_normalization": "all",
    "map_side": 336,
    "positive_weight": "image",
    "policy_loss_weight": 0.4,
}


class UGroundConfig(LlavaLlamaConfig):
    """Sizes of the three parts, ids of the special tokens, and the method's settings (paper's values as defaults).

    Args:
        sam_config: ``SamShape`` as a dictionary.
        seg_token_id, rej_token_id: ids of ``[SEG]`` and ``[REJ]``.
        layer_selection: the layer whose hidden state and similarity map a [SEG] uses in training, by a rule of
            ``model.layer_rules``: ``policy`` (SSC), ``last``, ``fixed:K``, ``soft``, ...
        policy_gradient: ``reinforce`` = from the sampled layer's reward (Eq. 5), ``exact`` = of the expected reward,
            from the rewards of all layers at the map's own resolution; it has no variance and takes no baseline.
        first_candidate_layer: 1 = the paper's layers, 0 = the embeddings too (released weights).
        last_candidate_layer: highest layer that can be chosen; -1 = the last.
        phi_layer: ``chosen`` = phi reads the layer that the map is taken from, ``last`` = always the last one.
        eval_layer_policy: the rule of ``predict`` unless told otherwise; None = the one that training taught
            (``layer_policy``).
        seg_prompt, mask_prompt: phi([SEG]) and the similarity map as SAM prompts (Table 6).
        point_prompts: so many foreground and as many background points from the similarity map as SAM prompts (READ);
            0 = none.
        point_rule: ``extremes`` = the ``point_prompts`` highest and as many of the lowest patches; ``read_7b`` and
            ``read_13b`` = ``point_prompts`` points in all, by the thresholds of READ's two published checkpoints.
        reward: ``seg`` = one per [SEG] (Algorithm 1), ``batch`` = one sum for all of a batch (released).
        reward_terms: the map's negative Gaussian BCE, dice, or ``both`` (Table 8), or its ``iou`` with the mask.
        baseline: what the reward is compared with, its moving ``average`` (Algorithm 1) or a ``critic``'s guess.
        baseline_start: of the moving average (Algorithm 1 leaves it open), ``zero`` or the ``first`` mean reward.
            Rewards are far from zero, so that from there the gate's first steps are little but noise.
        baseline_decay: alpha of the moving average; critic_width: hidden units of the critic.
        entropy_bonus: reward per nat of the policy's entropy; scale_advantage: advantages over their root mean square.
        map_normalization: ``valid`` = min-max over patches that show the image, ``all`` = padded ones too (released).
        map_side: side of the padded square on which a map is enlarged first; 0 = CLIP's input side.
        map_terms: what constrains the map, any of ``MAP_TERMS`` (Table 7); the Gaussian ones take the soft mask.
        gaussian_kernel, gaussian_sigma: softening of the ground truth, in pixels.
        positive_weight: of the map's loss, background over foreground of each ``mask``, or of all masks of an
            ``image`` together (released).
        *_loss_weight: lambda of Eq. 8 and 9; the critic's is a share of the policy's.
        policy_seed: seeds the sampled layers, together with the sample's number.
    """

    model_type = "uground"

    def __init__(
        self,
        sam_config: dict | None = None,
        seg_token_id: int | None = None,
        rej_token_id: int | None = None,
        layer_selection: str = "policy",
        policy_gradient: str = "reinforce",
        first_candidate_layer: int = 1,
        last_candidate_layer: int = -1,
        phi_layer: str = "chosen",
        eval_layer_policy: str | None = None,
        seg_prompt: bool = True,
        mask_prompt: bool = True,
        point_prompts: int = 0,
        point_rule: str = "extremes",
        reward: str = "seg",
        reward_terms: str = "both",
        baseline: str = "average",
        baseline_start: str = "zero",
        baseline_decay: float = 0.9,
        critic_width: int = 128,
        entropy_bonus: float = 0.0,
        scale_advantage: bool = False,
        map_normalization: str = "valid",
        map_side: int = 0,
        map_terms: Sequence[str] = ("gaussian_bce", "gaussian_dice"),
        gaussian_kernel: int = 31,
        gaussian_sigma: float = 7.0,
        positive_weight: str = "mask",
        text_loss_weight: float = 1.0,
        mask_loss_weight: float = 1.0,
        map_loss_weight: float = 1.0,
        policy_loss_weight: float = 0.1,
        critic_loss_weight: float = 1.0,
        bce_loss_weight: float = 2.0,
        dice_loss_weight: float = 4.0,
        policy_seed: int = 0,
        **kwargs,
    ) -> None:
        self.sam_config = sam_config or SamShape().to_dict()
        self.seg_token_id, self.rej_token_id = seg_token_id, rej_token_id
        self.layer_selection, self.policy_gradient = layer_selection, policy_gradient
        self.first_candidate_layer, self.last_candidate_layer = first_candidate_layer, last_candidate_layer
        self.phi_layer, self.eval_layer_policy = phi_layer, eval_layer_policy
        self.seg_prompt, self.mask_prompt = seg_prompt, mask_prompt
        self.point_prompts, self.point_rule = point_prompts, point_rule
        self.reward, self.reward_terms, self.map_normalization = reward, reward_terms, map_normalization
        self.baseline_start = baseline_start
        self.baseline, self.baseline_decay, self.critic_width = baseline, baseline_decay, critic_width
        self.entropy_bonus, self.scale_advantage = entropy_bonus, scale_advantage
        self.map_terms = tuple(map_terms)
        self.gaussian_kernel, self.gaussian_sigma = gaussian_kernel, gaussian_sigma
        self.map_side, self.positive_weight = map_side, positive_weight
        self.text_loss_weight, self.mask_loss_weight = text_loss_weight, mask_loss_weight
        self.map_loss_weight, self.policy_loss_weight = map_loss_weight, policy_loss_weight
        self.critic_loss_weight = critic_loss_weight
        self.bce_loss_weight, self.dice_loss_weight = bce_loss_weight, dice_loss_weight
        self.policy_seed = policy_seed
        super().__init__(**kwargs)
        self.check_settings()

    @property
    def candidates(self) -> range:
        """The layers that the policy can choose."""
        return range(self.first_candidate_layer, self.last_candidate_layer % (self.num_hidden_layers + 1) + 1)

    @property
    def selection(self) -> layer_rules.LayerRule:
        """The rule of training."""
        return layer_rules.parse(self.layer_selection, self.num_hidden_layers + 1, self.candidates, "training")

    @property
    def layer_policy(self) -> str:
        """How ``predict`` chooses layers: the mode of a trained policy, or as in training where that had none."""
        return self.eval_layer_policy or self.selection.at_inference

    def layer_rule(self, layer_policy: str | None = None) -> layer_rules.LayerRule:
        """The rule that ``predict`` is told to take; None = the model's own.

        Raises:
            ValueError: if there is no such rule, or its argument does not fit the model's layers.
        """
        return layer_rules.parse(layer_policy or self.layer_policy, self.num_hidden_layers + 1, self.candidates)

    @property
    def rewards_all_layers(self) -> bool:
        """Whether the gate learns from the maps of all layers, not from the chosen one's alone."""
        gate = self.selection.gate
        return gate == "classifier" or (gate == "policy" and self.policy_gradient == "exact")

    def check_settings(self) -> None:
        """Raises ValueError if a setting has no meaning."""
        num_layers = self.num_hidden_layers + 1
        first, last = self.first_candidate_layer, self.last_candidate_layer
        if not (0 <= first <= last % num_layers and -1 <= last < num_layers):
            raise ValueError(
                f"first_candidate_layer {first} to last_candidate_layer {last} is no range of the layers 0 (the "
                f"embeddings) to {num_layers - 1} (the last, also -1)"
            )
        layer_rules.parse(self.layer_selection, num_layers, self.candidates, "training")
        layer_rules.parse(self.layer_policy, num_layers, self.candidates)
        if not (self.seg_prompt or self.mask_prompt or self.point_prompts):
            raise ValueError("seg_prompt and mask_prompt are both off: SAM would have no prompt; switch one on")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {' or '.join(map(repr, choices))}")
        if unknown := sorted(set(self.map_terms) - set(MAP_TERMS)):
            raise ValueError(f"map_terms: {', '.join(unknown)} unknown; choose from {', '.join(MAP_TERMS)}")
        if self.point_rule != "extremes" and self.clip_fit != "crop":
            raise ValueError(f"point_rule {self.point_rule} needs clip_fit crop: points lie in what a crop shows")
        if self.policy_gradient == "exact" and (self.reward, self.baseline) != ("seg", "average"):
            raise ValueError("policy_gradient exact knows each layer's reward per [SEG]: no batch reward, no critic")


AutoConfig.register(UGroundConfig.model_type, UGroundConfig, exist_ok=True)  # AutoTokenizer asks for it
