"""A small PixelLM with random weights."""

from __future__ import annotations

import torch
from conftest import WORDS

from model.backbones.llava import ClipReader
from model.config import UGroundConfig
from model.processing.processor import UGroundProcessor
from model.processing.tokens import add_special_tokens
from model.UGround import UGroundForCausalLM
from utils.demo.tiny_model import clip_config, llama_settings, train_tokenizer

SETTINGS = {
    "layer_selection": "last",
    "mask_prompt": False,
    "map_terms": (),
    "mask_decoder": "pixel_decoder",
    "decoder_width": 32,
    "codebook_tokens": 3,
    "clip_resize": 80,
    "image_pool": 2,
}
SIDE, PATCH, GRID, TOKENS = 80, 10, 8, 6  # of CLIP's resized input; [SEG] tokens of a target


def make_processor() -> UGroundProcessor:
    tokenizer = train_tokenizer([WORDS] * 4, vocab_size=340)
    add_special_tokens(tokenizer, TOKENS)
    return UGroundProcessor(tokenizer, ClipReader(SIDE, 2 * PATCH), 0, system_prompt="", codebook=TOKENS)


def make_config(size: int, processor: UGroundProcessor | None = None, **settings) -> UGroundConfig:
    ids = {}
    if processor:
        ids = {"seg_token_id": processor.tokens.seg, "codebook_ids": processor.codebook}
    return UGroundConfig(
        vision_config=clip_config(side=40, patch=PATCH, width=32, layers=3),
        mm_projector_width=64,
        **ids,
        **llama_settings(size, width=32, layers=4, heads=2),
        **(SETTINGS | settings),
    )


def make_pixellm(processor: UGroundProcessor, **settings) -> UGroundForCausalLM:
    torch.manual_seed(0)
    model = UGroundForCausalLM(make_config(len(processor.tokenizer), processor, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
