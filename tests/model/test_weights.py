"""Loading of weights in every published format; keys that do not fit are refused by name."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from opening import load_pretrained
from safetensors.torch import load_file, save_file
from segment_anything import sam_model_registry
from tiny_run import ROOT, environment, write_base
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SamConfig,
    SamModel,
)
from transformers.initialization import no_init_weights

from model.config import UGroundConfig
from model.decoders.segment_anything import SamShape
from model.loading import formats, weights
from model.loading.files import read_folder, read_torch_file
from model.loading.mask_decoders import read_sam
from model.loading.pretrained import load_for_training
from model.loading.weights import (
    fingerprint,
    grow_vocabulary,
    load_base,
    load_strictly,
)
from model.lora import add_lora
from model.opened import predict
from model.processing.tokens import add_special_tokens, load_tokenizer
from model.settings import RECIPES
from model.structures import Turn
from model.UGround import UGroundForCausalLM
from scripts.merge_lora import save_merged
from utils.demo.tiny_model import clip_config, llama_settings, sam_shape

EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture
def base(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    write_base(tmp_path / "base", tiny_model, tiny_tokenizer)
    return tmp_path / "base"


def open_base(base: Path, **changed):
    paths = {"version": base / "llava", "vision_tower": base / "clip", "vision_pretrained": base / "sam.pth"} | changed
    return load_base(*map(str, paths.values()), torch.float32, {})[0]


def edit(path: Path, **changed) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def reshard(folder: Path, kind: str, parts: int) -> None:
    """Rewrites model.safetensors as ``parts`` files of another kind, with an index if there are several."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = [f"{stem}-{i + 1:05d}-of-{parts:05d}.{end}" for i in range(parts)] if parts > 1 else [f"{stem}.{end}"]
    weight_map = {key: names[i % parts] for i, key in enumerate(state)}
    for name in names:
        own = {key: value for key, value in state.items() if weight_map[key] == name}
        save_file(own, folder / name) if kind == "safetensors" else torch.save(own, folder / name)
    if parts > 1:
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))


# -- LLaVA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "parts"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_llava_in_its_own_format(base, tiny_model, kind, parts):
    reshard(base / "llava", kind, parts)
    loaded = open_base(base).state_dict()
    for key, value in tiny_model.state_dict().items():
        if not key.startswith(("text_hidden_fcs.", "ppm.")):
            torch.testing.assert_close(loaded[key], value, **EXACT)


def test_llava_1_with_its_linear_projector(base):
    path = base / "llava/model.safetensors"
    state = {key: value for key, value in load_file(path).items() if ".mm_projector.2." not in key}
    state = {key.replace("mm_projector.0.", "mm_projector."): value for key, value in state.items()}
    save_file(state, path)
    projector = open_base(base).mm_projector
    assert isinstance(projector, torch.nn.Linear)
    torch.testing.assert_close(projector.weight.detach(), state["model.mm_projector.weight"], **EXACT)


LAYOUTS = {
    "as transformers 5 writes it": [],
    "before transformers 4.52": [("vision_tower.", "vision_tower.vision_model.")],
    "as modules are nested since": [
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llava_in_transformers_format(base, tiny_model, tiny_tokenizer, layout):
    clip = {k: v for k, v in tiny_model.config.vision_config.items() if k != "model_type"}
    text = {k: getattr(tiny_model.config, k) for k in ("vocab_size", "hidden_size", "intermediate_size")}
    text = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **text)
    reference = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**clip), text_config=text)
    ).eval()
    reference.save_pretrained(base / "hf")
    state = load_file(base / "hf/model.safetensors")
    for old, new in LAYOUTS[layout]:
        state = {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in state.items()}
    save_file(state, base / "hf/model.safetensors")
    model = open_base(base, version=base / "hf")
    image, ids = torch.randn(1, 3, 40, 40), torch.tensor([[1, 5, 9, 30]])
    with torch.inference_mode():
        features = model.encode_images(image, torch.arange(16)[None])[0]
        expected = reference.get_image_features(pixel_values=image)
        expected = getattr(expected, "pooler_output", expected)[0]
        torch.testing.assert_close(features, expected.reshape(features.shape), rtol=1e-5, atol=1e-6)
        logits = reference(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-6)


