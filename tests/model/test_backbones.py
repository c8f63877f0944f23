"""Backbones beside LLaVA: images, positions, templates and packed rows are what transformers' own classes compute."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from backbones import CHAT_TEMPLATES, OTHERS, loud, make_backbone, make_tokenizer, transformers_own
from PIL import Image
from transformers import GotOcr2ImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

from model.backbones import BACKBONES
from model.backbones.internvl3 import IMAGENET_MEAN, IMAGENET_STD
from model.processing.processor import PROCESSOR_FILE, UGroundProcessor
from model.processing.template import check_template
from model.structures import Batch, Turn

QWEN = ("qwen2_5_vl", "qwen3_vl")
SIZES = [(48, 64), (90, 30), (50, 50)]  # height x width
QUESTIONS = [
    ["Where is the red star?", "circle", "a", "Please segment all of the blue shapes.", "the star"],
    ["circle"],
    ["What is that?", "the star"],
]
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def noise(number: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)


IMAGES = [noise(number, size) for number, size in enumerate(SIZES)]


def prompts(processor: UGroundProcessor, answer: str = "") -> Batch:
    """Three images of different shape with 5, 1 and 2 questions."""
    return processor.prompts(IMAGES, [[Turn(question, answer) for question in row] for row in QUESTIONS])


# -- images ------------------------------------------------------------------------------------------------------------

EDGES = "480x640 640x480 98x70 41x43 32x32 28x28 13x15 3x3 1x1 1x3 3x1 3x40 2x400 4x800"  # height x width
EDGE_SIZES = [tuple(map(int, text.split("x"))) for text in EDGES.split()]


def qwen_reader(patch: int, tokens: int):
    return BACKBONES["qwen2_5_vl"].reader(Qwen2VLImageProcessor(patch_size=patch), tokens)


@pytest.mark.parametrize(("patch", "tokens"), [(14, 300), (16, 40)])
def test_qwens_images_are_those_of_the_image_processor(patch, tokens):
    """transformers' processor gets a PIL image: its channels are not to be guessed."""
    reader, cell = qwen_reader(patch, tokens), 2 * patch
    size = {"shortest_edge": min(56 * 56, tokens * cell**2), "longest_edge": tokens * cell**2}
    processor: Any = Qwen2VLImageProcessor(patch_size=patch, size=size)
    for number, edges in enumerate(EDGE_SIZES):
        image = noise(number, edges)
        if max(edges) > 200 * min(edges):
            continue
        expected = processor(images=[Image.fromarray(image)], return_tensors="pt")
        plan = reader.plan_of(*edges)
        assert torch.equal(reader.pixels([image]), expected["pixel_values"]), edges
        assert [1, *(2 * side for side in plan.grid)] == expected["image_grid_thw"][0].tolist()
        h, w = plan.grid
        assert plan.cells.tolist() == list(range(h * w))
        assert h * w <= tokens == reader.most_tokens


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_no_image_has_more_tokens_than_the_limit(tokens):
    """transformers' own size exceeds it for strips, and where the image is enlarged to the limit."""
    reader, exceeding = qwen_reader(14, tokens), 0
    for height, width in [*EDGE_SIZES, (10, 2000), (4000, 20), (1, 200), (56, 57), (100, 120), (700, 900)]:
        low, high = reader.processor.size["shortest_edge"], reader.processor.size["longest_edge"]
        own = smart_resize(height, width, 28, low, high)
        exceeding += own[0] * own[1] > high
        h, w = reader.grid(height, width)
        assert h * w <= tokens
        assert len(reader.pixels([noise(0, (height, width))])) == 4 * h * w
    assert exceeding > 0


