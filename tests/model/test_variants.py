"""The paper's ablations as settings: gating, candidate layers, rewards, constraint terms, prompts (Tables 6 to 9)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import assert_same_masks, drawn_sample

from model import losses
from model.config import UGroundConfig
from model.geometry import Fit, maps_at, mask_prompts, on_grid
from model.lora import add_lora
from model.opened import predict
from model.points import cell_centres, map_points, sam_points
from model.PPM import fuse_layers
from model.structures import Prompts, Turn

NEAR = {"rtol": 2e-4, "atol": 2e-5}
TURNS = [[Turn("star", "it is [SEG]."), Turn("circle", "[SEG] and [SEG]")]]


def ask(model, processor, **options):
    return predict(model, processor, [drawn_sample(0).image], TURNS, **options)[0]


# -- gating ------------------------------------------------------------------------------------------------------------


def test_fused_similarity_is_that_of_the_fused_states(tiny_processor):
    generator = torch.Generator().manual_seed(0)
    hidden = tuple(torch.randn(2, 9, 6, generator=generator) for _ in range(4))
    states, rows = torch.randn(3, 4, 6, generator=generator), torch.tensor([0, 1, 1])
    weights = torch.rand(3, 4, generator=generator)
    tokens, cells = torch.tensor([[2, 3, 4, 5], [11, 12, 13, 14]]), torch.tensor([[0, 1, 2, 3], [1, 2, 4, 5]])
    batch = tiny_processor.prompts([drawn_sample(0).image], TURNS)
    batch = replace(batch, image_tokens=tokens, image_cells=cells, valid=torch.ones(2, 6, dtype=torch.bool))
    fused, similarity = fuse_layers(hidden, states, weights, rows, batch)
    images = torch.stack([layer[rows, 2:6] for layer in hidden], 1)  # [N, L, V, D]
    torch.testing.assert_close(fused, (weights[:, :, None] * states).sum(1))
    image = (weights[:, :, None, None] * images).sum(1)
    expected = torch.zeros(3, 6).scatter(1, cells[rows], (image * fused[:, None]).sum(-1))  # 0 where no token is
    torch.testing.assert_close(similarity, expected, **NEAR)


def test_soft_gating_with_all_weight_on_one_layer_is_that_layer(make_model, tiny_processor):
    soft = make_model(layer_selection="soft", first_candidate_layer=2, last_candidate_layer=2)
    assert soft.config.layer_policy == "soft"
    for gated, fixed in zip(ask(soft, tiny_processor), ask(soft, tiny_processor, layer_policy="fixed:2")):
        assert gated.layers == fixed.layers
        assert_same_masks(gated.mask_logits, fixed.mask_logits)
        torch.testing.assert_close(gated.maps, fixed.maps, **NEAR)
    spread = make_model(layer_selection="soft")
    gated_maps, fixed_maps = (ask(spread, tiny_processor, layer_policy=rule)[0].maps for rule in ("soft", "fixed:2"))
    assert (gated_maps - fixed_maps).abs().max() > 0.01


def test_what_trains_the_gate(make_model, tiny_processor, tiny_samples):
    """Soft gating: SAM's masks and the map's constraint. The classifier: its cross-entropy, and no mask."""
    batch = tiny_processor.collate(tiny_samples)
    gates = {}
    for selection in ("soft", "ce_soft"):
        for weight in (0.0, 1.0):
            model = add_lora(make_model(layer_selection=selection, policy_loss_weight=weight), r=2)
            output = model(batch)
            output.loss.backward()
            gates[selection, weight] = model.ppm.gate.grad
            assert ("classifier" in output.terms) == (selection == "ce_soft")
            assert "policy" not in output.terms
            assert output.layers.tolist() == output.policy.argmax(-1).tolist()
    assert gates["soft", 0.0].any()
    torch.testing.assert_close(gates["soft", 0.0], gates["soft", 1.0])
    assert not gates["ce_soft", 0.0].any()
    assert gates["ce_soft", 1.0].any()


@pytest.mark.parametrize("size", [(64, 64), (40, 64), (64, 30)])
def test_all_layers_are_rewarded_as_the_chosen_one_is(make_model, tiny_processor, size):
    """The reward at the map's own resolution is close to that at the image's, for every layer, and ranks them alike."""
    sample, model = drawn_sample(3, size, (2, 1)), make_model(policy_gradient="exact")
    batch, calls = tiny_processor.collate([sample]), []
    objective = model.objective
    model.objective = lambda *inputs: calls.append(inputs) or objective(*inputs)
    model(batch)
    model.objective = objective
    fine = torch.stack([model_with(make_model, f"fixed:{k}")(batch).rewards for k in range(5)], 1)
    terms = terms_of_all_layers(model, batch, calls[0][6])
    coarse = -(terms["map_bce"] + terms["map_dice"])
    assert coarse.shape == (3, 5)
    torch.testing.assert_close(coarse, fine, rtol=0.1, atol=0.02)
    assert torch.corrcoef(torch.stack([coarse.flatten(), fine.flatten()]))[0, 1] > 0.85  # 4 x 4 patches are coarse


@pytest.mark.parametrize("settings", [{}, {"layer_selection": "last"}, {"policy_gradient": "exact"}])
def test_the_map_losses_of_all_layers_are_computed_on_request(make_model, tiny_processor, tiny_samples, settings):
    """Nothing else changes, and a layer's loss is that of a model that always uses this layer."""
    batch = tiny_processor.collate(tiny_samples)
    plain, requested = (make_model(**settings)(batch, all_layers=all_layers) for all_layers in (False, True))
    assert (plain.layer_losses is None) == ("policy_gradient" not in settings)
    assert requested.terms == plain.terms
    torch.testing.assert_close(requested.loss, plain.loss)
    assert requested.layer_losses.shape == (5,)
    for layer, loss in enumerate(requested.layer_losses):
        terms = model_with(make_model, f"fixed:{layer}")(batch).terms
        assert float(loss) == pytest.approx(float(terms["map_bce"] + terms["map_dice"]), rel=0.1)


