"""LLaVA on transformers' CLIP and LLaMA: projector, image splice, and the attention of packed rows.

Legend: B rows, T tokens, P patches of CLIP's input, V of them that are encoded, D hidden size, L hidden states (decoder
layers + 1), C CLIP's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from model.geometry import resized_size, valid_patches
from model.structures import Batch


class LlavaLlamaConfig(LlamaConfig):
    """LLaMA's configuration with the vision tower's.

    Args:
        vision_config: CLIPVisionConfig or its dictionary.
        mm_vision_select_layer: which CLIP hidden state feeds the projector (LLaVA-1.5: -2, no final norm).
        mm_projector_type: ``mlp2x_gelu`` (LLaVA-1.5) or ``linear`` (LLaVA-1).
        padded_patches_attend: whether padded patches, as queries, attend to earlier tokens, as with SDPA and eager
            attention; flash attention excludes them and adds nothing to their states. No token attends to them: only
            the min-max over all patches (``map_normalization`` all) depends on them.
        mm_projector_width: hidden units of ``mlp2x_gelu``; 0 = the hidden size (PixelLM: twice that).
    """

    model_type = "uground_llava"
    image_pool = 1  # a setting of UGroundConfig

    def __init__(
        self,
        vision_config=None,
        mm_vision_select_layer: int = -2,
        mm_projector_type: str = "mlp2x_gelu",
        padded_patches_attend: bool = True,
        mm_projector_width: int = 0,
        **kwargs,
    ) -> None:
        if isinstance(vision_config, CLIPVisionConfig):
            vision_config = vision_config.to_dict()
        self.vision_config = vision_config or CLIPVisionConfig().to_dict()
        self.mm_vision_select_layer, self.mm_projector_type = mm_vision_select_layer, mm_projector_type
        self.padded_patches_attend, self.mm_projector_width = padded_patches_attend, mm_projector_width
        super().__init__(**kwargs)

    @property
    def clip_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(**{k: v for k, v in self.vision_config.items() if k != "model_type"})

    @property
    def clip_side(self) -> int:
        """Side of CLIP's square input in pixels."""
        return self.vision_config["image_size"]

    @property
    def clip_patch(self) -> int:
        """Side of CLIP's patches in pixels."""
        return self.vision_config["patch_size"]

    @property
    def cell_side(self) -> int:
        """Side in pixels of what an image token shows of CLIP's input: a patch, or ``image_pool`` x ``image_pool``."""
        return self.clip_patch * self.image_pool

    @property
    def num_image_tokens(self) -> int:
        """P, the cells of CLIP's input."""
        return (self.clip_side // self.cell_side) ** 2


@dataclass
class LanguageOutput:
    """LLaMA's states, and what a later call needs to continue from them.

    Attributes:
        hidden: L tensors [B, T, D], ``hidden[0]`` the embeddings, the last one after the final norm.
        keys: all tokens so far, as keys of the attention.
        cache: their KV cache; None without ``use_cache``.
        clip_states: [B, patches, C] of each of CLIP's hidden states that the mask decoder reads.
    """

    hidden: tuple[torch.Tensor, ...]
    keys: KeySpace
    cache: Cache | None = None
    clip_states: tuple[torch.Tensor, ...] = ()

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """States [N, L, D] of all layers at [N] flat positions, which index the [B * T] tokens."""
        return torch.stack([layer.flatten(0, 1)[positions] for layer in self.hidden], dim=1)


@dataclass
class KeySpace:
    """Keys that later tokens may attend to.

    Attributes:
        segment_ids: [B, K] int64 of all keys so far.
        key_mask: [B, K] bool, False for padded patches and padding.
    """

    segment_ids: torch.Tensor
    key_mask: torch.Tensor

    def extend(self, segment_ids: torch.Tensor, key_mask: torch.Tensor) -> KeySpace:
        return KeySpace(torch.cat([self.segment_ids, segment_ids], 1), torch.cat([self.key_mask, key_mask], 1))


def packed_mask(
    queries: torch.Tensor, keys: KeySpace, dtype: torch.dtype, padded_patches_attend: bool = True
) -> torch.Tensor:
    """Additive attention mask of packed rows.

    A token attends to the valid keys of the prefix (segment 0) and of its own conversation, up to itself. A padded
    patch is nobody's key, not even its own. Padding also attends to itself, so that no row of the softmax is empty;
    its states are never used.

    Args:
        queries: [B, Q] int64 segment ids of the newest Q tokens, which are the last Q of ``keys``.
        keys: K >= Q keys.
        dtype: of the mask, that of the hidden states.
        padded_patches_attend: False = rows of padded patches are -inf throughout, for which SDPA returns zeros.

    Returns:
        [B, 1, Q, K] with 0 where attention is allowed and the dtype's minimum elsewhere.
    """
    q_len, k_len = queries.shape[1], keys.segment_ids.shape[1]
    positions = torch.arange(k_len, device=queries.device)
    causal = positions[None, :] <= positions[k_len - q_len :, None]
    diagonal = positions[None, :] == positions[k_len - q_len :, None]
    same_segment = (keys.segment_ids[:, None, :] == 0) | (keys.segment_ids[:, None, :] == queries[:, :, None])
    allowed = (causal & same_segment & keys.key_mask[:, None, :]) | (diagonal & (queries < 0)[:, :, None])
    mask = torch.zeros(allowed.shape, dtype=dtype, device=queries.device)
    mask.masked_fill_(~allowed, torch.finfo(dtype).min)
    if not padded_patches_attend:
        padded = (queries >= 0) & ~keys.key_mask[:, k_len - q_len :]
        mask.masked_fill_(padded[:, :, None], -torch.inf)
    return mask[:, None]


class LlavaLlamaForCausalLM(LlamaForCausalLM):
    """LLaVA: LLaMA with projected CLIP features in place of the image placeholders."""

    config_class: type[LlavaLlamaConfig] = LlavaLlamaConfig
    _supports_flash_attn = False  # flash attention takes no mask with a prefix shared by conversations; SDPA does
    _supports_flex_attn = False

    def __init__(self, config: LlavaLlamaConfig) -> None:
        super().__init__(config)
        clip = config.clip_config
        clip._attn_implementation = config._attn_implementation
        self.vision_tower = CLIPVisionModel(clip)
        linear = config.mm_projector_type == "linear"
        width = config.hidden_size if linear else config.mm_projector_width or config.hidden_size
        first = nn.Linear(clip.hidden_size, width)
        self.mm_projector = first if linear else nn.Sequential(first, nn.GELU(), nn.Linear(width, config.hidden_size))
        self.post_init()

    @property
    def clip_depths(self) -> tuple[int, ...]:
        """Indices of the CLIP hidden states that are read beside LLaVA's; a subclass's mask decoder names them."""
        return ()

    @property
    def clip_layers(self) -> nn.ModuleList:
        """CLIP's layers up to the one that is read (``mm_vision_select_layer``); later ones are not computed."""
        layers: Any = self.vision_tower.encoder.layers
        return layers[: range(len(layers) + 1)[self.config.mm_vision_select_layer]]

    def encode_images(
        self, clip_images: torch.Tensor, cells: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, V, D] CLIP features after the projector, of some of the patches.

        Args:
            clip_images: [B, 3, S, S], normalised and padded.
            cells: [B, V] the patches, row-major.
            valid: [B, V] bool, patches that are keys of CLIP's attention; None = all.
        """
        return self.mm_projector(self._clip_states(clip_images, cells, valid)[-1])

    def encode_whole_images(
        self, batch: Batch, depths: tuple[int, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What ``encode_images`` returns, pooled to the image's tokens, with CLIP's states of all patches.

        As in PixelLM (encode_images and prepare_inputs_labels_for_multimodal of llava_arch.py): states are resized to
        the grid of image tokens before the projector; padded patches are no keys, but have states.

        Args:
            depths: indices of CLIP's hidden states.

        Returns:
            [B, V, D] features of ``batch.image_cells``; [B, patches, C] states, one tensor for each of ``depths``.
        """
        config = self.config
        grid = config.clip_side // config.clip_patch
        sizes = [resized_size(*size, config.clip_side) for size in batch.sizes]
        valid = valid_patches(sizes, config.clip_side, config.clip_patch)
        keys = None if valid.all() else valid.to(self.device, non_blocking=True)
        every = torch.arange(grid**2, device=self.device).expand(len(sizes), -1)
        states = self._clip_states(batch.clip_images, every, keys, depths)
        features = states[-1]
        if config.image_pool > 1:
            square = features.transpose(1, 2).unflatten(2, (grid, grid)).float()
            small = nn.functional.interpolate(square, (grid // config.image_pool,) * 2, mode="bilinear")
            features = small.flatten(2).transpose(1, 2).to(features.dtype)
        cells = batch.image_cells[..., None].expand(-1, -1, features.shape[-1])
        return self.mm_projector(features.gather(1, cells)), states[:-1]

    def _clip_states(
        self,
        clip_images: torch.Tensor,
        cells: torch.Tensor,
        valid: torch.Tensor | None,
        depths: tuple[int, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """[B, V, C] hidden states of CLIP, one tensor for each of ``depths``, and the one that LLaVA reads."""
        # transformers' gradient checkpointing makes the tower's inputs require gradients, also where it is frozen
        trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            return self._run_clip(clip_images, cells, valid, depths)

    def _run_clip(
        self, clip_images: torch.Tensor, cells: torch.Tensor, valid: torch.Tensor | None, depths: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        tower = self.vision_tower
        tokens = nn.functional.pad(cells + 1, (1, 0))  # the class token comes first
        states = tower.embeddings(clip_images)
        states = tower.pre_layrnorm(states.gather(1, tokens[..., None].expand(-1, -1, states.shape[-1])))
        mask = None
        if valid is not None:
            keys = nn.functional.pad(valid, (1, 0), value=True)
            mask = states.new_zeros(keys.shape).masked_fill_(~keys, torch.finfo(states.dtype).min)
            mask = mask[:, None, None, :].expand(-1, 1, keys.shape[1], -1)
        count = len(tower.encoder.layers) + 1
        wanted, read = {range(count)[depth] for depth in depths}, {}
        for index, layer in enumerate(self.clip_layers):
            if index in wanted:
                read[index] = states[:, 1:]
            states = layer(states, mask)
        read[len(self.clip_layers)] = states[:, 1:]
        return *(read[range(count)[depth]] for depth in depths), states[:, 1:]

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
        """Token embeddings [B, T, D] of ``input_ids`` [B, T], with features [B, V, D] at flat positions [B, V]."""
        positions = image_tokens.flatten()
        known = input_ids.flatten().index_fill(0, positions, 0)  # a placeholder may have no embedding
        words = self.get_input_embeddings()(known)
        embeddings = words.index_copy(0, positions, features.flatten(0, 1).to(words.dtype))
        return embeddings.unflatten(0, input_ids.shape)

    def forward_language(self, batch: Batch, use_cache: bool = False) -> LanguageOutput:
        """Forward pass of LLaVA over packed rows.

        Args:
            use_cache: whether the output has a KV cache, to continue from.
        """
        valid = batch.valid.gather(1, batch.image_cells)
        clip_states: tuple[torch.Tensor, ...] = ()
        if self.clip_depths or self.config.image_pool > 1:
            features, clip_states = self.encode_whole_images(batch, self.clip_depths)
        else:
            features = self.encode_images(batch.clip_images, batch.image_cells, valid if batch.has_padding else None)
        embeddings = self.embed(batch.input_ids, features, batch.image_tokens)
        key_mask = (batch.segment_ids >= 0).flatten().index_copy(0, batch.image_tokens.flatten(), valid.flatten())
        key_mask = key_mask.unflatten(0, batch.segment_ids.shape)
        rows = embeddings, batch.segment_ids, batch.position_ids, key_mask
        output = self.forward_packed(*rows, use_cache=use_cache)
        output.clip_states = clip_states
        return output

    def forward_packed(
        self,
        embeddings: torch.Tensor,
        segment_ids: torch.Tensor,
        position_ids: torch.Tensor,
        key_mask: torch.Tensor,
        past: LanguageOutput | None = None,
        use_cache: bool = False,
    ) -> LanguageOutput:
        """Forward pass of LLaMA over packed rows, or over further tokens of rows in ``past``.

        Args:
            embeddings: [B, Q, D] of the new tokens.
            segment_ids: [B, Q] int64; 0 prefix, k >= 1 conversations, -1 padding.
            position_ids: [B, Q] int64.
            key_mask: [B, Q] bool, False for padded patches and padding.
            past: output of an earlier call with ``use_cache``; its cache is extended in place.

        Returns:
            the new tokens' states (L tensors [B, Q, D]), with the keys and the cache of all tokens.
        """
        keys = KeySpace(segment_ids, key_mask) if past is None else past.keys.extend(segment_ids, key_mask)
        outputs = self.model(
            inputs_embeds=embeddings,
            attention_mask=packed_mask(segment_ids, keys, embeddings.dtype, self.config.padded_patches_attend),
            position_ids=position_ids,
            past_key_values=past.cache if past is not None else None,
            use_cache=use_cache,
            output_hidden_states=True,
        )
        hidden = tuple(layer.to(embeddings.device) for layer in outputs.hidden_states)  # layers may be spread over GPUs
        return LanguageOutput(hidden, keys, outputs.past_key_values)
