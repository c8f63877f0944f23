"""Trains UGround.

deepspeed train_ds.py --config configs/tiny.yaml [--any_setting value ...]     one process per GPU
python train_ds.py --config configs/tiny.yaml [--any_setting value ...]        one process
python train_ds.py --help                                                      every setting
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked

import cv2
from safetensors import SafetensorError

from model.opened import cache_sam_features
from model.settings import GrpoSettings, decoder_kind
from model.structures import Batch, GroupPrompts, Sample
from utils import distributed
from utils.command_line.other_trainers import differences_from_lisa
from utils.config import Config, ConfigError, config_from, load_config, missing_paths, to_dict
from utils.datasets import DataError, EvalDataset, get_eval_dataset
from utils.evaluation.benchmarks import benchmark_of
from utils.evaluation.panels import validation_sheet
from utils.evaluation.predictions import InferenceOptions
from utils.training import checkpoint as checkpoints
from utils.training.data_content import content_of, source_of
from utils.training.lineage import adopt
from utils.training.run_lock import lock_run
from utils.training.run_log import DivergedError, Meter, RunLog, check_finite, loading_table, parameter_table
from utils.training.step_layout import StepLayout, effects
from utils.wording import counted

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

    from model.grounding import GroundingModel
    from model.group_policy import SampledAnswers
    from model.loading.weights import Loaded
    from model.processing.processor import UGroundProcessor
    from utils.datasets.mixture import Mixture

TrainingBatch = tuple[Batch, GroupPrompts | None]
RESUME = "resume from the last checkpoint, if there is one, with --auto_resume true"
ENDED = {  # in a RuntimeError's message -> what has ended, and stopped this process
    "DataLoader worker": "a worker that reads data was ended; is memory too small? Lower --workers or --batch_size",
    "Connection closed by peer": "another process of the run has ended; its own output says why",
    "Connection reset by peer": "another process of the run has ended; its own output says why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Builds the run, trains, and prints the next step; returns the exit code, 2 for errors that the user can fix."""
    run = None
    try:
        config = load_config(argv)
        device = distributed.init()
        if distributed.is_main():
            for line in differences_from_lisa(sys.argv[1:] if argv is None else argv, config.flat()):
                print(line)
        run = build_run(config, device)
        train(run)
        report_run(run)
        warn_of_skipped(run)
        merge = f"python scripts/merge_lora.py --checkpoint {config.run_folder} --output {config.run_folder / 'merged'}"
        run.log.print(f"done; next: {merge}")
        return 0
    except (ConfigError, DataError, checkpoints.CheckpointError, DivergedError) as error:
        print_error(error)
    except KeyboardInterrupt:
        if distributed.is_main():
            print(f"\ninterrupted; {RESUME}", file=sys.stderr)
        return 130
    except (OSError, SafetensorError) as error:
        print_error(ValueError(f"{error}. Is the disk full, or the folder read-only? {RESUME}"))
    except RuntimeError as error:
        if not (ended := next((text for sign, text in ENDED.items() if sign in str(error)), None)):
            raise
        reason = " ".join(str(error).split())[:200]
        print_error(ValueError(f"{ended} ({reason}); {RESUME}"))
    except ValueError as error:
        if run is not None:  # while training: a bug
            raise
        print_error(error)
    finally:
        if run is not None:
            with contextlib.suppress(OSError):  # a full disk, which was reported
                run.log.close()
            if run.lock:
                run.lock.close()
        distributed.shutdown()
    return 2


def report_run(run: Run) -> None:
    """Writes report.html; a failure here does not fail the run."""
    from utils.training.run_report import write_report

    if not distributed.is_main():
        return
    folder = run.config.run_folder
    try:
        run.log.print(f"wrote {write_report(folder)}")
    except Exception as error:  # of any kind: the training itself is finished
        run.log.print(f"warning: no report ({error!r}); try again with python scripts/report.py {folder}")


