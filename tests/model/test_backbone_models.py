"""The whole model on backbones beside LLaVA: packed = separate, cached = uncached, maps at their place, what trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from answering import NEAR, read_anew
from backbones import OTHERS, loud, make_backbone
from conftest import assert_same_masks, drawn_sample
from torch import nn

from model.loading import placement
from model.lora import add_lora, parameters_by_part, part_of
from model.opened import predict
from model.structures import Batch, Sample, Turn
from utils.inference.session import ImageSession

SIZES = [(48, 64), (90, 30), (50, 50)]  # height x width
QUESTIONS = ["where is the red star", "and the blue circle?", "please segment all of the shapes", "a square"]
SEGS = [(1, 0, 2, 5), (3,), (0, 4)]  # of the conversations about each image


def samples() -> list[Sample]:
    """Three images of different shape with 0 to 5 [SEG] per conversation."""
    return [drawn_sample(number, size, segs) for number, (size, segs) in enumerate(zip(SIZES, SEGS))]


def separate(sample: Sample) -> list[Sample]:
    """A sample per conversation."""
    parts = sample.by_conversation()
    return [Sample(sample.source, sample.image, [turns], masks, sample.sample_id) for turns, masks in parts]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = gradients(actual), gradients(expected)
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        tolerance = 1e-4 * float(gradient.abs().max()) + 1e-7 * largest
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("trained", "attention"), [("lora", "eager"), ("full", "sdpa")])
@pytest.mark.parametrize("backbone", OTHERS)
def test_packed_rows_equal_separate_rows(backbone, trained, attention):
    """Loss, masks, maps and gradients of three images in a batch, against a row and a batch per conversation."""
    settings: dict[str, Any] = {"layer_selection": "fixed:2", "policy_loss_weight": 0.0}
    models = []
    for _ in range(2):
        model, processor = make_backbone(backbone, attn_implementation=attention, **settings)
        if trained == "lora":
            model = add_lora(loud(model), r=2, dropout=0.0)
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(len(name)))
        models.append(model.eval())
    packed, alone = models
    batch = processor.collate(samples())
    assert batch.has_padding
    one = packed(batch)
    one.loss.backward()
    total, logits = torch.zeros(()), []
    for part in [part for sample in samples() for part in separate(sample)]:
        rows = processor.collate([part])
        assert len(rows.counts) == 3
        many = alone(replace(rows, counts=batch.counts))  # the denominators of the whole batch
        many.loss.backward()
        total = total + many.loss.detach()
        logits += [*many.mask_logits]
    torch.testing.assert_close(one.loss.detach(), total, **NEAR)
    flat = [mask for rows in one.mask_logits for mask in rows]
    for ours, theirs in zip(flat, [mask for rows in logits for mask in rows], strict=True):
        assert_same_masks(ours, theirs)
    assert len(flat) == 15
    assert_same_gradients(packed, alone)
    towers = (".visual.", ".vision_tower.")
    assert any(tower in name for name in gradients(packed) for tower in towers) == (trained == "full")


# -- generation --------------------------------------------------------------------------------------------------------


def talkative(backbone: str, ends: float = 0.0):
    """A model that generates [SEG] often, and ends an answer with about the probability ``ends`` per token.

    Random heads prefer few tokens: those of [SEG] and the end get a bias, so that each wins at some states.
    """
    model, processor = make_backbone(backbone)
    loud(model, 1)
    texts = [[Turn(question, "it is [SEG], and [SEG] too.") for question in QUESTIONS]]
    batch = processor.prompts([drawn_sample(6).image], texts)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=generator)
        states = model.forward_language(batch).hidden[-1].flatten(0, 1)[batch.label_positions]
        common = nn.functional.normalize(states.mean(0), dim=0)
        model.lm_head.weight -= torch.outer(model.lm_head.weight @ common, common)
        bias = torch.zeros(len(model.lm_head.weight))
        for token, share in ((processor.tokens.seg, 0.6), (processor.tokens.eos, ends)):
            logits = model.lm_head(states) + bias
            margin = logits.amax(-1) - logits[:, token]
            bias[token] = margin.quantile(share) if share else -1e9
        model.lm_head.bias = nn.Parameter(bias)
    return model, processor


@pytest.mark.parametrize("backbone", OTHERS)
def test_batches_of_images_and_questions_equal_single_ones_without_cache(backbone):
    """Three images together, 1 to 4 questions each, against a pass without a cache over each answer."""
    model, processor = talkative(backbone, ends=0.01 if backbone == "qwen2_5_vl" else 0.2)
    images = [sample.image for sample in samples()]
    questions = [QUESTIONS, QUESTIONS, QUESTIONS[:2]]
    together = predict(model, processor, images, [list(map(Turn, row)) for row in questions], max_new_tokens=8)
    counts, lengths = set(), set()
    for image, row, answers in zip(images, questions, together):
        for question, prediction in zip(row, answers):
            token_ids, uncached = read_anew(model, processor, image, (), question, prediction.token_ids)
            assert token_ids == prediction.token_ids
            torch.testing.assert_close(prediction.layer_maps, uncached.layer_maps, **NEAR)
            assert prediction.layers == uncached.layers
            assert_same_masks(prediction.mask_logits, uncached.mask_logits)
            counts.add(len(prediction.layers))
            lengths.add(len(prediction.token_ids))
    assert len(counts) > 1
    assert len(lengths) > 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backbone", OTHERS)
def test_follow_ups_equal_the_whole_conversation_encoded_again(backbone, size):
    model, processor = talkative(backbone)
    image, masks = drawn_sample(6, size).image, 0
    session = ImageSession(model, processor, image)
    for question in QUESTIONS[:3]:
        history = list(session.history)
        prediction = session.ask(question, max_new_tokens=6)
        written, anew = read_anew(model, processor, image, history, question, prediction.token_ids)
        assert written == prediction.token_ids
        assert prediction.layers == anew.layers
        assert_same_masks(prediction.mask_logits, anew.mask_logits)
        torch.testing.assert_close(prediction.layer_maps, anew.layer_maps, **NEAR)
        masks += len(prediction.mask_logits)
    assert masks > 2


# -- places ------------------------------------------------------------------------------------------------------------


class Planted:
    """A model whose image features are what one cell of each image changes, and whose [SEG] states are their sum.

    The features are the real tower's, of two images that differ in the cell: no index of a token or cell is used.
    """

    def __init__(self, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.processor = make_backbone(backbone)
        self.plain: torch.Tensor = torch.zeros(0)
        self.direction: torch.Tensor = torch.zeros(0)
        read, ground = self.model.read_images, self.model.ground

        def changes(batch: Batch):
            now, before = read(batch), read(replace(batch, pixel_values=self.plain))
            tokens = now.tokens - before.tokens
            scale = 10 / tokens.norm(dim=-1).amax(1)[:, None, None]
            added = tuple((a - b) * scale for a, b in zip(now.added, before.added))
            self.direction = (tokens * scale).sum(1)
            return replace(now, tokens=tokens * scale, added=added)

        def towards(hidden, states, rows, *rest):
            return ground(hidden, self.direction[rows][:, None].expand_as(states), rows, *rest)

        monkeypatch.setattr(self.model, "read_images", changes)
        monkeypatch.setattr(self.model, "ground", towards)

    def maps(self, images: list[np.ndarray], plain: list[np.ndarray], layer: int) -> list[torch.Tensor]:
        """The [H, W] map of each image, of all in a batch."""
        turns = [[Turn("where is it", "it is [SEG].")]] * len(images)
        self.plain = self.processor.reader.pixels(plain)
        rows = predict(self.model, self.processor, images, turns, layer_policy=f"fixed:{layer}")
        return [row[0].maps[0] for row in rows]


BLOB_SIZES = [(60, 130), (120, 45), (80, 80)]  # height x width


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("backbone", OTHERS)
def test_a_blob_of_the_image_is_the_peak_of_the_map(backbone, layer, monkeypatch):
    """A cell of noise in a gray image, at corners and inside, comes out at its centre at the image's own size."""
    planted = Planted(backbone, monkeypatch)
    plain = [np.full((*size, 3), 128, np.uint8) for size in BLOB_SIZES]
    grids = planted.processor.prompts(plain, [[Turn("a")]] * 3).grids
    assert len({h > w for h, w in grids}) == 2
    for corner in range(5):
        images, centres = [], []
        for image, (h, w) in zip(plain, grids):
            row, column = [(0, 0), (0, w - 1), (h - 1, 0), (h - 1, w - 1), (h // 2, w // 3)][corner]
            height, width = image.shape[:2]
            rows, columns = (
                slice(round(i * n / k), round((i + 1) * n / k)) for i, n, k in ((row, height, h), (column, width, w))
            )
            blob = image.copy()
            blob[rows, columns] = np.random.default_rng(corner).integers(0, 255, blob[rows, columns].shape)
            images.append(blob)
            centres.append((row, column))
        for full, (row, column), (h, w) in zip(planted.maps(images, plain, layer), centres, grids):
            height, width = full.shape
            inner = [(row + 0.5) * height / h - 0.5, (column + 0.5) * width / w - 0.5]
            peak = (full == full.max()).nonzero().float().mean(0).tolist()  # corners are plateaus
            for at, centre, cells, length, place in zip(peak, inner, (h, w), (height, width), (row, column)):
                edge = place in (0, cells - 1)
                assert abs(at - centre) <= (0.3 * length / cells if edge else 1.0), (corner, peak, inner, (h, w))


# -- what trains -------------------------------------------------------------------------------------------------------

TRAINED = {"lora", "phi", "gate", "sam_mask_decoder", "sam_prompt_encoder", "embed_tokens", "lm_head"}


@pytest.mark.parametrize(("tables", "tied"), [("new", False), ("new", True), ("full", False)])
@pytest.mark.parametrize("backbone", OTHERS)
def test_every_trained_part_gets_a_gradient(backbone, tables, tied):
    """LoRA on the language model's attention alone; nothing of the tower, which is run without a graph."""
    model, processor = make_backbone(backbone, tied=tied)
    rows = processor.added_tokens if tables == "new" else ()
    trained = add_lora(model, r=2, token_rows=rows)
    adapted = {name.split(".lora_")[0] for name, _ in trained.named_parameters() if ".lora_A" in name}
    expected = {f"layers.{i}.self_attn.{name}_proj" for i in range(4) for name in "qv"}
    assert adapted == {f"base_model.model.model.language_model.{name}" for name in expected}
    trained.train()
    trained(processor.collate(samples())).loss.backward()
    norms: dict[str, float] = {}
    for name, parameter in trained.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            norms[part_of(name)] = norms.get(part_of(name), 0.0) + float(parameter.grad.norm())
    assert norms.keys() == (TRAINED - {"lm_head"} if tied else TRAINED)
    assert all(value > 0 for value in norms.values()), norms
    assert not model.read_images(processor.collate(samples())).tokens.requires_grad
    parts = parameters_by_part(trained)
    assert parts.keys() >= {"language_model", "vision_tower", "projector"}
    assert not parts.keys() & {"llama", "clip"}
    if tables == "new":
        assert parts["embed_tokens"][1] == len(rows) * 32


@pytest.mark.parametrize("backbone", OTHERS)
def test_names_of_parts(backbone):
    model, _ = make_backbone(backbone)
    of = {name: part_of(name) for name, _ in model.named_parameters()}
    assert of == {name: part_of(f"base_model.model.{name}") for name in of}  # as peft names them
    by_part = {part: [name for name in of if of[name] == part] for part in set(of.values())}
    projector = {"qwen2_5_vl": r"visual.merger", "qwen3_vl": r"merger", "internvl3": r"multi_modal_projector"}
    assert all(projector[backbone] in name for name in by_part["projector"])
    assert not any(projector[backbone] in name for name in of if of[name] != "projector")
    assert all(".visual." in name or ".vision_tower." in name for name in by_part["vision_tower"])
    assert all(".language_model." in name for name in by_part["language_model"])


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("backbone", OTHERS)
def test_gradient_checkpointing_changes_no_gradient(backbone, trained):
    """Layers run once more in the backward pass; a frozen tower does not."""
    models = []
    for checkpointing in (False, True):
        base, processor = make_backbone(backbone)
        model = add_lora(loud(base), r=2, dropout=0.0) if trained == "lora" else loud(base)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(len(name)))
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        calls: dict[str, int] = {}
        tower = getattr(base.model, "visual", None)
        of_tower = tower.blocks[0] if tower is not None else base.model.vision_tower.encoder.layer[0]
        for name, module in (("text", base.decoder_layers[1].mlp), ("tower", of_tower.mlp)):
            module.register_forward_pre_hook(lambda *_, n=name, c=calls: c.update({n: c.get(n, 0) + 1}))
        model.train()
        model(processor.collate(samples())).loss.backward()
        assert calls == {"text": 1 + checkpointing, "tower": 1 + (checkpointing and trained == "full")}
        models.append(model)
    assert_same_gradients(models[1], models[0])


def test_deepstack_trains_through_the_states_that_ppm_reads():
    """The gradient of a layer's states at image tokens reaches the tower's deepstack part of that layer."""
    model, processor = make_backbone("qwen3_vl")
    batch = processor.collate(samples())
    for number in range(2):
        model.zero_grad()
        batch.image_states(model.forward_language(batch).hidden[number + 1]).sum().backward()
        mergers = model.model.visual.deepstack_merger_list
        assert [merger.linear_fc2.bias.grad is not None for merger in mergers] == [True, number == 1]


# -- placement ---------------------------------------------------------------------------------------------------------

TURNS = [[Turn("where is the red star", "it is [SEG]."), Turn("circle", "[SEG] and [SEG]")]]


def masks_of(model, processor) -> torch.Tensor:
    image = drawn_sample(0).image
    return torch.cat([p.mask_logits for p in predict(model, processor, [image], TURNS, layer_policy="last")[0]])


@pytest.mark.parametrize("backbone", OTHERS)
def test_spread_layers_give_the_same_answers(backbone):
    """On one CPU: offloaded weights are copied for each forward pass, as from main memory to a GPU."""
    model, processor = talkative(backbone)
    turns = [list(map(Turn, QUESTIONS))]
    exact = masks_of(model, processor)
    answers = predict(model, processor, [drawn_sample(6).image], turns, max_new_tokens=4)
    placement.spread(model, "cpu", [torch.device("cpu"), "cpu", torch.device("cpu"), "cpu"])
    offloaded = [all(p.is_meta for p in layer.parameters()) for layer in model.decoder_layers]
    assert offloaded == [False, True, False, True]
    torch.testing.assert_close(masks_of(model, processor), exact, rtol=0, atol=0)
    again = predict(model, processor, [drawn_sample(6).image], turns, max_new_tokens=4)
    assert [p.token_ids for p in again[0]] == [p.token_ids for p in answers[0]]


@pytest.mark.parametrize("backbone", OTHERS)
def test_quantized_layers(backbone):
    pytest.importorskip("bitsandbytes")
    model, processor = talkative(backbone)
    exact, before = masks_of(model, processor), {name: type(module) for name, module in model.named_modules()}
    placement.place(model, "cpu", quantize="8bit")
    changed = {name for name, module in model.named_modules() if type(module) is not before.get(name)}
    layers = {name for name, kind in before.items() if kind is nn.Linear and ".language_model.layers." in name}
    assert changed == layers
    quantized = masks_of(model, processor)
    assert not torch.equal(quantized, exact)
    assert bool((quantized - exact).abs().max() <= 0.2 * exact.abs().max())
    assert predict(model, processor, [drawn_sample(6).image], [list(map(Turn, QUESTIONS))], max_new_tokens=4)[0]
