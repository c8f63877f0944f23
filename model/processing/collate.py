"""Packs images and their encoded conversations into a Batch: one row per image, whose tokens are encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.processing.conversation import EncodedConversation, Prefix
from model.processing.reader import ImageReader
from model.processing.transforms import SAM_INPUTS, squares
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
        ids, labels, in_thought = conversation.ids, conversation.labels, conversation.in_thought
        truncated = EncodedConversation(ids[:max_tokens], labels[:max_tokens], in_thought[:max_tokens])
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
    prefix: Prefix,
    reader: ImageReader,
    sam_side: int,
    pad_id: int,
    seg_id: int,
    keep_padding: bool = False,
    sam_input: str = "pad",
    thought_weight: float = 1.0,
    seen: Batch | None = None,
) -> Batch:
    """Builds the packed batch, padded on the right.

    Args:
        rows: with a mask per ``[SEG]`` label (``UGroundProcessor.collate`` checks it), or without masks (prompts).
        prefix: the tokens before the first question; reader: plans the image's tokens among them.
        sam_side: side of SAM's square input in pixels, 0 = none; sam_input: how it is made, of ``SAM_INPUTS``.
        pad_id, seg_id: ids of the padding token and of ``[SEG]``.
        keep_padding: whether padded patches get tokens, too.
        thought_weight: of a thought's tokens in the text loss.
        seen: an earlier batch of these images, whose pixels are taken.
    """
    images = [row.image for row in rows]
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    tokens = reader.plan(sizes, keep_padding)
    num_images, axes = tokens.cells.shape[1], tokens.positions.shape[2]
    start, after = len(prefix.before), len(prefix.after)
    length = start + num_images + after
    width = max(length + sum(len(c.ids) for c in row.conversations) for row in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    segment_ids, position_ids = torch.full(shape, -1), torch.zeros(*shape, axes, dtype=torch.int64)
    labels, in_thought = torch.full(shape, IGNORE_LABEL), torch.zeros(shape, dtype=torch.bool)
    input_ids[:, :length] = torch.tensor([*prefix.before, *[prefix.image_id] * num_images, *prefix.after])
    segment_ids[:, :length] = 0
    position_ids[:, :start] = torch.arange(start)[:, None]
    position_ids[:, start : start + num_images] = start + tokens.positions
    for b, row in enumerate(rows):
        text_start = start + tokens.lengths[b]  # where text goes on after the image
        position_ids[b, length - after : length] = torch.arange(text_start, text_start + after)[:, None]
        begin = length
        for k, conversation in enumerate(row.conversations, start=1):
            end = begin + len(conversation.ids)
            input_ids[b, begin:end] = torch.tensor(conversation.ids)
            labels[b, begin:end] = torch.tensor(conversation.labels)
            if conversation.in_thought:
                in_thought[b, begin:end] = torch.tensor(conversation.in_thought)
            segment_ids[b, begin:end] = k
            position_ids[b, begin:end] = (text_start + after + torch.arange(end - begin))[:, None]
            begin = end
    label_positions, seg_positions = before_labels(labels), before_labels(labels, seg_id)
    label_ids, label_thoughts = labels.flatten()[label_positions + 1], in_thought.flatten()[label_positions + 1]
    label_weights = torch.where(label_thoughts, thought_weight, 1.0)
    pixel_values, sam_images = _pixels(images, reader, sam_side, sam_input, seen)
    num_targets = sum(int((row.masks == 1).any((1, 2)).sum()) for row in rows)
    return Batch(
        input_ids=input_ids,
        segment_ids=segment_ids,
        position_ids=position_ids[..., 0] if axes == 1 else position_ids,
        label_positions=label_positions,
        label_ids=label_ids,
        label_weights=label_weights,
        label_thoughts=label_thoughts,
        counts=torch.tensor([float(label_weights.sum()), num_targets, float(label_thoughts.sum())]),
        seg_positions=seg_positions,
        seg_rows=seg_positions // width,
        pixel_values=pixel_values,
        sam_images=sam_images,
        sizes=sizes,
        masks=[torch.from_numpy(np.ascontiguousarray(row.masks)) for row in rows],
        sample_ids=[row.sample_id for row in rows],
        questions=[len(row.conversations) for row in rows],
        image_tokens=torch.arange(len(rows))[:, None] * width + torch.arange(start, start + num_images),
        image_cells=tokens.cells,
        image_shown=tokens.shown,
        image_counts=tokens.shown.sum(1).tolist(),
        valid=tokens.valid,
        has_padding=not bool(tokens.shown.all()),
        grids=tokens.grids,
    )


def _pixels(
    images: Sequence[np.ndarray], reader: ImageReader, sam_side: int, sam_input: str, seen: Batch | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of vision tower and mask decoder; the arguments are of ``collate_rows``."""
    if seen is not None:
        return seen.pixel_values, seen.sam_images
    empty = torch.zeros(len(images), 3, 0, 0)
    return reader.pixels(images), squares(images, sam_side, SAM_INPUTS[sam_input]) if sam_side else empty
