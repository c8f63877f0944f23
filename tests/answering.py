"""Random models that write [SEG], and their answers computed anew without a cache."""

import torch
from conftest import drawn_sample

from model.processing.collate import PackedSequence
from model.processing.conversation import EncodedConversation
from model.structures import IGNORE_LABEL, Turn

NEAR = {"rtol": 2e-4, "atol": 2e-5}


def says_seg_often(model, processor):
    """A random model whose free answers hold [SEG] about every second token."""
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.lm_head.weight[processor.tokens.seg] = direction
        model.lm_head.weight[5] = -direction
    return model


def read_anew(model, processor, image, history, question, said):
    """Uncached, in one pass: the tokens that the model would write at each place of the answer, and its masks."""
    ids = processor.builder.encode((*history, Turn(question, ""))).ids
    conversation = EncodedConversation(ids + said, [IGNORE_LABEL] * len(ids) + said)
    no_masks = drawn_sample(0, image.shape[:2], ()).masks
    batch = processor._collate([PackedSequence(image, [conversation], no_masks, 0)])
    with torch.no_grad():
        hidden = model.forward_language(batch)[0].hidden[-1].flatten(0, 1)
        written = model.lm_head(hidden[batch.label_positions]).argmax(-1).tolist()
    return written, model.predict(batch)[0][0]
