"""PixelLM: its codebook, pixel decoder and target refinement loss, and its published layout with random weights.

The masks of a published checkpoint are computed once more from its file, by a reference in the order of the authors'
code, on transformers' and segment-anything's modules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from answering import read_anew
from conftest import drawn_sample
from opening import load_pretrained
from pixellm import GRID, PATCH, SETTINGS, SIDE, TOKENS, make_config, make_pixellm, make_processor
from safetensors.torch import load_file, save_file
from segment_anything.modeling import TwoWayTransformer
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from model import losses
from model.config import UGroundConfig
from model.decoders import DECODERS
from model.generation import next_tokens
from model.geometry import resized_size
from model.loading import adapter
from model.loading.pretrained import load_for_training, settings_of
from model.loading.weights import Loaded, load_original_sam, new_model
from model.lora import add_lora, parameters_by_part, set_trainable
from model.opened import cache_sam_features, predict
from model.processing import tokens
from model.processing.processor import UGroundProcessor
from model.processing.template import HUMAN_SYSTEM_PROMPT
from model.processing.transforms import resize_and_pad
from model.settings import DECODER_KINDS
from model.structures import Turn
from model.UGround import UGroundForCausalLM
from scripts.dev import study_policy
from utils.conversion.boxes import SamBoxes
from utils.demo.tiny_model import clip_config, llama_settings, train_tokenizer
from utils.diagnostics import memory_model
from utils.inference.session import ImageSession
from utils.training.checkpoint import trained_shapes

QUESTION, ANSWER = "where is the red star", "it is [SEG] and [SEG]."
IN_CHECKPOINT = ("mm_projector.", "text_hidden_fcs.")


@pytest.fixture(scope="module")
def processor() -> UGroundProcessor:
    return make_processor()


@pytest.fixture
def model(processor) -> UGroundForCausalLM:
    return make_pixellm(processor)


# -- the codebook ------------------------------------------------------------------------------------------------------


def test_texts_have_one_seg_where_the_model_has_six(processor):
    batch = processor.prompts([drawn_sample(0).image], [[Turn("what is [SEG2] or [SEG]", ANSWER)]])
    ids = batch.label_ids.tolist()
    start = ids.index(processor.codebook[0])
    assert ids[start : start + TOKENS] == processor.codebook
    assert [ids.count(token) for token in processor.codebook] == [2] * TOKENS
    assert processor.decode(ids) == ANSWER
    question = batch.input_ids[0].tolist()[: -len(ids)]
    assert not set(processor.codebook) & set(question)  # what a user types is no special token
    assert set(processor.codebook) <= set(processor.added_tokens)


def test_states_are_those_before_each_token_of_the_codebook(model, processor):
    batch = processor.prompts([drawn_sample(0).image], [[Turn(QUESTION, ANSWER)]])
    answers = model.answer(batch).answers
    hidden = model.forward_language(batch).hidden[-1][0]
    places = [i for i, token in enumerate(batch.input_ids[0].tolist()) if token in processor.codebook]
    expected = hidden[torch.tensor(places) - 1].view(2, TOKENS, -1)
    torch.testing.assert_close(answers.codebook[:, :, -1], expected)
    torch.testing.assert_close(answers.states, answers.codebook.mean(1))


def test_a_target_that_is_cut_off_has_no_mask(processor):
    sample = drawn_sample(0, segs=(2,))
    whole = processor.builder.encode(sample.conversations[0]).ids
    last, prefix = (
        max(i for i, token in enumerate(whole) if token in processor.codebook),
        len(processor.builder.prefix) + processor.reader.most_tokens,
    )
    sides = processor.reader, 0
    for length, masks in ((last + 1, 2), (last, 1), (last - TOKENS + 2, 1)):
        short = UGroundProcessor(processor.tokenizer, *sides, "", max_tokens=prefix + length, codebook=TOKENS)
        batch = short.collate([sample])
        assert len(batch.masks[0]) == len(batch.seg_positions) == masks, length


def test_generated_targets_are_whole_and_in_order():
    codebook = (4, 5, 6)
    logits = torch.zeros(1, 4, 8)
    logits[..., 5] = 3.0  # never at the start of a target
    logits[..., 7], logits[0, 1, 4] = 1.0, 2.0
    chosen = next_tokens(logits.clone(), torch.tensor([[-1, 6, 4, 5]]), codebook)
    assert chosen.tolist() == [[7, 4, 5, 6]]
    assert next_tokens(logits.clone(), torch.tensor([[-1, 6, 4, 5]]), (5,)).tolist() == [[5] * 4]


def test_generation_gives_the_masks_of_the_same_answer_given(model, processor):
    """In a batch and in a conversation, also where an answer is cut off within a target."""
    images = [drawn_sample(0).image, drawn_sample(1, (64, 40)).image]
    turns = [[Turn(QUESTION)], [Turn("a star"), Turn("a circle")]]
    with torch.no_grad():
        model.lm_head.weight[processor.codebook[0]] *= 30
        for parameter in model.text_hidden_fcs.parameters():
            parameter *= 10  # else all masks are alike

    def check(generated, image, history, question):
        count = generated.token_ids.count(processor.tokens.seg)
        assert generated.token_ids.count(processor.codebook[0]) == count + 1  # cut off
        assert len(generated.masks) == generated.text.count("[SEG]") == count > 1
        assert (generated.mask_logits[0] - generated.mask_logits[1]).abs().max() > 1e-3
        _, given = read_anew(model, processor, image, history, question, generated.token_ids)
        torch.testing.assert_close(given.mask_logits, generated.mask_logits, rtol=0, atol=1e-5)

    for image, asked, row in zip(images, turns, predict(model, processor, images, turns, max_new_tokens=20)):
        for turn, generated in zip(asked, row, strict=True):
            check(generated, image, (), turn.question)
    session = ImageSession(model, processor, images[0])
    for question in (QUESTION, "a circle"):
        history = list(session.history)
        check(session.ask(question, max_new_tokens=20), images[0], history, question)


def test_rules_that_weight_layers_weight_the_codebook_too(model, processor):
    batch = processor.prompts([drawn_sample(0).image], [[Turn(QUESTION, ANSWER)]])
    language_pass = model.answer(batch)
    soft = model.decode_masks(language_pass, "soft")[0][0].mask_logits
    with torch.no_grad():
        model.ppm.gate.zero_()
        model.ppm.gate[2] = 1e4 * language_pass.answers.states[:, 2].mean(0)  # all weight on layer 2, or none
    blend = model.decode_masks(language_pass, "blend:1")[0][0]
    fixed = torch.cat(
        [model.decode_masks(language_pass, f"fixed:{layer}")[0][0].mask_logits[n : n + 1]
         for n, layer in enumerate(blend.layers)]
    )  # fmt: skip
    torch.testing.assert_close(blend.mask_logits, fixed, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(soft, fixed)


def test_the_map_of_a_chosen_layer_prompts_this_decoder_too(processor):
    """Policy and mask prompt are not bound to SAM: the map's gradient reaches the prompt's convolutions."""
    settings = {"layer_selection": "policy", "mask_prompt": True, "map_terms": ("gaussian_bce",)}
    model = make_pixellm(processor, **settings)
    set_trainable(model)
    model(processor.collate([drawn_sample(0)])).loss.backward()
    assert model.visual_model.prompt_encoder.mask_downscaling[0].weight.grad.abs().sum() > 0
    assert model.ppm.gate.grad.abs().sum() > 0
    ask = (model, processor, [drawn_sample(0).image], [[Turn(QUESTION, ANSWER)]])
    masks = [predict(*ask, layer_policy=rule)[0][0].mask_logits for rule in ("fixed:1", "fixed:4", "mc:3")]
    assert all(mask.isfinite().all() and mask.shape == masks[0].shape for mask in masks)
    assert not torch.equal(masks[0], masks[1])


def test_masks_are_rated_where_that_was_trained(model, processor, monkeypatch):
    """Its IoU head starts untrained, and its authors' loss leaves it so."""

    def answer(rule):
        turns = [[Turn("where is the red star?", "It is [SEG].")]]
        return predict(model, processor, [drawn_sample(0).image], turns, layer_policy=rule)[0][0]

    with pytest.raises(ValueError, match=r"layer policy best:2: .* not trained to rate its masks"):
        answer("best:2")
    assert answer("last").predicted_iou == []
    monkeypatch.setattr(model.config, "iou_loss_weight", 0.1)
    assert len(answer("best:2").predicted_iou) == 1


