"""The memory model: parameters against the paper's, activations against what autograd saves, and the tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stretched import sam2_config
from tiny_run import ROOT
from transformers.models.sam2.configuration_sam2 import Sam2MaskDecoderConfig, Sam2PromptEncoderConfig

from model.decoders.sam2 import Sam2, sizes_of
from model.lora import add_lora
from model.settings import DECODER_KINDS
from model.UGround import UGroundForCausalLM
from scripts import doctor
from utils.config import load_config
from utils.diagnostics import memory_model
from utils.diagnostics.memory_probe import measure_step, processor_of, random_batch

ZERO3 = str(ROOT / "configs/deepspeed/zero3.json")


@pytest.fixture(scope="module")
def plan() -> memory_model.Plan:
    """The paper's 7B."""
    return memory_model.plan_of_preset("7b", load_config([], needs=()))


def test_parameters_are_the_papers(plan):
    assert plan.trainable == pytest.approx(288.40e6, rel=1e-3)  # Table 10
    assert plan.parameters == pytest.approx(7.75e9, rel=5e-3)
    assert memory_model.expected(plan)["weights"] == 2 * plan.parameters


def test_what_changes_what(plan):
    def parts(**changes):
        return memory_model.expected(replace(plan, **changes))

    before = parts()
    assert parts(gpus=8)["optimizer"] == before["optimizer"] / 8
    assert parts(gpus=8)["weights"] == before["weights"]  # ZeRO-2 shares no weights
    offloaded = parts(offload=True)
    assert (offloaded["optimizer"], offloaded["host"]) == (0, before["optimizer"])
    third = replace(memory_model.plan_of_preset("7b", load_config(["--deepspeed_config", ZERO3], needs=())), gpus=8)
    sharded = memory_model.expected(third)["weights"]
    kept = 2 * (plan.parameters - third.sharded)  # SAM, phi, the gate
    assert kept == pytest.approx(1.3e9, rel=0.05)
    assert sharded == pytest.approx(kept + 2 * third.sharded / 8 + 2e9)
    assert memory_model.expected(replace(third, gpus=1))["weights"] == before["weights"]  # nothing is sharded over one
    assert parts(checkpointing=True)["language model"] < 0.2 * before["language model"]
    one = memory_model.image_encoder(plan)
    assert memory_model.image_encoder(replace(plan, images=8)) == one  # they are encoded one by one
    assert parts(images=8)["SAM"] > one  # masks at the images' size do grow
    assert parts(pixels=12_000_000)["total"] < before["total"] + 3e9  # the losses of a large photograph go in parts
    for values in (before, offloaded):
        assert values["total"] == pytest.approx(sum(values[part] for part in memory_model.MEMORY_PARTS))
    assert memory_model.on_cuda(before) > before["total"] + memory_model.CUDA_CONTEXT


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(checkpointing):
    """Bytes that a forward pass saves, for a shape with all parts; a CPU saves dropout's mask as floats."""
    shape = memory_model.preset("medium")
    shape.num_hidden_layers, shape.sam_config["image_size"] = 4, 512
    flags = [*memory_model.MEDIUM_SETTINGS, "--batch_size", "1", "--lora_dropout", "0"]
    plan = replace(
        memory_model.plan_of_preset("medium", load_config(flags, needs=())),
        shape=shape,
        pixels=160_000,
        checkpointing=checkpointing,
    )
    base = UGroundForCausalLM(shape)
    model = add_lora(base, 8, dropout=0.0).train()
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = random_batch(plan, processor_of(plan.shape))
    plan = replace(plan, tokens=batch.input_ids.shape[1], labels=len(batch.label_ids))
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch)
    assert output.loss.isfinite()
    measured = sum(storage.nbytes() for storage in saved.values())
    parts = (
        memory_model.language_model(plan),
        memory_model.text_loss_bytes(plan),
        memory_model.mask_decoder(plan),
        memory_model.mask_losses(plan),
    )
    expected = sum(parts)
    if checkpointing:  # the layer that the backward pass recomputes is not counted
        layer = memory_model.language_model(replace(plan, checkpointing=False)) - memory_model.language_model(plan)
        expected -= layer / 3 - 4 * plan.rows * shape.hidden_size / 3
    assert measured / expected == pytest.approx(1, abs=0.15), (measured, parts)


def test_a_model_without_a_sam_is_planned_and_measured_with_its_own_tokens(plan):
    flags = ["--config", str(ROOT / "configs/methods/pixellm.yaml"), "--train_tables", "new"]
    config = load_config(flags, needs=())
    pixels = memory_model.plan_of_preset("7b", config)
    assert pixels.labels == plan.labels + 5 * plan.masks
    assert pixels.tokens == plan.tokens - 576 + 256 + 5 * plan.masks
    assert len(pixels.token_rows) == memory_model.ADDED + 5
    batch = random_batch(replace(pixels, images=1), processor_of(pixels.shape))
    assert batch.pixel_values.shape[-1] == 448
    assert batch.sam_images.numel() == 0
    assert len(batch.seg_positions) == pixels.masks
    last = batch.label_ids == batch.input_ids.flatten()[batch.seg_positions[0]]
    assert last.sum() == pixels.masks