def warn_of_skipped(run: Run) -> None:
    """Warns if records were replaced: an incomplete data set must not pass for a complete one."""
    if skipped := int(run.mixture.skipped.sum()):
        run.log.print(
            f"warning: {counted(skipped, 'sampled record')} could not be read, replaced by others (named above); is "
            "the data set complete?"
        )
    if truncated := int(run.mixture.truncated):
        run.log.print(
            f"warning: {counted(truncated, 'sample')} cut off, with answers and [SEG] (named above); raise "
            "--model_max_length"
        )
    if left_out := int(run.mixture.left_out):
        run.log.print(
            f"warning: {counted(left_out, 'question')} left out, too long with an answer of --grpo_tokens (named "
            "above); lower it, or raise --model_max_length"
        )


def print_error(error: ValueError) -> None:
    """Prints an error once: the main process always, others only errors that may be theirs alone."""
    if distributed.is_main():
        message = str(error)
        if "\nOriginal Traceback (most recent call last):\n" in message:  # torch's, of a worker's DataError
            message = message.rpartition("DataError: ")[2].strip()
        print(f"error: {message}", file=sys.stderr)
    elif not getattr(error, "shared", False):
        print(f"error in process {distributed.rank()}: {str(error).splitlines()[0]}", file=sys.stderr)


@dataclass
class Run:
    """A training run.

    Attributes:
        model: UGround with LoRA inside, as evaluation calls it; the engine trains the same weights.
        meta: the metadata in every checkpoint.
        lock: of the run's folder, as long as it is open; None on other processes than the main one.
        step: optimizer steps done. best: the best validation metric so far.
    """

    config: Config
    device: torch.device
    engine: Any
    model: GroundingModel
    processor: UGroundProcessor
    mixture: Mixture
    benchmarks: list[EvalDataset]
    log: RunLog
    meta: dict[str, Any]
    lock: TextIO | None = None
    step: int = 0
    best: float | None = None


# -- build -------------------------------------------------------------------------------------------------------------


def build_run(config: Config, device: torch.device) -> Run:
    """Builds and checks everything that training needs; raises a ValueError that names what is wrong."""
    from model.lora import base_of
    from utils.training.engine import build_engine, build_model, deepspeed_settings
    from utils.training.group_samples import check_room

    mixture, benchmarks = open_data(config)
    adopt(config)
    exists = distributed.all_gather(config.run_folder.is_dir())[0]  # as the main process sees it
    lock = lock_folder(config) if exists else None
    start = find_start(config)
    contents = [{"content": content_of(dataset)} | source_of(dataset) for dataset in mixture.datasets]
    rows = [row | content for row, content in zip(mixture.describe(), contents, strict=True)]
    meta = checkpoints.describe_settings(config, rows)
    if start:
        saved_meta = checkpoints.check_same_run(start, meta)  # before minutes of loading
        check_steps_left(config, start, saved_meta["step"])
    settings = deepspeed_settings(config, distributed.world_size())
    model, processor, loaded = build_model(config)
    inner = base_of(model)
    if config.data.sam_feature_cache:
        cache_sam_features(inner, processor, config.data.sam_feature_cache, config.data.sam_feature_cache_gb)
    if config.model.compile_sam:
        inner.visual_model.compile_encoder()
    check_room(config.grpo, processor)
    engine = build_engine(model, config, settings)
    meta |= checkpoints.describe_model(model, processor, loaded)
    saved: dict[str, Any] = checkpoints.resume(engine, start, meta) if start else {"step": 0, "best": None}
    if not exists:
        lock = lock_folder(config)
        if find_start(config) != start:
            raise checkpoints.CheckpointError(f"{config.run_folder} was trained meanwhile; start again")
    log = open_log(config, saved["step"])
    best = saved["best"] if saved.get("best_of") == selection_criterion(config) else None  # else not comparable
    run = Run(config, device, engine, inner, processor, mixture, benchmarks, log, meta, lock, saved["step"], best)

    images = (config.total_steps - run.step) * config.images_per_step(distributed.world_size())
    log.print(f"{loading_table(loaded)}\n{unread_paths(config)}\n{parameter_table(model)}\n\n{mixture.table(images)}\n")
    log.print(describe_step(config, device))
    log.event("start", run.step, **describe_start(run, loaded, start), **meta)
    if start:
        log.print(f"resuming from {start} (step {run.step} of {config.total_steps})")
        saved_config = config_from(saved["config"], str(start))
        warn_of_layout(run, StepLayout.of(saved_config, saved["processes"]))
        planned = saved_config.total_steps
        if planned != config.total_steps:
            log.print(
                f"warning: the run was planned for {planned} steps and now has {config.total_steps}: the learning rate "
                "follows the new schedule from here on, and may rise"
            )
    if run.step < config.total_steps:
        trial = validate(run, limit=1)  # a benchmark that fails must not end the run after its first epoch
        if trial:
            selection_metric(run, trial)
    return run


