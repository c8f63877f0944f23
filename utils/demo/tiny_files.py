"""Files of the tiny families: their tokenizer, new models, and what pre-training reads and writes."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Sam2Model

from model.backbones import qwen2_5_vl
from model.backbones.base import Backbone
from model.backbones.llava import ClipReader, LlavaLlamaConfig, LlavaLlamaForCausalLM
from model.backbones.qwen2_5_vl import UGroundQwen25VL
from model.decoders.sam2 import Sam2
from model.loading.files import read_folder
from model.loading.formats import renamed
from model.processing.processor import UGroundProcessor
from model.processing.template import VICUNA, ChatTemplate
from model.processing.tokens import REJ, SEG
from utils.demo import scene_texts, tiny_model
from utils.demo.pretrain_batches import ATTRIBUTES, CELL, SIDE, STREAM

QWEN = "qwen2_5_vl"  # folder below --output
QWEN_TOKENS = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
NO_SYSTEM_PROMPT = ""  # 30 tokens in front of every prompt would cost a tiny model more than they tell it


def make_tokenizer(folder: Path, seed: int, template: ChatTemplate = VICUNA) -> PreTrainedTokenizerFast:
    """Trains the tokenizer, or loads the one that is there."""
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    rng = np.random.default_rng([seed, STREAM["tokenizer"]])
    texts = [*scene_texts.corpus(rng, 1000), *list(tiny_model.template_corpus()) * 500, "USER: ASSISTANT:" * 5000]
    texts += [f" {text}" for text in texts]  # a word is another token at the start of a line than after a space
    texts += [f" {word}" for values in ATTRIBUTES.values() for word in values] * 5000
    tokenizer = tiny_model.train_tokenizer(texts)
    if template.added == ():  # Qwen's, which begins with no token
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.add_tokens(list(template.tokens), special_tokens=True)
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = None, template.end, template.end
    tokenizer.save_pretrained(folder)
    needed = [" Sure", " It", " Yes", " They", " No", " There", " Nothing", *ATTRIBUTES["color"], *ATTRIBUTES["kind"]]
    split = [word for word in needed if len(tokenizer.encode(f" {word.strip()}", add_special_tokens=False)) > 1]
    if split:
        raise ValueError(f"the vocabulary is too small: it splits {split}")
    return tokenizer


def save_llava(model: LlavaLlamaForCausalLM, output: Path) -> None:
    """Writes llava/: language model and projector, in LLaVA-1.5's own layout."""
    state = {}
    for key, value in model.state_dict().items():
        if not key.startswith("vision_tower."):
            key = key.replace("mm_projector.", "model.mm_projector.") if key.startswith("mm_projector.") else key
            state[key] = value.cpu().contiguous()
    save_file(state, output / "llava" / "model.safetensors", metadata={"format": "pt"})
    settings = tiny_model.llama_settings(model.config.vocab_size)
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_hidden_size": model.vision_tower.config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": model.config.mm_vision_select_layer,
        "hidden_act": "silu",
        "rms_norm_eps": model.config.rms_norm_eps,
        "system_prompt": NO_SYSTEM_PROMPT,
        "torch_dtype": "float32",
        **settings,
    }
    (output / "llava" / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def new_qwen(options: argparse.Namespace) -> tuple[UGroundQwen25VL, UGroundProcessor]:
    """A random Qwen2.5-VL, or that of an earlier run; the parts that UGround adds are neither trained nor saved."""
    folder = options.output / QWEN
    if options.start and options.start != options.output:
        shutil.copytree(options.start / QWEN, folder, dirs_exist_ok=True)
    tokenizer = make_tokenizer(folder, options.seed, qwen2_5_vl.TEMPLATE)
    ids, before_after = tokenizer.get_vocab(), qwen2_5_vl.TEMPLATE.image
    config = qwen2_5_vl.Config(
        **tiny_model.qwen_sizes(len(tokenizer)),
        vision_start_token_id=ids[before_after[0]],
        image_token_id=ids[before_after[1]],
        vision_end_token_id=ids[before_after[2]],
        sam_config=tiny_model.sam_shape().to_dict(),
        max_image_tokens=(SIDE // CELL) ** 2,
        seg_token_id=ids[SEG],
        rej_token_id=ids[REJ],
    )
    model = UGroundQwen25VL(config)
    for part in (model.visual_model, model.ppm, model.text_hidden_fcs):
        part.requires_grad_(False)
    for layer in (model.model.visual.merger.mlp[0], model.model.visual.merger.mlp[2]):
        nn.init.xavier_normal_(layer.weight)  # so that features are as large as embeddings from the beginning
    reader = config.new_reader()
    reader.save_pretrained(folder)
    if options.start:
        state = renamed(read_folder(folder), UGroundQwen25VL.published_keys)
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert not [name for name in missing if name.startswith(("model.", "lm_head."))]
    return model, UGroundProcessor(tokenizer, reader, 0, NO_SYSTEM_PROMPT)


def start_language(model: UGroundQwen25VL, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Takes the language model of a tiny LLaVA: Qwen2's layers are LLaMA's, with biases, which stay zero here."""
    state = load_file(folder / "llava" / "model.safetensors")
    known, own = PreTrainedTokenizerFast.from_pretrained(folder / "llava").get_vocab(), tokenizer.get_vocab()
    shared = [token for token in own if token in known]
    theirs, ours = (torch.tensor([vocabulary[token] for token in shared]) for vocabulary in (known, own))
    decoder = model.language
    with torch.no_grad():
        decoder.embed_tokens.weight[ours] = state["model.embed_tokens.weight"][theirs]
        model.lm_head.weight[ours] = state["lm_head.weight"][theirs]
    parts = ("model.layers.", "model.norm.")
    layers = {name.removeprefix("model."): value for name, value in state.items() if name.startswith(parts)}
    missing, unexpected = decoder.load_state_dict(layers, strict=False)
    if wrong := unexpected + [name for name in missing if not name.endswith(".bias") and "embed_tokens" not in name]:
        raise ValueError(f"--language {folder}: its layers are not those of the tiny Qwen2.5-VL: {wrong}")
    print(f"language model of {folder}: {len(shared)} of {len(own)} tokens are known", flush=True)


def save_base(model: Backbone, output: Path, with_tower: bool) -> None:
    """Writes the family's folders of the vision-language model."""
    if isinstance(model, UGroundQwen25VL):
        return save_qwen(model, output)
    assert isinstance(model, LlavaLlamaForCausalLM)
    save_llava(model, output)
    if with_tower:
        model.vision_tower.save_pretrained(output / "clip")


def save_qwen(model: UGroundQwen25VL, output: Path) -> None:
    """Writes qwen2_5_vl/: the base alone, by transformers' class, with the system prompt in its ``config.json``."""
    sizes = tiny_model.qwen_sizes(model.language.config.vocab_size)
    tokens = {name: getattr(model.config, name) for name in QWEN_TOKENS}
    base = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**sizes, **tokens))
    own = model.state_dict()
    base.load_state_dict({name: own[name] for name in base.state_dict()})
    base.save_pretrained(output / QWEN)
    path = output / QWEN / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"system_prompt": NO_SYSTEM_PROMPT}, indent=2) + "\n")