@pytest.mark.parametrize("tokens", [3328, 256, 1791])
def test_internvls_images_are_those_of_the_image_processor(tokens):
    """All tiles but the thumbnail's show cells, each once; ``max_image_tokens`` says how many there are."""
    side: Any = {"height": 448, "width": 448}
    settings: Any = {"size": side, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    reader = BACKBONES["internvl3"].reader(GotOcr2ImageProcessor(**settings), 16, tokens)
    most = {3328: 12, 256: 1, 1791: 5}[tokens]
    own: Any = GotOcr2ImageProcessor(**settings, crop_to_patches=True, min_patches=1, max_patches=most)
    for number, edges in enumerate(
        [*EDGE_SIZES[:2], (1, 1), (1, 3), (3, 1), (3, 40), (448, 448), (1, 5000), (5000, 2)]
    ):
        image = noise(number, edges)
        expected = own([Image.fromarray(image)], return_tensors="pt")["pixel_values"]
        plan, (h, w) = reader.plan_of(*edges), reader.plan_of(*edges).grid
        assert torch.equal(reader.pixels([image]), expected), edges
        assert len(plan.cells) == plan.length == 256 * len(expected) <= tokens
        inside, thumbnail = plan.cells[: h * w], plan.cells[h * w :]
        assert inside.sort().values.tolist() == list(range(h * w))
        assert len(thumbnail) == (256 if h * w > 256 else 0)
        assert bool((thumbnail >= h * w).all())


def test_cells_of_two_tiles_beside_each_other():
    reader = make_backbone("internvl3")[1].reader
    plan = reader.plan_of(40, 80)
    assert plan.grid == (2, 4)
    assert plan.cells.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("backbone", QWEN)
@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (1, 201)])
def test_an_image_that_is_too_long_is_refused(backbone, size):
    processor = make_backbone(backbone)[1]
    for read in (
        lambda: processor.reader.pixels([noise(0, size)]),
        lambda: processor.prompts([noise(0, size)], [[Turn("a")]]),
    ):
        with pytest.raises(ValueError, match=rf"{size[1]} x {size[0]} pixels.*more than 200 times"):
            read()


@pytest.mark.parametrize("backbone", OTHERS)
def test_images_of_a_few_pixels_are_answered(backbone):
    model, processor = make_backbone(backbone)
    sizes = [(1, 1), (1, 3), (3, 1), *[(1, 5000)] * (backbone == "internvl3")]
    turns = [[Turn("a", "it is [SEG].")]] * len(sizes)
    for row, size in zip(model.predict(processor.prompts([noise(0, size) for size in sizes], turns)), sizes):
        assert row[0].mask_logits.shape == row[0].maps.shape == (1, *size)
        assert bool(row[0].mask_logits.isfinite().all())