def unread_paths(config: Config) -> str:
    """A line that names the paths that a finished model in ``--version`` makes needless, if there are any."""
    from model.loading.pretrained import resolve_start

    paths = config.model
    read = resolve_start(**config.start)
    beside = {"vision_tower": paths.vision_tower, "vision_pretrained": paths.vision_pretrained}
    given = [f"--{name} {path}" for name, path in beside.items() if path and name not in read]
    needs_sam = decoder_kind(config.start).has_encoder
    reason = "--version holds these parts" if needs_sam else "--version or the mask decoder replaces them"
    return f"not read, as {reason}: {', '.join(given)}\n" if given else ""


def describe_start(run: Run, loaded: Sequence[Loaded], start: Path | None) -> dict[str, Any]:
    """When, where and from what a run starts; ``parameters``: part -> number of its parameters, and of trained ones."""
    from model.lora import parameters_by_part

    return {
        "command": shlex.join(sys.argv),
        "resumed": str(start or ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(run.device),
        "weights": [vars(row) for row in loaded],
        "parameters": parameters_by_part(run.engine.module),
    }


def device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def describe_step(config: Config, device: torch.device) -> str:
    """Device and images per step, so that a run on the CPU, or with eight times the intended batch, is noticed."""
    name = device_name(device)
    if device.type == "cpu" and Path("/dev/nvidia0").exists():
        name += " (an NVIDIA GPU is present, but this torch cannot use it: is the driver too old?)"
    layout = StepLayout.of(config, distributed.world_size())
    processes = f"{counted(layout.processes, 'process', 'processes')} on {name}, {config.model.precision}"
    return f"{processes}; {counted(layout.images, 'image')} per step = {layout}\n"


def warn_of_layout(run: Run, before: StepLayout) -> None:
    """Says how a resumed run's steps are divided, if that has changed, and what they compute otherwise."""
    now = StepLayout.of(run.config, distributed.world_size())
    if now == before:
        return
    run.log.print(f"the same images per step as {now}; until the checkpoint {before}")
    if changed := effects(run.config, now, before):
        run.log.print(f"warning: the run differs from one without this change: {'; '.join(changed)}")


def open_data(config: Config) -> tuple[Mixture, list[EvalDataset]]:
    """The mixture and the benchmarks; raises a ConfigError that names everything missing on disk."""
    from utils.datasets.mixture import make_mixture

    problems, folder = missing_paths(config), config.data.dataset_dir
    mixture, benchmarks = None, []
    try:
        mixture = make_mixture(config) if Path(folder).is_dir() else None
    except DataError as error:
        problems.append(str(error))
    for spec in config.eval.val_dataset if Path(folder).is_dir() and not config.eval.no_eval else ():
        try:
            benchmarks.append(get_eval_dataset(spec, folder))
        except DataError as error:
            problems.append(str(error))
    metric = config.eval.val_metric
    if not problems and benchmarks and metric not in (known := benchmark_of(benchmarks[0].spec).metrics):
        problems.append(f"--val_metric {metric}: {benchmarks[0].spec} reports {', '.join(known)}")
    if problems or mixture is None:
        raise ConfigError(problems)
    return mixture, benchmarks


def find_start(config: Config) -> Path | None:
    """The checkpoint to resume from, or None. A run is resumed only on request."""
    folder, name = config.run_folder, config.train.exp_name
    index = checkpoints.read_index(folder)
    if config.train.resume:
        checkpoint = checkpoints.find_checkpoint(config.train.resume)
        if index and checkpoint.resolve().parents[1] != folder.resolve():
            raise checkpoints.CheckpointError(
                f"--resume {config.train.resume} would write to {folder}, which holds another run; give another "
                "--exp_name"
            )
        return checkpoint
    if index and not config.train.auto_resume:
        raise checkpoints.CheckpointError(
            f"{folder} holds a run already (checkpoint {index['latest']}). Resume it with --auto_resume true, start "
            f"another one with --exp_name {name}-2, or remove the folder"
        )
    return checkpoints.find_checkpoint(folder) if index else None


def check_steps_left(config: Config, start: Path, step: int) -> None:
    """Rejects a checkpoint past the run's end, or at the end of another run: nothing would be trained or written."""
    train, other = config.train, start.resolve().parents[1] != config.run_folder.resolve()
    if step > config.total_steps or (step == config.total_steps and other):
        raise checkpoints.CheckpointError(
            f"{start} is at step {step}, and --epochs {train.epochs} x --steps_per_epoch {train.steps_per_epoch} ends "
            f"at {config.total_steps}: nothing is left to train. Raise --epochs, or merge this checkpoint"
        )


def lock_folder(config: Config) -> TextIO | None:
    """Creates and locks the run's folder. All processes must call it.

    Raises:
        CheckpointError: if another run trains in it.
    """
    lock, problem = None, None
    if distributed.is_main():
        try:
            config.run_folder.mkdir(parents=True, exist_ok=True)
            lock = lock_run(config.run_folder)
        except checkpoints.CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--log_base_dir: {config.run_folder} cannot be written: {error.strerror}"
    distributed.raise_on_all_ranks(problem, checkpoints.CheckpointError)
    return lock


def open_log(config: Config, step: int) -> RunLog:
    """Saves the effective configuration in the run folder, and opens the log."""
    if distributed.is_main():
        config.save(config.run_folder / "config.yaml")
    distributed.barrier()
    train = config.train
    return RunLog(config.run_folder, step, config.total_steps, train.steps_per_epoch, train.report_to, to_dict(config))


# -- loop --------------------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Trains to the last step, with validation and a checkpoint after each epoch."""
    batches = iter(batches_from(run))
    meter = Meter(run.device, run.model.ppm.num_layers)
    settings = run.config.train
    run.engine.train()  # LoRA's dropout; evaluation switches it off and on again
    while run.step < run.config.total_steps:
        number = run.step + 1
        epoch_ends = number % settings.steps_per_epoch == 0
        saves = epoch_ends or (settings.save_every and number % settings.save_every == 0)
        # a step that is saved is logged: a loss that is not finite is seen before, and a resumed run's means are those
        # of the uninterrupted one
        logged = number == 1 or saves or number % settings.log_every == 0
        train_step(run, batches, meter, logged)
        if saves:
            save_step(run, validate(run) if epoch_ends else {})
            meter.restart()


def train_step(run: Run, batches: Iterator[TrainingBatch], meter: Meter, logged: bool) -> None:
    """One step: micro steps whose accumulated gradient is that of one large batch; repeated for ``grpo_updates``."""
    import torch

    from model.loading.placement import PRECISIONS
    from utils.training.engine import gradient_norms

    accumulation, seed = run.config.train.grad_accumulation_steps, run.config.train.seed
    dtype, lr, gradients = PRECISIONS[run.config.model.precision], run.engine.get_lr()[0], {}
    window, prompts = zip(*islice(batches, accumulation), strict=True)
    counts = distributed.mean(torch.stack([batch.counts for batch in window]).mean(0).to(run.device))
    check_answers(window, counts, run.step + 1)
    groups = sample_groups(run, window, prompts)
    last = (run.step + 1) * accumulation - 1
    for update in range(run.config.updates_per_step):
        for micro, (part, sampled) in enumerate(zip(window, groups, strict=True), start=run.step * accumulation):
            batch = replace(part, counts=counts).to(run.device, dtype)
            # ZeRO's offload reads it during the backward pass; DeepSpeed itself sets it too late for outputs like ours
            run.engine.set_gradient_accumulation_boundary(micro == last)
            # dropout is a function of (seed, micro step, rank), so that a resumed run is the uninterrupted one
            torch.manual_seed(((seed * 1_000_003 + micro) * 65_536 + distributed.rank()) % 2**63)
            output = run.engine(batch, all_layers=logged, sampled=sampled)
            run.engine.backward(output.loss)
            meter.add(output, 0 if update else len(batch.sizes))
            del output  # full-size masks and maps: freed before the next forward pass
            if logged and micro == last:
                gradients = gradient_norms(run.engine)
            run.engine.step()  # the optimizer steps at the last micro step only
    run.step += 1
    run.log.advance()
    if logged:
        values = meter.collect() | {"lr": lr, "gradient": float(run.engine.get_global_grad_norm())}
        values["skipped"] = int(run.mixture.skipped.sum())
        run.log.train(run.step, values, gradients)
        check_finite(values, run.step)
        if run.step == 1 and (silent := [part for part, norm in gradients.items() if norm == 0]):
            reason = "a loss weight of 0, or no mask in the batch?"
            if run.config.grpo.objective == "grpo":
                reason = "rewards train words and layers alone, where the answers of a group differ in reward"
            run.log.print(f"warning: no gradient in step 1 for {', '.join(silent)} ({reason})")


def sample_groups(
    run: Run, window: Sequence[Batch], prompts: Sequence[GroupPrompts | None]
) -> Sequence[SampledAnswers | None]:
    """Answers to the questions of a step's batches; None for each with objective ``supervised``."""
    import torch

    from model.loading.placement import PRECISIONS
    from utils.training.group_samples import sample_answers
    from utils.training.zero3 import gathered

    asked = [each for each in prompts if each is not None]
    if len(asked) < len(prompts):
        return [None] * len(prompts)
    settings, seed, dtype = run.config.grpo, run.config.train.seed, PRECISIONS[run.config.model.precision]
    answers = [float(settings.grpo_answers * sum(map(len, each.questions))) for each in asked]
    count = distributed.mean(torch.tensor(answers, device=run.device).mean())
    if settings.objective == "grpo" and count == 0:  # true in all processes or in none
        raise DataError(
            f"step {run.step + 1} has no question whose answers could be rewarded: name data with targets in "
            "--dataset, or raise --batch_size"
        )
    with gathered(run.engine):
        return [
            sample_answers(run.model, run.processor, part.to(run.device, dtype), each, count, settings, seed)
            for part, each in zip(window, asked, strict=True)
        ]


def check_answers(window: Sequence[Batch], counts: torch.Tensor, step: int) -> None:
    """Raises ``DataError`` if truncation left no answer in a step; ``counts`` are the means over all processes."""
    if not any(len(batch.label_ids) for batch in window) and counts[0] == 0:  # true in all processes or in none
        raise DataError(
            f"step {step} has no answer to learn: its conversations are so long that --model_max_length cuts all of "
            "them off; raise it, or shorten the questions"
        )


def collate(
    samples: Sequence[Sample], processor: UGroundProcessor, mixture: Mixture, grpo: GrpoSettings
) -> TrainingBatch:
    """A batch with its ground truth, and its questions where answers are sampled."""
    batch = processor.collate(samples, on_truncated=mixture.count_truncated)
    if grpo.objective == "supervised":
        return batch, None
    return batch, processor.group_prompts(samples, grpo.grpo_tokens, on_left_out=mixture.count_left_out)


def batches_from(run: Run) -> DataLoader:
    """All remaining batches, from the run's position in the mixture on."""
    from torch.utils.data import DataLoader

    from utils.datasets.mixture import MixtureSampler

    train_settings, accumulation = run.config.train, run.config.train.grad_accumulation_steps
    workers = run.config.data.workers
    run.mixture.check_image = run.processor.check_image
    sampler = MixtureSampler(
        train_settings.batch_size,
        run.step * accumulation,
        run.config.total_steps * accumulation,
        distributed.rank(),
        distributed.world_size(),
    )
    return DataLoader(
        run.mixture,
        batch_sampler=sampler,
        collate_fn=partial(collate, processor=run.processor, mixture=run.mixture, grpo=run.config.grpo),
        num_workers=workers,
        prefetch_factor=1 + -(-accumulation // workers) if workers else None,  # a whole step is fetched at once
        worker_init_fn=one_thread,
        pin_memory=run.device.type == "cuda",
    )


def one_thread(_worker: int) -> None:
    """Limits a worker to one thread: workers already share the cores."""
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


# -- validate and save -------------------------------------------------------------------------------------------------


def validate(run: Run, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Metrics per benchmark; with ``limit``, a trial on that many images, which is not logged."""
    from utils.evaluation import evaluate
    from utils.evaluation.engine import RunOptions
    from utils.training.zero3 import gathered

    settings, results = run.config.eval, {}
    think = "auto" if run.config.grpo.objective == "supervised" else run.config.grpo.grpo_think
    options = InferenceOptions(
        settings.val_mode, run.model.config.layer_policy, seed=run.config.train.seed, think=think
    )
    run_options = RunOptions(settings.val_batch_size, limit=limit or settings.val_limit or None)
    with gathered(run.engine) if run.benchmarks else contextlib.nullcontext():
        for dataset in run.benchmarks:
            results[str(dataset.spec)] = evaluate(run.model, run.processor, dataset, options, run_options).metrics
            if limit is None and settings.val_pictures and distributed.is_main():
                picture = validation_sheet(run.model, run.processor, dataset, options, settings.val_pictures)
                run.log.picture(run.step, dataset.spec.slug, picture)
    return results


def save_step(run: Run, results: dict[str, dict[str, float]]) -> None:
    """Logs the validation and writes a checkpoint; the first benchmark selects the best one."""
    is_best = False
    if results:
        value = selection_metric(run, results)
        is_best = value is not None and (run.best is None or value > run.best)
        run.best = value if is_best else run.best
        run.log.validation(run.step, results, is_best)
    meta = run.meta | {
        "step": run.step,
        "position": run.step * run.config.images_per_step(distributed.world_size()),
        "best": run.best,
        "best_of": selection_criterion(run.config),
        "metrics": results,
    }
    checkpoints.save_checkpoint(run.engine, run.config.run_folder, meta, is_best)


def selection_criterion(config: Config) -> list[Any]:
    """What the value ``best`` measures, for JSON; values of other criteria cannot be compared with it."""
    settings = config.eval
    specs = list(settings.val_dataset[:1])
    return [*specs, settings.val_metric, settings.val_mode, settings.val_limit, settings.val_layer_policy]


def selection_metric(run: Run, results: dict[str, dict[str, float]]) -> float | None:
    """The value that selects the best checkpoint; None, with a warning, if the benchmark does not report it."""
    spec, name = str(run.benchmarks[0].spec), run.config.eval.val_metric
    if name not in results[spec]:
        run.log.print(
            f"warning: --val_metric {name} is not reported by {spec} ({', '.join(results[spec])}): no best checkpoint"
        )
    return results[spec].get(name)


if __name__ == "__main__":
    distributed.exit_process(main())