def test_every_decoder_has_its_scales(model):
    assert DECODERS.keys() == DECODER_KINDS.keys()
    assert len(model.visual_model.clip_depths) == model.config.num_scales == DECODER_KINDS["pixel_decoder"].scales
    assert UGroundConfig().num_scales == 1


def test_what_needs_an_image_encoder_says_so(model, processor, tmp_path):
    with pytest.raises(ValueError, match=r"--sam_feature_cache .* has no image encoder"):
        cache_sam_features(model, processor, str(tmp_path), 1)
    with pytest.raises(ValueError, match=r"--compile_sam: .* has no image encoder"):
        model.visual_model.compile_encoder()
    with pytest.raises(ValueError, match=r"sam.pth is a SAM 1, and .* decodes"):
        load_original_sam("sam.pth", model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--sam .* holds no SAM .*image_encoder.* decoded by pixel_decoder has none"):
        SamBoxes(tmp_path)


# -- training ----------------------------------------------------------------------------------------------------------


def test_every_part_before_a_mask_learns(model, processor):
    set_trainable(model)
    output = model(processor.collate([drawn_sample(0), drawn_sample(1, (64, 40), (2,)), drawn_sample(2, segs=(0,))]))
    output.loss.backward()
    learns = {part for part, (_, count) in parameters_by_part(model).items() if count}
    new = {"projector", "mask_projector", "image_neck"}
    assert learns == {"phi", "sam_prompt_encoder", "sam_mask_decoder", "embed_tokens", "lm_head"} | new
    for name in (
        "mm_projector.0.weight",
        "visual_model.out_mm_projector.0.weight",
        "visual_model.image_feature_neck.2.weight",
        "visual_model.mask_decoder.transformer.0.layers.0.mlp.lin1.weight",
        "visual_model.mask_decoder.transformer.1.layers.0.mlp.lin1.weight",
        "visual_model.mask_decoder.level_embed.weight",
        "visual_model.prompt_encoder.no_mask_embed.weight",
        "text_hidden_fcs.0.0.weight",
    ):
        assert model.get_parameter(name).grad.abs().sum() > 0, name
    assert model.vision_tower.embeddings.patch_embedding.weight.grad is None


def test_packed_conversations_equal_separate_ones(model, processor):
    sample = drawn_sample(0, segs=(1, 2))
    packed = model(processor.collate([sample]))
    alone = [
        type(sample)(sample.source, sample.image, [talk], masks, sample.sample_id)
        for talk, masks in sample.by_conversation()
    ]
    separate = torch.cat([model(processor.collate([one])).mask_logits[0] for one in alone])
    torch.testing.assert_close(packed.mask_logits[0], separate, rtol=1e-4, atol=1e-4)


def test_overlaps_count_within_a_conversation():
    logits = torch.tensor([[[1.0, 1, -1]], [[1.0, -1, -1]], [[1.0, 1, 1]]])
    weights = losses.overlap_weights(logits, torch.tensor([1, 1, 2]), 2.0)
    assert weights.tolist() == [[[2, 1, 1]], [[2, 1, 1]], [[1, 1, 1]]]
    targets = torch.tensor([[[1, 0, 255]]] * 3, dtype=torch.uint8)
    expected = F.binary_cross_entropy_with_logits(logits, (targets == 1).float(), reduction="none")
    expected = (expected * weights)[..., :2].mean((1, 2))
    torch.testing.assert_close(losses.mask_bce(logits, targets, weights), expected)
    assert losses.overlap_weights(logits[:0], torch.zeros(0), 2.0).shape == (0, 1, 3)


def test_the_target_refinement_loss_counts_overlaps_more(model, processor):
    batch = processor.collate([drawn_sample(0, segs=(1, 2)), drawn_sample(1, segs=(2,))])
    plain = model(batch)
    model.config.overlap_weight = 3.0
    refined = model(batch)
    expected = []
    for logits, masks, groups in zip(plain.mask_logits, batch.masks, ([0, 1, 1], [0, 0])):
        for n, group in enumerate(groups):
            same = [m for m, other in enumerate(groups) if other == group]
            weight = 1 + 2.0 * ((logits[same] > 0).sum(0) >= 2)
            bce = F.binary_cross_entropy_with_logits(logits[n], masks[n].float(), reduction="none")
            expected.append((bce * weight).mean())
    torch.testing.assert_close(refined.terms["mask_bce"], torch.stack(expected).mean())
    assert refined.terms["mask_bce"] > plain.terms["mask_bce"]
    assert refined.terms["mask_dice"] == plain.terms["mask_dice"]


@pytest.mark.parametrize("reward", ["mask", "mask_iou"])
def test_rewards_do_not_count_overlaps_more(model, processor, reward):
    """The rewards of further sampled layers know nothing of overlaps: one [SEG]'s must be comparable."""
    model.config.reward_terms = reward
    batch = processor.collate([drawn_sample(0, segs=(1, 2)), drawn_sample(1, segs=(2,))])
    plain = model(batch).rewards
    model.config.overlap_weight = 3.0
    output = model(batch)
    assert torch.equal(output.rewards, plain)
    assert torch.equal(output.rewards, model.objective.mask_rewards(batch.masks, output.mask_logits))


def test_the_study_of_learning_methods_gives_the_gate_what_training_does(model, processor, monkeypatch):
    samples, seen, log_policy = [drawn_sample(0), drawn_sample(1, segs=(1, 2))], [], model.ppm.log_policy
    monkeypatch.setattr(model.ppm, "log_policy", lambda states: seen.append(states) or log_policy(states))
    monkeypatch.setattr(study_policy, "make_mixture", lambda config: samples)
    [rewarded] = study_policy.compute_rewards(model, processor, SimpleNamespace(train=SimpleNamespace(batch_size=2)), 1)
    with torch.no_grad():
        model(processor.collate(samples))
    studied, trained = seen
    assert torch.equal(studied, trained)
    assert torch.equal(rewarded.states, trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_of_a_decoder_follow_from_the_seed(processor, dtype):
    config, states = make_config(len(processor.tokenizer), processor), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(new_model(config, dtype).visual_model.state_dict())
    positions = [key for key in states[0] if key.endswith("gaussian_matrix")]
    assert len(positions) == 2
    for key, value in states[0].items():
        assert value.dtype == (torch.float32 if key in positions else dtype)
        assert value.isfinite().all()
        assert torch.equal(value, states[1][key]), key
    assert not any(torch.equal(states[0][key], states[2][key]) for key in positions)


def test_an_adapter_holds_all_of_a_new_decoder(model, processor, tmp_path):
    """Also frozen parts and buffers: the same seed may give other weights elsewhere."""
    adapted = add_lora(model, r=2, frozen=("image_neck", "sam_prompt_encoder"))
    expected = {name: value.clone() for name, value in model.visual_model.state_dict().items()}
    trained = trained_shapes(adapted, [Loaded("visual_model", "new", 1, "float32", "")])
    adapter.save(adapted, tmp_path, trained, torch.float32)
    other = UGroundForCausalLM(make_config(len(processor.tokenizer), processor))
    meta = {"trained": trained, "config": {"model": {"lora_alpha": 16, "lora_r": 2}}}
    adapter.apply(other, tmp_path, meta)
    assert all(torch.equal(value, expected[name]) for name, value in other.visual_model.state_dict().items())
    parts = load_file(tmp_path / adapter.PARTS)
    del parts["visual_model.image_feature_neck.0.weight"]
    save_file(parts, tmp_path / adapter.PARTS)
    with pytest.raises(ValueError, match=r"is incomplete: .* lack 1 of .*image_feature_neck\.0\.weight"):
        adapter.apply(other, tmp_path, meta)


def test_parameters_at_full_size_are_those_of_table_10(monkeypatch):
    """7B as the authors train it: a projector of double width; neck and prompt encoder frozen, as train_ds.py does not
    list them. 32008 tokens: Vicuna's, six of the codebook, <im_start> and <im_end>."""
    monkeypatch.setattr(memory_model, "VOCABULARY", 32_008)
    settings = SETTINGS | {"decoder_width": 256, "clip_resize": 448}
    shape = memory_model.preset("7b", mm_projector_width=8192, **settings)
    frozen = ("sam_prompt_encoder", "image_neck")
    total, trained, _ = memory_model.count_parameters(shape, 8, frozen=frozen)
    assert shape.decoder_config["clip_depths"] == [-2, -11]
    assert shape.num_image_tokens == 256
    assert f"{trained / 1e6:.2f}M of {total / 1e9:.2f}B" == "375.72M of 7.16B"


def test_settings_that_exclude_each_other_are_named():
    def refused(match: str, **settings) -> None:
        with pytest.raises(ValueError, match=match):
            make_config(100, **settings)

    refused("point_prompts: mask_decoder pixel_decoder takes no points", point_prompts=3)
    refused("clip_fit: .* read the whole image", clip_fit="crop")
    refused("seg_prompt: .* no prompt without", seg_prompt=False, mask_prompt=True)
    refused("decoder_width: 40 is not a multiple of 16", decoder_width=40)
    refused("clip_resize: CLIP's input of 90 pixels is not a multiple of 10 .* x 2", clip_resize=90)


# -- the published layout ----------------------------------------------------------------------------------------------


@dataclass
class Published:
    folder: Path
    clip: Path
    state: dict[str, torch.Tensor]
    tokenizer: object


@pytest.fixture
def published(tmp_path, monkeypatch) -> Published:
    """A checkpoint with the names of the authors' code (model/PixelLM.py; the merged model without CLIP)."""
    texts = [f"{QUESTION} {ANSWER} {HUMAN_SYSTEM_PROMPT}"] * 3
    names = tuple(f"[SEG{i}]" for i in range(TOKENS))
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "SEG", names[0])
        patch.setattr(tokens, "SPECIAL_TOKENS", (*names, "<im_start>", "<im_end>"))
        tokenizer = train_tokenizer(texts, vocab_size=320)
    torch.manual_seed(1)
    model = UGroundForCausalLM(make_config(len(tokenizer)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("visual_model."):
            state[key.replace("visual_model.", "model.")] = value
        elif not key.startswith(("vision_tower.", "ppm.")):
            state[f"model.{key}" if key.startswith(IN_CHECKPOINT) else key] = value
    folder, clip = tmp_path / "PixelLM", tmp_path / "clip"
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    config = llama_settings(len(tokenizer), width=32, layers=4, heads=2) | {
        "model_type": "llava",
        "architectures": ["PixelLMForCausalLM"],
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "max_position_embeddings": 4096,
        "resize_vision_tower_size": SIDE,
        "image_feature_scale_num": 2,
        "separate_mm_projector": True,
        "vision_tower_for_mask": True,
        "out_dim": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    tower = CLIPVisionModel(clip_config(side=40, patch=PATCH, width=32, layers=3))
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tower.save_pretrained(clip)
    return Published(folder, clip, state, tokenizer)


def reference_clip(published: Published, image: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Reference: CLIP's hidden states [P, C] with resized positions, and which patches [8, 8] show the image."""
    small = CLIPVisionModel.from_pretrained(published.clip)
    state = small.state_dict()
    key = next(key for key in state if key.endswith("position_embedding.weight"))
    table = state[key]
    square = table[:-1].T.reshape(1, 32, 4, 4)
    rows = F.interpolate(square, (GRID, GRID), mode="bilinear", align_corners=False)[0].flatten(1).T
    state[key] = torch.cat([rows, table[-1:]])
    tower = CLIPVisionModel(clip_config(side=SIDE, patch=PATCH, width=32, layers=3)).eval()
    tower.load_state_dict(state)
    pixels, (height, width) = resize_and_pad(image, SIDE)
    shown = torch.zeros(1, 1, SIDE, SIDE)
    shown[..., :height, :width] = 1
    shown = F.interpolate(shown, (GRID, GRID), mode="nearest")[0, 0]
    keys = torch.cat([torch.ones(1), shown.flatten()])
    mask = ((1 - keys) * torch.finfo(torch.float32).min)[None, None, None].expand(1, 1, len(keys), -1)
    states = tower.pre_layrnorm(tower.embeddings(pixels[None]))
    hidden = [states]
    for layer in tower.encoder.layers:
        hidden.append(layer(hidden[-1], mask))
    return [layer[0, 1:] for layer in hidden], shown


def reference_prompts(published: Published, features: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Reference: fused prompts [N, 2 scales, E] of the answer's targets."""
    s, tokenizer = published.state, published.tokenizer
    pooled = F.interpolate(features.T.reshape(1, 32, GRID, GRID), (4, 4), mode="bilinear", align_corners=False)
    pooled = mlp(s, "model.mm_projector", pooled[0].flatten(1).T, (0, 2), F.gelu)
    answer = ANSWER.replace("[SEG]", "".join(f"[SEG{i}]" for i in range(TOKENS)))
    before = tokenizer(f"{HUMAN_SYSTEM_PROMPT} USER: <im_start>")["input_ids"]
    after = tokenizer(f"<im_end>\n{QUESTION} ASSISTANT: {answer}</s>")["input_ids"][1:]
    llama = LlamaForCausalLM(LlamaConfig(**llama_settings(len(tokenizer), width=32, layers=4, heads=2))).eval()
    llama.load_state_dict({key: s[key] for key in llama.state_dict()})
    embed = llama.get_input_embeddings()
    embeddings = torch.cat([embed(torch.tensor(before)), pooled, embed(torch.tensor(after))])
    valid = F.interpolate(shown[None, None], (4, 4), mode="nearest").flatten()
    attention = torch.cat([torch.ones(len(before)), valid, torch.ones(len(after))])[None]
    last = llama.model(inputs_embeds=embeddings[None], attention_mask=attention.long()).last_hidden_state[0]
    names = [tokenizer.decode([token]) for token in after]
    places = [len(before) + 16 + i for i, name in enumerate(names) if name.startswith("[SEG")]
    prompts = mlp(s, "model.text_hidden_fcs.0", last[torch.tensor(places) - 1], (0, 2), torch.relu)
    return (prompts.view(-1, 2, 3, 32) / 6).sum(2)


def mlp(s: dict, name: str, x: torch.Tensor, layers, activation) -> torch.Tensor:
    for number, layer in enumerate(layers):
        x = F.linear(x if not number else activation(x), s[f"{name}.{layer}.weight"], s[f"{name}.{layer}.bias"])
    return x


def doubled(s: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    x = F.conv_transpose2d(x, s[f"{name}.0.weight"], s[f"{name}.0.bias"], stride=2)
    return F.gelu(channel_norm(s, f"{name}.1", x))


def channel_norm(s: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)
    return x.permute(0, 3, 1, 2)


def positions(matrix: torch.Tensor, side: int) -> torch.Tensor:
    """Reference: SAM's random positional encoding [1, E, side, side]."""
    centers = (torch.arange(side) + 0.5) / side
    grid = torch.stack([centers.expand(side, side), centers[:, None].expand(side, side)], -1)
    angles = 2 * torch.pi * ((2 * grid - 1) @ matrix)
    return torch.cat([angles.sin(), angles.cos()], -1).permute(2, 0, 1)[None]


def reference_masks(published: Published, image: np.ndarray) -> torch.Tensor:
    s = published.state
    hidden, shown = reference_clip(published, image)
    prompts = reference_prompts(published, hidden[-2], shown)
    n, low, previous = len(prompts), 0, None
    for scale, states in enumerate((hidden[-2], hidden[-3])):  # -11 of 24 layers, in proportion to 3
        grid = mlp(s, "model.out_mm_projector", states, (0, 2), F.gelu).T.reshape(1, 32, GRID, GRID)
        grid = channel_norm(s, "model.image_feature_neck.1", F.conv2d(grid, s["model.image_feature_neck.0.weight"]))
        grid = F.conv2d(grid, s["model.image_feature_neck.2.weight"], padding=1)
        source = channel_norm(s, "model.image_feature_neck.3", grid).expand(n, -1, -1, -1)
        matrix = s["model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
        if scale:
            source = doubled(s, "model.mask_decoder.upsample_2x", source) * (previous[:, None].sigmoid() + 1)
            matrix = s["model.mask_decoder.pe1.positional_encoding_gaussian_matrix"]
        source = source + s["model.prompt_encoder.no_mask_embed.weight"].view(1, -1, 1, 1)
        learned = torch.cat([s["model.mask_decoder.iou_token.weight"], s["model.mask_decoder.mask_tokens.weight"]])
        sequence = torch.cat([learned.expand(n, -1, -1), prompts[:, scale : scale + 1]], 1)
        sequence = sequence + s["model.mask_decoder.level_embed.weight"][scale]
        transformer = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=256)
        prefix = f"model.mask_decoder.transformer.{scale}."
        transformer.load_state_dict({k.removeprefix(prefix): v for k, v in s.items() if k.startswith(prefix)})
        pe = positions(matrix, source.shape[-1]).expand(n, -1, -1, -1)
        mixed_tokens, mixed = transformer(source, pe, sequence)
        upscaled = doubled(s, "model.mask_decoder.output_upscaling", mixed.transpose(1, 2).reshape(source.shape))
        head = "model.mask_decoder.output_hypernetworks_mlps.0.layers"
        weights = mlp(s, head, mixed_tokens[:, 1], (0, 1, 2), torch.relu)
        previous = (weights[:, :, None, None] * upscaled).sum(1)
        low = low + F.interpolate(previous[:, None], (32, 32), mode="bilinear", align_corners=False) / 2
    full = F.interpolate(low, (SIDE, SIDE), mode="bilinear", align_corners=False)
    height, width = resized_size(*image.shape[:2], SIDE)
    return F.interpolate(full[..., :height, :width], image.shape[:2], mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize("size", [(48, 64), (64, 40), (50, 50)])
@torch.inference_mode()
def test_masks_of_a_published_checkpoint_equal_the_reference(published, size):
    model, processor = load_pretrained(str(published.folder), vision_tower=str(published.clip))
    image = np.random.default_rng(3).integers(0, 255, (*size, 3), dtype=np.uint8)
    [[prediction]] = predict(model, processor, [image], [[Turn(QUESTION, ANSWER)]])
    expected = reference_masks(published, image)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(prediction.mask_logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert processor.tokens.rej is None
    assert model.config.codebook_tokens == 3
    assert model.visual_model.clip_depths == (-2, -3)


def test_published_checkpoints_are_read_strictly_saved_again_and_trained_on(published, tmp_path):
    where = {"vision_tower": str(published.clip)}
    model, processor = load_pretrained(str(published.folder), **where)
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    own, own_processor = load_pretrained(str(tmp_path / "own"))
    ask = ([drawn_sample(0).image], [[Turn(QUESTION, ANSWER)]])
    before, after = (predict(*pair, *ask)[0][0] for pair in ((model, processor), (own, own_processor)))
    assert torch.equal(before.mask_logits, after.mask_logits)
    assert before.text == after.text == ANSWER

    assert settings_of(published.folder)["codebook_tokens"] == 3
    trained, processor, rows = load_for_training(str(published.folder), str(published.clip), "", "fp32")
    assert trained.config.codebook == tuple(processor.codebook)
    assert {row.module for row in rows if row.source == "new"} == {"ppm"}
    assert torch.equal(
        trained.visual_model.mask_decoder.level_embed.weight, model.visual_model.mask_decoder.level_embed.weight
    )
    with pytest.raises(ValueError, match=r"mask_decoder is segment_anything, .* was trained with pixel_decoder"):
        load_for_training(str(published.folder), str(published.clip), "", "fp32", {"mask_decoder": "segment_anything"})

    for key, match in (
        ("model.image_feature_neck.2.weight", r"1 missing: visual_model\.image_feature_neck\.2\.weight"),
        ("model.mask_decoder.level_embed.weight", r"holds no pixel decoder \(no 'mask_decoder\.level_embed\.weight'\)"),
    ):
        torch.save({k: v for k, v in published.state.items() if k != key}, published.folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=match):
            load_pretrained(str(published.folder), **where)


def test_position_embeddings_of_a_run_keep_the_class_token(base):
    model, _, rows = load_for_training(
        str(base / "llava"), str(base / "clip"), "", "fp32", {k: v for k, v in SETTINGS.items() if k != "map_terms"}
    )
    table = CLIPVisionModel.from_pretrained(base / "clip").embeddings.position_embedding.weight
    resized = model.vision_tower.embeddings.position_embedding.weight
    assert len(resized) == GRID**2 + 1
    assert torch.equal(resized[0], table[0])
    torch.testing.assert_close(resized[1:].mean(0), table[1:].mean(0))
    assert {row.module: row.source for row in rows}["visual_model"] == "new"
