"""What UGround and related methods cost, beside Tables 10 and 11 of the paper (``scripts/bench.py --table``).

All methods are settings of configs/methods on one model with random weights, and alternate in one process; PixelLM,
which has no SAM, has a second model beside it. So a row differs from LISA's by the method alone, where the paper
compares the programs of five groups. Only ratios to LISA can be compared with the paper's: its seconds are another
machine's.

SESAME differs from LISA in its data alone. As the rows share their images and questions, its ratio shows the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.processing.tokens import SEG
from model.settings import decoder_kind
from model.structures import Sample
from utils.config import load_config
from utils.datasets.templates import joint_turn
from utils.diagnostics import memory_model, release_like
from utils.diagnostics.benchmark import PRESETS, Bench, Preset, in_turn, replaced, spread
from utils.plotting.text_tables import markdown

METHODS = Path(__file__).resolve().parents[2] / "configs/methods"
BASELINE, ENCODER = "LISA", "SAM encoder"
BATCH_SIZES = (1, 8)  # images answered at a time; the paper has 1
MB = 2**20


# -- the paper ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaperCost:
    """A row of the paper's tables: seconds per training step, GB (MaxMemAllocated), percent of the parameters that
    train, their number and that of all in millions, answered images per second."""

    seconds: float
    gigabytes: float
    share: float
    trainable: float
    total: float
    answers: float


SOURCE = (
    "Tables 10 and 11 of the UGround paper: 7B, one A100-SXM4-40GB, ReasonSeg, steps of 2 images, answers one by one"
)
PAPER = {
    "SESAME": PaperCost(1.11, 23.15, 3.73, 288.25, 7730, 4.64),
    "PixelLM": PaperCost(1.22, 23.02, 5.25, 375.72, 7160, 9.24),
    "LISA": PaperCost(1.26, 23.68, 3.74, 288.25, 7710, 4.68),
    "GSVA": PaperCost(2.13, 25.73, 3.73, 288.26, 7730, 3.98),
    "UGround": PaperCost(2.97, 28.16, 3.72, 288.40, 7750, 4.12),
}


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row of the tables.

    Attributes:
        method: file in configs/methods. layout: ``packed``, ``unpacked`` (a row per question) or ``release``.
        checkpointing: gradient checkpointing of LLaMA's layers, as the release has it on.
    """

    name: str
    method: str
    layout: str = "packed"
    checkpointing: bool = False


CASES = (
    Case("UGround", "uground"),
    Case("UGround, checkpointing", "uground", checkpointing=True),
    Case("UGround, unpacked", "uground", "unpacked"),
    Case("LISA", "lisa"),
    Case("LISA, unpacked", "lisa", "unpacked"),
    Case("SESAME", "sesame"),
    Case("GSVA", "gsva"),
    Case("READ", "read"),
    Case("release-like", "uground", "release"),
    Case("release-like, checkpointing", "uground", "release", checkpointing=True),
    Case("PixelLM", "pixellm"),
)
# A question per image is a row in any layout, and answers need no backward pass.
ANSWERING = tuple(case for case in CASES if case.layout != "unpacked" and not case.checkpointing)


@dataclass(frozen=True)
class Method:
    """A file in configs/methods.

    Attributes:
        settings: of the method, as ``Bench.configure`` takes them. decoder: of ``DecoderSettings``, for ``Bench``.
        frozen: parts that do not train.
        lists_targets: whether one question lists all targets of an image, as GSVA's do.
    """

    settings: dict[str, Any]
    decoder: dict[str, Any]
    frozen: tuple[str, ...]
    lists_targets: bool

    @property
    def has_sam(self) -> bool:
        return decoder_kind(self.decoder).has_encoder

    def apply(self, bench: Bench) -> None:
        bench.configure(self.settings, self.frozen)


@cache
def method_of(name: str) -> Method:
    """The method of ``configs/methods/NAME.yaml``."""
    config = load_config(["--config", str(METHODS / f"{name}.yaml")], needs=())
    decoder = vars(config.decoder)
    settings = {key: value for key, value in config.method.items() if key not in decoder}
    return Method(settings, decoder, tuple(config.model.freeze), config.data.joint_probability > 0)


class Benches:
    """A ``Bench`` for each mask decoder of the cases, made when it is first needed: it then does not count in what
    others hold."""

    def __init__(self, preset: Preset, device: str, folder: str) -> None:
        self.preset, self.device, self.folder = preset, device, folder
        self.sam = Bench(preset, device, folder)

    @cached_property
    def without_sam(self) -> Bench:
        """PixelLM's, with its decoder as wide as SAM's, and CLIP's input as much larger as at full size."""
        decoder, clip_side = method_of("pixellm").decoder, self.preset.clip.image_size
        sizes = {
            "clip_resize": decoder["clip_resize"] * clip_side // PRESETS["7b"].clip.image_size,
            "decoder_width": self.preset.sam.prompt_width,
        }
        return Bench(self.preset, self.device, self.folder, decoder | sizes)

    def of(self, case: Case) -> Bench:
        return self.sam if method_of(case.method).has_sam else self.without_sam


