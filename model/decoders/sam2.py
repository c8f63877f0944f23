"""SAM 2 (2.1) by transformers' classes, for single images: Hiera's features of three scales, prompts, masks.

Source: Sam2Model of transformers and SAM2ImagePredictor of facebookresearch/sam2. What a video needs (memory) is not
built. The input is the image stretched to a square, so that mask prompts and masks are, too.

Legend: B images, N prompts, E prompt width (256), R input side (1024), G side of the coarsest grid (64), 4G side of
mask prompts and low-resolution masks (256).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Sam2Config, Sam2Model

from model.decoders.base import EncodingDecoder

if TYPE_CHECKING:
    from model.config import GroundingConfig

LARGE: dict[str, Any] = {  # sam2.1_hiera_l.yaml of facebookresearch/sam2; what is not here has transformers' default
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 144,
            "num_attention_heads": 2,
            "blocks_per_stage": [2, 6, 36, 4],
            "embed_dim_per_stage": [144, 288, 576, 1152],
            "num_attention_heads_per_stage": [2, 4, 8, 16],
            "window_size_per_stage": [8, 4, 16, 8],
            "global_attention_blocks": [23, 33, 43],
        },
        "backbone_channel_list": [1152, 576, 288, 144],
    }
}
GENERAL = {item.name for item in fields(PreTrainedConfig)}  # of any configuration; its dtype would override a run's


def sizes_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a configuration and those inside it declare, as plain values."""
    values: dict[str, Any] = {}
    for item in fields(config):  # type: ignore[arg-type]  # transformers makes each a dataclass
        if item.name not in GENERAL:
            value = getattr(config, item.name)
            values[item.name] = sizes_of(value) if isinstance(value, PreTrainedConfig) else value
    return {"model_type": config.model_type, **values}


