"""Packs encoded images and conversations into a Batch: one row per image (design: the image's tokens stand once)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.processing.conversation import EncodedConversation
from model.processing.transforms import CLIP_FITS, resize_and_pad
from model.structures import IGNORE_LABEL, Batch


@dataclass
class PackedSequence:
    """One image, its encoded conversations and masks ([N, H, W] uint8, one per ``[SEG]`` in the labels)."""

    image: np.ndarray
    conversations: list[EncodedConversation]
    masks: np.ndarray
    sample_id: int


def cut(row: PackedSequence, max_tokens: int, seg_id: int) -> PackedSequence:
    """Shortens each conversation to ``max_tokens``; a ``[SEG]`` that is lost takes its mask with it."""
    if all(len(conversation.ids) <= max_tokens for conversation in row.conversations):
        return row
    kept, keep_mask = [], []
    for conversation in row.conversations:
        short = EncodedConversation(conversation.ids[:max_tokens], conversation.labels[:max_tokens])
        segs, left = conversation.labels.count(seg_id), short.labels.count(seg_id)
        keep_mask += [True] * left + [False] * (segs - left)
        kept.append(short)
    masks = row.masks[np.array(keep_mask, dtype=bool)] if len(row.masks) else row.masks
    return PackedSequence(row.image, kept, masks, row.sample_id)


def before_labels(labels: torch.Tensor, token: int | None = None) -> torch.Tensor:
    """Flat positions whose NEXT token is a label (or is the label ``token``).

    Args:
        labels: [B, T] int64 with ``IGNORE_LABEL`` where nothing is learned.
        token: only this one, for example the id of ``[SEG]``.

    Returns:
        [M] int64 positions in [0, B * T), row by row, left to right.
    """
    ahead = labels[:, 1:]
    chosen = ahead != IGNORE_LABEL if token is None else ahead == token
    rows, columns = chosen.nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns


def collate_rows(
    rows: Sequence[PackedSequence],
    prefix_ids: list[int],
    image_start: int,
    pad_id: int,
    seg_id: int,
    clip_side: int,
    sam_side: int,
    clip_fit: str = "pad",
) -> Batch:
    """Builds the packed batch, padded on the right.

    Args:
        rows: with a mask for each ``[SEG]`` label (``UGroundProcessor.collate`` checks it), or none at all (prompts).
        clip_fit: how an image is made square for CLIP, of ``CLIP_FITS``; for SAM it is padded.
    """
    prefix = len(prefix_ids)
    width = max(prefix + sum(len(c.ids) for c in row.conversations) for row in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    segment_ids, position_ids = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_LABEL)
    for b, row in enumerate(rows):
        input_ids[b, :prefix] = torch.tensor(prefix_ids)
        segment_ids[b, :prefix], position_ids[b, :prefix] = 0, torch.arange(prefix)
        start = prefix
        for k, conversation in enumerate(row.conversations, start=1):
            end = start + len(conversation.ids)
            input_ids[b, start:end] = torch.tensor(conversation.ids)
            labels[b, start:end] = torch.tensor(conversation.labels)
            segment_ids[b, start:end], position_ids[b, start:end] = k, torch.arange(prefix, prefix + end - start)
            start = end
    label_positions, seg_positions = before_labels(labels), before_labels(labels, seg_id)
    label_ids = labels.flatten()[label_positions + 1]
    targets = sum(int((row.masks == 1).any((1, 2)).sum()) for row in rows)
    clip_images, clip_sizes = _squares(rows, clip_side, CLIP_FITS[clip_fit])
    sam_images, sam_sizes = _squares(rows, sam_side, resize_and_pad)
    return Batch(
        input_ids=input_ids,
        segment_ids=segment_ids,
        position_ids=position_ids,
        label_positions=label_positions,
        label_ids=label_ids,
        label_weights=torch.ones(len(label_ids)),
        counts=torch.tensor([len(label_ids), targets], dtype=torch.float32),
        seg_positions=seg_positions,
        seg_rows=seg_positions // width,
        clip_images=clip_images,
        clip_sizes=clip_sizes,
        sam_images=sam_images,
        sam_sizes=sam_sizes,
        sizes=[row.image.shape[:2] for row in rows],
        masks=[torch.from_numpy(np.ascontiguousarray(row.masks)) for row in rows],
        sample_ids=[row.sample_id for row in rows],
        questions=[len(row.conversations) for row in rows],
        image_start=image_start,
    )


def _squares(rows: Sequence[PackedSequence], side: int, fit: Callable) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The rows' images as [B, 3, side, side] float32, and the (height, width) of each inside."""
    images = torch.zeros(len(rows), 3, side, side)
    return images, [fit(row.image, side, out)[1] for row, out in zip(rows, images)]