def test_added_tokens_start_at_the_mean_also_with_spare_rows(base, tiny_model, tiny_tokenizer):
    """transformers' LLaVA-1.5 has 32064 rows for 32002 tokens."""
    known = len(tiny_tokenizer) - 5
    path = base / "llava/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < known]
    path.write_text(json.dumps(tokenizer))
    config = base / "llava/tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("added_tokens_decoder", None)
    settings.pop("additional_special_tokens", None)
    settings.pop("extra_special_tokens", None)
    config.write_text(json.dumps(settings))
    paths = (str(base / "llava"), str(base / "clip"), str(base / "sam.pth"))
    model, processor, _ = load_for_training(*paths, precision="fp32")
    table = model.get_input_embeddings().weight
    assert len(table) == tiny_model.config.vocab_size == len(processor.tokenizer)
    assert processor.tokens.seg >= known
    torch.testing.assert_close(table[processor.tokens.seg], table[:known].mean(0))


@pytest.mark.parametrize("written", ["once", "twice"])
def test_a_base_whose_head_is_its_embeddings(base, make_model, tmp_path, tiny_samples, written):
    """As SmolLM's: tied, with fewer key-value heads. It stays tied through loading, growing, training and saving."""
    path = base / "llava/model.safetensors"
    state = load_file(path)
    for key in (key for key in list(state) if key.endswith(("k_proj.weight", "v_proj.weight"))):
        state[key] = state[key][:16].clone()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if written == "once":
        del state["lm_head.weight"]
    save_file(state, path)
    edit(base / "llava/config.json", tie_word_embeddings=True, num_key_value_heads=1)
    paths = (str(base / "llava"), str(base / "clip"), str(base / "sam.pth"))
    model, processor, rows = load_for_training(*paths, precision="fp32")
    embeddings = model.get_input_embeddings()
    assert model.lm_head.weight is embeddings.weight
    assert {row.module: row.fingerprint for row in rows}["lm_head"] == fingerprint([embeddings.weight])
    grow_vocabulary(model, len(processor.tokenizer), len(processor.tokenizer) + 3)
    assert model.lm_head.weight is model.get_input_embeddings().weight

    adapted = add_lora(model, r=2)
    trained = {
        name for name, p in adapted.named_parameters() if p.requires_grad and ("embed" in name or "lm_head" in name)
    }
    assert trained == {"base_model.model.model.embed_tokens.weight"}
    before = model.lm_head.weight.clone()
    adapted.get_base_model()(processor.collate(tiny_samples)).loss.backward()
    with torch.no_grad():
        model.lm_head.weight -= model.get_input_embeddings().weight.grad
    assert not torch.equal(before, model.get_input_embeddings().weight)

    merged = adapted.merge_and_unload()
    (tmp_path / "own").mkdir()
    save_merged(merged, tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    again, _ = load_pretrained(str(tmp_path / "own"))
    assert again.lm_head.weight is again.get_input_embeddings().weight
    torch.testing.assert_close(again.lm_head.weight, merged.lm_head.weight, **EXACT)


# -- SAM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "whole"),
    [
        ("vit_b", 768, 12, 12, (2, 5, 8, 11)),
        ("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
        ("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
    ],
)
def test_sam_sizes_follow_from_the_file(name, width, depth, heads, whole):
    with torch.device("meta"):
        state = sam_model_registry[name]().state_dict()
    shape = SamShape.from_state_dict(state)
    assert shape == SamShape(encoder_width=width, encoder_depth=depth, encoder_heads=heads, global_attention=whole)


def test_sam_of_transformers(base, tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    vision |= {"output_channels": 32, "global_attn_indexes": [1], "window_size": 5, "mlp_dim": 64, "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 8}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    reference = SamModel(config).eval()
    reference.save_pretrained(tmp_path / "sam")
    assert read_sam(str(tmp_path / "sam"))[1].window_size == 5
    sam = open_base(base, vision_pretrained=tmp_path / "sam").visual_model
    image, prompts = torch.randn(1, 3, 64, 64), torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        embeddings = reference.get_image_embeddings(image)
        torch.testing.assert_close(sam.encode(image), embeddings, rtol=1e-4, atol=1e-5)
        reference_output = reference(image_embeddings=embeddings, input_masks=prompts, multimask_output=False)
        expected = reference_output.pred_masks
        rated = sam.decode(embeddings, None, prompts)[1]
        torch.testing.assert_close(rated, reference_output.iou_scores[0, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sam.decode(embeddings, None, prompts)[0], expected[0, 0], rtol=1e-4, atol=1e-5)


# -- the paper's release -----------------------------------------------------------------------------------------------


def write_released(folder: Path, model: UGroundForCausalLM, tokenizer) -> None:
    """The model under the names of the paper's release, without CLIP."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith(("mm_projector.", "visual_model.", "text_hidden_fcs.")):
            state[f"model.{key}"] = value
        elif not key.startswith(("vision_tower.", "ppm.")):
            state[key] = value
    state |= {"ppm._layer_gate_W_similarity": model.ppm.gate.detach()}
    state |= {key.replace("mm_", "out_mm_"): v for key, v in state.items() if "mm_projector" in key}
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    config = model.config.to_dict()
    kept = {k: v for k, v in config.items() if k in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")}
    kept |= {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    kept |= {"model_type": "llava", "architectures": ["UGroundForCausalLM"], "mode": 3, "mm_hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(kept))
    tokenizer.save_pretrained(folder)


def test_a_released_folder_opens_as_any_other(base, tmp_path, tiny_model, tiny_tokenizer, tiny_samples):
    folder = tmp_path / "released"
    write_released(folder, tiny_model, tiny_tokenizer)
    with pytest.raises(ValueError, match="give --vision_tower"):
        load_pretrained(str(folder))
    model, processor = load_pretrained(str(folder), vision_tower=str(base / "clip"))
    assert {name: getattr(model.config, name) for name in RECIPES["released"]} == RECIPES["released"]
    torch.testing.assert_close(model.ppm.gate, tiny_model.ppm.gate, **EXACT)
    ask = ([tiny_samples[0].image], [[Turn("star", "it is [SEG].")]])
    assert predict(model, processor, *ask)[0][0].layers == [4]  # the last layer, by its own settings

    model.save_pretrained(tmp_path / "own")  # a folder of this project, which contains CLIP
    processor.save_pretrained(tmp_path / "own")
    again, processor = load_pretrained(str(tmp_path / "own"))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), **EXACT)
    assert predict(again, processor, *ask)[0][0].layers == [4]


def test_released_folders_that_do_not_fit(base, tmp_path, tiny_model, tiny_tokenizer):
    folder, tower = tmp_path / "released", str(base / "clip")
    write_released(folder, tiny_model, tiny_tokenizer)
    edit(folder / "config.json", mode=7)
    with pytest.raises(ValueError, match="mode 7"):
        load_pretrained(str(folder), vision_tower=tower)
    edit(folder / "config.json", mode=3)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        state[key] = state[key][:300]
    torch.save(state, folder / "pytorch_model.bin")
    edit(folder / "config.json", vocab_size=300)
    with pytest.raises(ValueError, match="of different checkpoints"):
        load_pretrained(str(folder), vision_tower=tower)
    torch.save({k: v for k, v in state.items() if "visual_model" not in k}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no SAM"):
        load_pretrained(str(folder), vision_tower=tower)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_keys_that_do_not_fit_are_named(base):
    path = base / "llava/model.safetensors"
    whole = load_file(path)

    def refused(state: dict, *words: str) -> None:
        save_file(state, path)
        with pytest.raises(ValueError, match="do not fit") as error:
            open_base(base)
        assert all(word in str(error.value) for word in words), error.value

    norm = "model.norm.weight"
    refused({k: v for k, v in whole.items() if k != norm}, "1 missing", norm, "incomplete")
    refused(whole | {"model.extra": whole[norm].clone()}, "1 unexpected", "model.extra")
    refused(whole | {norm: whole[norm][:8].clone()}, norm, "(8,)", "(32,)", "another size")
    lora = "model.layers.0.self_attn.q_proj.lora_A.weight"
    refused(whole | {lora: whole[norm].clone()}, "adapter that was not merged")
    with pytest.raises(ValueError, match="no key fits"):
        load_strictly(torch.nn.Linear(2, 2), {"a": torch.zeros(1)}, "a file")


def test_a_tower_that_does_not_fit_is_named(base):
    """transformers would initialize missing weights randomly."""
    path = base / "clip/model.safetensors"
    state = load_file(path)
    half = {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 2), "logit_scale": torch.zeros(())}
    save_file(state | half, path, metadata={"format": "pt"})  # a whole CLIP
    open_base(base)
    layer = next(key for key in state if "layers.1.mlp.fc1.weight" in key)
    damaged = {
        r"1 missing: .*layers.1.mlp.fc1.weight": {key: value for key, value in state.items() if key != layer},
        "1 unexpected: .*strange.weight": state | {"strange.weight": torch.zeros(2)},
        "1 of another shape: .*fc1.weight": state | {layer: torch.zeros(2, 2)},
    }
    for message, content in damaged.items():
        save_file(content, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"--vision_tower: (?s:.*){message}"):
            open_base(base)


def test_sentencepiece_alone_is_loaded_as_llamas_tokenizer(base):
    """As LLaVA-1.5 is published: tokenizer.model, no tokenizer.json, and a type that AutoTokenizer misreads."""
    folder = base / "llava"
    for path in folder.glob("tokenizer*"):
        path.unlink()
    text = folder / "text.txt"
    text.write_text((ROOT / "README.md").read_text())
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=450, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "pad_token": "<unk>"}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | tokens))
    expected = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    for words in ("A chat between a user and a model.", "one\nline", "layer 7"):
        assert tokenizer(words).input_ids == [1, *expected.encode(words)], words
    add_special_tokens(tokenizer)
    token_ids = tokenizer("it is [SEG].", add_special_tokens=False).input_ids
    assert token_ids.count(tokenizer.convert_tokens_to_ids("[SEG]")) == 1
    tokenizer.save_pretrained(folder / "again")
    assert load_tokenizer(folder / "again")("A chat [SEG].").input_ids == tokenizer("A chat [SEG].").input_ids


def test_a_missing_shard_is_named(base):
    reshard(base / "llava", "bin", 2)
    (base / "llava/pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="00002-of-00002"):
        open_base(base)


def test_wrong_pairs(base):
    config, sam = base / "llava/config.json", str(base / "sam.pth")
    edit(config, mm_hidden_size=64)
    with pytest.raises(ValueError, match=r"has width 32, .* expects 64"):
        open_base(base)
    edit(config, mm_hidden_size=32, mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(ValueError, match=r"reads images of 40 pixels, .* trained with 336"):
        open_base(base)
    edit(config, mm_vision_tower="openai/clip-vit-large-patch14")
    with pytest.raises(ValueError, match="trained with 224"):
        open_base(base)
    with pytest.raises(ValueError, match="no segment-anything checkpoint"):
        read_sam(str(base / "llava"))
    assert read_sam(sam)[1].image_size == 64
    torch.save({key: value for key, value in torch.load(sam).items() if "mask_decoder" not in key}, sam)
    with pytest.raises(ValueError, match=rf"{sam} is no segment-anything checkpoint \(no 'mask_decoder"):
        read_sam(sam)


class Code:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("name", ["sam.pth", "llava/pytorch_model.bin"])
def test_files_that_carry_code_are_refused(base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (base / "llava/model.safetensors").unlink()
    torch.save({"weight": Code()}, base / name)
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
        read_torch_file(base / name)
    (base / name).write_bytes(pickle.dumps({"weight": Code()}))
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
        read_sam(str(base / name)) if name == "sam.pth" else read_folder(base / "llava")
    assert not Path("ran").exists()


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path

from model.loading.pretrained import load_for_training

def memory(name):
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * next(int(line[1]) for line in lines if line[0] == f"{name}:")

import transformers.models.llama.modeling_llama  # imports are not part of the measurement
for precision in ("bf16", "fp32"):
    model = None
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    model, _, _ = load_for_training(*sys.argv[1:4], precision=precision)
    print((memory("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_loading_takes_the_memory_of_one_model(tmp_path, tiny_tokenizer):
    """194 MB in bfloat16, in four shards; with another dtype, one shard at a time is in memory twice."""
    llama = llama_settings(len(tiny_tokenizer), width=1024, layers=8, heads=8)
    clip, sam = clip_config(40, 10, 32, 3), sam_shape(64, 8, 16, 2, 32).to_dict()
    with no_init_weights():
        model = UGroundForCausalLM(UGroundConfig(vision_config=clip, sam_config=sam, **llama)).bfloat16()
    write_base(tmp_path / "base", model, tiny_tokenizer)
    reshard(tmp_path / "base/llava", "safetensors", 4)
    edit(tmp_path / "base/llava/config.json", **llama)
    paths = [str(tmp_path / "base" / name) for name in ("llava", "clip", "sam.pth")]
    command = [sys.executable, "-c", MEASURE, *paths]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True)
    same, converted = map(float, done.stdout.split()[-2:])
    assert 0.9 < same < 1.1
    assert 0.9 < converted < 1.3


def test_no_weight_is_left_uninitialized(base, monkeypatch):
    """``build`` leaves weights uninitialized: loading must replace all of them."""
    new_model = weights.new_model

    def poisoned(*arguments):
        model = new_model(*arguments)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith(weights.NEW_PARTS):
                    parameter.fill_(torch.nan)
        return model

    monkeypatch.setattr(weights, "new_model", poisoned)
    state = open_base(base).state_dict()
    assert all(value.isfinite().all() and not value.is_meta for value in state.values())


# -- full size, without weights ----------------------------------------------------------------------------------------

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
SIZES = {  # hidden, intermediate, layers, LoRA's rank
    "7b": (4096, 11008, 32, 8),
    "13b": (5120, 13824, 40, 64),
}


def skeleton(size: str) -> tuple[UGroundForCausalLM, int]:
    """The released model, with 32004 tokens, on the meta device; and LoRA's rank."""
    width, inner, layers, rank = SIZES[size]
    llama = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 32004}
    heads = {"num_attention_heads": width // 128, "num_key_value_heads": width // 128, "tie_word_embeddings": False}
    with torch.device("meta"):
        return UGroundForCausalLM(UGroundConfig(vision_config=CLIP_L, **llama, **heads)), rank


@pytest.mark.parametrize("size", SIZES)
def test_full_size(size):
    """Table 10: 7.75B parameters of which 288.40M train. The total counts a second projector that nothing uses."""
    model, rank = skeleton(size)
    width, _, layers, _ = SIZES[size]
    projector = sum(p.numel() for p in model.mm_projector.parameters())
    with torch.device("meta"):
        model = add_lora(model, r=rank)
    total = projector + sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = rank * 2 * 2 * width * layers
    gate, phi = (layers + 1) * width, width * width + width + 256 * width + 256
    tables, mask_decoder, mask_downscaling = 2 * 32004 * width, 4_058_340, 4_684
    assert trained == adapters + gate + phi + tables + mask_decoder + mask_downscaling
    if size == "7b":
        assert total == pytest.approx(7.75e9, rel=1e-3)
        assert trained == pytest.approx(288.40e6, rel=1e-4)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    projections = {f"model.layers.{i}.self_attn.{part}_proj" for i in range(layers) for part in "qv"}
    assert adapted == {f"base_model.model.{name}" for name in projections}


@pytest.mark.parametrize("size", SIZES)
def test_published_keys_are_loaded_at_full_size(size):
    """LLaMA's and SAM's keys and shapes come from the libraries that define them, not from this project."""
    model, _ = skeleton(size)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**{k: getattr(model.config, k) for k in LlamaConfig().to_dict() if k in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads")})).state_dict()  # fmt: skip
        sam = sam_model_registry["vit_h"]().state_dict()
    own = model.state_dict()
    rest = ("mm_projector.", "text_hidden_fcs.")
    published = {f"model.{key}": value for key, value in own.items() if key.startswith(rest)}
    published |= {f"model.visual_model.{key}": value for key, value in sam.items()} | llama
    published |= {"ppm._layer_gate_W_similarity": own["ppm.gate"], "model.out_mm_projector.0.weight": own["ppm.gate"]}
    state = formats.renamed(published, formats.LLAVA)
    load_strictly(model, state, "the release", new=("vision_tower.", "ppm.baseline"))