def terms_of_all_layers(model, batch, maps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return model.objective.layer_terms(batch.masks, [model.objective.soft_target(masks) for masks in batch.masks], maps)


def model_with(make_model, selection: str):
    model = make_model(layer_selection=selection)
    model.requires_grad_(False)
    return model


def test_the_classifiers_label_is_the_layer_that_overlaps_most(make_model, tiny_processor):
    model = make_model(layer_selection="ce_soft")
    batch = tiny_processor.collate([drawn_sample(5, (64, 64), (1, 1))])
    maps = torch.rand(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    target, share = on_grid((batch.masks[0] == 1).float(), torch.ones(2, 64, 64), Fit("pad", 40), (4, 4))
    assert (share == 1).all()
    maps[0, 3], maps[1, 0], maps[1, 2] = target[0], target[1], 0.5 * target[1]
    overlap = terms_of_all_layers(model, batch, [maps])["map_iou"]
    assert float(overlap[0, 3]) == pytest.approx(1.0)
    log_policy = torch.log_softmax(torch.randn(2, 5), -1)
    log_policy[:, 0] = -torch.inf  # no candidate, however well it fits
    terms = model.objective.gate_terms(torch.zeros(2), torch.zeros(2).long(), log_policy, overlap)
    second = int(overlap[1, 1:].argmax()) + 1
    torch.testing.assert_close(terms["classifier"], -log_policy[torch.arange(2), torch.tensor([3, second])])


def test_masks_on_the_grid_exclude_padding_and_ignored_pixels():
    mask, valid = torch.zeros(1, 20, 40), torch.ones(1, 20, 40)
    mask[:, :, :20], valid[:, :10, :20] = 1.0, 0.0
    values, share = on_grid(mask, valid, Fit("pad", 40), (4, 4))
    assert values[0].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert share[0].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0] * 4, [0] * 4]


@pytest.mark.parametrize("size", [(80, 40), (40, 80), (40, 40)])
def test_masks_on_the_grid_are_those_of_a_centre_crop(size):
    """A map at the image's size (``maps_at``), reduced again, is the map: both know what CLIP sees."""
    maps = torch.eye(16)[:3].view(3, 4, 4)
    crop, pad = Fit("crop", 40), Fit("pad", 40)
    full, valid = maps_at(maps, crop, size), torch.ones(3, *size)
    values, share = on_grid(full, valid, crop, (4, 4))
    assert (share == 1).all()
    torch.testing.assert_close(values, on_grid(maps_at(maps, pad, (40, 40)), torch.ones(3, 40, 40), pad, (4, 4))[0])
    assert values.flatten(1).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [(80, 200), (200, 50), (64, 64)])