def joint(sample: Sample) -> Sample:
    """The sample with one question about all of its targets."""
    expressions = [turns[0].question for turns in sample.conversations]
    return replace(sample, conversations=[(joint_turn(expressions, [SEG] * len(expressions)),)])


def training_call(bench: Bench, case: Case, samples: list[Sample]) -> Callable[[], None]:
    """A call that takes the case's training step, SAM's features from the cache."""
    method = method_of(case.method)
    if case.layout == "release":
        step = release_like.training(bench, samples)
    else:
        samples = [joint(sample) for sample in samples] if method.lists_targets else samples
        step = partial(bench.step, bench.batch(samples, packed=case.layout == "packed"))

    def call() -> None:
        method.apply(bench)
        with bench.checkpointing() if case.checkpointing else nullcontext():
            step()

    return call


def answering_seconds(bench: Bench, case: Case, samples: list[Sample]) -> float:
    """Seconds to answer each sample's question in 12 tokens, with a mask."""
    method_of(case.method).apply(bench)
    if case.layout == "release":
        return bench.seconds(release_like.answering(bench, samples))
    return bench.seconds(bench.answering(bench.prompts(samples)))


def reason_samples(bench: Bench, numbers: Iterable[int]) -> list[Sample]:
    """Images in the shapes of photographs, each with one question, in turn a phrase and a sentence, as in ReasonSeg."""
    height, width = bench.preset.size
    sizes = (height, width), (width * 2 // 3, width), (width, height), (height, height)
    queries = ("something that a person could sit on", "where in this image would somebody look for the time of day?")
    samples = []
    for number in numbers:
        (sample,) = bench.samples(1, images=1, size=sizes[number % len(sizes)])
        (turn,) = sample.conversations[0]
        talk = (replace(turn, question=queries[number % len(queries)]),)
        samples.append(replace(sample, conversations=[talk], sample_id=number))
    return samples


# -- measurements ------------------------------------------------------------------------------------------------------


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """Numbers of the parameters: all, and those that train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {"trainable": sum(size for size, trains in sizes if trains), "total": sum(size for size, _ in sizes)}


def encoder_call(bench: Bench) -> Callable[[], Any]:
    """A call of SAM's encoder for one image, warmed up. It encodes images one by one: it is timed apart and added."""
    call = partial(bench.sam_encoder().encode, bench.batch(bench.samples(1, images=1)).sam_images)
    call()
    return call


@cache
def counts_at_7b(method: str) -> dict[str, int]:
    """``parameter_counts`` of a file in configs/methods at LLaVA-1.5 7B's shape; allocates no memory."""
    found = method_of(method)
    shape = memory_model.preset("7b", **found.settings, **found.decoder)
    total, trainable, _ = memory_model.count_parameters(shape, PRESETS["7b"].lora_r, frozen=found.frozen)
    return {"trainable": trainable, "total": total}


def training_costs(benches: Benches, repeats: int, questions: int) -> dict[str, dict[str, Any]]:
    """Per case: seconds of a training step, peak bytes (SAM's features from the cache), parameters, ratios to LISA.

    Args:
        questions: per image.
    """
    samples, rows = benches.sam.samples(questions), dict[str, dict[str, Any]]()
    calls: dict[str, Callable[[], Any]] = {}
    for case in CASES:  # their warm-up, while no other case's batch is in memory
        bench = benches.of(case)
        training_call(bench, case, samples)()  # the optimizer creates its state
        peak = bench.peak(training_call(bench, case, samples))
        counts = {**parameter_counts(bench.wrapped), "at_7b": counts_at_7b(case.method)}
        rows[case.name] = {"peak_bytes": peak, "parameters": counts}
    calls |= {case.name: training_call(benches.of(case), case, samples) for case in CASES}
    calls[ENCODER] = encoder_call(benches.sam)
    times = {name: np.array(seconds) for name, seconds in in_turn(benches.sam, calls, repeats).items()}
    encoding = {case.name: len(samples) * times[ENCODER] * method_of(case.method).has_sam for case in CASES}
    baseline = times[BASELINE]
    for name, row in rows.items():
        row["seconds"] = _spread(times[name])
        row["to_lisa"] = _spread(times[name] / baseline)
        row["to_lisa_with_encoder"] = _spread((times[name] + encoding[name]) / (baseline + encoding[BASELINE]))
        row["peak_to_lisa"] = row["peak_bytes"] / rows[BASELINE]["peak_bytes"]
    return rows


def answering_costs(benches: Benches, repeats: int, limit: int) -> dict[str, dict[str, Any]]:
    """Per case and number of images at a time: answered images per second with SAM's encoder, and without it.

    Args:
        limit: images to answer, at least the largest of ``BATCH_SIZES``.
    """
    bench = benches.sam
    sam: Any = bench.model.visual_model
    embeddings = torch.randn(max(BATCH_SIZES), *sam.feature_shape)
    embeddings = embeddings.to(bench.device, bench.model.dtype)
    encode, encoding = encoder_call(bench), np.zeros(repeats)
    times = {size: {case.name: np.zeros(repeats) for case in ANSWERING} for size in BATCH_SIZES}
    with replaced(sam, encode=lambda images, keys: embeddings[: len(images)]):
        for case in ANSWERING:  # the warm-up
            answering_seconds(benches.of(case), case, reason_samples(bench, range(1)))
        for turn in range(repeats):
            encoding[turn] = limit * bench.seconds(encode)
            for size, seconds in times.items():
                for start in range(0, limit, size):
                    samples = reason_samples(bench, range(start, min(start + size, limit)))
                    for case in ANSWERING:
                        seconds[case.name][turn] += answering_seconds(benches.of(case), case, samples)
    rows: dict[str, dict[str, Any]] = {}
    for case in ANSWERING:
        own = encoding * method_of(case.method).has_sam
        rows[case.name] = {
            str(size): _speed(seconds[case.name] + own, seconds[BASELINE] + encoding, limit)
            | {"without_encoder": _speed(seconds[case.name], seconds[BASELINE], limit)}
            for size, seconds in times.items()
        }
    return rows


def _speed(seconds: np.ndarray, baseline: np.ndarray, images: int) -> dict[str, Any]:
    return {"answers_per_second": _spread(images / seconds), "to_lisa": _spread(baseline / seconds)}


def _spread(values: np.ndarray) -> dict[str, float]:
    return spread(values.tolist())


# -- Markdown ----------------------------------------------------------------------------------------------------------


def training_tables(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Table 10: time and memory, then parameters."""
    lisa = PAPER[BASELINE]
    costs = [["", "s", "spread", "/ LISA", "the same with SAM's encoder", "paper", "peak MB", "/ LISA", "paper"]]
    sizes = [["parameters", "trainable", "total", "share", "at 7B", "total", "share", "paper", "total", "share"]]
    for name, row in rows.items():
        paper, seconds, counts = PAPER.get(name), row["seconds"], row["parameters"]
        times = [f"{seconds['median']:.3f}", f"{seconds['min']:.3f} to {seconds['max']:.3f}"]
        times += [_ratio(row["to_lisa"]), _ratio(row["to_lisa_with_encoder"])]
        times.append(f"{paper.seconds / lisa.seconds:.2f}" if paper else "")
        memory = [f"{row['peak_bytes'] / MB:,.0f}", f"{row['peak_to_lisa']:.2f}"]
        memory.append(f"{paper.gigabytes / lisa.gigabytes:.2f}" if paper else "")
        costs.append([name, *times, *memory])
        theirs = _counts(paper.trainable * 1e6, paper.total * 1e6, paper.share) if paper else [""] * 3
        sizes.append([name, *_counts(counts["trainable"], counts["total"]), *_counts(**counts["at_7b"]), *theirs])
    return [
        f"Ratios are to LISA in this run; the paper's to its own LISA, with {lisa.seconds} s and {lisa.gigabytes} GB",
        f"paper: {SOURCE}",
        "",
        markdown(costs, "lr"),
        "",
        markdown(sizes, "lr"),
    ]


def answering_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Table 11."""
    lisa = PAPER[BASELINE]
    cells = [["answers/s", *_heads("", " at a time"), "paper, 1", *_heads("without SAM's encoder, ", "")]]
    for name, row in rows.items():
        paper, whole = PAPER.get(name), [row[str(size)] for size in BATCH_SIZES]
        theirs = f"{paper.answers / lisa.answers:.2f}" if paper else ""
        cells.append([name, *_speeds(whole), theirs, *_speeds([each["without_encoder"] for each in whole])])
    return [
        f"Ratios are to LISA in this run; the paper's to its own LISA, with {lisa.answers} answers/s",
        f"paper: {SOURCE}",
        "",
        markdown(cells, "lr"),
    ]


def _heads(before: str, after: str) -> list[str]:
    return [cell for size in BATCH_SIZES for cell in (f"{before}{size}{after}", "/ LISA")]


def _speeds(figures: list[dict[str, Any]]) -> list[str]:
    return [
        cell for each in figures for cell in (f"{each['answers_per_second']['median']:.2f}", _ratio(each["to_lisa"]))
    ]


def _counts(trainable: float, total: float, share: float | None = None) -> list[str]:
    """Numbers in millions, and the share in percent; ``share``: as published."""
    percent = 100 * trainable / total if share is None else share
    return [
        f"{trainable / 1e6:,.2f}M",
        f"{total / 1e6:,.0f}M" if total > 1e8 else f"{total / 1e6:,.2f}M",
        f"{percent:.2f}%",
    ]


def _ratio(figures: dict[str, float]) -> str:
    return f"{figures['median']:.2f}"
