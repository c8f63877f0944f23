"""Packing, generation and loss aggregation: equalities that the design claims to be exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from answering import NEAR, read_anew, says_seg_often
from conftest import assert_same_masks, drawn_sample

from model.backbones.llava import ClipReader
from model.config import UGroundConfig
from model.geometry import maps_at
from model.lora import add_lora, parameters_by_part
from model.opened import predict
from model.processing.processor import UGroundProcessor
from model.structures import Sample, Turn


def separate_rows(sample: Sample) -> list[Sample]:
    """One sample per conversation, as in LISA."""
    rows, start = [], 0
    for conversation in sample.conversations:
        count = sum(turn.answer.count("[SEG]") for turn in conversation)
        rows.append(Sample(sample.source, sample.image, [conversation], sample.masks[start : start + count]))
        start += count
    return rows


@pytest.mark.parametrize("size", [(48, 64), (64, 40), (50, 50)])
def test_packed_rows_equal_separate_rows(make_model, tiny_processor, size):
    sample = drawn_sample(3, size, segs=(1, 0, 2, 5))
    settings = {"layer_selection": "fixed:3", "policy_loss_weight": 0.0}
    packed, separate = make_model(**settings), make_model(**settings)
    one = packed(tiny_processor.collate([sample]))
    many = separate(tiny_processor.collate(separate_rows(sample)))
    torch.testing.assert_close(one.loss, many.loss, **NEAR)
    assert_same_masks(one.mask_logits[0], torch.cat(many.mask_logits))
    one.loss.backward()
    many.loss.backward()
    for (name, a), b in zip(packed.named_parameters(), separate.parameters()):
        if a.grad is None or "k_proj.bias" in name:
            continue
        tolerance = 5e-5 * max(1e-3, float(b.grad.abs().max()))
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_conversations_do_not_attend_to_each_other(tiny_model, tiny_processor):
    first = drawn_sample(4, segs=(1, 1))
    second = Sample(first.source, first.image, [first.conversations[0], drawn_sample(5, segs=(0,)).conversations[0]],
                    first.masks[:1], first.sample_id)  # fmt: skip
    a, b = (tiny_model(tiny_processor.collate([s])).mask_logits[0][0] for s in (first, second))
    assert_same_masks(a, b)


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (64, 24)])
def test_cached_generation_equals_generation_without_cache(make_model, tiny_processor, size):
    model = says_seg_often(make_model(seed=1), tiny_processor)
    image = drawn_sample(6, size).image
    questions = ["where is the red star", "circle", "please segment all of the blue shapes in this image"]
    together = predict(model, tiny_processor, [image], [list(map(Turn, questions))], max_new_tokens=6)[0]
    for question, prediction in zip(questions, together):
        ids = []
        for _ in range(len(prediction.token_ids)):  # no cache: a forward pass of the whole row per token
            batch = tiny_processor.prompts([image], [[Turn(question)]])
            tail = torch.tensor([ids], dtype=torch.int64)
            extra = len(ids)
            batch.input_ids = torch.cat([batch.input_ids, tail], 1)
            batch.segment_ids = torch.cat([batch.segment_ids, torch.ones(1, extra, dtype=torch.int64)], 1)
            more = batch.position_ids[:, -1:] + torch.arange(1, extra + 1)
            batch.position_ids = torch.cat([batch.position_ids, more], 1)
            hidden = model.forward_language(batch).hidden[-1]
            ids.append(int(model.lm_head(hidden[0, -1]).argmax()))
        assert ids == prediction.token_ids
    assert sum(len(p.mask_logits) for p in together) > 0
    alone = [predict(model, tiny_processor, [image], [[Turn(q)]], max_new_tokens=6)[0][0] for q in questions]
    for a, b in zip(together, alone):
        assert a.token_ids == b.token_ids
        assert a.layers == b.layers
        assert_same_masks(a.mask_logits, b.mask_logits)


def test_batches_of_images_and_questions_equal_single_ones_without_cache(make_model, tiny_processor, monkeypatch):
    """Square and padded images together, 1 to 4 questions each, answers of 1 to 8 tokens with 0 to 5 [SEG]."""
    images = [drawn_sample(n, size).image for n, size in ((6, (50, 50)), (7, (40, 64)), (8, (64, 24)))]
    questions = [
        ["where is the red star", "circle", "please segment all of the blue shapes in this image", "a square"],
        ["star"],
        ["what can you see in this image ?", "the green one and the red one, please"],
    ]
    turns = [[Turn(question) for question in row] for row in questions]
    counts, lengths = set(), set()
    for seed in (4, 11):
        model = says_seg_often(make_model(seed=7), tiny_processor)
        with torch.no_grad():  # answers of different lengths
            end = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
            model.lm_head.weight[tiny_processor.tokens.eos] = 0.9 * end
        widths, forward = [], model.forward_packed
        with monkeypatch.context() as patch:
            patch.setattr(
                model,
                "forward_packed",
                lambda e, *a, w=widths, forward=forward, **k: w.append(e.shape[1]) or forward(e, *a, **k),
            )
            together = predict(model, tiny_processor, images, turns, max_new_tokens=8)
        for image, image_questions, row in zip(images, questions, together):
            for question, prediction in zip(image_questions, row):
                token_ids, uncached = read_anew(model, tiny_processor, image, (), question, prediction.token_ids)
                assert token_ids == prediction.token_ids
                torch.testing.assert_close(prediction.layer_maps, uncached.layer_maps, **NEAR)
                assert prediction.layers == uncached.layers
                assert_same_masks(prediction.mask_logits, uncached.mask_logits)
                counts.add(len(prediction.layers))
                lengths.add(len(prediction.token_ids))
        alive = [max(sum(len(a.token_ids) > step for a in row) for row in together) for step in range(1, len(widths))]
        assert widths[1:] == alive  # questions that have ended take no slot
    assert counts == {0, 1, 2, 3, 4, 5}
    assert {1, 3, 5, 8} <= lengths


def test_generated_masks_equal_teacher_forced_ones(make_model, tiny_processor):
    """The state that predicts [SEG] in generation is the one used when the same answer is teacher-forced."""
    model = says_seg_often(make_model(seed=2), tiny_processor)
    tokens = tiny_processor.tokens
    image = drawn_sample(7).image
    questions = ["circle", "star", "square"]
    generated = predict(model, tiny_processor, [image], [list(map(Turn, questions))], max_new_tokens=3)[0]
    for question, prediction in zip(questions, generated):
        answer = prediction.token_ids
        assert len(prediction.mask_logits) == answer.count(tokens.seg)
        batch = tiny_processor.prompts([image], [[Turn(question)]])
        width = batch.input_ids.shape[1]
        batch.input_ids = torch.cat([batch.input_ids, torch.tensor([answer])], 1)
        batch.segment_ids = torch.cat([batch.segment_ids, torch.ones(1, len(answer), dtype=torch.int64)], 1)
        more = batch.position_ids[:, -1:] + torch.arange(1, len(answer) + 1)
        batch.position_ids = torch.cat([batch.position_ids, more], 1)
        positions = torch.tensor([width - 1 + i for i, token in enumerate(answer) if token == tokens.seg])
        batch.label_positions, batch.label_ids = positions, torch.full_like(positions, tokens.seg)
        batch.seg_positions, batch.seg_rows = positions, torch.zeros_like(positions)
        if len(positions):
            forced = model.predict(batch)[0][0]
            assert_same_masks(prediction.mask_logits, forced.mask_logits)
    assert sum(len(p.mask_logits) for p in generated) > 0


def test_predictions_do_not_depend_on_the_batch(tiny_model, tiny_processor, tiny_samples):
    images = [s.image for s in tiny_samples]
    questions = [["red star", "circle"], ["blue square"], ["star", "the green circle please", "shapes"]]
    answers = [["it is [SEG].", "[SEG] and [SEG]"], ["sure, [SEG]"], ["there is no star [REJ]", "it is [SEG]", "a"]]
    turns = [list(map(Turn, *pair)) for pair in zip(questions, answers)]
    together = predict(tiny_model, tiny_processor, images, turns)
    for i, image in enumerate(images):
        alone = predict(tiny_model, tiny_processor, [image], [turns[i]], sample_ids=[i])[0]
        for a, b in zip(together[i], alone):
            assert (a.text, a.layers, a.rejected) == (b.text, b.layers, b.rejected)
            assert_same_masks(a.mask_logits, b.mask_logits)


def test_every_trainable_part_gets_a_gradient(make_model, tiny_processor, tiny_samples):
    model = add_lora(make_model(), r=2)
    model(tiny_processor.collate(tiny_samples)).loss.backward()
    from model.lora import part_of

    norms: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            part = part_of(name)
            norms[part] = norms.get(part, 0.0) + float(parameter.grad.norm())
    expected = {"lora", "phi", "gate", "sam_mask_decoder", "sam_prompt_encoder", "embed_tokens", "lm_head"}
    assert set(norms) == expected
    assert all(value > 0 for value in norms.values()), norms
    assert parameters_by_part(model)["lora"][1] > 0


def test_lora_adapts_only_the_language_model(make_model):
    model = add_lora(make_model(), r=2)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    expected = {f"base_model.model.model.layers.{i}.self_attn.{name}_proj" for i in range(4) for name in ("q", "v")}
    assert adapted == expected
    with pytest.raises(ValueError, match="gate_proj"):
        add_lora(make_model(), r=2, targets="q_proj,gate_proj")


def test_a_batch_without_masks_touches_every_trainable_parameter(make_model, tiny_processor):
    model = add_lora(make_model(), r=2)
    output = model(tiny_processor.collate([drawn_sample(8, segs=(0, 0))]))
    output.loss.backward()
    assert output.layers.shape == (0,)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.isfinite(output.loss)


def test_a_frozen_tower_has_no_backward_pass(tiny_model):
    """Under gradient checkpointing, transformers makes the inputs of every encoder require gradients."""
    images, cells = torch.rand(1, 3, 40, 40), torch.arange(16)[None]
    tiny_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert tiny_model.train().encode_images(images, cells).requires_grad  # in full
    add_lora(tiny_model, r=2)
    assert not tiny_model.encode_images(images, cells).requires_grad


def test_lisa_setting_needs_no_mask_prompt(make_model, tiny_processor, tiny_samples):
    lisa = make_model(layer_selection="last", mask_prompt=False, map_loss_weight=0.0, policy_loss_weight=0.0)
    lisa = add_lora(lisa, r=2)
    output = lisa(tiny_processor.collate(tiny_samples))
    output.loss.backward()
    assert set(output.layers.tolist()) == {4}
    assert lisa.ppm.gate.grad is None
    assert "policy" not in output.terms


def test_map_prompt_alone_works(make_model, tiny_processor, tiny_samples):
    output = add_lora(make_model(seg_prompt=False), r=2)(tiny_processor.collate(tiny_samples))
    assert torch.isfinite(output.loss)
    with pytest.raises(ValueError, match="both off"):
        make_model(seg_prompt=False, mask_prompt=False)


def test_sampled_layers_do_not_depend_on_the_batch(make_model, tiny_processor, tiny_samples):
    model = make_model(layer_selection="uniform")
    together = model(tiny_processor.collate(tiny_samples)).layers.tolist()
    alone = [layer for s in tiny_samples for layer in model(tiny_processor.collate([s])).layers.tolist()]
    assert together == alone
    assert len(set(together)) > 1
    assert 0 not in together  # the embeddings are no candidate


def test_monte_carlo_of_one_sample_equals_sample(tiny_model, tiny_processor, tiny_samples):
    image = [tiny_samples[0].image]
    ask = (image, [[Turn("star", "it is [SEG]."), Turn("circle", "[SEG] and [SEG]")]])
    one = predict(tiny_model, tiny_processor, *ask, layer_policy="mc:1", seed=5)[0]
    sampled = predict(tiny_model, tiny_processor, *ask, layer_policy="sample", seed=5)[0]
    for a, b in zip(one, sampled):
        assert a.layers == b.layers
        assert_same_masks(a.mask_logits, b.mask_logits, tolerance=0.02)  # through probabilities near a half and back
    many = predict(tiny_model, tiny_processor, *ask, layer_policy="mc:8", seed=5)[0]
    assert all(torch.isfinite(p.mask_logits).all() for p in many)


def test_one_language_pass_is_decoded_with_several_layer_rules(make_model, tiny_processor, tiny_samples):
    model = make_model()
    batch = tiny_processor.prompts([tiny_samples[1].image], [[Turn("where is the red star", "it is [SEG] and [SEG].")]])
    language_pass = model.answer(batch)
    for layer_rule in ("fixed:1", "fixed:3", "soft", "mc:4"):
        [[decoded]], [[predicted]] = model.decode_masks(language_pass, layer_rule), model.predict(batch, layer_rule)
        assert decoded.layers == predicted.layers
        assert torch.equal(decoded.mask_logits, predicted.mask_logits)
    [[fixed]] = model.decode_masks(language_pass, "fixed:3")
    enlarged = maps_at(fixed.layer_maps[:, 3], model.config.map_fit, batch.sizes[0])
    torch.testing.assert_close(enlarged, fixed.maps)


def test_an_answer_without_seg_needs_no_sam(make_model, tiny_processor, tiny_samples, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.visual_model, "encode", lambda images: pytest.fail("encoded without need"))
    batch = tiny_processor.prompts([tiny_samples[0].image], [[Turn("where is the red star", "there is no such thing")]])
    [[prediction]] = model.predict(batch)
    assert prediction.mask_logits.shape == (0, *tiny_samples[0].image.shape[:2])
    assert prediction.layers == []


@pytest.mark.parametrize("policy", ["best", "fixed:9", "mc:0", "fixed", "last:1"])
def test_unknown_layer_policies_are_refused(tiny_model, tiny_processor, tiny_samples, policy):
    with pytest.raises(ValueError, match=r"layer|policy|sample"):
        predict(tiny_model, tiny_processor, [tiny_samples[0].image], [[Turn("star")]], layer_policy=policy)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "argmax"),
        ({"layer_selection": "last"}, "last"),  # its policy is untrained: the mode is meaningless
        ({"layer_selection": "fixed:2"}, "fixed:2"),
        ({"layer_selection": "last", "eval_layer_policy": "argmax"}, "argmax"),
    ],
)
def test_prediction_uses_the_layer_of_training(make_model, tiny_processor, tmp_path, settings, expected):
    make_model(**settings).config.save_pretrained(tmp_path)
    assert UGroundConfig.from_pretrained(tmp_path).layer_policy == expected
    if expected in ("last", "fixed:2"):
        model, image = make_model(**settings), np.zeros((40, 40, 3), np.uint8)
        [[prediction]] = predict(model, tiny_processor, [image], [[Turn("star", "it is [SEG].")]])
        assert prediction.layers == [{"last": 4, "fixed:2": 2}[expected]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gaussian_sigma": None}, "gaussian_sigma: None is not a number"),
        ({"point_prompts": "two"}, "point_prompts: 'two' is not a number"),
        ({"eval_layer_policy": "fixed:9"}, r"eval_layer_policy \(a run's --val_layer_policy\): layer 9 does not exist"),
    ],
)
def test_a_configuration_names_wrong_settings(make_model, settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(**settings)


def test_save_and_load(tiny_model, tiny_processor, tiny_samples, tmp_path):
    from opening import load_pretrained

    tiny_model.ppm.baseline.fill_(-0.75)
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    model, processor = load_pretrained(str(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()
    assert float(model.ppm.baseline) == -0.75
    assert processor.tokens == tiny_processor.tokens
    batch = tiny_processor.collate(tiny_samples)
    with torch.no_grad():
        torch.testing.assert_close(model(batch).loss, tiny_model(batch).loss)
    (tmp_path / "uground_processor.json").unlink()
    with pytest.raises(ValueError, match="uground_processor"):
        load_pretrained(str(tmp_path))


def test_bfloat16_keeps_the_baseline_in_float32(tiny_model, tiny_processor, tiny_samples):
    model = tiny_model.to(torch.bfloat16)
    assert model.ppm.baseline.dtype == torch.float32
    output = model(tiny_processor.collate(tiny_samples).to("cpu", torch.bfloat16))
    assert torch.isfinite(output.loss)
    assert all(logits.dtype == torch.float32 for logits in output.mask_logits)


def test_a_folder_loads_in_bfloat16(tiny_model, tiny_processor, tiny_samples, tmp_path):
    from opening import load_pretrained

    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    model, processor = load_pretrained(str(tmp_path), precision="bf16")
    ask = ([tiny_samples[0].image], [[Turn("star", "it is [SEG].")]])
    low, full = (predict(m, processor, *ask, layer_policy="last")[0][0].mask_logits for m in (model, tiny_model))
    torch.testing.assert_close(low, full, rtol=0.1, atol=0.02)


def test_a_question_that_is_too_long_is_refused_not_truncated(tiny_tokenizer):
    """Truncated, it would lose the end of its prompt, and the model would continue the question."""
    processor = UGroundProcessor(tiny_tokenizer, ClipReader(40, 10), 64, system_prompt="", max_tokens=60)
    image = drawn_sample(0).image
    processor.prompts([image], [[Turn("where is the red star")]])
    for answer in ("", "it is [SEG]."):
        with pytest.raises(ValueError, match=r"'where is the red star where is.*fit beside the image"):
            processor.prompts([image], [[Turn("where is the red star " * 20, answer)]])


@pytest.mark.parametrize("room", [-320, 0])
def test_a_length_that_leaves_no_room_beside_the_image_is_refused(tiny_processor, room):
    """``--model_max_length 300`` with 576 image tokens: training would see rows without a conversation."""
    prefix = tiny_processor.max_tokens - tiny_processor.room
    sides = tiny_processor.reader, tiny_processor.sam_side
    with pytest.raises(
        ValueError, match=rf"take up to {prefix} tokens, .* at most {prefix + room}; raise --model_max_len"
    ):
        UGroundProcessor(tiny_processor.tokenizer, *sides, system_prompt="", max_tokens=prefix + room)


def test_turns_with_and_without_an_answer_make_no_batch(tiny_processor):
    image = drawn_sample(0).image
    with pytest.raises(ValueError, match=r"give all answers \(teacher forced\), or leave all to the model"):
        tiny_processor.prompts([image, image], [[Turn("star", "[SEG]")], [Turn("star")]])


def test_images_of_one_row_of_pixels(tiny_model, tiny_processor):
    image = np.zeros((1, 5000, 3), np.uint8)
    prediction = predict(tiny_model, tiny_processor, [image], [[Turn("star", "it is [SEG].")]])[0][0]
    assert prediction.mask_logits.shape == (1, 1, 5000)
    assert torch.isfinite(prediction.mask_logits).all()


def test_a_truncated_answer_loses_masks_with_their_tokens(tiny_tokenizer):
    """``model_max_length``: a [SEG] and its mask are kept or removed together."""
    kept = []
    for longest in range(28, 60):
        processor = UGroundProcessor(tiny_tokenizer, ClipReader(40, 10), 64, "", max_tokens=longest)
        batch = processor.collate([drawn_sample(0, segs=(2, 1, 0))])
        kept.append(len(batch.seg_positions))
        assert len(batch.masks[0]) == kept[-1] == int((batch.label_ids == processor.tokens.seg).sum())
    assert set(kept) == {0, 2, 3}  # the first [SEG] of both answers, and the second one


def test_the_objective_is_a_part_without_parameters_of_its_own(make_model):
    """It shares the configuration and the gate, and adds no key to checkpoints."""
    model = make_model()
    assert model.objective.config is model.ppm.config is model.config
    assert model.objective.ppm is model.ppm
    assert not [name for name in model.state_dict() if "objective" in name]
    gates = [name for name, p in model.named_parameters(remove_duplicate=False) if p is model.ppm.gate]
    assert gates == ["ppm.gate"]


def test_a_sample_needs_a_mask_per_seg(tiny_processor, tiny_samples):
    sample = replace(tiny_samples[0], masks=tiny_samples[0].masks[1:])
    with pytest.raises(ValueError, match=rf"{sample.source}: 3 \[SEG\] in the answers but 2 masks"):
        tiny_processor.collate([sample])


def test_training_in_full_is_told_once_with_the_number_of_parameters(make_model, tiny_processor, caplog):
    batch = tiny_processor.collate([drawn_sample(0)])
    model = make_model()
    model.eval()(batch)
    assert not caplog.messages
    for _ in range(2):
        model.train()(batch)
    [message] = caplog.messages
    assert message.startswith(f"{sum(p.numel() for p in model.parameters()):,} parameters train")
    assert "add_lora" in message


@pytest.mark.parametrize("r", [0, 2])
def test_training_with_add_lora_is_told_nothing(r, make_model, tiny_processor, caplog):
    model = add_lora(make_model(), r).train()
    model(batch=tiny_processor.collate([drawn_sample(0)]))
    assert not caplog.messages
    assert parameters_by_part(model)["llama"][1] == 0


def test_an_answer_ends_at_the_largest_number_of_segs(make_model, tiny_processor, monkeypatch):
    """Alone, and beside others that continue."""
    model, seg = says_seg_often(make_model(seed=7), tiny_processor), tiny_processor.tokens.seg
    with torch.no_grad():  # answers of different lengths, as above
        end = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(4))
        model.lm_head.weight[tiny_processor.tokens.eos] = 0.9 * end
    image = drawn_sample(6, (50, 50)).image
    questions = ["where is the red star", "circle", "please segment all of the blue shapes in this image", "a square"]

    def ask(*asked):
        return predict(model, tiny_processor, [image], [list(map(Turn, asked))], max_new_tokens=8)[0]

    def cut(answer):
        places = [k for k, token in enumerate(answer.token_ids) if token == seg]
        return answer.token_ids[: places[1] + 1] if len(places) > 1 else answer.token_ids

    expected = [cut(answer) for answer in ask(*questions)]
    assert len(set(map(len, expected))) > 1
    monkeypatch.setattr("model.generation.MAX_SEGS", 2)
    together = ask(*questions)
    assert [answer.token_ids for answer in together] == expected
    for question, answer in zip(questions, together):
        [alone] = ask(question)
        assert alone.token_ids == answer.token_ids
        assert_same_masks(alone.mask_logits, answer.mask_logits)
        assert answer.cut == (answer.token_ids[-1] != tiny_processor.tokens.eos)
