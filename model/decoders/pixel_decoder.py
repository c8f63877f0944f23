"""PixelLM's pixel decoder (Ren et al., CVPR 2024, section 3.2): masks from CLIP's states, without a SAM.

CLIP's states of two depths are projected to the language model's width and reduced by a neck, one grid per scale. Each
scale has a two-way transformer, whose prompt is the scale's part of the codebook; the mask of a scale weights the next
scale's image features, and the mean of all scales is the mask. Built of segment-anything's blocks, as theirs; keys and
shapes follow MaskDecoderMultiScale and PixelLMMetaModel of MaverickRen/PixelLM (model/PixelLM.py,
model/segment_anything/modeling/mask_decoder_multi_scale.py).

Legend: B images, N prompts, S scales, P patches of CLIP's input on a grid of side G, C CLIP's width, D width of the
language model, E prompt width (256).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from segment_anything.modeling import PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import nn
from torch.nn import functional as F

from model.decoders.base import MaskDecoder

if TYPE_CHECKING:
    from model.config import GroundingConfig
    from model.structures import Batch

MASK_TOKENS = 4  # of SAM's decoder, of which the first is the single mask; the others are unused weights


@dataclass
class PixelDecoderShape:
    """The sizes of a pixel decoder. Defaults: PixelLM-7B.

    Attributes:
        clip_width, image_width: C, D; projector_width: hidden units of the projector between them.
        prompt_width, mask_channels, decoder_mlp, iou_hidden: widths, as in ``SamShape``.
        clip_depths: indices of CLIP's hidden states, one per scale, from the coarsest.
    """

    clip_width: int = 1024
    projector_width: int = 8192
    image_width: int = 4096
    prompt_width: int = 256
    mask_channels: int = 16
    decoder_depth: int = 2
    decoder_mlp: int = 2048
    iou_hidden: int = 256
    clip_depths: tuple[int, ...] = (-2, -11)

    @classmethod
    def new(
        cls, clip_layers: int, select_layer: int, clip_width: int, image_width: int, width: int
    ) -> PixelDecoderShape:
        """Of a decoder that is trained from scratch.

        Args:
            clip_layers: of the tower; select_layer: ``mm_vision_select_layer``; width: E.
        """
        return cls(
            clip_width=clip_width,
            projector_width=2 * image_width,
            image_width=image_width,
            prompt_width=width,
            decoder_mlp=8 * width,
            iou_hidden=width,
            clip_depths=clip_depths(clip_layers, select_layer),
        )

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], depths: tuple[int, ...]) -> PixelDecoderShape:
        """The sizes of a published decoder.

        Args:
            depths: of CLIP's hidden states, which the tensors do not tell.

        Raises:
            KeyError: if the checkpoint lacks a weight that tells a size.
            ValueError: if its number of scales is not that of ``depths``.
        """
        scales, width = state["mask_decoder.level_embed.weight"].shape
        if scales != len(depths):
            raise ValueError(f"the pixel decoder has {scales} scales (mask_decoder.level_embed), not {len(depths)}")
        layers = [key.split(".")[4] for key in state if key.startswith("mask_decoder.transformer.0.layers.")]
        return cls(
            clip_width=state["out_mm_projector.0.weight"].shape[1],
            projector_width=state["out_mm_projector.0.weight"].shape[0],
            image_width=state["out_mm_projector.2.weight"].shape[0],
            prompt_width=width,
            mask_channels=state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
            decoder_depth=1 + max(map(int, layers)),
            decoder_mlp=state["mask_decoder.transformer.0.layers.0.mlp.lin1.weight"].shape[0],
            iou_hidden=state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
            clip_depths=depths,
        )

    def to_dict(self) -> dict:
        return asdict(self) | {"clip_depths": list(self.clip_depths)}


def clip_depths(clip_layers: int, select_layer: int) -> tuple[int, int]:
    """The CLIP hidden states of the two scales: LLaVA's, and a shallower one, -11 of ViT-L's 24 layers, as theirs
    (clip_encoder.py), and in proportion for towers with fewer layers."""
    return select_layer, -max(3, 11 * clip_layers // 24)


class MultiScaleMaskDecoder(nn.Module):
    """SAM's mask decoder with a transformer per scale, under the names of the authors' module of this kind."""

    def __init__(self, shape: PixelDecoderShape) -> None:
        super().__init__()
        width, scales = shape.prompt_width, len(shape.clip_depths)
        self.transformer = nn.ModuleList(
            TwoWayTransformer(depth=shape.decoder_depth, embedding_dim=width, num_heads=8, mlp_dim=shape.decoder_mlp)
            for _ in range(scales)
        )
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, width)
        self.level_embed = nn.Embedding(scales, width)
        self.output_upscaling = _doubled(width, width // 8)
        self.upsample_2x = _doubled(width, width)
        self.pe1 = PositionEmbeddingRandom(width // 2)
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(width, width, width // 8, 3) for _ in range(MASK_TOKENS))
        self.iou_prediction_head = MLP(width, shape.iou_hidden, MASK_TOKENS, 3)

    def forward(
        self,
        scale: int,
        image: torch.Tensor,
        image_pe: torch.Tensor,
        token: torch.Tensor,
        dense: torch.Tensor,
        previous: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask of one scale.

        Args:
            image, dense: [N, E, G, G]; image_pe: [1, E, G, G] positional encoding; token: [N, 1, E].
            previous: [N, h, w] logits of the scale before; with them the grid is doubled.

        Returns:
            logits [N, 2G, 2G], or [N, 4G, 4G] with ``previous``, and their predicted IoU [N].
        """
        n = len(token)
        learned = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(n, -1, -1)
        tokens = torch.cat([learned, token], 1) + self.level_embed.weight[scale]
        if previous is not None:
            image = self.upsample_2x(image)
            size = image.shape[-2:]
            image = image * (1 + _resized(previous[:, None], size).sigmoid())
            image_pe = self.pe1(size)[None].to(image.dtype)
            dense = _resized(dense, size)
        source = image + dense
        states, mixed = self.transformer[scale](source, image_pe.expand(n, -1, -1, -1), tokens)
        upscaled = self.output_upscaling(mixed.transpose(1, 2).reshape(source.shape))
        masks = torch.einsum("nc,nchw->nhw", self.output_hypernetworks_mlps[0](states[:, 1]), upscaled)
        return masks, self.iou_prediction_head(states[:, 0])[:, 0]


