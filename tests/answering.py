"""Random models that generate [SEG], and reference answers computed without a cache."""

from dataclasses import replace

import torch
from conftest import drawn_sample

from model.processing.collate import PackedSequence
from model.processing.conversation import EncodedConversation
from model.structures import IGNORE_LABEL, Batch, Turn

NEAR = {"rtol": 2e-4, "atol": 2e-5}


def says_seg_often(model, processor):
    """Makes about every second generated token of a random model a [SEG]; returns the model."""
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.lm_head.weight[processor.tokens.seg] = direction
        model.lm_head.weight[5] = -direction
    return model


def read_anew(model, processor, image, history, question, answer_ids):
    """The most likely token at each position of an answer, and the answer's prediction, in one pass without a cache."""
    ids = processor.builder.encode((*history, Turn(question, ""))).ids
    conversation = EncodedConversation(ids + answer_ids, [IGNORE_LABEL] * len(ids) + answer_ids)
    no_masks = drawn_sample(0, image.shape[:2], ()).masks
    batch = processor._collate([PackedSequence(image, [conversation], no_masks, 0)])
    with torch.no_grad():
        hidden = model.forward_language(batch).hidden[-1].flatten(0, 1)
        best = model.lm_head(hidden[batch.label_positions]).argmax(-1).tolist()
    return best, model.predict(batch)[0][0]


def without_image(batch: Batch) -> Batch:
    """The batch without its image tokens: as if the prefix had been text alone."""
    width, count = batch.input_ids.shape[1], batch.image_tokens.shape[1]
    start = int(batch.image_tokens[0, 0])
    kept = torch.cat([torch.arange(start), torch.arange(start + count, width)])

    def moved(positions: torch.Tensor) -> torch.Tensor:
        return positions // width * len(kept) + positions % width - count

    positions = batch.position_ids[:, kept]
    return replace(
        batch,
        input_ids=batch.input_ids[:, kept],
        segment_ids=batch.segment_ids[:, kept],
        position_ids=torch.where(positions < start, positions, positions - count),
        label_positions=moved(batch.label_positions),
        seg_positions=moved(batch.seg_positions),
    )