@pytest.mark.parametrize("seen", [Fit("pad", 40), Fit("stretch")])
@pytest.mark.parametrize("decoded", [Fit("pad", 64), Fit("stretch", 64)])
def test_maps_prompts_and_points_lie_where_the_image_shows_them(size, seen, decoded):
    """A square at two thirds of the height and a quarter of the width, through every pair of fits."""
    height, width = size
    target, y, x = torch.zeros(1, height, width), 2 * height // 3, width // 4
    target[:, y - 5 : y + 5, x - 5 : x + 5] = 1.0
    grid = (20, 20) if seen.kind == "pad" else (height // 5, width // 5)
    values, share = on_grid(target, torch.ones_like(target), seen, grid)
    full = maps_at(values, seen, size)
    weights = full[0] / full.sum()
    centre = [float((weights.sum(1 - axis) * torch.arange(size[axis])).sum()) + 0.5 for axis in (0, 1)]
    assert centre == pytest.approx([y, x], abs=max(size) / 40)
    _, _, inner_height, inner_width = decoded.box(size)
    prompt = mask_prompts(full, decoded)[0, 0]
    row, column = divmod(int(prompt.argmax()), 64)
    assert (row + 0.5) / inner_height * height == pytest.approx(y, abs=height / inner_height + 5)
    assert (column + 0.5) / inner_width * width == pytest.approx(x, abs=width / inner_width + 5)
    points, _ = sam_points(Prompts(points=1), values * 40, share > 0, size, seen, decoded)
    (column, row), (outer_column, outer_row) = points[0].tolist()  # the last is background
    assert row / inner_height * height == pytest.approx(y, abs=max(size) / 20)
    assert column / inner_width * width == pytest.approx(x, abs=max(size) / 20)
    assert 0 <= outer_column <= inner_width
    assert 0 <= outer_row <= inner_height


@pytest.mark.parametrize(("fit", "iou"), [("crop", 1.0), ("pad", 0.5)])
def test_layer_maps_are_compared_with_what_clip_sees(make_model, fit, iou):
    """A target in the middle of a wide image fills the centre crop; what lies beside it does not count."""
    mask = torch.zeros(1, 40, 80, dtype=torch.uint8)
    mask[:, :, 20:60] = 1
    objective = make_model(clip_fit=fit).objective
    terms = objective.layer_terms([mask], [objective.soft_target(mask)], [torch.ones(1, 5, 4, 4)])
    assert terms["map_iou"][0].tolist() == pytest.approx([iou] * 5)


def test_candidates_are_a_range(make_model, tiny_processor, tiny_samples):
    for selection in ("policy", "uniform"):
        model = make_model(layer_selection=selection, first_candidate_layer=2, last_candidate_layer=3)
        output = model(tiny_processor.collate(tiny_samples))
        assert set(output.layers.tolist()) <= {2, 3}
        assert not output.policy[:, [0, 1, 4]].any()
    for first, last in ((3, 2), (0, 5), (5, -1), (-1, 2)):
        with pytest.raises(ValueError, match=r"no range|is below|too small"):
            make_model(first_candidate_layer=first, last_candidate_layer=last)


# -- rewards and constraints -------------------------------------------------------------------------------------------


def test_rewards_are_made_of_the_chosen_terms(make_model, tiny_processor, tiny_samples):
    batch, rewards = tiny_processor.collate(tiny_samples), {}
    for kind in ("both", "bce", "dice", "iou"):
        output = make_model(reward_terms=kind)(batch)
        rewards[kind] = output.rewards
    torch.testing.assert_close(rewards["bce"] + rewards["dice"], rewards["both"])
    assert (rewards["bce"] < 0).all()
    assert ((rewards["iou"] > 0) & (rewards["iou"] < 1)).all()
    map_iou = losses.map_iou(output.maps[0], (batch.masks[0] == 1).float(), batch.masks[0] != 255)
    torch.testing.assert_close(rewards["iou"][: len(map_iou)], map_iou)


def test_rewards_are_made_of_the_decoded_masks(make_model, tiny_processor, tiny_samples):
    batch, outputs = tiny_processor.collate(tiny_samples), {}
    batch.masks[0][0, :10] = 255
    for kind in ("both", "mask", "mask_iou"):
        outputs[kind] = make_model(reward_terms=kind)(batch)
    plain = outputs["both"]
    masks = -(plain.terms["mask_bce"] + plain.terms["mask_dice"])
    torch.testing.assert_close(outputs["mask"].terms["reward"], masks)
    pairs = [(m > 0, t) for rows, targets in zip(plain.mask_logits, batch.masks) for m, t in zip(rows, targets)]
    ious = [((mask & (t == 1)).sum() / ((mask & (t != 255)) | (t == 1)).sum()) for mask, t in pairs]
    torch.testing.assert_close(outputs["mask_iou"].rewards, torch.stack(ious))
    assert (outputs["mask_iou"].rewards > 0).any()
    for kind in ("mask", "mask_iou"):  # they reach the gate alone
        others = {"text", "mask_bce", "mask_dice", "map_bce", "map_dice"}
        assert {name: outputs[kind].terms[name] for name in others} == {name: plain.terms[name] for name in others}
        assert outputs[kind].terms["policy"] != plain.terms["policy"]


def test_iou_of_masks():
    logits, targets = torch.full((2, 4, 4), -1.0), torch.zeros(2, 4, 4, dtype=torch.uint8)
    logits[0, :2], targets[0, 1:3] = 1.0, 1
    assert losses.mask_iou(logits, targets).tolist() == pytest.approx([1 / 3, 0])
    targets[0, 0] = 255
    assert losses.mask_iou(logits, targets)[0] == 0.5
    assert losses.mask_iou(logits[:0], targets[:0]).shape == (0,)


def test_iou_of_binary_maps():
    maps, targets = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    maps[:, :2], targets[:, 1:3] = 1.0, 1.0
    assert float(losses.map_iou(maps, targets, torch.ones(1, 4, 4))) == pytest.approx(1 / 3)
    assert float(losses.map_iou(maps, targets, 1 - maps)) == 0


def test_any_subset_of_constraints(make_model, tiny_processor, tiny_samples):
    batch = tiny_processor.collate(tiny_samples)

    def loss_and_terms(*names: str, **settings):
        output = make_model(map_terms=names, **settings)(batch)
        return output.loss.detach(), output.terms

    unconstrained, _ = loss_and_terms()
    torch.testing.assert_close(unconstrained, loss_and_terms(map_loss_weight=0.0)[0])
    terms = {"gaussian_bce": "map_bce", "gaussian_dice": "map_dice", "bce": "map_hard_bce", "dice": "map_hard_dice"}
    added = {}
    for name, term in terms.items():
        loss, values = loss_and_terms(name)
        added[name] = loss - unconstrained
        torch.testing.assert_close(added[name], (2 if "bce" in name else 4) * values[term], **NEAR)
    assert abs(added["bce"] - added["gaussian_bce"]) > 1e-3
    torch.testing.assert_close(loss_and_terms(*terms)[0] - unconstrained, sum(added.values()), **NEAR)
    with pytest.raises(ValueError, match="gaussian_iou"):
        make_model(map_terms=("gaussian_iou",))


def test_entropy_bonus_and_scaled_advantages_are_off_by_default(make_model, tiny_processor, tiny_samples):
    batch = tiny_processor.collate(tiny_samples)
    plain = make_model()(batch)
    bonus = make_model(entropy_bonus=0.5)(batch)
    expected = plain.loss - 0.1 * 0.5 * plain.terms["entropy"]
    torch.testing.assert_close(bonus.loss, expected)
    scaled = make_model(scale_advantage=True)(batch)
    assert abs(scaled.terms["policy"]) != abs(plain.terms["policy"])
    torch.testing.assert_close(scaled.rewards, plain.rewards)


def test_sams_rating_trains_on_the_iou_of_its_mask(make_model, tiny_processor, tiny_samples):
    """SAM's own loss; off by default, with the same graph as without it."""
    batch = tiny_processor.collate(tiny_samples)
    head = "visual_model.mask_decoder.iou_prediction_head.layers.2.bias"
    plain, rated = make_model(), make_model(iou_loss_weight=0.5)
    off, on = plain(batch), rated(batch)
    assert not {"mask_iou", "mask_iou_mse"} & off.terms.keys()
    assert {name: on.terms[name] for name in off.terms} == off.terms
    torch.testing.assert_close(on.loss - off.loss, 0.5 * on.terms["mask_iou_mse"], rtol=1e-4, atol=1e-6)
    for model, output in ((plain, off), (rated, on)):
        output.loss.backward()
        assert (dict(model.named_parameters())[head].grad != 0).any() == (model is rated)
    optimizer = torch.optim.Adam(rated.visual_model.mask_decoder.iou_prediction_head.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        output = rated(batch)
        output.loss.backward()
        optimizer.step()
    assert output.terms["mask_iou_mse"] < 0.2 * on.terms["mask_iou_mse"]


def test_constraints_survive_saving(make_model, tmp_path):
    make_model(map_terms=("dice",)).config.save_pretrained(tmp_path)
    assert UGroundConfig.from_pretrained(tmp_path).map_terms == ("dice",)


def test_a_gradient_over_all_layers_takes_no_batch_reward_and_no_critic(make_model):
    for settings in ({"reward": "batch"}, {"baseline": "critic"}, {"baseline": "state_critic"}):
        for gradient in ("exact", "leave_one_out"):
            with pytest.raises(ValueError, match=gradient):
                make_model(policy_gradient=gradient, **settings)


@pytest.mark.parametrize("kind", ["mask", "mask_iou"])
def test_a_gradient_over_all_layers_takes_no_reward_of_masks(make_model, kind):
    with pytest.raises(ValueError, match=f"exact with reward_terms {kind} .* use leave_one_out"):
        make_model(policy_gradient="exact", reward_terms=kind)


def test_a_critic_of_the_state_takes_no_batch_reward(make_model):
    with pytest.raises(ValueError, match=r"state_critic expects .* takes reward seg"):
        make_model(baseline="state_critic", reward="batch")


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_points_lie_on_the_maps_peaks_and_valleys():
    scores, valid = torch.full((2, 16), 0.5), torch.ones(2, 16, dtype=torch.bool)
    scores[0, 5], scores[0, 15] = 1.0, 0.0
    valid[1, 8:], scores[1, 8:] = False, 0.0  # the lower half is padding
    scores[1, 3] = 0.1
    scores, valid = (
        (40 * scores).view(2, 4, 4).requires_grad_(),
        valid.view(2, 4, 4),
    )  # so steep that neighbours have no weight
    centres = cell_centres(scores, (64, 64), Fit("pad", 40), Fit("pad", 64))
    points, labels = map_points(scores, valid, 1, centres)
    assert labels.tolist() == [[1, 0]] * 2
    torch.testing.assert_close(points[0], torch.tensor([[24.0, 24.0], [56.0, 56.0]]), rtol=0, atol=0.1)
    torch.testing.assert_close(points[1, 1], torch.tensor([56.0, 8.0]), rtol=0, atol=0.1)
    many, _ = map_points(scores, valid, 20, centres)
    assert many.shape == (2, 40, 2)
    assert (many[1, :, 1] < 32).all()
    points.sum().backward()
    assert scores.grad.isfinite().all()
    assert not scores.grad[1, 2:].any()
    empty, _ = map_points(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4, dtype=torch.bool), 3, centres)
    assert empty.shape == (0, 6, 2)


@pytest.mark.parametrize(
    ("settings", "prompted"),
    [
        ({"mask_prompt": False}, {"phi"}),
        ({"seg_prompt": False}, {"mask"}),
        ({"seg_prompt": False, "mask_prompt": False, "point_prompts": 2}, {"points"}),
        ({"mask_prompt": False, "point_prompts": 3}, {"phi", "points"}),
        ({"point_prompts": 1}, {"phi", "mask", "points"}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else "",
)
def test_every_choice_of_prompts_trains_and_decodes_masks(make_model, tiny_processor, tiny_samples, settings, prompted):
    model = add_lora(make_model(**settings), r=2)
    model(tiny_processor.collate(tiny_samples)).loss.backward()
    keys = {
        "phi": "text_hidden_fcs.0.0.weight",
        "mask": "prompt_encoder.mask_downscaling.0.weight",
        "points": "prompt_encoder.point_embeddings.1.weight",
    }
    parameters = dict(model.named_parameters())
    for kind, key in keys.items():
        (parameter,) = [p for name, p in parameters.items() if name.endswith(key)]
        assert parameter.requires_grad == (kind in prompted), key
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (kind in prompted), key
    for prediction in ask(model.get_base_model(), tiny_processor):
        assert prediction.mask_logits.isfinite().all()
        assert prediction.mask_logits.std() > 0
    text_only = model(tiny_processor.collate([drawn_sample(8, segs=(0, 0))]))
    text_only.loss.backward()
    assert torch.isfinite(text_only.loss)


def test_points_work_in_bfloat16(make_model, tiny_processor, tiny_samples):
    model = make_model(point_prompts=2).to(torch.bfloat16)
    output = model(tiny_processor.collate(tiny_samples).to("cpu", torch.bfloat16))
    assert torch.isfinite(output.loss)
    soft = make_model(layer_selection="soft").to(torch.bfloat16)
    assert torch.isfinite(soft(tiny_processor.collate(tiny_samples).to("cpu", torch.bfloat16)).loss)