class Sam2(EncodingDecoder):
    """A Sam2Model's modules under its own key names.

    Frozen: the encoder and all that its features depend on, the object score, which judges frames of a video.

    Args:
        config: of ``config_class``.

    Raises:
        ValueError: if its parts do not fit each other.
    """

    fit_kind = "stretch"
    encoder_key = "vision_encoder"
    config_class: ClassVar[type[PreTrainedConfig]] = Sam2Config
    model_class: ClassVar[type[PreTrainedModel]] = Sam2Model
    default_sizes: ClassVar[dict[str, Any]] = LARGE

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.check_sizes(config)
        config.mask_decoder_config.dynamic_multimask_via_stability = False  # else evaluation would decode other masks
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float32)  # positions are computed, not loaded
            model: Any = self.model_class(config)
        finally:
            torch.set_default_dtype(dtype)
        self.shape = config
        self.image_side, self.prompt_width = model.prompt_encoder.input_image_size, model.prompt_encoder.hidden_size
        self.vision_encoder, self.no_memory_embedding = model.vision_encoder, model.no_memory_embedding
        self.shared_image_embedding = model.shared_image_embedding
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        points = self.prompt_encoder.shared_embedding  # of the image's frame; transformers ties them when it loads
        points.positional_embedding.copy_(self.shared_image_embedding.positional_embedding)
        self.to(dtype)
        self.keep_positions_float()  # also on the meta device

    @classmethod
    def of(cls, config: GroundingConfig) -> Sam2:
        assert config.decoder_config is not None
        return cls(cls.config_class(**config.decoder_config))

    @classmethod
    def side_of(cls, config: GroundingConfig) -> int:
        assert config.decoder_config is not None
        return config.decoder_config["prompt_encoder_config"]["image_size"]

    @classmethod
    def sizes(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """A published ``config.json`` as ``UGroundConfig.decoder_config``: sizes alone.

        Raises:
            ValueError: naming parts that do not fit each other.
            Exception: of any kind, for values that transformers refuses.
        """
        config = cls.config_class(**{name: raw[name] for name in cls.parts() if name in raw})
        cls.check_sizes(config)
        return sizes_of(config)

    @classmethod
    def parts(cls) -> list[str]:
        """Names of the configurations inside ``config_class``."""
        return ["vision_config", "prompt_encoder_config", "mask_decoder_config"]

    @classmethod
    def check_sizes(cls, config: Any) -> None:
        """Raises a ValueError if the encoder's features are not those that prompt encoder and mask decoder take."""
        vision, prompt, decoder = config.vision_config, config.prompt_encoder_config, config.mask_decoder_config
        side, grid = prompt.image_size, prompt.image_size // prompt.patch_size
        expected = [[scale * grid] * 2 for scale in (4, 2, 1)]
        for name, actual, wanted in (
            ("the encoder's image_size", _both(vision.backbone_config.image_size), [side, side]),
            ("backbone_feature_sizes", [_both(size) for size in vision.backbone_feature_sizes[:3]], expected),
            ("the pixels of a coarsest feature", cls.coarsest_stride(vision), prompt.patch_size),
            ("fpn_hidden_size", vision.fpn_hidden_size, prompt.hidden_size),
            ("the mask decoder's hidden_size", decoder.hidden_size, prompt.hidden_size),
        ):
            if actual != wanted:
                raise ValueError(
                    f"{name} is {actual}, but prompt_encoder_config (image_size {side}, patch_size "
                    f"{prompt.patch_size}, hidden_size {prompt.hidden_size}) needs {wanted}; was the file edited?"
                )

    @staticmethod
    def coarsest_stride(vision: Any) -> float:
        """Side in pixels of what a feature of the third scale shows."""
        backbone = vision.backbone_config
        return _both(backbone.patch_stride)[0] * _both(backbone.query_stride)[0] ** 2

    @property
    def mask_side(self) -> int:
        """4G, the side of mask prompts and of low-resolution masks (256 for the published SAM 2)."""
        return self.prompt_encoder.mask_input_size[0]

    def encoder_weights(self) -> Iterable[torch.Tensor]:
        parts: tuple[nn.Module, ...] = self.vision_encoder, self.mask_decoder.conv_s0, self.mask_decoder.conv_s1
        return [*(value for part in parts for value in part.state_dict().values()), self.no_memory_embedding]

    def encoder_settings(self) -> str:
        """Weights do not tell, for instance, which blocks attend to windows."""
        text = json.dumps(sizes_of(self.shape.vision_config), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """[1, 4 E G G]: the features of three scales one after the other, as ``scales`` splits them."""
        fine, middle, coarse = self.vision_encoder(image).fpn_hidden_states[:3]
        coarse = coarse + self.no_memory_embedding.view(1, -1, 1, 1)
        features = self.mask_decoder.conv_s0(fine), self.mask_decoder.conv_s1(middle), coarse
        return torch.cat([feature.flatten(1) for feature in features], 1)

    @property
    def scale_shapes(self) -> list[tuple[int, int, int]]:
        """(E / 8, 4G, 4G), (E / 4, 2G, 2G), (E, G, G)."""
        width, side = self.prompt_width, self.mask_side
        return [(width // 8, side, side), (width // 4, side // 2, side // 2), (width, side // 4, side // 4)]

    @property
    def feature_shape(self) -> tuple[int]:
        return (sum(map(math.prod, self.scale_shapes)),)

    def scales(self, embeddings: torch.Tensor) -> list[torch.Tensor]:
        """Views of [N, 4 E G G] as [N, *shape] for each of ``scale_shapes``."""
        shapes = self.scale_shapes
        return [part.unflatten(1, s) for part, s in zip(embeddings.split([*map(math.prod, shapes)], 1), shapes)]

    def embed_points(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sparse prompts [N, K + 1, E] of points; the last is the padding for prompts without a box.

        Args:
            points: [N, K, 2] (x, y) in pixels of its input.
            labels: [N, K], 1 = foreground, 0 = background, -1 = not a point.
        """
        # as in the package, a pixel's corner is expected, and half a pixel added
        return self.prompt_encoder._embed_points(points[:, None] - 0.5, labels[:, None].long(), pad=True)[:, 0]

    def decode(
        self, embeddings: torch.Tensor, tokens: torch.Tensor | None, mask_prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, 4G, 4G] logits, the single-mask output, and the IoU [N] that its own head predicts for each.

        Args:
            embeddings: [N, 4 E G G]; tokens: [N, K, E] sparse prompts, or None; mask_prompts: [N, 1, 4G, 4G] or None.
        """
        n, dtype, width, side = len(embeddings), embeddings.dtype, self.prompt_width, self.mask_side
        if n == 0:  # its reshapes fail on zero prompts
            return embeddings.new_zeros(0, side, side), embeddings.new_zeros(0)
        *fine, coarse = self.scales(embeddings)
        if mask_prompts is None:
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, width, 1, 1).expand_as(coarse)
        else:
            dense = self.prompt_encoder.mask_embed(mask_prompts.to(dtype))
        if tokens is None:
            tokens = embeddings.new_zeros(n, 0, width)
        masks, iou, _, _ = self.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=self.dense_positions().to(dtype).expand(n, -1, -1, -1),
            sparse_prompt_embeddings=tokens[:, None].to(dtype),
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=fine,
        )
        return masks[:, 0, 0], iou[:, 0, 0]

    def dense_positions(self) -> torch.Tensor:
        """[1, E, G, G] float32, the positional encoding of the coarsest grid."""
        grid = self.mask_side // 4
        matrix = self.shared_image_embedding.positional_embedding
        centres = (torch.arange(grid, device=matrix.device, dtype=matrix.dtype) + 0.5) / grid
        points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)
        return self.shared_image_embedding(points).permute(2, 0, 1)[None]


def _both(size: Any) -> list[int]:
    """[height, width] of a side, or of both."""
    return list(size) if isinstance(size, (list, tuple)) else [size, size]
