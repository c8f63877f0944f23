"""Training runs on synthetic data: what they write, resuming, bad input, and two real processes against one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run
from forks import Program
from tiny_run import ROOT, arguments, environment, free_port, killed_after_saving, launch, log_lines
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_utils

import train_ds
from utils.config import load_config
from utils.datasets import DataOptions
from utils.datasets.mixture import Mixture
from utils.training import checkpoint as checkpoints
from utils.training.engine import deepspeed_settings

pytestmark = pytest.mark.slow
SAME = {"lora_dropout": 0.0, "val_pictures": 0}  # dropout depends on the rank


@pytest.fixture
def run_here(base, data, tmp_path, capsys, monkeypatch):
    """run(code=0, **settings) -> (folder, what was printed): train_ds.main in this process, again and again.

    Without pictures and a report, whose drawing takes longer than the steps; ``drawn=True`` makes them.
    """

    def run(code: int = 0, drawn: bool = False, **settings):
        settings = {"log_base_dir": tmp_path, "val_pictures": 2 if drawn else 0} | settings
        if not drawn:
            monkeypatch.setattr(train_ds, "report_run", lambda run: None)
        assert train_ds.main(arguments(base, data, tmp_path, **settings)) == code
        printed = capsys.readouterr()
        return tmp_path / str(settings.get("exp_name", "run")), printed.out + printed.err

    return run


def curve(run, *names: str) -> list[list[float]]:
    return [[line[name] for name in names] for line in log_lines(run, "train")]


def assert_same_curve(run, other, tolerance: float) -> None:
    lines, others = log_lines(run, "train"), log_lines(other, "train")
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, its in zip(lines, others):
        assert line["layers"] == its["layers"]
        for name in ("loss", "text", "mask_bce", "mask_dice", "map_bce", "policy", "reward", "baseline", "gradient"):
            assert line[name] == pytest.approx(its[name], rel=tolerance, abs=tolerance), (line["step"], name)
        for part, norm in line["gradients"].items():
            assert norm == pytest.approx(its["gradients"][part], rel=10 * tolerance, abs=tolerance), (
                line["step"],
                part,
            )


def test_a_run_learns_logs_and_saves(run_here):
    run, printed = run_here(drawn=True, val_dataset="ReasonSeg|val_short||grefcoco|unc|val", steps_per_epoch=6)
    weights = {row["module"]: row for row in log_lines(run, "start")[0]["weights"]}
    assert weights["visual_model"]["source"].endswith("sam.pth")
    assert all(row["fingerprint"] in printed for row in weights.values())
    lines = log_lines(run, "train")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["text"] < 0.85 * lines[0]["text"]
    first = lines[0]
    parts = {"lora", "phi", "gate", "sam_mask_decoder", "sam_prompt_encoder", "embed_tokens", "lm_head"}
    assert set(first["gradients"]) == parts
    assert all(norm > 0 for norm in first["gradients"].values())
    assert sum(norm**2 for norm in first["gradients"].values()) ** 0.5 == pytest.approx(first["gradient"], rel=1e-4)
    assert sum(first["layers"]) > 0
    assert first["layers"][0] == 0  # the embeddings are no candidate
    with_masks = [line for line in lines if "map_loss_by_layer" in line]
    assert with_masks
    assert all(len(line["map_loss_by_layer"]) == 5 for line in with_masks)
    validations = log_lines(run, "val")
    assert [line["step"] for line in validations] == [6, 12]
    assert set(validations[0]["metrics"]) == {"ReasonSeg|val_short", "grefcoco|unc|val"}
    assert {"gIoU", "cIoU"} <= set(validations[0]["metrics"]["ReasonSeg|val_short"])
    for expected in ("parameters", "trainable", "step 12/12", "eta", "merge_lora.py"):
        assert expected in printed
    assert load_config(["--config", str(run / "config.yaml")]).train.exp_name == "run"
    index = checkpoints.read_index(run)
    assert index["latest"] == "step_00000012"
    kept = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert kept == set(index.values())
    meta = checkpoints.read_meta(checkpoints.find_checkpoint(run))
    assert (meta["step"], meta["position"]) == (12, 24)
    assert meta["tokens"]["seg"] != meta["tokens"]["rej"]
    assert_tensorboard(run)
    assert "Step 12 of 12 (finished)" in (run / "report.html").read_text()
    kept_pictures = {path.name for path in (run / "pictures/ReasonSeg_val_short").iterdir()}
    assert kept_pictures == {"step_00000006.png", "step_00000012.png"}


def assert_tensorboard(run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    wanted = {f"loss/{name}" for name in ("loss", "text", "mask_bce", "mask_dice", "map_bce", "map_dice", "policy")}
    wanted |= {
        "map_loss_by_layer/0",
        "map_loss_by_layer/4",
        "policy/reward",
        "policy/baseline",
        "policy/entropy",
        "train/lr",
        "train/images_per_s",
    }
    wanted |= {"gradient/all", "gradient/gate", "gradient/lora", "gradient/phi", "val/ReasonSeg_val_short/gIoU"}
    assert wanted <= set(tags["scalars"])
    assert "policy/layers" in tags["histograms"]
    assert "val/ReasonSeg_val_short" in tags["images"]
    assert len(events.Images("val/ReasonSeg_val_short")) == 2


def test_figures_are_logged_only_when_asked(run_here):
    run, _ = run_here(log_every=4, steps_per_epoch=4, no_eval=True, workers=1)
    assert [line["step"] for line in log_lines(run, "train")] == [1, 4, 8]


class Waits(TorchDispatchMode):
    """Records callers that read a tensor's value, which synchronizes with a GPU; collation on the CPU is excluded."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        asks = name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            asks |= any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if asks:
            self.note()
        return function(*args, **kwargs or {})

    def note(self) -> None:
        files = [Path(frame.filename) for frame in traceback.extract_stack()]
        packages = ROOT / "model", ROOT / "utils"
        own = [file.name for file in files if file.parent == ROOT or any(map(file.is_relative_to, packages))]
        if not {"collate.py", "mixture.py"} & set(own):  # data are loaded in this process
            self.callers.append("DeepSpeed" if any("deepspeed" in file.parts for file in files) else own[-1])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_waits_for_no_value(run_here, monkeypatch, accumulation):
    """Forward, backward, clipping, AdamW, on the CPU; tests/test_device.py counts on a strict device."""
    waits, step, active = [], train_ds.train_step, []
    for name in ("tolist", "numpy", "cpu"):  # no operations for PyTorch
        call = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, call=call: (active and active[-1].note(), call(*a))[1])

    def watched(run, *rest):
        with Waits() as mode:
            active.append(mode)
            step(run, *rest)
            active.pop()
        waits.append(Counter(mode.callers))

    monkeypatch.setattr(train_ds, "train_step", watched)
    run_here(log_every=100, epochs=1, steps_per_epoch=4, no_eval=True, grad_accumulation_steps=accumulation)
    for counted in waits[1:-1]:
        assert counted == {"DeepSpeed": 3}  # its clipping, once per step of the optimizer
    assert waits[0]["run_log.py"]  # the first step is logged, and so is the last


