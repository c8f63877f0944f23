"""What ``GroundingModel`` expects of a mask decoder.

Legend: B images, N prompts, S scales (sparse prompts per [SEG]), E prompt width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from model.geometry import Fit
from model.threads import fewer_threads

if TYPE_CHECKING:
    from model.config import GroundingConfig
    from model.sam_cache import FeatureCache
    from model.structures import Batch

MASKS_AT_ONCE = 32  # masks in one call, where a [SEG] has several or a model may write many
POSITIONS = (  # buffers of segment-anything's encodings, transformers', and its rotary ones
    "positional_encoding_gaussian_matrix",
    "positional_embedding",
    "position_ids",
    "inv_freq",
    "original_inv_freq",
)


class MaskDecoder(nn.Module, ABC):
    """The model's ``visual_model``: five steps from an image and [SEG] states to masks.

    1. preprocess: the processor makes ``Batch.sam_images`` of side ``image_side``.
    2. encode: ``embed_images``, once per image.
    3. prompts: phi([SEG]), one token per scale; ``embed_points``; mask prompts of side ``mask_side``.
    4. decode: ``decode``, with one image embedding per prompt.
    5. postprocess: ``postprocess``, to an image's own size.

    Attributes:
        image_side: side of its square input in pixels; 0 = it has none, and reads CLIP's states.
        fit_kind: how an image is made square, ``pad`` or ``stretch`` (``model.geometry.Fit``).
        clip_depths: indices of the CLIP hidden states that it reads, as in ``CLIPVisionModel``'s output.
        mask_side: side of mask prompts and of low-resolution masks.
        prompt_width: E, the width of a sparse prompt, and so of phi's output.
        cache: of its image features on disk; None = no cache.
    """

    image_side: int
    fit_kind: str = "pad"
    clip_depths: tuple[int, ...] = ()
    prompt_width: int
    cache: FeatureCache | None = None

    def _apply(self, fn, recurse=True):
        """Keeps the matrices of positional encodings in float32: they multiply such coordinates."""
        matrices = [(module, name, getattr(module, name)) for module, name in self._positions()]
        super()._apply(fn, recurse)
        for module, name, matrix in matrices:
            if not matrix.is_meta:
                setattr(module, name, matrix.to(getattr(module, name).device, torch.float32))
        return self

    def _positions(self) -> list[tuple[nn.Module, str]]:
        return [(module, name) for module in self.modules() for name in POSITIONS if name in module._buffers]

    def keep_positions_float(self) -> None:
        """For constructors: the matrices of a model that is built in bf16, in float32."""
        for module, name in self._positions():
            setattr(module, name, getattr(module, name).float())

    @classmethod
    @abstractmethod
    def of(cls, config: GroundingConfig) -> MaskDecoder:
        """The decoder that a configuration describes, with new weights."""

    @classmethod
    def side_of(cls, config: GroundingConfig) -> int:
        """``image_side`` of the decoder that a configuration describes."""
        return 0

    def reset_parameters(self) -> None:
        """New weights, for a decoder that no file gives."""
        raise NotImplementedError(f"{type(self).__name__} is not trained from scratch")

    @property
    @abstractmethod
    def mask_side(self) -> int: ...

    @property
    def fit(self) -> Fit:
        """How an image fits the square that masks and points refer to."""
        return Fit(self.fit_kind, self.square_side)

    @property
    def mask_fit(self) -> Fit:
        """How an image fits mask prompts and low-resolution masks."""
        return Fit(self.fit_kind, self.mask_side)

    @abstractmethod
    def embed_images(self, batch: Batch, clip_states: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        """Image embeddings [B, ...], which ``decode`` takes by their first index.

        Args:
            clip_states: [B, P, C] of each of ``clip_depths``.
        """

    def embed_points(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sparse prompts [N, K + 1, E] of points [N, K, 2] (x, y) in pixels of its input, with labels [N, K]."""
        raise NotImplementedError(f"{type(self).__name__} takes no points; set point_prompts 0")

    @abstractmethod
    def decode(
        self, embeddings: torch.Tensor, tokens: torch.Tensor | None, mask_prompts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, side, side] logits, and the predicted IoU [N].

        Args:
            embeddings: [N, ...], the image embedding of each prompt.
            tokens: [N, K, E] sparse prompts, or None; mask_prompts: [N, 1, side, side], or None.
        """

    def postprocess(self, low_res: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Logits [n, H, W] float32 at an image's own size: to the square, padding removed, to ``size``.

        Args:
            low_res: [n, side, side] logits of one image; size: its (H, W).
        """
        square = (self.square_side, self.square_side)
        full = F.interpolate(low_res[:, None].float(), square, mode="bilinear", align_corners=False)
        _, _, height, width = self.fit.box(size)
        return F.interpolate(full[..., :height, :width], size, mode="bilinear", align_corners=False)[:, 0]

    @property
    def square_side(self) -> int:
        """Side in pixels of the padded square that masks cover."""
        return self.image_side

    def compile_encoder(self) -> None:
        """Compiles its image encoder in place (``torch.compile``); keys and weights do not change.

        Raises:
            ValueError: if it has none.
        """
        raise ValueError("--compile_sam: the model's mask decoder has no image encoder; leave it out")


class EncodingDecoder(MaskDecoder):
    """A mask decoder with a frozen image encoder of its own.

    Attributes:
        encoder_key: name of the encoder's module.
    """

    encoder_key: str = "image_encoder"

    @abstractmethod
    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Features [1, ...] of one image [1, 3, R, R]: one tensor, also where they have several scales."""

    @property
    @abstractmethod
    def feature_shape(self) -> tuple[int, ...]:
        """Of one image's features."""

    def encoder_weights(self) -> Iterable[torch.Tensor]:
        """All tensors that its features depend on; their fingerprint is part of an entry's name in the cache."""
        return self.get_submodule(self.encoder_key).state_dict().values()

    def encoder_settings(self) -> str:
        """What its features depend on beside these tensors, in a few characters; also part of that name."""
        return ""

    def embed_images(self, batch: Batch, clip_states: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        return self.encode(batch.sam_images, batch.image_keys)

    def encode(self, images: torch.Tensor, keys: Sequence[str] = ()) -> torch.Tensor:
        """Image features [B, ...] without gradients, from the cache if there is one.

        Args:
            images: [B, 3, R, R], normalised.
            keys: B keys of the images in the cache (``image_key``); ignored without one.

        Raises:
            ValueError: if there is a cache, and an image has no key.
        """
        if self.cache is None:
            return self._encode(images)
        if len(keys) != len(images):
            raise ValueError(
                f"SAM's features are cached, but {len(images) - len(keys)} of the batch's {len(images)} images have no "
                "key: the processor does not hash images; use cache_sam_features"
            )
        return self.cache.get(keys, images, self._encode)

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encodes one image at a time, which is enough work for a GPU.

        So the biases of global attention (ViT-H: 0.5 GB per image in bf16) do not grow with the batch, and a compiled
        encoder sees a single shape.
        """
        cells = (self.mask_side // 4) ** 2
        widest = max(weight.numel() for weight in self.get_submodule(self.encoder_key).parameters())
        with torch.inference_mode(), fewer_threads(cells, widest):
            features = torch.cat([self.encode_image(image[None]) for image in images])
        return features.clone()  # autograd cannot save inference tensors for the decoder's backward pass

    def compile_encoder(self) -> None:
        self.get_submodule(self.encoder_key).compile(dynamic=False)
