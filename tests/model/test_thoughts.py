"""Thoughts before answers: their text and labels, how an answer begins, and what training and loading know of them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, build_tiny_model

from model.backbones.llava import ClipReader
from model.opened import predict, with_text
from model.processing.processor import UGroundProcessor
from model.processing.thoughts import MARKS, Marks
from model.processing.tokens import add_special_tokens
from model.settings import METHOD_FIELDS, kept_settings
from model.structures import IGNORE_LABEL, Sample, Turn
from utils.demo.tiny_model import train_tokenizer
from utils.inference.session import ImageSession
from utils.training.run_log import Meter

FORMATS = list(MARKS)
TURN = Turn("where is the red star", "it is [SEG].", "the red [SEG] shape is a star")


def make_processor(thought_format: str) -> UGroundProcessor:
    tokenizer = train_tokenizer([f"{WORDS} Thought: Answer:"] * 4, vocab_size=340)
    if thought_format in MARKS:
        add_special_tokens(tokenizer, of_thoughts=MARKS[thought_format].tokens)
    return UGroundProcessor(tokenizer, ClipReader(40, 10), 64, system_prompt="", thought_format=thought_format)


@pytest.fixture(scope="module", params=FORMATS)
def processor(request: pytest.FixtureRequest) -> UGroundProcessor:
    return make_processor(request.param)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_is_split_into_thought_and_answer(name: str) -> None:
    marks = MARKS[name]
    assert marks.split(f"{marks.marked('it is red')} It is [SEG].") == ("it is red", "It is [SEG].")
    assert marks.split("It is [SEG].") == ("", "It is [SEG].")
    assert marks.split(f"{marks.opening} it is") == ("it is", "")  # cut off within the thought
    assert marks.split(marks.opening[:3]) == ("", "")  # or within its mark
    assert marks.split(f"No, {marks.opening} x") == ("", f"No, {marks.opening} x")


def test_the_thought_is_written_before_the_answer_and_labelled(processor: UGroundProcessor) -> None:
    encoded = processor.builder.encode((TURN,))
    labelled = [k for k, label in enumerate(encoded.labels) if label != IGNORE_LABEL]
    thought = [k for k, inside in enumerate(encoded.in_thought) if inside]
    assert thought == labelled[: len(thought)]
    text = processor.decode([encoded.ids[k] for k in thought])
    assert text == processor.builder.marks.marked("the red [ SEG ] shape is a star")  # which is no target
    assert processor.decode([encoded.ids[k] for k in labelled[len(thought) :]]) == "it is [SEG]."
    assert processor.split_thought(processor.decode([encoded.ids[k] for k in labelled]))[1] == "it is [SEG]."
    plain = processor.builder.encode((replace(TURN, thought=""),))
    assert not any(plain.in_thought)
    assert len(plain.ids) == len(encoded.ids) - len(thought)
    assert encoded.ids[thought[0] :][: len(processor.builder.opening)] == processor.builder.opening


def test_marks_in_a_thought_do_not_end_it(processor: UGroundProcessor) -> None:
    marks = processor.builder.marks
    turn = Turn("q", f"{marks.opening} it is [SEG]", f"a {marks.closing} b {marks.opening} c")
    encoded = processor.builder.encode((turn,))
    text = processor.decode([label for label in encoded.labels if label != IGNORE_LABEL])
    thought, answer = processor.split_thought(text)
    assert [word for word in thought.split() if word in "abc"] == ["a", "b", "c"]
    assert answer.endswith("it is [SEG]")
    alone = processor.builder.encode((replace(turn, thought=""),))
    assert processor.split_thought(processor.decode([i for i in alone.labels if i != IGNORE_LABEL]))[0] == ""


@pytest.mark.parametrize("marks", [MARKS["text"], MARKS["tokens"]], ids=["text", "tokens"])
def test_marks_that_are_left_over_from_marks_do_not_end_a_thought(marks: Marks) -> None:
    for mark in (marks.opening, marks.closing):
        nested = f"see {mark}{mark[-1]} and {mark[0]}{mark}{mark[1:]}: it"
        thought, answer = marks.split(f"{marks.marked(nested)} It is [SEG].")
        assert (thought[:3], thought[-2:], answer) == ("see", "it", "It is [SEG].")


def test_a_short_answer_is_no_beginning_of_a_mark_once_it_is_complete() -> None:
    assert MARKS["text"].split("T") == ("", "")  # may go on: Thought:
    assert MARKS["text"].split("T", complete=True) == ("", "T")


def test_a_seg_within_a_thought_is_no_target(processor: UGroundProcessor, image: np.ndarray) -> None:
    model = build_tiny_model(processor)
    turn = Turn("where", "it is [SEG] and [SEG].")
    batch = processor.prompts([image], [[turn]])
    [[plain]] = model.predict(batch)
    marks = processor.builder.marks
    answer = f"{marks.opening} it is [SEG] {marks.closing} it is [SEG]."
    encoded = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    seg = encoded.index(processor.tokens.seg)
    spelled = processor.tokenizer.convert_tokens_to_ids(list("[SEG]"))  # is no such token, and has no mask
    plain.token_ids = [*encoded[:seg], *spelled, *encoded[seg:]]
    [[prediction]] = with_text([[plain]], processor)
    assert (prediction.thought.count("[SEG]"), prediction.text.count("[SEG]")) == (2, 1)
    assert len(prediction.masks) == len(prediction.layers) == len(prediction.policy) == 1
    assert torch.equal(prediction.mask_logits[0], plain.mask_logits[1])


def test_a_thought_needs_a_format() -> None:
    with pytest.raises(ValueError, match="has a thought, and thought_format is none"):
        make_processor("none").builder.encode((TURN,))
    tokenizer = make_processor("none").tokenizer
    with pytest.raises(ValueError, match="does not know <think>, </think>"):
        UGroundProcessor(tokenizer, ClipReader(40, 10), 64, thought_format="tokens")
    with pytest.raises(ValueError, match="thought_format 'x' is unknown"):
        UGroundProcessor(tokenizer, ClipReader(40, 10), 64, thought_format="x")


def test_a_typed_mark_is_no_token() -> None:
    processor = make_processor("tokens")
    opening = processor.tokenizer.get_vocab()["<think>"]
    encoded = processor.builder.encode((Turn("say <think>", "it is </think> so", "a <think> b"),))
    assert encoded.ids.count(opening) == 1
    assert encoded.ids.count(processor.tokenizer.get_vocab()["</think>"]) == 1


def test_weights_and_counts_of_a_batch(processor: UGroundProcessor, image: np.ndarray) -> None:
    mask = np.ones((1, 48, 64), np.uint8)
    weighted = copy.copy(processor)
    weighted.thought_weight = 0.25
    turns = [TURN, replace(TURN, thought="")]
    sample = Sample("a", image, [(turn,) for turn in turns], mask.repeat(2, axis=0))
    batch = weighted.collate([sample])
    number = int(batch.label_thoughts.sum())
    assert number == sum(processor.builder.encode((TURN,)).in_thought)
    assert batch.label_weights[batch.label_thoughts].unique().tolist() == [0.25]
    assert batch.label_weights[~batch.label_thoughts].unique().tolist() == [1]
    assert batch.counts.tolist() == [len(batch.label_ids) - 0.75 * number, 2, number]


def test_a_truncated_thought_has_neither_answer_nor_mask(processor: UGroundProcessor, image: np.ndarray) -> None:
    short = copy.copy(processor)
    short.max_tokens = processor.max_tokens - processor.room + len(processor.builder.encode((TURN,)).ids) - 5
    batch = short.collate([Sample("a", image, [(TURN,)], np.ones((1, 48, 64), np.uint8))])
    assert batch.masks[0].shape[0] == 0
    assert 0 < int(batch.label_thoughts.sum()) <= len(batch.label_ids)


def test_the_loss_of_thoughts_is_logged_per_token(image: np.ndarray) -> None:
    processor = make_processor("text")
    sample = Sample("a", image, [(TURN,)], np.ones((1, 48, 64), np.uint8))
    both, none = processor.collate([sample]), copy.copy(processor)
    none.thought_weight = 0.0
    model = build_tiny_model(processor, thought_format="text")
    terms = [model(batch).terms for batch in (both, none.collate([sample]))]
    thoughts, answers = int(both.label_thoughts.sum()), int((~both.label_thoughts).sum())
    expected = (terms[0]["thought"] * thoughts + terms[1]["text"] * answers) / (thoughts + answers)
    torch.testing.assert_close(terms[0]["text"], expected)
    assert "thought" not in build_tiny_model(processor)(both).terms


def test_an_answer_begins_as_asked(processor: UGroundProcessor, image: np.ndarray) -> None:
    model = build_tiny_model(processor)
    questions = [[Turn("where is the red star"), Turn("what is this")]]
    opening = processor.builder.opening
    answers = {
        think: predict(model, processor, [image], questions, think=think, max_new_tokens=12)[0]
        for think in ("auto", "on", "off")
    }
    for prediction in answers["on"]:
        assert prediction.token_ids[: len(opening)] == opening
        assert prediction.thought
        assert processor.decode(prediction.token_ids).startswith(processor.builder.marks.opening)
    for prediction in answers["off"]:
        assert prediction.token_ids[: len(opening)] != opening
        assert prediction.thought == ""
    [[session]] = [[ImageSession(model, processor, image).ask("where is the red star", think="on", max_new_tokens=12)]]
    assert session.token_ids == answers["on"][0].token_ids
    with pytest.raises(ValueError, match="think is 'x'; use auto, on, off"):
        predict(model, processor, [image], questions, think="x")


def test_a_banned_thought_is_what_the_model_would_have_written(image: np.ndarray) -> None:
    """A model whose first word is always the opening."""
    processor = make_processor("tokens")
    model = build_tiny_model(processor)
    opening = processor.tokenizer.get_vocab()["<think>"]
    first = predict(model, processor, [image], [[Turn("where")]], think="off", max_new_tokens=4)[0][0]
    with torch.no_grad():
        model.lm_head.weight[opening] = 50 * model.lm_head.weight[first.token_ids[0]]
    [[free]] = predict(model, processor, [image], [[Turn("where")]], max_new_tokens=4)
    [[banned]] = predict(model, processor, [image], [[Turn("where")]], think="off", max_new_tokens=4)
    assert free.token_ids[0] == opening
    assert opening not in banned.token_ids[: len(processor.builder.opening)]


def test_a_model_without_thoughts_says_so(tiny_model, tiny_processor, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="trained without thoughts"):
        predict(tiny_model, tiny_processor, [image], [[Turn("where")]], think="on")
    [[off]] = predict(tiny_model, tiny_processor, [image], [[Turn("where")]], think="off", max_new_tokens=4)
    [[auto]] = predict(tiny_model, tiny_processor, [image], [[Turn("where")]], max_new_tokens=4)
    assert off.token_ids == auto.token_ids


def test_further_training_keeps_the_format() -> None:
    method = {name: item.default for name, item in METHOD_FIELDS.items()}
    assert "thought_format" not in kept_settings(method)
    assert "thought_format" in kept_settings(method | {"thought_format": "text"})


def test_the_log_has_the_mean_over_steps_with_thoughts() -> None:
    processor = make_processor("text")
    model = build_tiny_model(processor, thought_format="text")
    picture = np.zeros((48, 64, 3), np.uint8)
    batches = [
        processor.collate([Sample("a", picture, [(turn,)], np.ones((1, 48, 64), np.uint8))])
        for turn in (TURN, replace(TURN, thought=""), replace(TURN, thought=""))
    ]
    meter = Meter(torch.device("cpu"), model.ppm.num_layers)
    outputs = [model(batch) for batch in batches]
    for output in outputs:
        meter.add(output, 1)
    assert meter.collect()["thought"] == pytest.approx(float(outputs[0].terms["thought"]))
    meter.add(outputs[1], 1)
    assert "thought" not in meter.collect()


def test_the_format_is_saved_with_the_processor(processor: UGroundProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = UGroundProcessor.from_pretrained(tmp_path)
    assert again.thought_format == processor.thought_format
    assert again.builder.opening == processor.builder.opening
    assert again.added_tokens == processor.added_tokens


def test_a_thought_is_learned_and_written_only_when_asked_for(processor: UGroundProcessor, image: np.ndarray) -> None:
    """The same question with a thought and without: its first token decides."""
    model = build_tiny_model(processor, thought_format=processor.thought_format)
    turns = [Turn("where is it", "it is [SEG].", "it is green"), Turn("where is it", "sure, it is [SEG].")]
    batch = processor.collate([Sample("a", image, [(turn,) for turn in turns], np.ones((2, 48, 64), np.uint8))])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(120):
        output = model(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.terms["thought"] < 0.3
    for think, turn in (("on", turns[0]), ("off", turns[1])):
        [[prediction]] = predict(model, processor, [image], [[Turn("where is it")]], think=think, max_new_tokens=40)
        assert (prediction.thought, prediction.text) == (turn.thought, turn.answer)
        assert len(prediction.masks) == 1


def test_the_history_of_a_conversation_has_its_thoughts(processor: UGroundProcessor, image: np.ndarray) -> None:
    """A later question reads the earlier thought as it would in training."""
    session = ImageSession(build_tiny_model(processor), processor, image)
    session.history = [Turn("where is it", "it is [SEG].", "it is green")]
    session.ask("and the star", max_new_tokens=2)
    asked = processor.builder.encode((session.history[0], Turn("and the star"))).ids
    assert session.cache.ids[: len(asked)] == asked
    assert processor.builder.marks.marked("it is green") in processor.decode(asked)


def test_a_target_of_several_tokens_may_follow_a_thought() -> None:
    plain = make_processor("tokens")
    tokenizer = train_tokenizer([WORDS] * 4, vocab_size=340)
    add_special_tokens(tokenizer, codebook=3, of_thoughts=MARKS["tokens"].tokens)
    several = UGroundProcessor(tokenizer, ClipReader(40, 10), 64, "", codebook=3, thought_format="tokens")
    encoded, expected = several.builder.encode((TURN,)), plain.builder.encode((TURN,))
    assert len(encoded.ids) == len(encoded.in_thought) == len(expected.ids) + 2
    assert encoded.in_thought.count(True) == expected.in_thought.count(True)
    at = encoded.ids.index(several.codebook[0])
    assert encoded.ids[at : at + 3] == several.codebook
    assert encoded.in_thought[at : at + 3] == [False] * 3