def test_checkpoints_between_epochs(run_here, monkeypatch):
    saved, save = [], checkpoints.save_checkpoint

    def remember(engine, folder, meta, best):
        saved.append((meta["step"], bool(meta["metrics"]), best))
        return save(engine, folder, meta, best)

    monkeypatch.setattr(checkpoints, "save_checkpoint", remember)
    run, _ = run_here(epochs=1, steps_per_epoch=5, save_every=2)
    assert saved == [(2, False, False), (4, False, False), (5, True, True)]
    assert [line["step"] for line in log_lines(run, "val")] == [5]


def test_best_is_compared_with_its_like(run_here):
    """A run resumed with another validation metric discards the best value of the old one."""
    run, printed = run_here(epochs=1, steps_per_epoch=3, val_metric="gIoU", lr=1e-6)
    assert "1 process on CPU" in printed
    assert "2 images per step = batch_size 2 x grad_accumulation_steps 1 x 1" in printed
    first = checkpoints.read_meta(checkpoints.find_checkpoint(run))
    assert first["best_of"][:2] == ["ReasonSeg|val_short", "gIoU"]
    run_here(epochs=2, steps_per_epoch=3, val_metric="cIoU", lr=1e-6, auto_resume=True)
    second = checkpoints.read_meta(checkpoints.find_checkpoint(run))
    assert second["best"] == second["metrics"]["ReasonSeg|val_short"]["cIoU"]
    assert checkpoints.read_index(run)["best"] == checkpoints.read_index(run)["latest"]


