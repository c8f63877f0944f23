"""Tiny random models of the backbones beside LLaVA, with their processors; built from configuration classes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from model.backbones import BACKBONES
from model.grounding import GroundingModel
from model.processing.processor import UGroundProcessor
from model.processing.tokens import SPECIAL_TOKENS, add_special_tokens
from utils.demo.tiny_model import sam_shape, train_tokenizer

OTHERS = ("qwen2_5_vl", "qwen3_vl", "internvl3")  # backbones that are one folder of weights
LAYERS, WIDTH = 4, 32
# what the published templates do with an image, texts and system prompts
_TURN = (
    "{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}{{ 'IMAGE' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SYSTEM = (
    "{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
)
_QWEN = _TURN.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
CHAT_TEMPLATES = {
    "qwen2_5_vl": "{% for m in messages %}" + _SYSTEM + "{% endif %}" + _QWEN,
    "qwen3_vl": "{% for m in messages %}" + _QWEN,
    "internvl3": "{% for m in messages %}" + _TURN.replace("IMAGE", "<IMG_CONTEXT>\n"),
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def sizes(backbone: str, vocabulary: int, tied: bool = False) -> dict[str, Any]:
    """The backbone's part of a configuration: maps of cells of 10 pixels (Qwen), or tiles of 40 with 2 x 2 tokens."""
    text = {**TEXT, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    top = {"tie_word_embeddings": tied}
    if backbone == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH}
        vision |= {"patch_size": 5, "window_size": 20, "fullatt_block_indexes": [1]}
        return {**top, "text_config": {**text, "rope_parameters": ROPE}, "vision_config": vision}
    if backbone == "qwen3_vl":
        vision = {"depth": 3, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH}
        vision |= {"patch_size": 5, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        text |= {"head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
        return {**top, "text_config": text, "vision_config": vision}
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vision |= {"image_size": [40, 40], "patch_size": [10, 10]}
    return {**top, "text_config": {"model_type": "qwen2", **text}, "vision_config": vision}


def base_tokenizer(backbone: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer with the template's special tokens and chat template, as a hub folder has; no BOS token."""
    template = BACKBONES[backbone].reader.template
    trained = train_tokenizer(["Where is the red star? It is here, [SEG]."] * 3, vocab_size=320)
    learned = json.loads(trained.backend_tokenizer.to_str())
    learned["added_tokens"] = [token for token in learned["added_tokens"] if token["content"] not in SPECIAL_TOKENS]
    learned["post_processor"] = None
    backend = Tokenizer.from_str(json.dumps(learned))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=template.end)
    tokenizer.add_tokens(list(template.tokens), special_tokens=True)
    tokenizer.pad_token = template.end
    tokenizer.chat_template = CHAT_TEMPLATES[backbone]
    return tokenizer


def make_tokenizer(backbone: str) -> PreTrainedTokenizerFast:
    """``base_tokenizer`` with the tokens of UGround."""
    tokenizer = base_tokenizer(backbone)
    add_special_tokens(tokenizer, 1, BACKBONES[backbone].reader.template.added)
    return tokenizer


def make_backbone(
    backbone: str, seed: int = 0, tied: bool = False, **settings: Any
) -> tuple[GroundingModel, UGroundProcessor]:
    """A random model of a backbone with a tiny SAM, and its processor; the gate is random, too."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(backbone)
    sam = sam_shape(side=64, patch=8, encoder_width=16, depth=2, width=32).to_dict()
    settings = {"sam_config": sam, "max_image_tokens": 40} | settings
    config = BACKBONES[backbone].config(**sizes(backbone, len(tokenizer), tied), **settings)
    processor = UGroundProcessor(tokenizer, **config.processor_settings(), max_tokens=400)
    tokens = processor.tokens
    config.seg_token_id, config.rej_token_id, config.eos_token_id = tokens.seg, tokens.rej, tokens.eos
    config.pad_token_id = tokens.pad
    model = BACKBONES[backbone].model(config)
    for name, parameter in model.named_parameters():  # transformers starts some at zero: places would be alike
        if "position_embeddings" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.init.normal_(model.ppm.gate, std=0.3)
    return model.eval(), processor


OWN: dict[str, Any] = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "internvl3": InternVLForConditionalGeneration,
}


def transformers_own(model: GroundingModel, processor: UGroundProcessor) -> Any:
    """A model of transformers' own class with the same weights, which knows the processor's placeholder."""
    kind = OWN[model.config.backbone]
    tied = bool(model.config.tie_word_embeddings)
    config = kind.config_class(**sizes(model.config.backbone, len(processor.tokenizer), tied))
    config.image_token_id = processor.tokens.image
    config._attn_implementation = model.config._attn_implementation
    own = kind(config).eval()
    state = model.state_dict()
    own.load_state_dict({name: state[name] for name in own.state_dict()})
    return own


def loud(model: GroundingModel, seed: int = 0) -> GroundingModel:
    """Weights that are large enough for each part to show in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("model.", "lm_head.")):
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def write_base(folder: Path, backbone: str, tied: bool = False, rows: int = 0, seed: int = 0) -> Any:
    """Writes base weights as the hub has them, by transformers' own classes, and a SAM as ``sam.pth``.

    Args:
        rows: of the embeddings beyond the tokenizer's tokens.

    Returns:
        transformers' model.
    """
    model, processor = make_backbone(backbone, seed, tied)
    tokenizer = base_tokenizer(backbone)
    torch.manual_seed(seed)
    kind = OWN[backbone]
    config = kind.config_class(**sizes(backbone, len(tokenizer) + rows, tied))
    config.image_token_id = tokenizer.get_vocab()[BACKBONES[backbone].reader.template.image[1]]
    own = kind(config).eval()
    own.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.reader.save_pretrained(folder)
    torch.save(model.visual_model.state_dict(), folder / "sam.pth")
    return own
