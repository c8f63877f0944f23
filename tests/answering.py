"""Random models that generate [SEG], and reference answers computed without a cache."""

import torch
from conftest import drawn_sample

from model.processing.collate import PackedSequence
from model.processing.conversation import EncodedConversation
from model.structures import IGNORE_LABEL, Turn

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
        hidden = model.forward_language(batch)[0].hidden[-1].flatten(0, 1)
        best = model.lm_head(hidden[batch.label_positions]).argmax(-1).tolist()
    return best, model.predict(batch)[0][0]