def save_sam2(sam: Sam2, output: Path) -> None:
    """Writes sam2/, by transformers' class."""
    model = Sam2Model(sam.shape)
    model.load_state_dict(sam.state_dict())
    model.save_pretrained(output / "sam2")


def load_llava(model: LlavaLlamaForCausalLM, folder: Path) -> None:
    """Loads llava/ and clip/ of an earlier run."""
    state = load_file(folder / "llava" / "model.safetensors")
    state = {key.replace("model.mm_projector.", "mm_projector."): value for key, value in state.items()}
    clip = load_file(folder / "clip" / "model.safetensors")
    state |= {f"vision_tower.{key}": value for key, value in clip.items()}
    model.load_state_dict(state)


def new_llava(options: argparse.Namespace) -> tuple[LlavaLlamaForCausalLM, UGroundProcessor]:
    """A random LLaVA, or that of an earlier run."""
    llava = options.output / "llava"
    if options.start and options.start != options.output:
        shutil.copytree(options.start / "llava", llava, dirs_exist_ok=True)
    tokenizer = make_tokenizer(llava, options.seed)
    config = LlavaLlamaConfig(vision_config=tiny_model.clip_config(), **tiny_model.llama_settings(len(tokenizer)))
    model = LlavaLlamaForCausalLM(config)
    reader = ClipReader(config.clip_side, config.clip_patch)
    processor = UGroundProcessor(tokenizer, reader, tiny_model.sam_shape().image_size, NO_SYSTEM_PROMPT)
    processor.keep_padding = True  # targets have all patches
    return model, processor