def test_resumed_run_is_the_uninterrupted_one(run_here):
    settings = {"grad_accumulation_steps": 2, "log_every": 5}  # logged: steps 1, 5, and 3 and 6, which are saved
    whole, _ = run_here(exp_name="whole", **settings)
    with killed_after_saving():
        run_here(code=130, exp_name="cut", **settings)
    cut, printed = run_here(exp_name="cut", auto_resume=True, **settings)
    assert "resuming from" in printed
    assert_same_curve(cut, whole, 1e-6)  # with dropout: its seed is the step's
    resumed, expected = (
        checkpoints.trained_weights(checkpoints.find_checkpoint(run, "latest")) for run in (cut, whole)
    )
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert resumed["base_model.model.ppm.baseline"] != 0
    # and once more: it is finished
    _, printed = run_here(exp_name="cut", auto_resume=True, **settings)
    assert "step 6 of 6" in printed
    assert len(log_lines(cut, "train")) == 4


def test_resuming_another_run_is_refused(run_here, base, data):
    run, _ = run_here(no_eval=True, epochs=1)
    _, printed = run_here(code=2, no_eval=True)
    assert "holds a run already" in printed
    assert "--auto_resume true" in printed
    changed = {
        "lora_r": 4,
        "seed": 3,
        "dataset": "reason_seg",
        "refer_seg_data": "",
        "no_eval": True,
        "auto_resume": True,
    }
    _, printed = run_here(code=2, **changed)
    for expected in (
        "lora_r: 2 in the checkpoint, now 4",
        "seed: 0 in the checkpoint, now 3",
        "dataset: (",
    ):
        assert expected in printed
    sam = torch.load(base / "sam.pth", weights_only=True)
    other = base / "other.pth"
    torch.save({name: value + 0.1 for name, value in sam.items()}, other)
    _, printed = run_here(code=2, no_eval=True, auto_resume=True, vision_pretrained=other)
    assert "--vision_pretrained: the base weights of visual_model are not the same" in printed
    _, printed = run_here(code=2, no_eval=True, resume=run.parent / "nothing")
    assert "no such folder" in printed
    run_here(no_eval=True, resume=run, exp_name="longer")  # epochs may change: 1 -> 2
    assert log_lines(run.parent / "longer", "train")[0]["step"] == 4


def test_a_micro_batch_may_change_where_the_images_of_a_step_do_not(run_here):
    run, _ = run_here(no_eval=True, epochs=1)
    _, printed = run_here(code=2, no_eval=True, auto_resume=True, grad_accumulation_steps=2)
    assert (
        "images per step: 2 in the checkpoint (batch_size 2 x grad_accumulation_steps 1 x 1 process), now 4" in printed
    )
    assert "give --batch_size and --grad_accumulation_steps whose product is 2" in printed
    _, printed = run_here(no_eval=True, auto_resume=True, batch_size=1, grad_accumulation_steps=2)
    assert "the same images per step as batch_size 1 x grad_accumulation_steps 2 x 1 process; until the" in printed
    warning = next(line for line in printed.splitlines() if "differs from one without this change" in line)
    assert "dropout" in warning
    assert "moving average" in warning
    assert [line["step"] for line in log_lines(run, "train")] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_another_length_says_so(run_here):
    run, _ = run_here(no_eval=True, epochs=2)
    _, printed = run_here(code=2, no_eval=True, epochs=1, auto_resume=True)
    assert "is at step 6, and --epochs 1 x --steps_per_epoch 3 ends at 3" in printed
    _, printed = run_here(code=2, no_eval=True, epochs=2, resume=run, exp_name="other")
    assert "nothing is left to train" in printed
    assert not (run.parent / "other").exists()
    _, printed = run_here(no_eval=True, epochs=2, auto_resume=True)  # finished, and still there
    assert "warning" not in printed
    _, printed = run_here(no_eval=True, epochs=3, auto_resume=True)
    assert "planned for 6 steps and now has 9" in printed


def test_an_incomplete_data_set_is_warned_of(run_here, data, tmp_path):
    copy = tmp_path / "half"
    shutil.copytree(data, copy)
    for path in sorted((copy / "refer_seg/images/mscoco/images/train2014").glob("*.jpg"))[::2]:
        path.write_bytes(b"")
    flags = {"dataset": "refer_seg", "epochs": 1, "no_eval": True, "dataset_dir": copy}
    _, printed = run_here(**flags)
    assert re.search(r"warning: \d+ sampled records? could not be read", printed)
    _, printed = run_here(**flags | {"dataset_dir": data, "exp_name": "whole"})
    assert "could not be read" not in printed


