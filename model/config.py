"""Configurations: the sizes of the three parts, the special tokens' ids, and the method's settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from model import layer_rules
from model.backbones import BACKBONES
from model.backbones.llava import ClipReader, LlavaLlamaConfig
from model.decoders import DECODERS
from model.decoders.pixel_decoder import PixelDecoderShape
from model.decoders.sam2 import Sam2
from model.decoders.segment_anything import SamShape
from model.geometry import Fit
from model.processing.reader import ImageReader
from model.processing.template import ChatTemplate
from model.settings import (
    MASK_REWARDS,
    METHOD_FIELDS,
    RUN_NAMES,
    CheckpointSettings,
    DecoderKind,
    DecoderSettings,
    ExperimentalSettings,
    LossSettings,
    PpmSettings,
    contradictions,
    decoder_kind,
    value_problems,
)

OF_CLIP = ("clip_fit", "clip_resize", "image_pool", "map_side", "map_normalization", "point_rule")  # settings of LLaVA


def packing_problem(model_type: str, layer_types: Sequence[str] | None) -> str:
    """Why a language model with these layers cannot read packed rows; "" if it can."""
    kinds = Counter(layer_types or ())
    others = {kind: count for kind, count in kinds.items() if kind != "full_attention"}
    if not others:
        return ""
    named = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    return (
        f"{model_type} has {named} among its {kinds.total()} layers: conversations about an image share a row, and "
        "only layers of full attention keep them apart; use a model that has no others"
    )


class GroundingConfig(
    PreTrainedConfig, PpmSettings, LossSettings, DecoderSettings, ExperimentalSettings, CheckpointSettings
):
    """What a model of any backbone is: its mask decoder's sizes, the special tokens' ids, and the method's settings.

    Args:
        sam_config: ``SamShape`` as a dictionary; without a meaning for decoders with ``decoder_config``.
        seg_token_id, rej_token_id: ids of ``[SEG]`` and ``[REJ]``.
        codebook_ids: with several [SEG] tokens per target, the ids of all, in their order; the last is
            ``seg_token_id``, which completes the target. None = there is one.
        decoder_config: sizes of another mask decoder than SAM: ``PixelDecoderShape`` as a dictionary, or what
            ``Sam2.sizes`` gives; None = its default sizes (SAM 2.1 Large, facebook/sam3).
        **kwargs: the method's settings (``model.settings``, the paper's values as defaults), and the backbone's.

    Attributes:
        backbone: its name in ``model.backbones.BACKBONES``.

    Raises:
        ValueError: naming every invalid or contradictory setting.
    """

    backbone: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "model_type" in vars(cls):
            AutoConfig.register(cls.model_type, cls, exist_ok=True)  # AutoTokenizer looks it up

    def __init__(
        self,
        sam_config: dict | None = None,
        seg_token_id: int | None = None,
        rej_token_id: int | None = None,
        codebook_ids: list[int] | None = None,
        decoder_config: dict | None = None,
        **kwargs,
    ) -> None:
        self.sam_config = sam_config or SamShape().to_dict()
        self.seg_token_id, self.rej_token_id, self.codebook_ids = seg_token_id, rej_token_id, codebook_ids
        self.decoder_config = decoder_config
        for name, item in METHOD_FIELDS.items():
            setattr(self, name, kwargs.pop(name, item.default))
        self.map_terms = tuple(self.map_terms)  # JSON has lists
        super().__init__(**kwargs)
        self.fit_backbone()
        self.check_settings()
        decoder = DECODERS[self.mask_decoder]
        if issubclass(decoder, Sam2) and not self.decoder_config:
            self.decoder_config = decoder.sizes(decoder.default_sizes)

    def fit_backbone(self) -> None:
        """Hook for what the settings change about the backbone, before they are checked."""

    def backbone_problems(self) -> Iterator[tuple[str, str]]:
        """(setting, problem) of settings that the backbone lacks, and of a language model that cannot be packed."""
        for name in OF_CLIP:
            value = getattr(self, name)
            if value != METHOD_FIELDS[name].default:
                yield (
                    name,
                    f"{value!r} is for LLaVA, which pads or crops images for CLIP; {self.backbone} has no such input",
                )
        if not self.decoder_kind.has_encoder:
            yield "mask_decoder", f"{self.mask_decoder} reads the states of LLaVA's CLIP, which {self.backbone} lacks"
        if problem := packing_problem(self.text.model_type, getattr(self.text, "layer_types", None)):
            yield "text_config", problem

    def new_reader(self, folder: Path | None = None) -> ImageReader:
        """The reader of the backbone's images.

        Args:
            folder: of base weights, with the files of their image processor; None = as the configuration says.
        """
        raise NotImplementedError

    @property
    def map_fit(self) -> Fit:
        """How an image fits what its similarity maps show."""
        return Fit("stretch")

    @property
    def num_image_tokens(self) -> int:
        """Tokens of an image, at most."""
        return self.max_image_tokens

    @property
    def template(self) -> ChatTemplate:
        """The backbone's chat template."""
        return BACKBONES[self.backbone].reader.template

    @property
    def text(self) -> PreTrainedConfig:
        """The language model's sizes."""
        return self.get_text_config()

    @property
    def decoder_kind(self) -> DecoderKind:
        """What is known of the mask decoder."""
        return decoder_kind(vars(self))

    @property
    def num_scales(self) -> int:
        """S, the prompts that the decoder takes for a [SEG], each from tokens of its own."""
        return self.decoder_kind.scales

    @property
    def codebook_size(self) -> int:
        """K, the [SEG] tokens of a target."""
        return self.num_scales * self.codebook_tokens

    @property
    def codebook(self) -> tuple[int, ...]:
        """Ids of a target's [SEG] tokens: S times ``codebook_tokens``, scale by scale; -1 = not known yet."""
        last = -1 if self.seg_token_id is None else self.seg_token_id
        return tuple(self.codebook_ids or [*[-1] * (self.codebook_size - 1), last])

    def processor_settings(self, folder: Path | None = None) -> dict[str, Any]:
        """Arguments of ``UGroundProcessor`` that follow from the model; ``folder``: of ``new_reader``."""
        return {
            "reader": self.new_reader(folder),
            "sam_side": self.sam_side,
            "sam_input": self.decoder_kind.input,
            "codebook": self.codebook_size,
            "thought_format": self.thought_format,
        }

    @property
    def sam_side(self) -> int:
        """Side in pixels of the mask decoder's square input; 0 = it has none."""
        return DECODERS[self.mask_decoder].side_of(self)

    @property
    def num_layers(self) -> int:
        """L, hidden states: the embeddings and the output of each decoder layer."""
        return self.text.num_hidden_layers + 1

    @property
    def candidates(self) -> range:
        """The layers that the policy can choose."""
        return range(self.first_candidate_layer, self.last_candidate_layer % self.num_layers + 1)

    @property
    def selection(self) -> layer_rules.LayerRule:
        """The layer rule of training."""
        return layer_rules.parse(self.layer_selection, self.num_layers, self.candidates, "training")

    @property
    def layer_policy(self) -> str:
        """The layer rule of ``predict``: ``eval_layer_policy``, or else the one that follows from training."""
        return self.eval_layer_policy or self.selection.at_inference

    def layer_rule(self, layer_policy: str | None = None) -> layer_rules.LayerRule:
        """The layer rule that ``layer_policy`` names; None = the model's own.

        Raises:
            ValueError: if the rule is unknown, its argument does not fit the model's layers, or it needs ratings that
                the model does not have.
        """
        rule = layer_rules.parse(layer_policy or self.layer_policy, self.num_layers, self.candidates)
        if isinstance(rule, layer_rules.BestRated) and not self.rates_masks:
            raise ValueError(
                f"layer policy {layer_policy or self.layer_policy}: this model's mask decoder was not trained to rate "
                "its masks (iou_loss_weight 0); use another layer policy"
            )
        return rule

    @property
    def rates_masks(self) -> bool:
        """Whether the mask decoder's predicted IoU means something: SAM's does from its pre-training."""
        return self.decoder_kind.has_encoder or self.iou_loss_weight > 0

    @property
    def rewards_all_layers(self) -> bool:
        """Whether the gate learns from the maps of all layers, not only from the chosen layer's."""
        gate, of_maps = self.selection.gate, self.reward_terms not in MASK_REWARDS
        return gate == "classifier" or (gate == "policy" and self.policy_gradient != "reinforce" and of_maps)

    @property
    def sampled_layers(self) -> int:
        """K, the layers that training samples for each [SEG]; the first one's mask is trained."""
        leave_one_out = self.selection.gate == "policy" and self.policy_gradient == "leave_one_out"
        return self.policy_samples if leave_one_out else 1

    @property
    def reads_padding(self) -> bool:
        """Whether maps depend on the states of padded patches."""
        return self.map_normalization == "all"

    def check_settings(self) -> None:
        """Validates all settings.

        Raises:
            ValueError: naming every invalid or contradictory setting.
        """
        method = {name: getattr(self, name) for name in METHOD_FIELDS}
        problems = [*value_problems(method, METHOD_FIELDS)]
        problems = problems or [*contradictions(method, self.num_layers)]
        problems += self.backbone_problems()
        if problems:
            named = {name: f"{name} (a run's --{run_name})" for name, run_name in RUN_NAMES.items()}
            raise ValueError("; ".join(f"{named.get(name, name)}: {text}" for name, text in problems))