# -- the processor's files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", OTHERS)
def test_a_processor_is_saved_and_read_again(backbone, tmp_path):
    _, processor = make_backbone(backbone)
    processor.save_pretrained(tmp_path)
    again = UGroundProcessor.from_pretrained(tmp_path)
    assert again.reader.settings() == processor.reader.settings()
    assert again.tokens == processor.tokens
    for name, value in vars(prompts(processor, "it is [SEG].")).items():
        other = getattr(prompts(again, "it is [SEG]."), name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else str(value) == str(other), name
    text = (tmp_path / PROCESSOR_FILE).read_text()
    (tmp_path / PROCESSOR_FILE).write_text(text.replace(f'"{backbone}"', '"qwen9"'))
    with pytest.raises(ValueError, match=rf"{PROCESSOR_FILE}: backbone 'qwen9' is unknown; known: llava, qwen2_5_vl"):
        UGroundProcessor.from_pretrained(tmp_path)
    (tmp_path / PROCESSOR_FILE).write_text(text.replace("max_image_tokens", "most_tokens"))
    with pytest.raises(ValueError, match=r"max_image_tokens is missing; most_tokens is unknown"):
        UGroundProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("backbone", OTHERS)
def test_a_damaged_image_processor_is_named(backbone, tmp_path):
    model, processor = make_backbone(backbone)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    for text in (None, "{", "[]", '{"size": "a"}', '{"size": {"a": 7}}'):
        file.unlink() if text is None else file.write_text(text)
        for read in (UGroundProcessor.from_pretrained, model.config.new_reader):
            with pytest.raises(ValueError, match=rf"{tmp_path}.*preprocessor_config.json"):
                read(tmp_path)


@pytest.mark.parametrize(
    ("backbone", "key", "value", "message"),
    [
        ("qwen2_5_vl", "patch_size", 14, r"patch_size is 14 in preprocessor_config.json, 5 in\s+config.json"),
        ("qwen3_vl", "patch_size", "a", r"preprocessor_config.json: patch_size is 'a', not a whole number"),
        ("qwen2_5_vl", "size", 7, r"preprocessor_config.json: size has no whole number longest_edge: 7"),
        ("qwen3_vl", "merge_size", 4, r"merge_size is 4 in preprocessor_config.json, 2 in\s+config.json"),
        ("internvl3", "size", {"height": 56, "width": 56}, r"tiles are .*56.* in preprocessor_config.json, .*40"),
        ("internvl3", "size", {"height": 56, "width": 40}, r"tiles are .*56.* in preprocessor_config.json, .*40"),
    ],
)
def test_an_image_processor_of_another_model_is_refused(backbone, key, value, message, tmp_path):
    model, processor = make_backbone(backbone)
    processor.reader.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        model.config.new_reader(tmp_path)


@pytest.mark.parametrize("backbone", OTHERS)
def test_published_files_of_other_layouts_are_read(backbone, tmp_path):
    """Early Qwen2.5-VL names a class that transformers no longer has; transformers 5 writes one file of all parts."""
    model, processor = make_backbone(backbone)
    processor.reader.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text()) | {"image_processor_type": "Qwen2_5_VLImageProcessor"}
    if backbone != "internvl3":
        values.pop("size")
        values |= {"min_pixels": 1000, "max_pixels": 12845056}
    file.write_text(json.dumps(values))
    expected = model.config.new_reader(tmp_path)
    file.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    again = model.config.new_reader(tmp_path)
    assert torch.equal(again.pixels(IMAGES), expected.pixels(IMAGES))
    assert again.settings() == expected.settings() == processor.reader.settings()
    if backbone != "internvl3":
        assert again.processor.size["shortest_edge"] == 1000


def test_tile_counts_that_do_not_fit():
    """A tile takes 4 tokens here; of a folder's tiles no side may be another."""
    with pytest.raises(ValueError, match=r"max_image_tokens 3: a tile of InternVL3 takes 4"):
        make_backbone("internvl3", max_image_tokens=3)
    assert make_backbone("internvl3", max_image_tokens=7)[1].reader.plan_of(40, 80).grid == (2, 2)
    config = BACKBONES["internvl3"].config
    with pytest.raises(ValueError, match=r"tiles of 50x50 pixels with patches of 20x20 do not split into square"):
        config(vision_config={"image_size": [50, 50], "patch_size": [20, 20]})


# -- templates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", OTHERS)
@pytest.mark.parametrize("system", [None, "You segment what is asked for."])
@pytest.mark.parametrize(
    "turns",
    [
        [("where is the red star?", "It is [SEG].")],
        [("\u00e9toile\n\nrouge {}", "[SEG]"), ("and\nthe 2 others?", "")],
        [("a", "b {x}"), ("c", "[SEG], [SEG]"), ("d", "")],
    ],
)
def test_conversations_are_those_of_the_chat_template(backbone, system, turns):
    """Texts of the tokenizer's own ``apply_chat_template``, as token ids; labels are the answers with their ends."""
    _, made = make_backbone(backbone)
    processor = UGroundProcessor(made.tokenizer, made.reader, 64, system, max_tokens=400)
    messages: list[dict] = [] if system is None else [{"role": "system", "content": system}]
    for number, (question, answer) in enumerate(turns):
        image = [{"type": "image"}] * (number == 0)
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] * bool(answer)
    opened = not turns[-1][1]
    tokenizer: Any = processor.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    if backbone == "internvl3":  # as InternVLProcessor expands it
        text = text.replace("<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>")
    conversation = processor.builder.encode(tuple(Turn(*turn) for turn in turns))
    prefix = processor.builder.prefix
    ids = [*prefix.before, prefix.image_id, *prefix.after, *conversation.ids]
    assert ids == tokenizer(text if opened else text.removesuffix("\n"))["input_ids"]
    labels = tokenizer.decode([label for label in conversation.labels if label >= 0])
    assert labels == "".join(f"{answer}<|im_end|>" for _, answer in turns if answer)
    check_template(processor.reader.template, tokenizer, "folder")


