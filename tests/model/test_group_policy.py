"""The group-relative objective: its numbers against hand-made ones, sampled answers, rewards, and what trains."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import drawn_sample
from pixellm import make_pixellm, make_processor

from model import group_policy
from model.generation import Sampling, uniform_numbers
from model.group_policy import (
    answer_log_probs,
    clipped_objective,
    divergence,
    group_advantages,
    token_log_probs,
    without_lora,
)
from model.lora import add_lora, base_of
from model.rewards import REWARDS, SampledAnswer, rewards_of, weights_of
from model.settings import GrpoSettings
from model.structures import Turn
from utils.training.group_samples import describe, packed_answers, sample_answers

SETTINGS = GrpoSettings(objective="grpo", grpo_answers=4, grpo_tokens=12)


@pytest.fixture
def lora_model(make_model):
    """A random model with LoRA that is not zero, so that the reference differs; answers end soon."""
    model = add_lora(make_model(), 4, dropout=0.0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def sampled(model, processor, samples, settings=SETTINGS, seed=0):
    batch, prompts = processor.collate(samples), processor.group_prompts(samples, settings.grpo_tokens)
    count = torch.tensor(float(settings.grpo_answers * sum(map(len, prompts.questions))))
    return batch, sample_answers(base_of(model), processor, batch, prompts, count, settings, seed)


def written(processor, samples, settings=SETTINGS):
    """Answers of four forms to every question, in groups of four: [SEG], two of them, [REJ], and one without an end."""
    batch, prompts = processor.collate(samples), processor.group_prompts(samples, settings.grpo_tokens)
    seg, rej, eos = processor.tokens.seg, processor.tokens.rej, processor.tokens.eos
    words = processor.tokenizer("it is")["input_ids"][1:]
    forms = [[*words, seg, eos], [seg, *words, seg, eos], [rej, eos], [*words, *words]]
    count = torch.tensor(float(4 * sum(map(len, prompts.questions))))
    answers = [[forms[k] for _ in row for k in range(4)] for row in prompts.questions]
    return batch, packed_answers(answers, processor, batch, prompts, count, settings)


# -- pure functions ----------------------------------------------------------------------------------------------------


def test_advantages_are_relative_to_the_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3])
    plain = group_advantages(rewards, 4, scale=False)
    torch.testing.assert_close(plain, torch.tensor([0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]))
    scaled = group_advantages(rewards, 4, scale=True)
    deviation = math.sqrt(4 * 0.25 / 3)  # of a sample
    torch.testing.assert_close(scaled, plain / deviation)


def test_the_ratio_is_clipped_where_it_would_go_on():
    log_probs = torch.log(torch.tensor([0.5, 0.9, 0.1, 0.1])).requires_grad_()
    old, advantages = torch.log(torch.tensor([0.5] * 4)), torch.tensor([1.0, 1.0, 1.0, -1.0])
    gain, clipped = clipped_objective(log_probs, old, advantages, 0.2)
    torch.testing.assert_close(gain, torch.tensor([1.0, 1.2, 0.2, -0.8]))
    assert clipped.tolist() == [False, True, False, True]
    gain.sum().backward()
    assert (log_probs.grad != 0).tolist() == [True, False, True, False]


def test_the_divergence_is_that_of_the_distributions_on_average():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.2, 0.5, 0.3]).log()
    each = divergence(policy, reference)
    assert (each >= 0).all()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * each).sum(), exact)


def test_token_probabilities_have_the_sampling_temperature():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    found, entropy = token_log_probs(logits, torch.tensor([1, 2, 3]), 0.5)
    table = torch.softmax(logits * 2, -1)
    torch.testing.assert_close(found.exp(), table[range(3), [1, 2, 3]])
    torch.testing.assert_close(entropy, -(table * table.log()).sum(-1))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6), (1.0, 1e-6)])
def test_tokens_are_drawn_from_the_likeliest(temperature, top_p):
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    numbers = (torch.arange(1000) + 0.5) / 1000  # evenly spread: frequencies are exact
    drawn = Sampling(temperature, top_p, numbers[:, None, None]).choose(
        logits.expand(1000, 1, 4), torch.zeros(1000, 1).long(), 0
    )
    frequency = drawn.flatten().bincount(minlength=4) / 1000
    kept = {1.0: [0, 1, 2, 3], 0.6: [0, 2], 1e-6: [0]}[top_p]
    expected = torch.zeros(4).index_put((torch.tensor(kept),), torch.softmax(logits / temperature, -1)[kept])
    torch.testing.assert_close(frequency, expected / expected.sum(), atol=0.002, rtol=0)


def test_numbers_belong_to_the_answer_not_to_its_place():
    keys = [[(0, 5, 0, k) for k in range(3)], [(0, 9, 0, 0)]]
    numbers = uniform_numbers(keys, 4)
    assert torch.equal(numbers[0, 2], uniform_numbers([[(0, 5, 0, 2)]], 4)[0, 0])
    assert torch.equal(numbers[0, 2], uniform_numbers([[(0, 5, 0, 2)]], 6)[0, 0, :4])
    flat = [*numbers[0].tolist(), numbers[1, 0].tolist()]
    assert len({tuple(row) for row in flat}) == 4


# -- rewards -----------------------------------------------------------------------------------------------------------


def answer_of(masks, targets, **details) -> SampledAnswer:
    """An answer whose masks and targets are lists of sets of pixels 0 to 9."""

    def table(sets):
        return torch.tensor([[[k in pixels for k in range(10)]] for pixels in sets]).view(-1, 1, 10)

    logits = table(masks) * 2.0 - 1.0
    known = {"thought": "", "answer": "", "length": 5, "longest": 20, "ended": True, "thinks": False}
    known |= {"well_thought": False, "rejects": False} | details
    return SampledAnswer(**known, masks=logits, maps=(logits > 0).float(), targets=table(targets).byte())


@pytest.mark.parametrize("name", ["mask_iou", "map_iou"])
@pytest.mark.parametrize(
    ("masks", "targets", "expected"),
    [
        ([{0, 1}], [{0, 1}], 1.0),
        ([{0, 1}], [{1, 2}], 1 / 3),
        ([{5}, {0, 1}], [{0, 1}, {5}], 1.0),  # in any order
        ([{0}, {0}], [{0}, {5}], 0.5),  # one to one
        ([{0}, {5}], [{0}], 0.5),  # a mask too many
        ([{0}], [{0}, {5}], 0.5),  # one too few
        ([], [{0}], 0.0),
        ([{0}], [], 0.0),
        ([], [], 1.0),
    ],
)
def test_masks_are_rewarded_by_their_best_matching(name, masks, targets, expected):
    assert REWARDS[name](answer_of(masks, targets)) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["mask_iou", "map_iou"])
def test_an_answer_that_is_cut_off_before_a_mask_is_not_right_about_an_absent_target(name):
    assert REWARDS[name](answer_of([], [], ended=False)) == 0


def test_ignored_pixels_count_neither_way():
    answer = answer_of([{0, 1, 2}], [{0}])
    answer.targets[0, 0, 1:3] = 255
    assert REWARDS["mask_iou"](answer) == REWARDS["map_iou"](answer) == 1.0


@pytest.mark.parametrize(("segs", "rejects", "present"), list(product([0, 1], [False, True], [False, True])))
def test_rejection_is_right_or_wrong(segs, rejects, present):
    answer = answer_of([{0}] * segs, [{0}] * present, rejects=rejects)
    right = (segs == 1 and not rejects) if present else (segs == 0 and rejects)
    assert REWARDS["rejection"](answer) == float(right)


def test_form_and_length():
    form, length = REWARDS["format"], REWARDS["length"]
    assert form(answer_of([], [])) == 1
    assert form(answer_of([], [], ended=False)) == 0
    assert form(answer_of([], [], thinks=True)) == 0
    assert form(answer_of([], [], thinks=True, well_thought=True)) == 1
    assert length(answer_of([], [], length=5, longest=20)) == 0.75
    rewards = rewards_of([answer_of([], []), answer_of([{0}], [{0}], length=10)], ["length", "mask_iou"])
    torch.testing.assert_close(rewards, torch.tensor([[0.75, 1.0], [0.5, 1.0]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_named(monkeypatch, value):
    monkeypatch.setitem(REWARDS, "broken", lambda answer: value if len(answer.masks) else 0.0)
    assert rewards_of([answer_of([], [])], ["format", "broken"]).tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="reward broken is not a finite number"):
        rewards_of([answer_of([], []), answer_of([{0}], [])], ["format", "broken"])


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (["iou:1"], "no reward"),
        (["mask_iou"], "no weight"),
        (["mask_iou:x"], "no weight"),
        (["mask_iou:1", "mask_iou:2"], "twice"),
        (["mask_iou:nan"], "finite"),
        (["mask_iou:0"], "other than 0"),
        ([], "empty"),
    ],
)
def test_weights_are_checked(entries, problem):
    with pytest.raises(ValueError, match=problem):
        weights_of(entries)
    assert weights_of(["mask_iou:1", "length:-0.5"]) == {"mask_iou": 1.0, "length": -0.5}


# -- sampled answers ---------------------------------------------------------------------------------------------------


def test_questions_without_a_judge_are_left_out(tiny_processor):
    sample = drawn_sample(0)
    joint = (Turn("a", "it is [SEG] and [REJ]"),)
    text = (Turn("what is there", "a star"),)
    dialogue = (Turn("where is the red star", "it is [SEG]."), Turn("and the blue", "it is [SEG]."))
    masks = sample.masks[[0, 0, 1, 2]]
    prompts = tiny_processor.group_prompts(
        [replace(sample, conversations=[joint, text, dialogue, (Turn("a", "it is [SEG]."),)], masks=masks)], 8
    )
    assert [len(row) for row in prompts.questions] == [2]
    assert torch.equal(prompts.targets[0][0], torch.from_numpy(masks[2]))  # the last turn's
    assert tiny_processor.tokens.seg in prompts.questions[0][0]  # the earlier answer stays
    told = []
    none = tiny_processor.group_prompts([sample], tiny_processor.room, lambda *each: told.append(each))
    assert none.questions == [[]]
    assert told[0][1] == 3


def test_an_answer_does_not_depend_on_its_neighbours(tiny_model, tiny_processor, tiny_samples):
    """Sampled together or image by image: the same tokens. Groups differ within, and with the seed."""
    _, together = sampled(tiny_model, tiny_processor, tiny_samples)
    alone = [sampled(tiny_model, tiny_processor, [sample])[1] for sample in tiny_samples]

    def ids(answers):
        return [answers.batch.label_ids[answers.owners == k].tolist() for k in range(len(answers.details))]

    assert ids(together) == [answer for each in alone for answer in ids(each)]
    assert len(together.details) == 4 * (3 + 1 + 1)
    assert len({tuple(answer) for answer in ids(together)[:4]}) > 1
    assert ids(sampled(tiny_model, tiny_processor, tiny_samples, seed=1)[1]) != ids(together)
    assert [len(answer) for answer in ids(together)] == [details["length"] for details in together.details]


def test_packed_answers_have_the_probabilities_of_separate_ones(lora_model, tiny_processor):
    """G answers beside each other see the image and their own question, not each other."""
    model = base_of(lora_model)
    batch, answers = sampled(lora_model, tiny_processor, [drawn_sample(0)])
    packed, _ = answer_log_probs(model, model.forward_language(answers.batch), answers.batch, 1.0)
    prompts = tiny_processor.group_prompts([drawn_sample(0)], 12)
    for number in (0, 3, 6, 11):
        ids = answers.batch.label_ids[answers.owners == number].tolist()
        asked = prompts.questions[0][number // 4]
        alone = tiny_processor.continued([[(asked, ids)]], batch)
        expected, _ = answer_log_probs(model, model.forward_language(alone), alone, 1.0)
        torch.testing.assert_close(packed[answers.owners == number], expected, atol=1e-4, rtol=1e-4)


def test_describe_knows_the_tokens(tiny_processor):
    seg, eos = tiny_processor.tokens.seg, tiny_processor.tokens.eos
    words = tiny_processor.tokenizer("it is")["input_ids"][1:]
    known = describe([*words, seg, eos], tiny_processor, SETTINGS)
    assert known == {
        "thought": "",
        "answer": "it is[SEG]",
        "length": len(words) + 2,
        "longest": 12,
        "ended": True,
        "thinks": False,
        "well_thought": False,
        "rejects": False,
        "segs": 1,
        "in_thought": 0,
    }
    assert describe([tiny_processor.tokens.rej], tiny_processor, SETTINGS)["rejects"]
    assert not describe(words, tiny_processor, SETTINGS)["ended"]


# -- the loss ----------------------------------------------------------------------------------------------------------


def step(model, batch, answers):
    model.zero_grad()
    base_of(model).ppm.baseline.zero_()  # of Eq. 5, a moving average: each step is the first
    output = model(batch, sampled=answers)
    output.loss.backward()
    return output


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_words_and_layers_learn_and_nothing_else(lora_model, tiny_processor, tiny_samples):
    batch, answers = written(tiny_processor, tiny_samples)
    output = step(lora_model, batch, answers)
    assert output.loss.item() == pytest.approx(0, abs=1e-5)  # the ratio is 1, the advantages of a group sum to 0
    trained = gradients(lora_model)
    assert any("lora_" in name for name in trained)
    assert any(name.endswith("ppm.gate") for name in trained)
    assert not any(part in name for name in trained for part in ("visual_model", "text_hidden_fcs"))
    assert {"grpo", "grpo_reward_mask_iou", "grpo_reward_rejection", "grpo_reward_format", "grpo_entropy"} <= set(
        output.terms
    )
    mean = sum(details["length"] for details in answers.details) / len(answers.details)
    assert output.terms["grpo_tokens"].item() == pytest.approx(mean)
    number = len(output.layers)
    assert output.terms["grpo_segs"].item() == pytest.approx(number / len(answers.details))
    entropy = torch.special.entr(output.policy).sum() / number
    found = output.terms["grpo_layer_entropy"] / output.terms["grpo_segs"]
    assert found.item() == pytest.approx(entropy.item(), rel=1e-4)


def test_the_gradient_is_that_of_reinforce(lora_model, tiny_processor):
    """In the first update: advantage times the gradient of the mean log-probability of words and layers."""
    batch, answers = written(tiny_processor, [drawn_sample(1, segs=(1,)), drawn_sample(2, segs=(1,))])
    step(lora_model, batch, answers)
    found, old, model = gradients(lora_model), answers.old, base_of(lora_model)
    assert old.advantages.abs().sum() > 0
    lora_model.zero_grad()
    output = model.forward_language(answers.batch)
    log_probs, _ = answer_log_probs(model, output, answers.batch, 1.0)
    policy = model.ppm.log_policy(output.at(answers.batch.seg_positions))
    log_probs = log_probs.index_add(0, answers.segs, policy.gather(1, old.layers[:, None])[:, 0])
    total = 0.0
    for number, advantage in enumerate(old.advantages.tolist()):
        total = total - advantage * log_probs[answers.owners == number].mean() / len(answers.details)
    total.backward()
    expected = gradients(lora_model)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_parts_of_a_step_add_up(lora_model, tiny_processor, tiny_samples):
    """The count of the whole step makes the mean over micro steps that of one batch."""
    batch, whole = written(tiny_processor, tiny_samples)
    step(lora_model, batch, whole)
    expected, total = gradients(lora_model), {}
    for sample in tiny_samples:
        batch, part = written(tiny_processor, [sample])
        part.count = whole.count / len(tiny_samples)
        step(lora_model, batch, part)
        for name, gradient in gradients(lora_model).items():
            total[name] = total.get(name, 0) + gradient / len(tiny_samples)
    for name, gradient in expected.items():
        torch.testing.assert_close(total[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_the_reference_is_the_model_without_lora(lora_model, make_model, tiny_processor, tiny_samples):
    settings = replace(SETTINGS, grpo_kl=0.1)
    batch, answers = written(tiny_processor, tiny_samples, settings)
    output = step(lora_model, batch, answers)
    plain = make_model()
    expected, _ = answer_log_probs(plain, plain.forward_language(answers.batch), answers.batch, 1.0)
    torch.testing.assert_close(answers.old.reference, expected, atol=1e-5, rtol=1e-4)
    assert output.terms["grpo_kl"] > 0
    with without_lora(lora_model):
        inside, _ = answer_log_probs(
            base_of(lora_model), base_of(lora_model).forward_language(answers.batch), answers.batch, 1.0
        )
    torch.testing.assert_close(inside, expected, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for name, p in lora_model.named_parameters() if "lora_" in name)


def test_later_updates_keep_layers_and_rewards_and_clip(lora_model, tiny_processor):
    settings = replace(SETTINGS, grpo_rewards=("length:1",), grpo_layers="apart")
    batch, answers = written(tiny_processor, [drawn_sample(0)], settings)
    optimizer = torch.optim.SGD([p for p in lora_model.parameters() if p.requires_grad], lr=30.0)
    answers.details = [details | {"length": k + 1} for k, details in enumerate(answers.details)]
    shares = []
    for _ in range(4):
        output = step(lora_model, batch, answers)
        shares.append((float(output.terms["grpo_clipped"]), answers.old))
        optimizer.step()
    assert shares[0][0] == 0 < shares[-1][0]
    assert all(old is shares[0][1] for _, old in shares)


def test_both_is_the_sum(lora_model, tiny_processor, tiny_samples):
    settings = replace(SETTINGS, objective="both", grpo_weight=0.5)
    batch, answers = written(tiny_processor, tiny_samples, settings)
    both = step(lora_model, batch, answers)
    found = gradients(lora_model)
    step(lora_model, batch, None)
    supervised = gradients(lora_model)
    answers.old, answers.settings = None, replace(settings, objective="grpo")
    step(lora_model, batch, answers)
    alone = gradients(lora_model)
    for name, gradient in found.items():
        expected = supervised.get(name, 0) + 0.5 * alone.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3, msg=name)
    assert {"text", "mask_bce", "grpo", "grpo_reward_mask_iou"} <= set(both.terms)


def test_masks_are_decoded_in_parts(lora_model, tiny_processor, tiny_samples, monkeypatch):
    """A model may sample more [SEG] than fit at once: the same rewards."""
    settings = replace(SETTINGS, grpo_rewards=("mask_iou:1", "map_iou:1"))
    rewards = []
    for at_once in (100, 2):
        monkeypatch.setattr(group_policy, "MASKS_AT_ONCE", at_once)
        batch, answers = written(tiny_processor, tiny_samples, settings)
        step(lora_model, batch, answers)
        rewards.append(answers.old.rewards)
    assert rewards[0].any()
    torch.testing.assert_close(rewards[0], rewards[1])


def test_a_spelled_seg_is_no_target(tiny_processor):
    spelled = tiny_processor.tokenizer.convert_tokens_to_ids(list("[SEG]"))
    assert tiny_processor.decode(spelled) == "[SEG]"
    seg, eos = tiny_processor.tokens.seg, tiny_processor.tokens.eos
    known = describe([*spelled, seg, eos], tiny_processor, SETTINGS)
    assert (known["segs"], known["in_thought"]) == (1, 0)
    rejected = tiny_processor.tokenizer.convert_tokens_to_ids(list("[REJ]"))
    assert not describe([*rejected, eos], tiny_processor, SETTINGS)["rejects"]


@pytest.mark.parametrize("layers", ["joint", "apart"])
def test_the_layer_of_a_codebook_is_that_of_its_first_token(tiny_samples, layers):
    processor = make_processor()
    base = make_pixellm(processor, layer_selection="policy")
    torch.nn.init.normal_(base.ppm.gate, std=0.3)
    model = add_lora(base, 2, dropout=0.0)
    settings = replace(SETTINGS, grpo_layers=layers)
    batch, prompts = processor.collate(tiny_samples), processor.group_prompts(tiny_samples, 12)
    eos, rej = processor.tokens.eos, processor.tokens.rej
    group = [[*processor.codebook, eos], [rej, eos], [*processor.codebook, eos], [*processor.codebook]]
    answers = packed_answers(
        [group * len(row) for row in prompts.questions], processor, batch, prompts, torch.tensor(20.0), settings
    )
    assert answers.written[answers.segs].all()
    assert (answers.batch.label_ids[answers.segs] == processor.codebook[0]).all()
    step(model, batch, answers)
    assert base.ppm.gate.grad.any()


def test_layers_can_stay_out_of_it(lora_model, tiny_processor, tiny_samples):
    batch, answers = written(tiny_processor, tiny_samples, replace(SETTINGS, grpo_layers="off"))
    step(lora_model, batch, answers)
    assert not any(name.endswith("ppm.gate") for name in gradients(lora_model))


def test_a_batch_without_questions_changes_nothing(lora_model, tiny_processor):
    sample = replace(drawn_sample(0, segs=()), conversations=[(Turn("what is there", "a star"),)])
    batch, answers = written(tiny_processor, [sample])
    output = step(lora_model, batch, answers)
    assert output.loss == 0
    assert not gradients(lora_model)


@pytest.mark.parametrize("layers", ["joint", "apart"])
def test_rewards_raise_what_they_reward(lora_model, tiny_processor, layers):
    """Rejecting less where the target is there, and choosing the layer whose map fits."""
    settings = replace(SETTINGS, grpo_rewards=("rejection:1", "map_iou:1"), grpo_layers=layers)
    sample = drawn_sample(1, segs=(1,))
    parts = {True: [], False: []}
    for name, parameter in lora_model.named_parameters():
        if parameter.requires_grad:
            parts[name.endswith("ppm.gate")].append(parameter)
    groups = [{"params": parts[True], "lr": 0.05}, {"params": parts[False], "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    chances, fits = [], []
    for number in range(60):
        batch, answers = written(tiny_processor, [replace(sample, sample_id=number)], settings)
        step(lora_model, batch, answers)
        optimizer.step()
        means = [float(answers.old.log_probs[answers.owners == k].mean()) for k in range(4)]
        chances.append(means[0] - means[2])
        with torch.no_grad():
            model = base_of(lora_model)
            output = model.forward_language(batch)
            grounding = model.ground_targets(output, batch, model.config.selection)
            rewards = model.objective.map_rewards(batch.masks, model.layer_maps(grounding, batch))["iou"]
            fits.append(float((grounding.log_policy.exp() * rewards).sum(1).mean() / rewards.mean()))
    assert chances[-1] > chances[0] + 1
    assert fits[-1] > fits[0]