def test_a_metric_that_is_not_reported_ends_the_run_before_it_begins(run_here):
    _, printed = run_here(code=2, val_metric="giou")
    assert "--val_metric giou: ReasonSeg|val_short reports gIoU, cIoU" in printed


def test_bad_input_is_named_all_at_once(run_here, tmp_path):
    _, printed = run_here(
        code=2, version=tmp_path / "no_llava", vision_pretrained=tmp_path / "no.pth", dataset="reasonseg"
    )
    for expected in ("no_llava: no such folder", "no.pth: no such file", "Did you mean 'reason_seg'"):
        assert expected in printed
    _, printed = run_here(code=2, dataset="reasonseg", sample_rates="2,1")  # not that there is a rate too many
    assert "Did you mean 'reason_seg'" in printed
    _, printed = run_here(code=2, val_dataset="ReasonSeg|vall")
    assert "val" in printed
    assert not (tmp_path / "run").exists()


def test_deepspeed_file_must_not_contradict(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 7,
                "gradient_clipping": "auto",
                "bf16": {"enabled": True},
                "zero_optimization": {
                    "stage": 0,
                    "elastic_checkpoint": True,
                    "offload_optimizer": {"device": "nvme"},
                },
                "optimizer": {"type": "Adam"},
            }
        )
    )
    flags = arguments(tmp_path, tmp_path, tmp_path, deepspeed_config=path)
    with pytest.raises(ValueError, match="contradicts the settings") as error:
        deepspeed_settings(load_config(flags), world_size=4)
    for expected in (
        "per_gpu is 7, but batch_size is 2",
        "bf16.enabled is True, but precision is fp32",
        "stage is 0; give 1, 2 or 3",
        "elastic_checkpoint is on",
        "offloads to nvme",
        "'opt",
    ):
        assert expected in str(error.value)
    settings = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}
    path.write_text(json.dumps(settings))
    filled = deepspeed_settings(load_config([*flags, "--grad_accumulation_steps", "3"]), world_size=4)
    assert (filled["train_batch_size"], filled["gradient_clipping"]) == (24, 1.0)
    assert (filled["bf16"], filled["fp16"]) == ({"enabled": False}, {"enabled": False})
    path.write_text(json.dumps(settings | {"zero_optimization": {"stage": 2, "overlap_com": True}}))
    with pytest.raises(ValueError, match=r"--deepspeed_config .*ds\.json: .*overlap_com\b"):
        deepspeed_settings(load_config(flags), world_size=2)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        deepspeed_settings(load_config(flags), world_size=1)


def test_loss_that_is_not_finite_stops_the_run(run_here):
    _, printed = run_here(code=2, lr=1e12, gradient_clipping=0, no_eval=True, steps_per_epoch=20)
    assert re.search(r"error: step \d: .*not finite; the run cannot recover", printed)