@pytest.mark.parametrize("backbone", OTHERS)
def test_a_variant_that_thinks_is_refused(backbone):
    tokenizer, template = make_tokenizer(backbone), BACKBONES[backbone].reader.template
    for change in (("assistant\n", "assistant\n<think>\n"), ("<|im_end|>\n", "<|im_end|>")):
        tokenizer.chat_template = CHAT_TEMPLATES[backbone].replace(*change)
        assert tokenizer.chat_template != CHAT_TEMPLATES[backbone]
        with pytest.raises(ValueError, match=r"(?s)^folder: its chat_template writes .*this backbone's.*Instruct"):
            check_template(template, tokenizer, "folder")
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ValueError, match=r"^folder: its chat_template cannot be read"):
        check_template(template, tokenizer, "folder")
    tokenizer.chat_template = None
    check_template(template, tokenizer, "folder")


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", QWEN)
def test_positions_are_those_of_the_model(backbone):
    """Of three images of different shape in one batch, as the processor packs them, one conversation at a time."""
    model, processor = make_backbone(backbone)
    own, batch = transformers_own(model, processor), prompts(processor, "it is [SEG].")
    assert len(set(batch.grids)) == 3
    for b, (h, w) in enumerate(batch.grids):
        for number in range(1, batch.questions[b] + 1):
            row = tokens_of(batch, b, number)
            ids = batch.input_ids[b, row][None]
            types = (ids == processor.tokens.image).int()
            sizes = torch.tensor([[1, 2 * h, 2 * w]])
            expected, _ = own.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=sizes)
            assert torch.equal(batch.position_ids[b, row], expected[:, 0].T)
            assert len({tuple(axes) for axes in batch.position_ids[b, row].tolist()}) > h * w


def test_positions_of_internvl_count_the_images_own_tokens():
    _, processor = make_backbone("internvl3")
    batch = prompts(processor, "it is [SEG].")
    assert batch.has_padding
    for b in range(3):
        row = tokens_of(batch, b, 1)
        assert batch.position_ids[b, row].tolist() == list(range(int(row.sum())))


# -- packed rows -------------------------------------------------------------------------------------------------------


def tokens_of(batch: Batch, b: int, number: int) -> torch.Tensor:
    """[T] bool: the tokens of conversation ``number`` of row b, with its prefix and without padded image tokens."""
    kept = (batch.segment_ids[b] == 0) | (batch.segment_ids[b] == number)
    width = batch.input_ids.shape[1]
    kept[batch.image_tokens[b][~batch.image_shown[b]] - b * width] = False
    return kept


def own_inputs(batch: Batch, b: int, number: int, image: int) -> dict[str, torch.Tensor]:
    """transformers' inputs of a conversation; its image's pixels are cut out of the batch's by transformers' counts."""
    ids = batch.input_ids[b, tokens_of(batch, b, number)][None]
    return {"input_ids": ids, "mm_token_type_ids": (ids == image).int()}


