"""What a backbone gives the method: its image tokens, and its states over packed rows.

A backbone is a file of this folder: a reader (``model.processing.reader``), a configuration, and a model, which extends
transformers' own class by ``Backbone``.

Legend: B rows, T tokens, V image tokens, D hidden size, L hidden states (decoder layers + 1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from model.loading.files import blame, read_json
from model.structures import Batch


@dataclass
class LanguageOutput:
    """The language model's states, and what a later call needs to continue from them.

    Attributes:
        hidden: L tensors [B, T, D], the residual stream: ``hidden[0]`` the embeddings, ``hidden[l]`` the input of layer
            l, the last one after the final norm.
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


@dataclass
class ImageFeatures:
    """What the vision tower gives.

    Attributes:
        tokens: [B, V, D], embeddings of the image's tokens.
        added: [B, V, D] each, what is added to the image tokens' states after the first layers (Qwen3-VL's deepstack).
        clip_states: of ``LanguageOutput``.
    """

    tokens: torch.Tensor
    added: tuple[torch.Tensor, ...] = ()
    clip_states: tuple[torch.Tensor, ...] = ()


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


def in_rows(features: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Features of all images' tokens, one after another, as [B, V, D]; rows with fewer than V are filled with zeros."""
    return nn.utils.rnn.pad_sequence(features.split(list(counts)), batch_first=True)


def image_processor(kind: type, folder: Path) -> Any:
    """transformers' image processor of a folder.

    By class, not by AutoImageProcessor: the file of early Qwen2.5-VL revisions names a class that does not exist.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    file, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    nested = whole.is_file() and not file.is_file()  # of a whole processor that transformers 5 has saved
    own: Any = kind
    with blame(f"the image processor cannot be read from {whole if nested else file}"):
        values = read_json(whole)["image_processor"] if nested else read_json(file)
        for name, value in values.items():  # transformers takes any
            if type(getattr(own, name, None)) is int and type(value) is not int:
                raise ValueError(f"{name} is {value!r}, not a whole number")
        processor = own.from_dict(values)
        if lacking := [name for name in own.size if not isinstance(processor.size[name], int)]:
            raise ValueError(f"size has no whole number {', '.join(lacking)}: {values.get('size')!r}")
        return processor


class Backbone(PreTrainedModel):
    """A vision-language model over packed rows. Its class also extends transformers' own, which comes after this one.

    Attributes:
        lora_layers: pattern of the names of the language model's attention, before the projection's name.
        published_keys: renaming rules (``model.loading.formats``) of published weights to transformers' names.
        clip_depths: indices of the CLIP hidden states that the mask decoder reads, for a backbone that has them.
    """

    lora_layers: str
    published_keys: tuple[tuple[str, str], ...] = ()
    lm_head: nn.Linear
    _supports_flash_attn = False  # flash attention takes no mask with a prefix shared by conversations; SDPA does
    _supports_flex_attn = False

    @property
    def clip_depths(self) -> tuple[int, ...]:
        return ()

    @property
    def language(self) -> Any:
        """The decoder: embeddings, ``layers`` and final norm."""
        return self.get_decoder()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' own, under the model's own names: those of InternVL it would rename as in older files."""
        super().save_pretrained(*args, **{"save_original_format": False} | kwargs)

    @abstractmethod
    def read_images(self, batch: Batch) -> ImageFeatures:
        """Embeddings [B, V, D] of the image tokens, of ``Batch.pixel_values``; no token attends to those of padding."""

    @contextmanager
    def grad_if_trained(self, *parts: nn.Module) -> Iterator[None]:
        """Gradients inside only if a parameter of the parts trains.

        transformers' gradient checkpointing makes the tower's inputs require gradients, also where it is frozen.
        """
        trains = any(parameter.requires_grad for part in parts for parameter in part.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            yield

    def embed(self, input_ids: torch.Tensor, features: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
        """Token embeddings [B, T, D] of ``input_ids`` [B, T], with features [B, V, D] at flat positions [B, V]."""
        positions = image_tokens.flatten()
        known = input_ids.flatten().index_fill(0, positions, 0)  # a placeholder may have no embedding
        words = self.get_input_embeddings()(known)
        embeddings = words.index_copy(0, positions, features.flatten(0, 1).to(words.dtype))
        return embeddings.unflatten(0, input_ids.shape)

    def forward_language(self, batch: Batch, use_cache: bool = False) -> LanguageOutput:
        """Forward pass over packed rows with their images.

        Args:
            use_cache: whether the output has a KV cache, to continue from.
        """
        features = self.read_images(batch)
        embeddings = self.embed(batch.input_ids, features.tokens, batch.image_tokens)
        positions = batch.image_tokens.flatten()
        key_mask = (batch.segment_ids >= 0).flatten().index_copy(0, positions, batch.image_shown.flatten())
        key_mask = key_mask.unflatten(0, batch.segment_ids.shape)
        rows = embeddings, batch.segment_ids, batch.position_ids, key_mask
        added = (batch.image_tokens, features.added) if features.added else None
        output = self.forward_packed(*rows, use_cache=use_cache, added=added)
        output.clip_states = features.clip_states
        return output

    def forward_packed(
        self,
        embeddings: torch.Tensor,
        segment_ids: torch.Tensor,
        position_ids: torch.Tensor,
        key_mask: torch.Tensor,
        past: LanguageOutput | None = None,
        use_cache: bool = False,
        added: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None,
    ) -> LanguageOutput:
        """Forward pass of the language model over packed rows, or over further tokens of rows in ``past``.

        Args:
            embeddings: [B, Q, D] of the new tokens.
            segment_ids: [B, Q] int64; 0 prefix, k >= 1 conversations, -1 padding.
            position_ids: [B, Q] int64, or [B, Q, 3] where the language model has three axes.
            key_mask: [B, Q] bool, False for padded patches and padding.
            past: output of an earlier call with ``use_cache``; its cache is extended in place.
            added: flat positions [B, V] of image tokens, and ``ImageFeatures.added``.

        Returns:
            the new tokens' states (L tensors [B, Q, D]), with the keys and the cache of all tokens.
        """
        keys = KeySpace(segment_ids, key_mask) if past is None else past.keys.extend(segment_ids, key_mask)
        attend = getattr(self.config, "padded_patches_attend", True)
        mask = packed_mask(segment_ids, keys, embeddings.dtype, attend)
        cache = past.cache if past is not None else None
        states, cache = self.run_layers(embeddings, mask, position_ids, cache, use_cache, added)
        hidden = tuple(layer.to(embeddings.device) for layer in states)  # layers may be spread over GPUs
        return LanguageOutput(hidden, keys, cache)

    def run_layers(
        self,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache | None,
        use_cache: bool,
        added: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None,
        **options: Any,
    ) -> tuple[tuple[torch.Tensor, ...], Cache | None]:
        """The residual stream (``LanguageOutput.hidden``), and the extended cache.

        Args:
            mask: [B, 1, Q, K], added to the attention's logits; K counts the keys in ``cache``, too.
            embeddings, position_ids, added: as of ``forward_packed``.
            options: more arguments of transformers' language model.

        Raises:
            NotImplementedError: for ``added``, which a language model that has it must take in its own way.
        """
        if added is not None:
            raise NotImplementedError(f"{type(self).__name__} adds features between layers: it needs a run_layers")
        if position_ids.dim() == 3:
            position_ids = position_ids.permute(2, 0, 1)
        outputs = self.language(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=use_cache,
            output_hidden_states=True,
            **options,
        )
        return outputs.hidden_states, outputs.past_key_values

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The language model's layers."""
        return self.language.layers