class UGroundConfig(GroundingConfig, LlavaLlamaConfig):
    """The configuration of UGround on LLaVA: ``GroundingConfig`` and ``LlavaLlamaConfig``."""

    model_type = "uground"
    backbone = "llava"
    num_image_tokens = LlavaLlamaConfig.num_image_tokens

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)  # else transformers makes a constructor of the fields

    def fit_backbone(self) -> None:
        if self.clip_resize:
            self.vision_config = {**self.vision_config, "image_size": self.clip_resize}
        if not (self.decoder_kind.has_encoder or self.decoder_config):
            clip = self.clip_config
            layers = clip.num_hidden_layers, self.mm_vision_select_layer
            widths = clip.hidden_size, self.hidden_size, self.decoder_width
            self.decoder_config = PixelDecoderShape.new(*layers, *widths).to_dict()

    def backbone_problems(self) -> Iterator[tuple[str, str]]:
        if self.mm_projector_type not in (choices := ("mlp2x_gelu", "linear")):
            yield "mm_projector_type", f"{self.mm_projector_type!r} is not one of {', '.join(choices)}"
        if self.max_image_tokens != METHOD_FIELDS["max_image_tokens"].default:
            count = self.num_image_tokens
            yield "max_image_tokens", f"{self.max_image_tokens} has no effect: LLaVA's CLIP gives {count}; leave it out"
        if not isinstance(self.mm_vision_select_layer, int):
            yield "mm_vision_select_layer", f"{self.mm_vision_select_layer!r} is not a whole number"
        if self.clip_side % self.cell_side:
            kind = "clip_resize" if self.clip_resize else "image_pool"
            cell = f"{self.clip_patch} (CLIP's patch) x {self.image_pool} (image_pool)"
            yield kind, f"CLIP's input of {self.clip_side} pixels is not a multiple of {cell}"

    def new_reader(self, folder: Path | None = None) -> ClipReader:
        return ClipReader(self.clip_side, self.cell_side, self.clip_fit)

    @property
    def map_fit(self) -> Fit:
        """How an image fits CLIP's input, or a square of ``map_side``."""
        return Fit(self.clip_fit, self.map_side or self.clip_side)
