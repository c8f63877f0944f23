"""A conversation about an image on one cache gives the answers of the whole conversation encoded again."""

import pytest
import torch
from answering import NEAR, read_anew, says_seg_often
from conftest import assert_same_masks, drawn_sample

from model.backbones.llava import ClipReader
from model.opened import predict
from model.processing.processor import UGroundProcessor
from model.structures import Turn
from utils.inference.session import ImageSession

QUESTIONS = ["where is the red star", "and the blue circle?", "please segment all of the shapes", "a square"]


@pytest.fixture
def model(make_model, tiny_processor):
    return says_seg_often(make_model(seed=1), tiny_processor)


@pytest.mark.parametrize("size", [(50, 50), (40, 64), (64, 24)])
def test_follow_ups_equal_the_whole_conversation_encoded_again(model, tiny_processor, size):
    image = drawn_sample(6, size).image
    session, masks = ImageSession(model, tiny_processor, image), 0
    for number, question in enumerate(QUESTIONS):
        history = list(session.history)
        assert [turn.question for turn in history] == QUESTIONS[:number]
        prediction = session.ask(question, max_new_tokens=6)
        written, anew = read_anew(model, tiny_processor, image, history, question, prediction.token_ids)
        assert written == prediction.token_ids
        assert prediction.layers == anew.layers
        assert_same_masks(prediction.mask_logits, anew.mask_logits)
        torch.testing.assert_close(prediction.layer_maps, anew.layer_maps, **NEAR)
        assert prediction.text == tiny_processor.decode(prediction.token_ids) == session.history[-1].answer
        masks += len(prediction.mask_logits)
    assert masks > 2


def test_the_image_is_encoded_once_and_a_follow_up_reads_its_own_tokens(model, tiny_processor, monkeypatch):
    calls = {"clip": 0, "sam": 0}
    read, lengths = model.forward_packed, []

    def count(name, encode):
        def counted(*arguments):
            calls[name] += 1
            return encode(*arguments)

        return counted

    def recorded(embeddings, *rest, **more):
        lengths.append(embeddings.shape[1])
        return read(embeddings, *rest, **more)

    monkeypatch.setattr(model, "encode_images", count("clip", model.encode_images))
    monkeypatch.setattr(model.visual_model, "encode", count("sam", model.visual_model.encode))
    monkeypatch.setattr(model, "forward_packed", recorded)
    session = ImageSession(model, tiny_processor, drawn_sample(6).image)
    assert (calls, lengths) == (
        {"clip": 1, "sam": 0},
        [tiny_processor.prefix(drawn_sample(6).image).input_ids.shape[1]],
    )
    before = 0
    for question in QUESTIONS:
        lengths.clear()
        token_ids = session.ask(question, max_new_tokens=4).token_ids
        whole = len(session.cache.ids) - len(token_ids) + 1
        assert lengths[1:] == [1] * (len(token_ids) - 1)
        assert lengths[0] <= whole - before
        before = whole
    session.decode_again("mc:4")
    assert calls == {"clip": 1, "sam": 1}


def test_text_is_streamed(model, tiny_processor):
    seen = []
    prediction = ImageSession(model, tiny_processor, drawn_sample(6).image).ask(
        "circle", max_new_tokens=5, on_text=seen.append
    )
    assert seen == [tiny_processor.decode(prediction.token_ids[: n + 1]) for n in range(len(prediction.token_ids))]
    assert "[SEG]" in seen[-1]