def test_full_disk_leaves_the_last_checkpoint(run_here, monkeypatch):
    """The second checkpoint meets a limit on file sizes, which the system enforces as it does a full disk."""
    saved, limits = train_ds.save_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_without_room(run, results):
        if run.step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        saved(run, results)

    monkeypatch.setattr(train_ds, "save_step", save_without_room)
    try:
        run, printed = run_here(code=2, no_eval=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in printed
    assert "free disk space and resume with --auto_resume true" in printed
    assert [path.name for path in (run / "checkpoints").glob("*step_*")] == ["step_00000003"]
    monkeypatch.setattr(train_ds, "save_step", saved)
    run, _ = run_here(no_eval=True, auto_resume=True)
    assert checkpoints.read_index(run)["latest"] == "step_00000006"


def test_no_room_is_seen_before_writing(run_here, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    run, printed = run_here(code=2, no_eval=True)
    assert "no room for a checkpoint" in printed
    assert not checkpoints.read_index(run)


def test_gradient_checkpointing_changes_no_number(run_here, monkeypatch):
    plain, _ = run_here(exp_name="plain", no_eval=True, epochs=1)
    calls, checkpoint = [], modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    saving, _ = run_here(exp_name="saving", no_eval=True, epochs=1, gradient_checkpointing=True)
    assert len(calls) >= 3 * 4  # each of LLaMA's layers in each step
    assert_same_curve(saving, plain, 1e-5)


def test_dropout_is_on_in_training(run_here):
    with_it, _ = run_here(exp_name="with", lora_dropout=0.5)
    without, _ = run_here(exp_name="without", lora_dropout=0.0)
    losses = [[line["loss"] for line in log_lines(run, "train")] for run in (with_it, without)]
    assert losses[0][0] == losses[1][0]  # adapters start at zero
    assert all(a != b for a, b in zip(losses[0][4:], losses[1][4:]))  # also after a validation


@pytest.mark.parametrize("method", ["last", "uniform", "fixed:2"])
def test_other_layer_selections_train(run_here, method):
    run, _ = run_here(no_eval=True, epochs=1, layer_selection=method, mask_prompt=method != "last")
    lines = log_lines(run, "train")
    assert "policy" not in lines[0]
    assert "gate" not in lines[0]["gradients"]
    if method != "uniform":
        assert lines[0]["layers"][{"last": 4, "fixed:2": 2}[method]] == sum(lines[0]["layers"])


@pytest.mark.parametrize(
    ("term", "settings"),
    [
        ("mask_bce", {"layer_selection": "soft"}),
        ("classifier", {"layer_selection": "ce_soft"}),
        ("policy", {"policy_gradient": "exact", "entropy_bonus": 0.1}),
        ("critic", {"baseline": "critic", "scale_advantage": "true", "map_terms": "bce||dice"}),
        ("critic", {"baseline": "state_critic", "baseline_start": "first"}),
        ("mask_iou", {"reward_terms": "mask_iou", "policy_gradient": "leave_one_out", "policy_samples": 2}),
        ("mask_iou_mse", {"iou_loss_weight": 1.0, "val_layer_policy": "best:2"}),
        ("map_iou", {"reward_terms": "iou", "point_prompts": 2, "mask_prompt": "false", "seg_prompt": "false"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_variants_train_validate_and_resume(run_here, term, settings):
    """The gate learns, validation chooses layers as the settings have it, and a resumed run has the state it saved."""
    run, _ = run_here(epochs=1, steps_per_epoch=4, **settings)
    lines = log_lines(run, "train")
    assert term in lines[0]
    assert lines[0]["gradients"]["gate"] > 0
    assert log_lines(run, "val")[0]["metrics"]["ReasonSeg|val_short"]
    before = checkpoints.trained_weights(checkpoints.find_checkpoint(run))
    run_here(epochs=2, steps_per_epoch=4, auto_resume=True, **settings)
    after = log_lines(run, "train")
    assert [line["step"] for line in after] == list(range(1, 9))
    if "baseline" not in settings:
        mean = float(before["base_model.model.ppm.baseline"])
        assert mean == pytest.approx(after[3]["baseline"], rel=1e-5)  # the log has six digits
        assert abs(after[4]["baseline"] - mean) < 0.2 * abs(after[4]["reward"] - mean) + 1e-6  # it moved on from there


# -- two processes -----------------------------------------------------------------------------------------------------


def start_two(folder: Path, *flags: str) -> list[Program]:
    """Two processes without the launcher."""
    port, started = free_port(), []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = environment(MASTER_PORT=port, **ranks)
        started.append(Program(ROOT / "train_ds.py", *flags, env=env, output=folder / f"{rank}.txt"))
    return started


@pytest.fixture(scope="module")
def two(base, data, tmp_path_factory):
    """A run of two processes with a batch of 1 each, trained once for all of xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "two-processes"
    folder.mkdir(exist_ok=True)
    with (folder / "only-one").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "trained").exists():
            launch(*arguments(base, data, folder, exp_name="two", batch_size=1, **SAME))
            (folder / "trained").touch()
    return folder / "two"


def test_two_processes_are_one(two, run_here, data):
    """The same global batch: loss curve, rewards, layers, and the gradient of every part, the policy's gate included.

    A rank whose image has no mask (question answering) is among the steps; it hangs nobody and changes nothing.
    """
    one, _ = run_here(exp_name="one", batch_size=2, **SAME)
    mixture = Mixture(data, "reason_seg||refer_seg||vqa", None, {"refer_seg": "grefcoco"}, DataOptions())
    without = [len(mixture[number].masks) == 0 for number in range(12)]
    assert any(left != right for left, right in zip(without[::2], without[1::2]))
    assert_same_curve(two, one, 2e-4)
    from_two, from_one = (checkpoints.trained_weights(checkpoints.find_checkpoint(run)) for run in (two, one))
    assert set(from_two) == set(from_one)
    for name, weights in from_one.items():
        assert (from_two[name] - weights).abs().max() <= 0.02 * weights.abs().max() + 1e-3, name


def test_micro_steps_are_one_batch(run_here, data):
    """Losses are divided by the counts of the whole optimizer step, not of each micro step: the same curve.

    Without a policy: REINFORCE's moving average advances per micro step, so that the gate would differ.
    """
    settings = {**SAME, "layer_selection": "last"}
    one, _ = run_here(exp_name="one", batch_size=4, **settings)
    parts, _ = run_here(exp_name="parts", batch_size=1, grad_accumulation_steps=4, **settings)
    mixture = Mixture(data, "reason_seg||refer_seg||vqa", None, {"refer_seg": "grefcoco"}, DataOptions())
    assert len({len(mixture[number].masks) for number in range(4)}) > 1  # or dividing by either count is the same
    for line, other in zip(log_lines(one, "train"), log_lines(parts, "train"), strict=True):
        for name in ("loss", "text", "mask_bce", "mask_dice", "map_bce", "map_dice", "reward", "gradient"):
            assert line[name] == pytest.approx(other[name], rel=2e-4, abs=2e-4), (line["step"], name)
        for part, norm in line["gradients"].items():
            assert norm == pytest.approx(other["gradients"][part], rel=2e-3, abs=2e-4), (line["step"], part)


def test_two_killed_processes_resume(two, base, data, tmp_path):
    """kill -9 after the first checkpoint; the rest of the curve is that of the run that nobody killed."""
    flags = arguments(base, data, tmp_path, exp_name="killed", batch_size=1, **SAME)
    index = tmp_path / "killed/checkpoints/index.json"
    started = start_two(tmp_path, *flags)
    while not index.is_file() and all(program.ends(0) is None for program in started):
        time.sleep(0.005)
    for program in started:
        program.process.kill()
        program.ends()
    assert json.loads(index.read_text())["latest"] == "step_00000003"
    started = start_two(tmp_path, *flags, "--auto_resume", "true")
    assert [program.ends() for program in started] == [0, 0], started[0].printed()[-3000:]
    assert "step 3 of 6" in started[0].printed()
    assert_same_curve(tmp_path / "killed", two, 1e-5)


# -- several machines, and the optimizer in the host's memory ----------------------------------------------------------

OFFLOAD = ROOT / "configs/deepspeed/zero2_offload.json"


def test_an_offloaded_optimizer_changes_no_number(run_here, tmp_path):
    """Losses, and the gradient of every part, over accumulated micro steps; and it resumes from its checkpoint."""
    settings = {"no_eval": True, "grad_accumulation_steps": 2, "epochs": 1}
    plain, _ = run_here(exp_name="plain", **settings)
    offloaded, _ = run_here(exp_name="offloaded", deepspeed_config=OFFLOAD, **settings)
    assert_same_curve(offloaded, plain, 1e-5)
    small = json.loads(OFFLOAD.read_text())
    small["zero_optimization"] |= {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
    (tmp_path / "small.json").write_text(json.dumps(small))
    buckets, _ = run_here(exp_name="buckets", deepspeed_config=tmp_path / "small.json", **settings)
    assert_same_curve(buckets, plain, 1e-5)  # also where gradients leave the device before the backward pass is over
    more = settings | {"epochs": 2, "auto_resume": True}
    run_here(exp_name="offloaded", deepspeed_config=OFFLOAD, **more)
    assert len(log_lines(offloaded, "train")) == 6


def test_two_machines_are_one(two, base, data, tmp_path):
    """A launcher per "machine", which meet on loopback as they would over a network, each with one process and an
    offloaded optimizer: the losses and gradients of two processes on one machine without it."""
    flags = arguments(base, data, tmp_path, exp_name="nodes", batch_size=1, deepspeed_config=OFFLOAD, **SAME)
    port, started = free_port(), []
    for node in range(2):
        where = ["--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1"]
        meet = ["--master_addr", "127.0.0.1", "--master_port", port]
        command = [Path(torch.distributed.run.__file__), *where, *meet, ROOT / "train_ds.py", *flags]
        started.append(Program(*command, output=tmp_path / f"{node}.txt"))
    assert [program.ends() for program in started] == [0, 0], "\n".join(each.printed()[-3000:] for each in started)
    assert_same_curve(tmp_path / "nodes", two, 1e-5)
