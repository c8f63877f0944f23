"""Precisions, quantized layers, and layers on several devices give the same answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.config import UGroundConfig
from model.loading import placement
from model.opened import predict
from model.structures import Turn
from model.UGround import UGroundForCausalLM
from utils.demo.tiny_model import clip_config, llama_settings, sam_shape

TURNS = [[Turn("where is the red star", "it is [SEG]."), Turn("circle", "[SEG] and [SEG]")]]


def masks(model, processor, image) -> torch.Tensor:
    return torch.cat([p.mask_logits for p in predict(model, processor, [image], TURNS, layer_policy="last")[0]])


def generated(model, processor, image) -> list[list[int]]:
    turns = [Turn(turn.question) for turn in TURNS[0]]
    return [p.token_ids for p in predict(model, processor, [image], [turns], max_new_tokens=6)[0]]


def near(actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> bool:
    return bool((actual - exact).abs().max() <= tolerance * exact.abs().max())


@pytest.fixture
def wider_model(tiny_processor) -> UGroundForCausalLM:
    """bitsandbytes' CPU code needs blocks of 64 inputs."""
    torch.manual_seed(0)
    ids = tiny_processor.tokens
    llama = llama_settings(len(tiny_processor.tokenizer), width=64, layers=2, heads=2) | {"intermediate_size": 192}
    sam = sam_shape(side=64, patch=8, encoder_width=16, depth=2, width=32).to_dict()
    clip = clip_config(side=40, patch=10, width=32, layers=3)
    config = UGroundConfig(vision_config=clip, sam_config=sam, seg_token_id=ids.seg, rej_token_id=ids.rej, **llama)
    return UGroundForCausalLM(config).eval()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.06), ("fp16", 0.01)])
def test_half_precision(make_model, tiny_processor, tiny_samples, precision, tolerance):
    image, dtype = tiny_samples[0].image, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    exact, half = masks(make_model(), tiny_processor, image), make_model().to(dtype)
    assert near(masks(half, tiny_processor, image), exact, tolerance)
    assert half.visual_model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.dtype == torch.float32


@pytest.mark.parametrize(("kind", "tolerance"), [("8bit", 0.03), ("4bit", 0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_layers(wider_model, tiny_processor, tiny_samples, kind, tolerance, dtype):
    pytest.importorskip("bitsandbytes")
    model, image = wider_model.to(dtype), tiny_samples[0].image
    exact = masks(model, tiny_processor, image)
    before = {name: type(module) for name, module in model.named_modules()}
    placement.place(model, "cpu", quantize=kind)
    changed = {name for name, module in model.named_modules() if type(module) is not before.get(name)}
    assert changed == {name for name, kind in before.items() if kind is nn.Linear and name.startswith("model.layers.")}
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == {"8bit": torch.int8, "4bit": torch.uint8}[kind]
    assert weight.numel() == {"8bit": 64 * 192, "4bit": 64 * 192 // 2}[kind]
    quantized = masks(model, tiny_processor, image)
    assert near(quantized, exact, tolerance)
    assert not torch.equal(quantized, exact)
    assert generated(model, tiny_processor, image)


def test_invalid_quantization_is_refused(make_model, monkeypatch):
    with pytest.raises(ValueError, match="exclude each other"):
        placement.place(make_model(), "cpu", quantize="4bit", device_map="auto")
    if placement.find_spec("bitsandbytes"):
        with pytest.raises(ValueError, match=r"q_proj is 32 to 32\. Use 8bit"):
            placement.place(make_model(), "cpu", quantize="4bit")
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        placement.place(make_model(), "cpu", quantize="8bit")
    monkeypatch.setattr(placement, "find_spec", lambda name: "there")
    with pytest.raises(ValueError, match="no code for mps"):
        placement.place(make_model(), "mps", quantize="8bit")


def test_layers_fill_the_gpus_in_order_and_then_main_memory(make_model):
    model = make_model()
    layer = sum(tensor.nbytes for tensor in model.model.layers[0].state_dict().values())
    rest = sum(tensor.nbytes for tensor in model.state_dict().values()) - 4 * layer

    def planned(*layers: float, main: int = 0) -> list:
        sizes = {i: int(layer * n / placement.USABLE) for i, n in enumerate(layers[:-1])}
        sizes[main] += int(rest / placement.USABLE) + 2
        return placement.plan(model, main, sizes | {"cpu": int(layer * layers[-1] / placement.USABLE) + 2})

    assert planned(9, 9, 9) == [0, 0, 0, 0]
    assert planned(1.5, 2.5, 9) == [0, 1, 1, "cpu"]
    assert planned(2.5, 1.5, 9, main=1) == [1, 0, 0, "cpu"]
    assert planned(0, 9, 0) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="into no GPU and main memory"):
        planned(1, 1, 1)
    with pytest.raises(ValueError, match="what cannot be spread"):
        placement.plan(model, 0, {0: rest, "cpu": 10**12})


def test_spread_layers_give_the_same_answers(make_model, tiny_processor, tiny_samples):
    """On one CPU: offloaded weights are copied for each forward pass, as from main memory to a GPU."""
    model, image = make_model(), tiny_samples[1].image
    exact, token_ids = masks(model, tiny_processor, image), generated(model, tiny_processor, image)
    placement.spread(model, "cpu", [torch.device("cpu"), "cpu", torch.device("cpu"), "cpu"])
    offloaded = [all(p.is_meta for p in layer.parameters()) for layer in model.model.layers]
    assert offloaded == [False, True, False, True]
    torch.testing.assert_close(masks(model, tiny_processor, image), exact, rtol=0, atol=0)
    assert generated(model, tiny_processor, image) == token_ids


def test_unavailable_devices_are_refused(make_model):
    with pytest.raises(ValueError, match="nothing to spread"):
        placement.place(make_model(), "cpu", device_map="auto")
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="--device mps cannot be used"):
            placement.pick_device("mps")


def test_flash_attention_is_refused(make_model, tmp_path):
    """It would ignore the mask that keeps the conversations of a row apart."""
    model = make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not support Flash Attention"):
        type(model).from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"
