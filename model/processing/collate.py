"""Packs images and their encoded conversations into a Batch: one row per image, whose tokens are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.geometry import image_cells, valid_patches
from model.processing.conversation import EncodedConversation
from model.processing.transforms import CLIP_FITS, resize_and_pad
from model.structures import IGNORE_LABEL, Batch


@dataclass
class PackedSequence:
    """A row of a batch before padding: an image with its encoded conversations.

    Attributes:
        image: [H, W, 3] uint8, RGB.
        conversations: their token ids and labels, without the prefix.
        masks: [N, H, W] uint8, one per ``[SEG]`` in the labels, or none.
        sample_id: index of the sample in the mixture.
    """

    image: np.ndarray
    conversations: list[EncodedConversation]
    masks: np.ndarray
    sample_id: int


def truncate(row: PackedSequence, max_tokens: int, seg_id: int) -> PackedSequence:
    """Truncates each conversation to ``max_tokens``, and removes the masks of truncated ``[SEG]``."""
    if all(len(conversation.ids) <= max_tokens for conversation in row.conversations):
        return row
    conversations, has_seg = [], []
    for conversation in row.conversations:
        truncated = EncodedConversation(conversation.ids[:max_tokens], conversation.labels[:max_tokens])
        before, after = conversation.labels.count(seg_id), truncated.labels.count(seg_id)
        has_seg += [True] * after + [False] * (before - after)
        conversations.append(truncated)
    masks = row.masks[np.array(has_seg, dtype=bool)] if len(row.masks) else row.masks
    return PackedSequence(row.image, conversations, masks, row.sample_id)


def before_labels(labels: torch.Tensor, token: int | None = None) -> torch.Tensor:
    """Flat positions whose NEXT token is a label (or the label ``token``).

    Args:
        labels: [B, T] int64, ``IGNORE_LABEL`` outside of answers.
        token: id of the only label to look for, such as that of ``[SEG]``; None = any.

    Returns:
        [M] int64 positions in [0, B * T), row by row, left to right.
    """
    following = labels[:, 1:]
    selected = following != IGNORE_LABEL if token is None else following == token
    rows, columns = selected.nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns


def collate_rows(
    rows: Sequence[PackedSequence],
    prefix_ids: list[int],
    image_start: int,
    pad_id: int,
    seg_id: int,
    clip_side: int,
    clip_patch: int,
    sam_side: int,
    clip_fit: str = "pad",
    keep_padding: bool = False,
) -> Batch:
    """Builds the packed batch, padded on the right.

    Padded patches count in the position ids, but get no tokens, which nothing would attend to; only where the images of
    a batch differ in how many they have (``image_cells``).

    Args:
        rows: with a mask per ``[SEG]`` label (``UGroundProcessor.collate`` checks it), or without masks (prompts).
        prefix_ids: tokens of the shared prefix, with a placeholder per patch; image_start: index of the first one.
        pad_id, seg_id: ids of the padding token and of ``[SEG]``.
        clip_side, sam_side: sides of their square inputs in pixels, sam_side 0 = none; clip_patch: side of a cell.
        clip_fit: how an image is made square for CLIP, of ``CLIP_FITS``; for SAM it is padded.
        keep_padding: whether padded patches get tokens, too.
    """
    clip_images, clip_sizes = _squares(rows, clip_side, CLIP_FITS[clip_fit])
    valid = valid_patches(clip_sizes, clip_side, clip_patch)
    cells = image_cells(valid, keep_padding)
    whole, end_of_image = torch.tensor(prefix_ids), image_start + valid.shape[1]
    parts = torch.arange(image_start), image_start + cells, torch.arange(end_of_image, len(whole))
    prefix_positions = torch.cat([part.expand(len(rows), -1) for part in parts], 1)  # in the whole prefix
    prefix = prefix_positions.shape[1]
    width = max(prefix + sum(len(c.ids) for c in row.conversations) for row in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    segment_ids, position_ids = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_LABEL)
    input_ids[:, :prefix], position_ids[:, :prefix] = whole[prefix_positions], prefix_positions
    segment_ids[:, :prefix] = 0
    for b, row in enumerate(rows):
        start = prefix
        for k, conversation in enumerate(row.conversations, start=1):
            end = start + len(conversation.ids)
            input_ids[b, start:end] = torch.tensor(conversation.ids)
            labels[b, start:end] = torch.tensor(conversation.labels)
            segment_ids[b, start:end] = k
            position_ids[b, start:end] = torch.arange(len(whole), len(whole) + end - start)
            start = end
    label_positions, seg_positions = before_labels(labels), before_labels(labels, seg_id)
    label_ids = labels.flatten()[label_positions + 1]
    num_targets = sum(int((row.masks == 1).any((1, 2)).sum()) for row in rows)
    sam_images = _squares(rows, sam_side, resize_and_pad)[0] if sam_side else torch.zeros(len(rows), 3, 0, 0)
    return Batch(
        input_ids=input_ids,
        segment_ids=segment_ids,
        position_ids=position_ids,
        label_positions=label_positions,
        label_ids=label_ids,
        label_weights=torch.ones(len(label_ids)),
        counts=torch.tensor([len(label_ids), num_targets], dtype=torch.float32),
        seg_positions=seg_positions,
        seg_rows=seg_positions // width,
        clip_images=clip_images,
        sam_images=sam_images,
        sizes=[row.image.shape[:2] for row in rows],
        masks=[torch.from_numpy(np.ascontiguousarray(row.masks)) for row in rows],
        sample_ids=[row.sample_id for row in rows],
        questions=[len(row.conversations) for row in rows],
        image_tokens=torch.arange(len(rows))[:, None] * width + torch.arange(image_start, image_start + cells.shape[1]),
        image_cells=cells,
        valid=valid,
        has_padding=not bool(valid.gather(1, cells).all()),
        grids=[(clip_side // clip_patch,) * 2] * len(rows),
    )


def _squares(rows: Sequence[PackedSequence], side: int, fit: Callable) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The rows' images as [B, 3, side, side] float32, and the (height, width) of each inside."""
    images = torch.zeros(len(rows), 3, side, side)
    return images, [fit(row.image, side, out)[1] for row, out in zip(rows, images)]
