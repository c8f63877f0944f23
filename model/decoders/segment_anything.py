"""segment-anything, with unmodified weights: encode an image once, decode many prompts in one call.

Legend: B images, N prompts, E prompt width (256), R input side (1024), G grid side (64), 4G mask prompt side (256).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.image_encoder import Attention
from torch import nn
from torch.nn import functional as F

from model.decoders.base import EncodingDecoder

if TYPE_CHECKING:
    from model.config import GroundingConfig


@dataclass
class SamShape:
    """The sizes of a SAM. Defaults: ViT-H.

    Attributes:
        image_size, patch_size: sides of the input and of its patches, in pixels.
        window_size: side of the windows of local attention, in patches; global_attention: blocks without windows.
        encoder_width, prompt_width, mask_channels, decoder_mlp, iou_hidden: widths, in channels.
    """

    image_size: int = 1024
    patch_size: int = 16
    encoder_width: int = 1280
    encoder_depth: int = 32
    encoder_heads: int = 16
    global_attention: tuple[int, ...] = (7, 15, 23, 31)
    window_size: int = 14
    prompt_width: int = 256
    mask_channels: int = 16
    decoder_depth: int = 2
    decoder_mlp: int = 2048
    iou_hidden: int = 256

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> SamShape:
        """The sizes of a segment-anything checkpoint (ViT-B, -L, -H or any other built from its classes).

        Raises:
            KeyError: if the checkpoint lacks a weight that tells a size.
        """
        decoder = "mask_decoder.transformer.layers"
        patch = state["image_encoder.patch_embed.proj.weight"]
        grid = state["image_encoder.pos_embed"].shape[1]
        relative = {
            int(key.split(".")[2]): value.shape
            for key, value in state.items()
            if key.startswith("image_encoder.blocks.") and key.endswith("attn.rel_pos_h")
        }
        depth = len(relative)
        is_global = {i: shape[0] == 2 * grid - 1 for i, shape in relative.items()}
        windows = [(shape[0] + 1) // 2 for i, shape in relative.items() if not is_global[i]]
        return cls(
            image_size=grid * patch.shape[-1],
            patch_size=patch.shape[-1],
            encoder_width=patch.shape[0],
            encoder_depth=depth,
            encoder_heads=patch.shape[0] // relative[0][1],
            global_attention=tuple(i for i in range(depth) if is_global[i]),
            window_size=windows[0] if windows else 14,
            prompt_width=state["prompt_encoder.no_mask_embed.weight"].shape[1],
            mask_channels=state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
            decoder_mlp=state[f"{decoder}.0.mlp.lin1.weight"].shape[0],  # raises if the decoder has no layer
            decoder_depth=1 + max(int(k.split(".")[3]) for k in state if k.startswith(decoder)),
            iou_hidden=state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
        )

    def to_dict(self) -> dict:
        return asdict(self) | {"global_attention": list(self.global_attention)}


class FusedAttention(nn.Module):
    """The attention of SAM's encoder as one fused operation, with the relative positions as an additive bias.

    Shares the weights of the package's module, under the same keys; results differ by rounding. The package computes
    scores, sum, softmax and product one after the other, each over 4096 x 4096 values per head.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] -> [B, H, W, C], over a window or the whole grid."""
        b, height, width, _ = states.shape
        qkv = self.qkv(states).view(b, height * width, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, H * W, c]
        grid = query.unflatten(2, (height, width))
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, _relative(self.rel_pos_h, height)).contiguous()
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, _relative(self.rel_pos_w, width)).contiguous()
        # the sum of contiguous terms is contiguous: its H W x H W values per head are not copied again
        bias = (rows[..., :, None] + columns[..., None, :]).view(b, self.num_heads, height * width, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).reshape(states.shape))


def _relative(table: torch.Tensor, size: int) -> torch.Tensor:
    """Relative positions [size, size, c] of (query, key), from a table [2 size - 1, c] of distances.

    The index is made on the device: the package's comes from the host, which synchronizes twice per layer.
    """
    positions = torch.arange(size, device=table.device)
    return table[positions[:, None] - positions + size - 1]


class PerPromptMaskDecoder(MaskDecoder):
    """SAM's mask decoder for prompts of SEVERAL images, with one image embedding per prompt.

    The package's decoder repeats one image's embedding for all prompts; the computation is the same.
    """

    def predict_masks(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits [N, 4, 4G, 4G] and their predicted IoU [N, 4].

        Args:
            image_embeddings, dense_prompt_embeddings: [N, E, G, G]; image_pe: [1, E, G, G] positional encoding.
            sparse_prompt_embeddings: [N, K, E].
        """
        n = sparse_prompt_embeddings.shape[0]
        learned = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([learned.expand(n, -1, -1), sparse_prompt_embeddings], dim=1)
        source = image_embeddings + dense_prompt_embeddings
        states, source = self.transformer(source, image_pe.expand(n, -1, -1, -1), tokens)
        upscaled = self.output_upscaling(source.transpose(1, 2).reshape(dense_prompt_embeddings.shape))
        weights = torch.stack(
            [mlp(states[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1
        )  # [N, 4, E / 8]
        masks = torch.einsum("nkc,nchw->nkhw", weights, upscaled)
        return masks, self.iou_prediction_head(states[:, 0])


class SegmentAnything(EncodingDecoder):
    """SAM's three modules under the package's own key names."""

    def __init__(self, shape: SamShape) -> None:
        super().__init__()
        self.shape = shape
        self.image_side, self.prompt_width = shape.image_size, shape.prompt_width
        grid = shape.image_size // shape.patch_size
        self.image_encoder = self.new_encoder(shape)
        self.prompt_encoder = PromptEncoder(
            embed_dim=shape.prompt_width,
            image_embedding_size=(grid, grid),
            input_image_size=(shape.image_size, shape.image_size),
            mask_in_chans=shape.mask_channels,
        )
        self.mask_decoder = PerPromptMaskDecoder(
            transformer_dim=shape.prompt_width,
            transformer=TwoWayTransformer(
                depth=shape.decoder_depth, embedding_dim=shape.prompt_width, num_heads=8, mlp_dim=shape.decoder_mlp
            ),
            iou_head_hidden_dim=shape.iou_hidden,
        )
        self.keep_positions_float()

    def new_encoder(self, shape: SamShape) -> nn.Module:
        """The image encoder, with new weights."""
        encoder = ImageEncoderViT(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            embed_dim=shape.encoder_width,
            depth=shape.encoder_depth,
            num_heads=shape.encoder_heads,
            out_chans=shape.prompt_width,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=shape.window_size,
            global_attn_indexes=shape.global_attention,
        )
        for block in encoder.blocks:
            block.attn = FusedAttention(block.attn)
        return encoder

    @classmethod
    def of(cls, config: GroundingConfig) -> SegmentAnything:
        return cls(SamShape(**config.sam_config))

    @classmethod
    def side_of(cls, config: GroundingConfig) -> int:
        return config.sam_config["image_size"]

    @property
    def mask_side(self) -> int:
        """4G, the side of mask prompts and of low-resolution masks (256 for the published SAMs)."""
        return self.prompt_encoder.mask_input_size[0]

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(E, G, G)."""
        grid = self.shape.image_size // self.shape.patch_size
        return self.prompt_width, grid, grid

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """[1, E, G, G]."""
        return self.image_encoder(image)

    def embed_points(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sparse prompts [N, K + 1, E] of points; the last is SAM's padding for prompts without a box.

        Args:
            points: [N, K, 2] (x, y) in pixels of SAM's input.
            labels: [N, K], 1 = foreground, 0 = background, -1 = not a point.
        """
        # the package takes a pixel's corner and adds half a pixel
        return self.prompt_encoder._embed_points(points - 0.5, labels, pad=True)

    def decode(
        self, embeddings: torch.Tensor, tokens: torch.Tensor | None, mask_prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes one mask per prompt.

        Args:
            embeddings: [N, E, G, G], the image embedding of each prompt.
            tokens: [N, K, E] sparse prompts such as phi([SEG]), or None.
            mask_prompts: [N, 1, 4G, 4G] dense prompts, or None.

        Returns:
            [N, 4G, 4G] logits, the single-mask output, and the IoU [N] that SAM's own head predicts for each.
        """
        n, width, grid, _ = embeddings.shape
        if n == 0:  # SAM's decoder fails on zero prompts
            return embeddings.new_zeros(0, self.mask_side, self.mask_side), embeddings.new_zeros(0)
        dtype = embeddings.dtype
        if mask_prompts is None:
            dense = self.prompt_encoder.no_mask_embed.weight.view(1, width, 1, 1).expand(n, -1, grid, grid)
        else:
            dense = self.prompt_encoder.mask_downscaling(mask_prompts.to(dtype))
        if tokens is None:
            tokens = embeddings.new_zeros(n, 0, width)
        image_pe = self.prompt_encoder.get_dense_pe().to(dtype)  # computed in float32, also in a bf16 model
        masks, iou = self.mask_decoder(embeddings, image_pe, tokens.to(dtype), dense, multimask_output=False)
        return masks[:, 0], iou[:, 0]
