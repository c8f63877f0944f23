"""The table of layer rules: each is parsed, validated, documented and offered everywhere; and its choice."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_same_masks, drawn_sample
from programs import chat, evaluation, run

from model import layer_rules
from model.grounding import MaskPrediction, best_rated
from model.layer_rules import RULES, parse
from model.opened import predict
from model.structures import Turn
from model.uncertainty import ambiguity
from utils.config import load_config
from utils.config.config import make_parser

LAYERS, CANDIDATES = 5, range(1, 5)  # of the tiny model
BAD = {  # of each rule: what is refused, and the message
    "policy": {"policy:1": "unknown layer rule"},
    "argmax": {"argmax:": "unknown layer rule"},
    "sample": {"sample:2": "unknown layer rule"},
    "last": {"last:1": "unknown layer rule"},
    "uniform": {"uniform:0.5": "unknown layer rule"},
    "fixed": {
        "fixed": "unknown layer rule",
        "fixed:x": "unknown layer rule",
        "fixed:1-2": "unknown layer rule",
        "fixed:5": r"layer 5 does not exist: choose 0 \(embeddings\) to 4 \(last\)",
        "fixed:-1": "layer -1 does not exist",
    },
    "soft": {"soft:2": "unknown layer rule"},
    "ce_soft": {"ce_soft:2": "unknown layer rule"},
    "mc": {"mc": "unknown layer rule", "mc:\u00b2": "unknown layer rule", "mc:0": "'mc:0' samples no layer"},
    "blend": {
        "blend": "unknown layer rule",
        "blend:0": "'blend:0' blends no layer; use blend:1 or more",
        "blend:6": "'blend:6' blends more layers than there are; use at most blend:5",
    },
    "best": {
        "best": "unknown layer rule",
        "best:0": "'best:0' decodes no layer; use best:1 or more",
        "best:6": "'best:6' decodes more layers than there are; use at most best:5",
    },
    "window": {
        "window:2": "unknown layer rule",
        "window:1-5": "layer 5 does not exist",
        "window:3-2": "'window:3-2' is empty; use window:2-3",
        "window:0-0": "'window:0-0' holds no layer that the policy can choose: 1 to 4",
    },
}
PROBABILITIES = torch.tensor([[0, 0.1, 0.2, 0.4, 0.3], [0, 0.6, 0.1, 0.1, 0.2]])
NOISE = torch.tensor([[9.0, 4.0, 0.0, 0.0, 1.0], [9.0, 0.0, 0.0, 3.0, 0.0]])
CHOSEN = {  # by the probabilities and the noise above
    "policy": [1, 3],
    "argmax": [3, 1],
    "sample": [1, 3],
    "last": [4, 4],
    "uniform": [1, 3],
    "fixed:2": [2, 2],
    "soft": [3, 1],
    "ce_soft": [3, 1],
    "mc:4": [1, 3],
    "blend:2": [3, 1],
    "best:2": [3, 1],
    "window:2-3": [3, 2],
    "window:0-1": [1, 1],
    "window:4-4": [4, 4],
}
WORDS = {
    "fixed:3": "layer 3",
    "soft": "all layers, most weight on 3",
    "mc:16": "sampled layers, most often 3",
    "blend:1": "layer 3",
    "blend:2": "the 2 most probable layers, most weight on 3",
    "best:4": "layer 3, rated best of 4",
    "window:2-3": "layer 3",
}
every_rule = pytest.mark.parametrize("kind", RULES, ids=lambda kind: kind.name)


def use_of(kind) -> layer_rules.Use:
    return kind.uses[-1]


def ask(model, processor, layer_policy: str | None = None):
    """One answer with two masks."""
    given = [[Turn("star", "[SEG] and [SEG]")]]
    return predict(model, processor, [drawn_sample(0).image], given, layer_policy=layer_policy)[0][0]


# -- every rule of the table -------------------------------------------------------------------------------------------


@every_rule
def test_a_rule_is_parsed_as_it_is_written(kind):
    assert kind.examples(LAYERS)
    for rule in kind.examples(LAYERS):
        assert parse(str(rule), LAYERS, CANDIDATES, use_of(kind)) == parse(str(rule), use=use_of(kind)) == rule
        assert str(rule).partition(":")[0] == kind.name


@every_rule
def test_a_wrong_argument_is_refused(kind):
    for text, message in BAD[kind.name].items():
        with pytest.raises(ValueError, match=message):
            parse(text, LAYERS, CANDIDATES, use_of(kind))


def test_an_unknown_rule_is_refused_with_a_list_of_all_rules():
    for use in layer_rules.EITHER:
        with pytest.raises(ValueError, match="'worst' is not one of ") as refused:
            parse("worst", use=use)
        for kind in RULES:
            assert (f" {kind.spelling()}," in f"{refused.value},") == (use in kind.uses)


@every_rule
def test_a_rule_trains_or_is_refused_by_settings_and_model_alike(make_model, tiny_processor, tiny_samples, kind):
    selection = str(kind.examples(LAYERS)[0])
    needed = ["--version", "v", "--vision_tower", "t", "--vision_pretrained", "p", "--dataset_dir", "d"]
    flags = [*needed, "--layer_selection", selection]
    if "training" in kind.uses:
        assert load_config(flags).ppm.layer_selection == selection
        model = make_model(layer_selection=selection)
        model(tiny_processor.collate(tiny_samples)).loss.backward()
        assert (kind.gate != "") == bool(model.ppm.gate.grad is not None and model.ppm.gate.grad.any())
        assert parse(model.config.layer_policy, LAYERS)
    else:
        with pytest.raises(ValueError, match=f"for training: '{selection}' is not one of policy") as refused:
            make_model(layer_selection=selection)
        with pytest.raises(ValueError, match="layer_selection") as reported:
            load_config(flags)
        assert str(refused.value) in str(reported.value)


@every_rule
def test_a_rule_predicts_or_is_refused(tiny_model, tiny_processor, kind):
    for rule in map(str, kind.examples(LAYERS)):
        if "inference" in kind.uses:
            prediction = ask(tiny_model, tiny_processor, rule)
            assert prediction.mask_logits.isfinite().all()
            assert len(prediction.layers) == len(prediction.maps) == 2
            assert len(prediction.predicted_iou) == 2
            torch.testing.assert_close(torch.tensor(prediction.ambiguity), ambiguity(prediction.mask_logits))
            assert len(prediction.uncertainty) == (2 if parse(rule).samples else 0)
        else:
            with pytest.raises(ValueError, match=f"for inference: '{rule}' is not one of"):
                ask(tiny_model, tiny_processor, rule)


@every_rule
def test_a_rule_is_documented_wherever_one_is_chosen(capsys, kind):
    texts = {"the table": layer_rules.table(), "train_ds.py --help": make_parser().format_help()}
    if "inference" in kind.uses:
        for name, program in (("chat.py", chat), ("test.py", evaluation)):
            texts[f"{name} --help"] = run(capsys, program, "--help")[1]
        texts["chat.py's /help"] = chat.HELP
        assert {str(rule) for rule in kind.examples(LAYERS)} <= set(layer_rules.menu(LAYERS))
    for name, text in texts.items():
        assert kind.spelling() in text, name
        assert kind.help in " ".join(text.split()), name


# -- what they choose --------------------------------------------------------------------------------------------------


@every_rule
def test_what_a_rule_chooses(kind):
    texts = [text for text in CHOSEN if text.partition(":")[0] == kind.name]
    assert texts, f"add {kind.spelling()} to CHOSEN"
    for text in texts:
        rule = parse(text, LAYERS, CANDIDATES, use_of(kind))
        assert rule.choose(PROBABILITIES.log(), NOISE).tolist() == CHOSEN[text], text


@every_rule
def test_weights_sum_to_one_over_the_candidates(kind):
    for rule in kind.examples(LAYERS):
        if (weights := rule.weights(PROBABILITIES.log())) is not None:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2))
            assert not weights[:, 0].any()
            assert weights.argmax(-1).tolist() == rule.choose(PROBABILITIES.log(), NOISE).tolist()


def test_words_for_a_person():
    assert {text: parse(text).words(3) for text in WORDS} == WORDS


def test_inference_uses_the_rule_of_training():
    at_inference = {
        str(rule): rule.at_inference for kind in RULES if "training" in kind.uses for rule in kind.examples(2)[-1:]
    }
    same = {text: text for text in ("last", "uniform", "fixed:1", "soft")}
    assert at_inference == same | {"policy": "argmax", "ce_soft": "soft"}


def test_the_classifiers_masks_do_not_train_the_gate():
    log_policy = PROBABILITIES.log().requires_grad_()
    soft, classifier = parse("soft").weights(log_policy), parse("ce_soft", use="training").weights(log_policy)
    assert torch.equal(soft, classifier)
    assert soft.requires_grad
    assert not classifier.requires_grad


def test_the_menu_ends_with_the_single_layers():
    assert layer_rules.menu(3)[-3:] == ["fixed:0", "fixed:1", "fixed:2"]
    assert "mc:16" in layer_rules.menu(3)


def test_the_last_layer_equals_the_fixed_layer_of_its_index(tiny_model, tiny_processor):
    last, fixed = ask(tiny_model, tiny_processor, "last"), ask(tiny_model, tiny_processor, "fixed:4")
    assert last.layers == fixed.layers == [4, 4]
    assert_same_masks(last.mask_logits, fixed.mask_logits)


def test_a_blend_weighs_the_most_probable_layers():
    weights = parse("blend:2").weights(PROBABILITIES.log())
    torch.testing.assert_close(weights, torch.tensor([[0, 0, 0, 4 / 7, 3 / 7], [0, 0.75, 0, 0, 0.25]]))


@pytest.mark.parametrize(("rule", "same"), [("blend:1", "argmax"), ("blend:4", "soft"), ("window:1-4", "argmax")])
def test_limits_of_blends_and_windows_are_other_rules(tiny_model, tiny_processor, rule, same):
    prediction, expected = ask(tiny_model, tiny_processor, rule), ask(tiny_model, tiny_processor, same)
    assert prediction.layers == expected.layers
    assert_same_masks(prediction.mask_logits, expected.mask_logits)
    torch.testing.assert_close(prediction.maps, expected.maps)


def test_a_blend_lies_between_the_mode_and_soft_gating(tiny_model, tiny_processor):
    one, two, every = (ask(tiny_model, tiny_processor, rule).maps for rule in ("argmax", "blend:2", "soft"))
    assert not torch.allclose(one, two, atol=1e-3)
    assert not torch.allclose(two, every, atol=1e-3)


def test_the_best_rated_layer_is_kept(make_model, tiny_processor):
    """Of the K most probable ones: its mask, map and rating are those of the layer alone."""
    model = make_model()
    torch.nn.init.normal_(model.visual_model.mask_decoder.iou_prediction_head.layers[-1].weight, std=1e4)
    alone = [ask(model, tiny_processor, f"fixed:{layer}") for layer in range(LAYERS)]
    ratings = torch.tensor([prediction.predicted_iou for prediction in alone]).T  # [N, L]
    assert (ratings[:, 1:].std(1) > 0.01).all()
    ranked = alone[0].policy.argsort(1, descending=True)
    for count in (1, 2, 4, 5):  # the embeddings are no candidate
        best = ask(model, tiny_processor, f"best:{count}")
        for n, layers in enumerate(ranked[:, : min(count, 4)]):
            layer = int(layers[ratings[n, layers].argmax()])
            assert best.layers[n] == layer
            assert best.predicted_iou[n] == pytest.approx(alone[layer].predicted_iou[n], rel=1e-4)
            assert_same_masks(best.mask_logits[n], alone[layer].mask_logits[n])
            torch.testing.assert_close(best.maps[n], alone[layer].maps[n])
    assert ask(model, tiny_processor, "best:1").layers == ask(model, tiny_processor, "argmax").layers


def test_of_equal_ratings_the_more_probable_layer_is_kept(make_model, tiny_processor):
    model = make_model()
    torch.nn.init.zeros_(model.visual_model.mask_decoder.iou_prediction_head.layers[-1].weight)
    assert ask(model, tiny_processor, "best:4").layers == ask(model, tiny_processor, "argmax").layers


@pytest.mark.parametrize("ratings", [(math.nan, 0.2, 0.1), (0.2, math.nan, 0.1)])
def test_a_rating_that_overflows_is_never_the_best(ratings):
    masks = [(0, MaskPrediction(torch.zeros(1), torch.zeros(1), layer, rating)) for layer, rating in enumerate(ratings)]
    [best] = best_rated(masks, torch.zeros(1, 3))
    assert best.predicted_iou == 0.2


def test_monte_carlo_rates_by_the_samples_mean(make_model, tiny_processor):
    model = make_model()
    torch.nn.init.normal_(model.visual_model.mask_decoder.iou_prediction_head.layers[-1].weight)
    ratings = torch.tensor([ask(model, tiny_processor, f"fixed:{layer}").predicted_iou for layer in range(LAYERS)]).T
    mean = ask(model, tiny_processor, "mc:16")
    shares = torch.stack([uncertainty.layers for uncertainty in mean.uncertainty])
    torch.testing.assert_close(torch.tensor(mean.predicted_iou), (shares * ratings).sum(1), rtol=1e-4, atol=1e-5)


def test_blended_layers_are_those_of_the_mode_under_ties():
    """A gate that never trained is uniform: ``topk`` and ``argmax`` break ties differently."""
    log_policy = torch.full((3, 9), -torch.inf)
    log_policy[:, 1:] = torch.tensor(1 / 8).log()
    mode = parse("argmax").choose(log_policy, torch.zeros(3, 9))
    for count in (1, 3, 8):
        rule = parse(f"blend:{count}")
        weights = rule.weights(log_policy)
        assert torch.equal(rule.choose(log_policy, torch.zeros(3, 9)), mode)
        assert (weights.gather(1, mode[:, None]) > 0).all()
        assert (weights > 0).sum(1).tolist() == [count] * 3