@pytest.mark.slow
def test_a_step_with_sampled_answers_is_measured():
    flags = [*memory_model.MEDIUM_SETTINGS, "--batch_size", "1", "--questions_per_image", "1", "--lora_dropout", "0"]
    config = load_config([*flags, "--objective", "both", "--grpo_tokens", "16", "--grpo_answers", "4"], needs=())
    plan = memory_model.plan_of_preset("medium", config)
    assert (plan.answers, plan.answer_labels) == (4, 64)
    plan.shape.num_hidden_layers, plan.shape.sam_config["image_size"] = 2, 256
    measured = measure_step(replace(plan, pixels=40_000), config)
    assert 4 <= measured.plan.answer_labels <= 64
    assert measured.plan.answer_tokens > measured.plan.tokens


def test_a_tenth_of_a_card_stays_free():
    assert memory_model.fits(21.6e9, 24)
    assert not memory_model.fits(21.7e9, 24)
    assert memory_model.fits(72e9, 80)


def test_tables(capsys):
    assert doctor.main(["--memory"]) == 0
    out = capsys.readouterr().out
    for expected in ("7B: 7,7", "13B: 14,0", "1 GPU, as configured ", "8 GPUs, gradient checkpointing, offload"):
        assert expected in out
    lines = {line.split("  ")[0]: line for line in out.splitlines()[: len(out.splitlines()) // 2]}
    assert lines["1 GPU, as configured"].rstrip().endswith(" 40, 80")
    tight = lines["1 GPU, checkpointing, 1 image"].split()  # 22.8 GB: less than 24, but by less than 10%
    assert tight[-3:] == ["22.8", "40,", "80"]
    assert "1 GPU, gradient checkpointing, offload" in lines
    assert " 24, 40, 80 (host: 4.6 per GPU)" in lines["1 GPU, gradient checkpointing, offload"]
    assert "are assumptions" in out


def test_a_configuration_whose_weights_are_not_there(capsys):
    config = ["--config", str(ROOT / "configs/7b_reason_seg.yaml")]
    assert doctor.main(["--memory", *config, "--gpus", "4", "--batch_size", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 images of 736 tokens" in out
    assert "LLaVA-1.5 7B with SAM ViT-H, assumed" in out
    assert "4 GPUs, as configured" in out
    with pytest.raises(ValueError, match="neither that of a LLaVA with 7b or 13b nor one of Qwen"):
        doctor.main(["--memory", *config, "--version", "weights/other"])


@torch.no_grad()
def test_sam_2s_decoder_saves_what_the_plan_says():
    """At full size, of one mask; its encoder has no part in it."""
    vision = {"fpn_hidden_size": 256, "backbone_feature_sizes": [[256, 256], [128, 128], [64, 64]]}
    config = sam2_config(vision_config=sizes_of(sam2_config().vision_config) | vision)
    backbone = config.vision_config.backbone_config
    backbone.image_size = [1024, 1024]
    config.prompt_encoder_config, config.mask_decoder_config = Sam2PromptEncoderConfig(), Sam2MaskDecoderConfig()
    decoder = Sam2(config)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*decoder.parameters(), *decoder.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []
    features = torch.randn(1, *decoder.feature_shape)
    held.add(features.untyped_storage().data_ptr())
    tokens, prompt = torch.randn(1, 1, 256, requires_grad=True), torch.rand(1, 1, 256, 256, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder.decode(features, tokens, prompt)
    assert sum(saved.values()) / (4 * 256 * 64**2) == pytest.approx(memory_model.SAM2_SAVED, rel=0.03)


@pytest.mark.parametrize(("name", "gigabytes"), [("sam2", 0.17), ("sam3_tracker", 0.19)])
def test_other_decoders_are_planned_with_their_own_sizes(name, gigabytes):
    config = load_config(["--mask_decoder", name], needs=())
    shape, source = memory_model.shape_of(replace_version(config, "llava-7b"))
    assert DECODER_KINDS[name].title in source
    plan = memory_model.plan_of_shape(shape, config)
    assert memory_model.image_encoder(plan) == pytest.approx(gigabytes * 1e9, rel=0.1)  # traced: 0.165, 0.187
    sam = memory_model.plan_of_preset("7b", load_config([], needs=()))
    assert plan.parameters - sam.parameters == pytest.approx(-420e6 if name == "sam2" else -180e6, rel=0.05)
    grid = shape.sam_side // (16 if name == "sam2" else 14)
    assert memory_model.mask_decoder(plan) == 27 * 256 * grid**2 * 2 * plan.masks * plan.images


def replace_version(config, version):
    config.model.version = version
    return config
