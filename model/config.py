"""UGroundConfig: the sizes of the three parts, the special tokens' ids, and the method's settings."""

from __future__ import annotations

from transformers import AutoConfig

from model.llava import LlavaLlamaConfig
from model.processing.transforms import CLIP_FITS
from model.sam import SamShape
from model.settings import (
    METHOD_FIELDS,
    CheckpointSettings,
    ExperimentalSettings,
    LossSettings,
    PpmSettings,
    contradictions,
    value_problems,
)


class UGroundConfig(LlavaLlamaConfig, PpmSettings, LossSettings, ExperimentalSettings, CheckpointSettings):
    """Sizes of the three parts, ids of the special tokens, and the method's settings.

    Args:
        sam_config: ``SamShape`` as a dictionary.
        seg_token_id, rej_token_id: ids of ``[SEG]`` and ``[REJ]``.
        **kwargs: the method's settings (``model.settings``, the paper's values as defaults), LLaVA's and LLaMA's.

    Raises:
        ValueError: for settings without a meaning, all of them at once.
    """

    model_type = "uground"

    def __init__(
        self,
        sam_config: dict | None = None,
        seg_token_id: int | None = None,
        rej_token_id: int | None = None,
        **kwargs,
    ) -> None:
        self.sam_config = sam_config or SamShape().to_dict()
        self.seg_token_id, self.rej_token_id = seg_token_id, rej_token_id
        for name, item in METHOD_FIELDS.items():
            setattr(self, name, kwargs.pop(name, item.default))
        self.map_terms = tuple(self.map_terms)  # JSON has lists
        super().__init__(**kwargs)
        self.check_settings()

    @property
    def layer_policy(self) -> str:
        """How ``predict`` chooses layers: the mode of a trained policy, or as in training where that had none."""
        taught = {"policy": "argmax", "ce_soft": "soft"}.get(self.layer_selection, self.layer_selection)
        return self.eval_layer_policy or taught

    @property
    def rewards_all_layers(self) -> bool:
        """Whether the gate learns from the maps of all layers, not from the chosen one's alone."""
        exact = self.layer_selection == "policy" and self.policy_gradient == "exact"
        return exact or self.layer_selection == "ce_soft"

    def check_settings(self) -> None:
        """Raises ValueError if a setting has no meaning."""
        method = {name: getattr(self, name) for name in METHOD_FIELDS}
        problems = [*value_problems(method, METHOD_FIELDS)]
        problems = problems or [*contradictions(method, self.num_hidden_layers + 1)]
        for name, choices in (("clip_fit", CLIP_FITS), ("mm_projector_type", ("mlp2x_gelu", "linear"))):
            if getattr(self, name) not in choices:
                problems.append((name, f"{getattr(self, name)!r} is not one of {', '.join(choices)}"))
        if self.point_rule != "extremes" and self.clip_fit != "crop":
            problems.append(("point_rule", f"{self.point_rule} needs clip_fit crop: points lie in what a crop shows"))
        if problems:
            raise ValueError("; ".join(f"{name}: {text}" for name, text in problems))


AutoConfig.register(UGroundConfig.model_type, UGroundConfig, exist_ok=True)  # AutoTokenizer asks for it