def pixels_of(processor: UGroundProcessor, batch: Batch, b: int) -> dict[str, torch.Tensor]:
    """An image's pixels for transformers' own forward, with its grid of patches where that is an input."""
    pixels = processor.reader.pixels([IMAGES[b]])
    if processor.reader.backbone == "internvl3":
        return {"pixel_values": pixels}
    h, w = batch.grids[b]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w]])}


def residual_stream(own: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The input of each decoder layer and the final norm's output, hooked, and the logits, of transformers' forward."""
    stream: list[torch.Tensor] = []
    text = own.model.language_model
    hooks = [layer.register_forward_pre_hook(lambda _, args: stream.append(args[0])) for layer in text.layers]
    hooks.append(text.norm.register_forward_hook(lambda _, args, output: stream.append(output)))
    own.model.rope_deltas = None
    with torch.no_grad():
        logits = own(**inputs).logits
    for hook in hooks:
        hook.remove()
    return stream, logits


def of_conversation(processor, batch: Batch, b: int, number: int) -> dict[str, torch.Tensor]:
    inputs = own_inputs(batch, b, number, processor.tokens.image) | pixels_of(processor, batch, b)
    if processor.reader.backbone == "internvl3":
        del inputs["mm_token_type_ids"]
    return inputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", OTHERS)
def test_packed_rows_are_transformers_own(backbone, attention):
    """Residual stream and logits of every token, against hooks in transformers' own forward with pixel values."""
    model, processor = make_backbone(backbone, attn_implementation=attention)
    own, batch = transformers_own(loud(model), processor), prompts(processor, "it is [SEG] or [SEG].")
    assert model.config._attn_implementation == own.config._attn_implementation == attention
    model.model.rope_deltas = torch.tensor([[1000]])  # state of an earlier call
    with torch.no_grad():
        output = model.forward_language(batch)
        logits = model.lm_head(output.hidden[-1])
    checked = 0
    for b in range(3):
        for number in range(1, batch.questions[b] + 1):
            stream, expected = residual_stream(own, of_conversation(processor, batch, b, number))
            row = tokens_of(batch, b, number)
            for layer, (ours, theirs) in enumerate(zip(output.hidden, stream, strict=True)):
                torch.testing.assert_close(ours[b, row], theirs[0], **NEAR, msg=lambda m, n=layer: f"{n}: {m}")
            torch.testing.assert_close(logits[b, row], expected[0], **NEAR)
            checked += 1
    assert checked == 8


def test_what_transformers_records_is_not_the_residual_stream_of_qwen3():
    """Deepstack is added after what ``output_hidden_states`` records; a change of that must be noticed."""
    model, processor = make_backbone("qwen3_vl")
    own, batch = transformers_own(loud(model), processor), prompts(processor)
    inputs = of_conversation(processor, batch, 0, 1)
    stream, _ = residual_stream(own, inputs)
    with torch.no_grad():
        recorded = own(**inputs, output_hidden_states=True).hidden_states
    at_image = inputs["input_ids"][0] == processor.tokens.image
    differ = [not torch.equal(a[0, at_image], b[0, at_image]) for a, b in zip(recorded, stream)]
    assert differ == [False, True, True, False, False]


@pytest.mark.parametrize("backbone", OTHERS)
def test_generation_is_transformers_own(backbone):
    """Answers of all questions on one cache, against transformers' ``generate`` of each conversation alone."""
    model, processor = make_backbone(backbone)
    own, batch = transformers_own(loud(model, 3), processor), prompts(processor)
    answers = model.predict(batch, max_new_tokens=6)
    lengths = set()
    for b in range(3):
        for number in range(1, batch.questions[b] + 1):
            ids = answers[b][number - 1].token_ids
            inputs = of_conversation(processor, batch, b, number)
            own.model.rope_deltas = None
            end: Any = processor.tokens.eos
            generated = own.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=end)
            assert generated[0, inputs["input_ids"].shape[1] :].tolist() == ids
            lengths.add(len(set(ids)))
    assert max(lengths) > 2  # not one token again and again
