"""Sizes of published backbones, for plans before their weights are here: as in their config.json on the hub.

A test builds each on the meta device and compares the number of its parameters with the published one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A backbone's own part of a configuration (``model.backbones``), and its number of parameters."""

    backbone: str
    sizes: dict[str, Any]
    parameters: int


def _text(width: int, mlp: int, layers: int, heads: int, keys: int, vocabulary: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        **others,
    }


_QWEN_25_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_QWEN_3_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_QWEN_25_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_QWEN_3_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
PUBLISHED = {
    "Qwen2.5-VL-3B": Published(
        "qwen2_5_vl",
        {
            "tie_word_embeddings": True,
            "text_config": _text(2048, 11008, 36, 16, 2, 151_936, rope_parameters=_QWEN_25_ROPE),
            "vision_config": {**_QWEN_25_TOWER, "out_hidden_size": 2048},
        },
        3_754_622_976,
    ),
    "Qwen2.5-VL-7B": Published(
        "qwen2_5_vl",
        {
            "tie_word_embeddings": False,
            "text_config": _text(3584, 18944, 28, 28, 4, 152_064, rope_parameters=_QWEN_25_ROPE),
            "vision_config": {**_QWEN_25_TOWER, "out_hidden_size": 3584},
        },
        8_292_166_656,
    ),
    "Qwen3-VL-8B": Published(
        "qwen3_vl",
        {
            "tie_word_embeddings": False,
            "text_config": _text(4096, 12288, 36, 32, 8, 151_936, head_dim=128, rope_parameters=_QWEN_3_ROPE),
            "vision_config": {**_QWEN_3_TOWER, "out_hidden_size": 4096},
        },
        8_767_123_696,
    ),
    "InternVL3-8B": Published(
        "internvl3",
        {
            "tie_word_embeddings": False,
            "text_config": {"model_type": "qwen2", **_text(3584, 18944, 28, 28, 4, 151_674)},
            "vision_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": [448, 448],
                "patch_size": [14, 14],
                "attention_bias": True,
            },
        },
        7_944_373_760,
    ),
}


def published(version: str) -> Published | None:
    """The backbone that a path or hub id names, such as ``Qwen/Qwen2.5-VL-7B-Instruct``; None if it is not known."""
    name = re.sub("[-_]", "", version.rpartition("/")[2].lower())
    return next((known for key, known in PUBLISHED.items() if re.sub("[-_]", "", key.lower()) in name), None)