@pytest.mark.parametrize("where", ["text", "layer", "sam"])
def test_an_interrupted_question_leaves_no_trace(model, tiny_processor, monkeypatch, where):
    image = drawn_sample(6).image
    session, undisturbed = (ImageSession(model, tiny_processor, image) for _ in range(2))
    first, _ = (s.ask(QUESTIONS[0], max_new_tokens=6) for s in (session, undisturbed))
    assert len(first.layers) > 0
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            raise KeyboardInterrupt

        if where == "layer":  # some layers have read the question, others have not
            patch.setattr(model.model.layers[2], "forward", stop)
        if where == "sam":
            patch.setattr(model.visual_model, "decode", stop)
        with pytest.raises(KeyboardInterrupt):
            session.ask("what can you see", max_new_tokens=6, on_text=stop if where == "text" else None)
    assert session.history == undisturbed.history
    assert_same_masks(session.decode_again().mask_logits, first.mask_logits)
    prediction, expected = (s.ask(QUESTIONS[2], max_new_tokens=6) for s in (session, undisturbed))
    assert prediction.token_ids == expected.token_ids
    assert_same_masks(prediction.mask_logits, expected.mask_logits)


def test_reset_and_independent_questions(model, tiny_processor):
    image = drawn_sample(6).image
    session = ImageSession(model, tiny_processor, image)
    alone = predict(model, tiny_processor, [image], [[Turn("a square")]], max_new_tokens=6)[0][0]
    session.ask(QUESTIONS[0], max_new_tokens=6)
    predictions = [session.ask("a square", max_new_tokens=6, remember=False)]
    assert [turn.question for turn in session.history] == QUESTIONS[:1]
    session.reset()
    assert session.history == []
    predictions.append(session.ask("a square", max_new_tokens=6))
    for prediction in predictions:
        assert prediction.token_ids == alone.token_ids
        assert_same_masks(prediction.mask_logits, alone.mask_logits)


def test_masks_are_decoded_again_without_the_language_model(model, tiny_processor, monkeypatch):
    session = ImageSession(model, tiny_processor, drawn_sample(6).image)
    with pytest.raises(ValueError, match="nothing was asked"):
        session.decode_again("last")
    answers = {rule: session.ask("circle", layer_policy=rule, seed=3, remember=False) for rule in ("fixed:2", "mc:4")}
    monkeypatch.setattr(model, "forward_packed", lambda *_, **__: pytest.fail("read again"))
    for rule, expected in answers.items():
        again = session.decode_again(rule, seed=3)
        assert (again.text, again.layers) == (expected.text, expected.layers)
        assert_same_masks(again.mask_logits, expected.mask_logits)
    for call in (session.decode_again, lambda rule: session.ask("circle", layer_policy=rule)):
        with pytest.raises(ValueError, match="unknown layer rule for inference: 'best'"):
            call("best")


def test_turns_that_do_not_fit_are_dropped(model, tiny_tokenizer):
    processor = UGroundProcessor(tiny_tokenizer, ClipReader(40, 10), 64, "", max_tokens=90)
    image = drawn_sample(6).image
    session = ImageSession(model, processor, image)
    seen = []
    for question in QUESTIONS * 2:
        prediction = session.ask(question, max_new_tokens=6)
        seen.append(len(session.history))
        assert session.history[-1] == Turn(question, prediction.text)
        assert len(processor.builder.prefix) + processor.reader.most_tokens + len(session.cache.ids) <= 90
        written, _ = read_anew(model, processor, image, session.history[:-1], question, prediction.token_ids)
        assert written == prediction.token_ids
    assert max(seen) > 1
    assert min(seen[1:]) < len(seen)
    history = list(session.history)
    with pytest.raises(ValueError, match=r"the question has \d+ tokens, \d+ fit beside the image"):
        session.ask("star " * 100)
    with pytest.raises(ValueError, match="a question is empty"):
        session.ask("  ")
    assert session.history == history


def test_the_longest_answer_leaves_room_for_history(model, tiny_tokenizer):
    """A quarter of the room is reserved for an answer, not all that it may have."""
    processor = UGroundProcessor(tiny_tokenizer, ClipReader(40, 10), 64, "", max_tokens=200)
    session = ImageSession(model, processor, drawn_sample(6).image)
    session.history = [Turn("the red star", "[SEG]")]
    kept, ids = session._fit(session.history, "the circle", 512)
    assert kept == session.history
    assert len(ids) <= processor.room * 3 // 4
    long = [Turn("the red star " * 40, "[SEG]"), *session.history]
    assert session._fit(long, "the circle", 512)[0] == session.history
