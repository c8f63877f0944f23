"""Configurations of the tiny families: LLaVA and SAM, Qwen2.5-VL and SAM 2, of about 2M parameters each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from model.decoders.segment_anything import SamShape
from model.processing.tokens import add_special_tokens
from utils.datasets.templates import ANSWERS, QUESTIONS

# Kinds of templates that the tiny demo was pre-trained on. Changing them changes its tokenizer, and so its weights.
DEMO_QUESTIONS = ("phrase", "sentence", "joint", "explain")
DEMO_ANSWERS = ("target", "merged", "absent", "joint")


def template_corpus() -> Iterator[str]:
    """Yields the demo's templates without placeholders, for training its tokenizer."""
    chosen = [*(QUESTIONS[kind] for kind in DEMO_QUESTIONS), *(ANSWERS[kind] for kind in DEMO_ANSWERS)]
    for templates in chosen:
        for template in templates:
            yield template.replace("{query}", "").replace("{list}", "A:[SEG], B:[REJ]").strip()


def train_tokenizer(texts: Iterable[str], vocab_size: int = 800) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: words of ``texts`` become single tokens; any other text remains encodable."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    add_special_tokens(wrapped)
    return wrapped


def clip_config(side: int = 120, patch: int = 10, width: int = 96, layers: int = 5) -> CLIPVisionConfig:
    """Configuration of the vision tower; LLaVA uses hidden state -2, so the last layer is never used."""
    return CLIPVisionConfig(
        image_size=side,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 32),
        projection_dim=width,
    )


def llama_settings(vocab_size: int, width: int = 128, layers: int = 8, heads: int = 4, mlp: int = 0) -> dict:
    """Settings of the LLaMA configuration; ``mlp`` = 0 stands for 8/3 of the width, in steps of 16."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": mlp or 8 * width // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def qwen_sizes(vocab_size: int, layers: int = 8) -> dict[str, Any]:
    """Sizes of a Qwen2.5-VL whose image tokens show cells of 10 x 10 pixels.

    The axes of positions share 16 frequencies so that rows and columns of a grid of 12 differ: up to 0.6 and 0.1
    radians a cell. In published shares, columns would have the lowest, and be alike.
    """
    text = llama_settings(vocab_size, layers=layers)
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 3, 12]}}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 5,
        "window_size": 40,
        "fullatt_block_indexes": [1],
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}


def sam2_sizes(side: int = 128, width: int = 64) -> dict[str, Any]:
    """Settings of a ``Sam2Config``: strides of 2, 4 and 8 pixels, so that mask prompts have half the input's side."""
    widths = [16, 32, 64, 96]
    hiera = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": widths[0],
        "num_attention_heads": 1,
        "image_size": [side, side],
        "patch_kernel_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "window_positional_embedding_background_size": [4, 4],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [1, 2, 4, 4],
        "window_size_per_stage": [8, 4, 8, 4],
        "global_attention_blocks": [3],
        "mlp_ratio": 2.0,
    }
    return {
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": hiera,
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[side // stride] * 2 for stride in (2, 4, 8)],
            "fpn_hidden_size": width,
        },
        "prompt_encoder_config": {"hidden_size": width, "image_size": side, "patch_size": 8},
        "mask_decoder_config": {"hidden_size": width, "mlp_dim": 4 * width, "iou_head_hidden_dim": width},
    }


def sam_shape(side: int = 120, patch: int = 8, encoder_width: int = 64, depth: int = 2, width: int = 64) -> SamShape:
    """Shape of a SAM with a small encoder and a narrow decoder."""
    return SamShape(
        image_size=side,
        patch_size=patch,
        encoder_width=encoder_width,
        encoder_depth=depth,
        encoder_heads=2,
        global_attention=tuple(range(1, depth, 2)),
        window_size=5,
        prompt_width=width,
        mask_channels=16,
        decoder_mlp=4 * width,
        iou_hidden=width,
    )
