"""The log of training: means over micro steps, the line of a step, and the log of a resumed run."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.objective import UGroundOutput
from utils.training.run_log import DivergedError, Meter, RunLog, check_finite, step_line, truncate_log

VALUES = {
    "loss": 3.21,
    "text": 0.5,
    "mask_bce": 0.1,
    "mask_dice": 0.3,
    "map_bce": 0.7,
    "map_dice": 0.9,
    "policy": -0.01,
    "entropy": 2.1,
    "reward": -1.6,
    "baseline": -1.7,
    "layers": [0, 2, 0, 2],
    "images_per_s": 5.13,
    "lr": 3e-4,
    "gradient": 0.8,
    "skipped": 0,
}


def output(loss: float, baseline: float, layers: list[int]) -> UGroundOutput:
    terms = {"text": torch.tensor(2 * loss), "baseline": torch.tensor(baseline), "entropy": torch.zeros(())}
    terms["entropy"] += 1.5 * bool(layers)
    chosen, has_masks = torch.tensor(layers, dtype=torch.int64), torch.tensor(float(bool(layers)))
    return UGroundOutput(torch.tensor(loss), terms, [], [], chosen, torch.zeros(0, 4), torch.zeros(0), has_masks)


def test_meter_gives_means_and_the_last_baseline():
    meter = Meter(torch.device("cpu"), num_layers=4)
    meter.add(output(1.0, -0.1, [3, 3, 1]), images=2)
    meter.add(output(2.0, -0.4, []), images=2)
    values = meter.collect()
    assert (values["loss"], values["text"], values["baseline"]) == pytest.approx((1.5, 3.0, -0.4))
    assert values["entropy"] == pytest.approx(1.5)  # a micro step without masks has none
    assert values["layers"] == [0, 1, 0, 2]
    assert values["images_per_s"] > 0
    meter.add(output(5.0, -0.5, [0]), images=1)
    again = meter.collect()
    assert (again["loss"], again["layers"]) == (5.0, [1, 0, 0, 0])


def test_meter_gives_the_policys_entropy_over_the_seg_of_sampled_answers():
    """Terms are sums over the answers' mean number in a micro step: two [SEG], then none in four answers each."""
    meter = Meter(torch.device("cpu"), num_layers=4)
    for segs, entropy in ((2, 2.5), (0, 0.0)):
        step = output(1.0, 0.0, [1] * segs)
        step.terms |= {"grpo_segs": torch.tensor(segs / 4), "grpo_layer_entropy": torch.tensor(entropy / 4)}
        meter.add(step, images=1)
    values = meter.collect()
    assert (values["grpo_segs"], values["grpo_layer_entropy"]) == pytest.approx((0.25, 1.25))
    meter.add(step, images=1)
    assert "grpo_layer_entropy" not in meter.collect()


def test_meter_gives_the_mean_of_a_critics_baseline():
    """Of all micro steps with a mask, not the last one's."""
    meter = Meter(torch.device("cpu"), num_layers=4)
    for critic_baseline, layers in ((-1.0, [1]), (-3.0, [2]), (0.0, [])):
        step = output(1.0, -1.7, layers)
        step.terms["critic_baseline"] = torch.tensor(critic_baseline)
        meter.add(step, images=1)
    values = meter.collect()
    assert values["baseline"] == -2
    assert "critic_baseline" not in values


def test_meter_gives_the_map_losses_of_all_layers_where_they_are_computed():
    meter, whole = Meter(torch.device("cpu"), num_layers=4), output(1.0, -0.1, [3])
    whole.layer_losses = torch.tensor([4.0, 3.0, 2.0, 1.0])
    half = output(1.0, -0.1, [3])
    half.layer_losses = whole.layer_losses / 2
    for figures in (output(1.0, -0.1, [3]), whole, half):
        meter.add(figures, images=1)
    values = meter.collect()
    assert values["map_loss_by_layer"] == [3.0, 2.25, 1.5, 0.75]
    assert values["layers"] == [0, 0, 0, 3]
    nothing = output(1.0, -0.1, [])  # a batch without masks has no map to judge
    nothing.layer_losses = torch.zeros(4)
    meter.add(nothing, images=1)
    assert "map_loss_by_layer" not in meter.collect()


def test_meter_does_not_wait_for_the_device():
    """Nothing of ``add`` reads a value: on the meta device there is none to be read."""
    meter = Meter(torch.device("meta"), num_layers=4)
    terms = {"text": torch.empty((), device="meta"), "baseline": torch.empty((), device="meta")}
    layers = torch.empty(3, dtype=torch.int64, device="meta")
    for _ in range(2):
        number = torch.empty((), device="meta")
        meter.add(UGroundOutput(number, terms, [], [], layers, layers, layers, number), images=2)
    assert meter.images == 4


def test_step_line():
    line = step_line(120, 600, 1.2, VALUES, 130)
    assert "\n" not in line
    for expected in (
        "step 120/600",
        "loss 3.210",
        "mask 0.100+0.300",
        "map 0.700+0.900",
        "policy -0.010 H 2.10",
        "reward -1.60 (baseline -1.70)",
        "layer 2.0±1.0",
        "lr 3.0e-04",
        "|g| 0.80",
        "5.1 img/s",
        "eta 02:10",
    ):
        assert expected in line
    assert "skipped" not in line
    without = {name: value for name, value in VALUES.items() if name != "policy"} | {"layers": [0] * 4, "skipped": 3}
    line = step_line(1, 600, 0.0, without, 0)
    assert "policy" not in line
    assert "layer" not in line
    assert "skipped 3" in line


def test_tensorboard_has_each_number_once_and_only_losses_under_loss(tmp_path):
    log = RunLog(tmp_path, 0, 600, 100)
    sampled = {"grpo": 0.0, "grpo_kl": 0.1, "grpo_reward_mask_iou": 0.5}
    log.train(120, VALUES | sampled, {"gate": 0.1})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    losses = {"loss", "text", "mask_bce", "mask_dice", "map_bce", "map_dice", "policy", "grpo"}
    assert {tag for tag in tags if tag.startswith("loss/")} == {f"loss/{name}" for name in losses}
    assert tags >= {"gradient/all", "gradient/gate", "train/skipped", "grpo/kl", "grpo/reward_mask_iou"}
    assert len(tags) == len(VALUES | sampled)  # without layers, with the gate


def test_a_loss_that_is_not_finite():
    check_finite(VALUES, 1)
    with pytest.raises(DivergedError, match=r"step 7: text not finite.*Lower --lr") as error:
        check_finite(VALUES | {"text": float("nan")}, 7)
    assert "--precision" not in str(error.value)  # training has bf16 and fp32 only: no advice is left to give


def test_log_of_a_resumed_run_has_no_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"kind": "tr')  # killed while writing
    truncate_log(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    truncate_log(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()