def _doubled(width: int, out: int) -> nn.Sequential:
    """[N, width, h, w] -> [N, out, 2h, 2w]."""
    return nn.Sequential(nn.ConvTranspose2d(width, out, kernel_size=2, stride=2), LayerNorm2d(out), nn.GELU())


def _resized(values: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    return F.interpolate(values.float(), tuple(size), mode="bilinear", align_corners=False).to(values.dtype)


class PixelDecoder(MaskDecoder):
    """PixelLM's decoder with what stands before it: the projector of CLIP's states, and the neck.

    Args:
        side: of CLIP's square input in pixels, a multiple of ``patch``, the side of its patches.
    """

    image_side = 0

    def __init__(self, shape: PixelDecoderShape, side: int, patch: int) -> None:
        super().__init__()
        self.shape, self.side, self.grid = shape, side, side // patch
        self.clip_depths = tuple(shape.clip_depths)
        self.prompt_width = width = shape.prompt_width
        self.out_mm_projector = nn.Sequential(
            nn.Linear(shape.clip_width, shape.projector_width),
            nn.GELU(),
            nn.Linear(shape.projector_width, shape.image_width),
        )
        self.image_feature_neck = nn.Sequential(
            nn.Conv2d(shape.image_width, width, kernel_size=1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(width),
        )
        self.prompt_encoder = PromptEncoder(
            embed_dim=width,
            image_embedding_size=(self.grid, self.grid),
            input_image_size=(side, side),
            mask_in_chans=shape.mask_channels,
        )
        self.mask_decoder = MultiScaleMaskDecoder(shape)
        self.keep_positions_float()

    @classmethod
    def of(cls, config: GroundingConfig) -> PixelDecoder:
        assert config.decoder_config is not None
        return cls(PixelDecoderShape(**config.decoder_config), config.clip_side, config.clip_patch)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, PositionEmbeddingRandom):
                module.positional_encoding_gaussian_matrix.normal_()
            elif isinstance(module, LayerNorm2d):
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding, nn.LayerNorm)):
                module.reset_parameters()

    @property
    def mask_side(self) -> int:
        """4G (128 for 448 px)."""
        return self.prompt_encoder.mask_input_size[0]

    @property
    def square_side(self) -> int:
        return self.side

    def embed_images(self, batch: Batch, clip_states: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        """[B, S, E, G, G] of CLIP's states [B, P, C], one per scale."""
        grids = [self.out_mm_projector(states).transpose(1, 2).unflatten(2, (self.grid,) * 2) for states in clip_states]
        return torch.stack([self.image_feature_neck(grid) for grid in grids], 1)

    def decode(
        self, embeddings: torch.Tensor, tokens: torch.Tensor | None, mask_prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, 4G, 4G] logits, the mean of all scales, and the IoU [N] that the last scale's head predicts.

        The authors do not train that head; ``iou_loss_weight`` does.

        Args:
            embeddings: [N, S, E, G, G]; tokens: [N, S, E], a prompt per scale; mask_prompts: [N, 1, 4G, 4G] or None.
        """
        side, grid, width = (self.mask_side,) * 2, self.grid, self.prompt_width
        n, dtype = len(embeddings), embeddings.dtype
        if n == 0:
            return embeddings.new_zeros(0, *side), embeddings.new_zeros(0)
        scales = len(self.clip_depths)
        if tokens is None or tokens.shape[1] != scales:
            raise ValueError(f"the pixel decoder takes {scales} tokens per [SEG], one per scale, and no points")
        if mask_prompts is None:
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, width, 1, 1).expand(n, -1, grid, grid)
        else:
            dense = self.prompt_encoder.mask_downscaling(mask_prompts.to(dtype))
        image_pe = self.prompt_encoder.get_dense_pe().to(dtype)
        masks, previous, iou = [], None, embeddings.new_zeros(n)
        for scale in range(scales):
            token = tokens[:, scale : scale + 1].to(dtype)
            previous, iou = self.mask_decoder(scale, embeddings[:, scale], image_pe, token, dense, previous)
            masks.append(_resized(previous[:, None], side)[:, 0])
        return torch.stack(masks).mean(0), iou
