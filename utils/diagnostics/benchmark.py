"""The model benchmark of scripts/bench.py: time and memory of a model with random weights and a preset's shape.

Times are processor time on a CPU (other programs may run) and wall time on a GPU. Compared cases alternate in one
process, after a warm-up; a ratio is the median over the repeats.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPVisionConfig

from model.config import UGroundConfig
from model.decoders.segment_anything import SamShape, SegmentAnything
from model.group_policy import SampledAnswers
from model.loading.placement import PRECISIONS
from model.lora import add_lora, set_trainable
from model.opened import cache_sam_features
from model.processing.processor import UGroundProcessor
from model.processing.tokens import add_special_tokens
from model.settings import GrpoSettings
from model.structures import Batch, Sample, Turn
from model.UGround import UGroundForCausalLM
from utils.demo.tiny_model import clip_config, llama_settings, sam_shape
from utils.diagnostics import memory_model, process_memory
from utils.diagnostics.memory_probe import random_weights
from utils.training.group_samples import sample_answers

ROOT = Path(__file__).resolve().parents[2]
UGROUND: dict[str, Any] = {
    "layer_selection": "policy",
    "mask_prompt": True,
    "map_terms": ("gaussian_bce", "gaussian_dice"),
    "policy_gradient": "reinforce",
}
EXACT = UGROUND | {"policy_gradient": "exact"}
LISA_STYLE = UGROUND | {"layer_selection": "last", "mask_prompt": False, "map_terms": ()}  # the last layer, no maps
ANSWER = "Sure, it is [SEG]."


@dataclass(frozen=True)
class Preset:
    """Shapes of the model and of a training step.

    ``tiny`` has the layers of assets/tiny. ``medium`` is for a CPU: a small LLaMA with CLIP at its full input and SAM
    ViT-B; it is not the ``medium`` of ``memory_model``, whose SAM is smaller.

    Attributes:
        llama: arguments of ``llama_settings``, except the vocabulary. batch: images. questions: per image.
        size: (height, width) of the images. precision: of ``PRECISIONS``. gpu: whether a GPU is required.
    """

    llama: dict[str, int]
    clip: CLIPVisionConfig
    sam: SamShape
    lora_r: int = 8
    batch: int = 2
    questions: int = 3
    size: tuple[int, int] = (480, 640)
    precision: str = "fp32"
    gpu: bool = False


def _large(name: str, lora_r: int) -> Preset:
    """LLaVA-1.5 ``7b`` or ``13b`` with SAM ViT-H, of the shapes that scripts/doctor.py --memory computes with."""
    shape = memory_model.preset(name)
    llama = {
        "width": shape.hidden_size,
        "layers": shape.num_hidden_layers,
        "heads": shape.num_attention_heads,
        "mlp": shape.intermediate_size,
    }
    return Preset(
        llama, CLIPVisionConfig.from_dict(shape.vision_config), SamShape(), lora_r=lora_r, precision="bf16", gpu=True
    )


SAM_VIT_B = SamShape(encoder_width=768, encoder_depth=12, encoder_heads=12, global_attention=(2, 5, 8, 11))
PRESETS = {
    "tiny": Preset({}, clip_config(), sam_shape(), size=(120, 160)),
    "medium": Preset(
        {"width": 512, "layers": 12, "heads": 8}, clip_config(336, 14, 256, 6), SAM_VIT_B, batch=1, questions=3
    ),
    "7b": _large("7b", 8),
    "13b": _large("13b", 64),
}


class Bench:
    """A model with random weights, and the steps to time.

    Args:
        device: ``cpu`` or a GPU. folder: of the cache of SAM's features.
        decoder: settings of ``DecoderSettings``; None = SAM.
    """

    def __init__(self, preset: Preset, device: str, folder: str, decoder: Mapping[str, Any] | None = None) -> None:
        self.preset, self.device = preset, torch.device(device)
        self.baseline_bytes = self._allocated()
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny/llava")
        config = UGroundConfig(
            vision_config=preset.clip.to_dict(),
            sam_config=preset.sam.to_dict(),
            **(decoder or {}),
            **llama_settings(memory_model.VOCABULARY, **preset.llama),
        )
        add_special_tokens(tokenizer, config.codebook_size)
        if not preset.gpu:
            config.vocab_size = len(tokenizer)
        self.processor = UGroundProcessor(tokenizer, **config.processor_settings())
        ids = self.processor.tokens
        config.seg_token_id, config.rej_token_id = ids.seg, ids.rej
        config.codebook_ids = self.processor.codebook
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft uses its old name
        torch.manual_seed(0)
        with random_weights(self.device, PRECISIONS[preset.precision]):
            self.model = UGroundForCausalLM(config)
            self.wrapped = add_lora(self.model, preset.lora_r)
        self.wrapped.train()
        self.optimizer = torch.optim.AdamW(self.trained(), lr=1e-6, fused=True)
        self.configure(UGROUND)
        if config.decoder_kind.has_encoder:
            cache_sam_features(self.model, self.processor, folder, 10.0)

    def configure(self, settings: Mapping[str, Any], frozen: Collection[str] = ()) -> None:
        """Switches to another method on the same weights.

        Args:
            frozen: parts that do not train (``--freeze``).
        """
        for name, value in settings.items():
            setattr(self.model.config, name, value)
        self.processor.keep_padding = self.model.config.reads_padding
        set_trainable(self.wrapped, frozen)
        known = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        if new := [parameter for parameter in self.trained() if parameter not in known]:
            self.optimizer.add_param_group({"params": new})

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that the method trains."""
        return [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]

    def samples(
        self, questions: int, segs: int = 1, images: int = 0, size: tuple[int, int] | None = None
    ) -> list[Sample]:
        """Random images with ``questions`` questions, each answered with ``segs`` masks."""
        height, width = size or self.preset.size
        answer = ANSWER.replace("[SEG]", " and ".join(["[SEG]"] * segs))
        samples = []
        for number in range(images or self.preset.batch):
            rng = np.random.default_rng(number)
            small = rng.integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
            image = np.ascontiguousarray(small.repeat(16, 0).repeat(16, 1)[:height, :width])
            masks = np.zeros((questions * segs, height, width), np.uint8)
            for k, mask in enumerate(masks):
                mask[height // 8 : height // 2, (k % 8) * width // 16 : (k % 8 + 6) * width // 16] = 1
            turns: list[tuple[Turn, ...]] = [
                (Turn(f"Where is the small blue thing {k} beside it?", answer),) for k in range(questions)
            ]
            samples.append(Sample(f"random/{number}", image, turns, masks, number))
        return samples

    def batch(self, samples: list[Sample], packed: bool = True) -> Batch:
        """A batch on the device, its SAM features in the cache. Unpacked: a row per question, as in LISA."""
        if not packed:
            samples = [row for sample in samples for row in separate(sample)]
        batch = self.processor.collate(samples).to(self.device, PRECISIONS[self.preset.precision])
        return self._cached(batch)

    @contextmanager
    def padded_patches(self) -> Iterator[None]:
        """Batches that are built inside have tokens for padded patches."""
        self.processor.keep_padding = True
        try:
            yield
        finally:
            self.processor.keep_padding = False

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Gradient checkpointing of LLaMA's layers inside."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield
        finally:
            self.model.gradient_checkpointing_disable()

    def _cached(self, batch: Batch) -> Batch:
        """Fills the cache with random SAM features: no time depends on their values."""
        decoder: Any = self.model.visual_model
        if decoder.cache is not None:  # else it has no image encoder
            shape = decoder.feature_shape
            decoder.cache.get(batch.image_keys, batch.sam_images, lambda x: torch.randn(len(x), *shape).to(x))
        return batch

    def step(self, batch: Batch, sampled: SampledAnswers | None = None) -> None:
        """A training step: forward, backward, optimizer."""
        self.wrapped(batch, sampled=sampled).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sampled_step(self, samples: list[Sample], objective: str) -> Callable[[], None]:
        """A training step with sampled answers of 32 tokens and one [SEG]; SAM's features come from the cache."""
        settings = GrpoSettings(objective=objective, grpo_tokens=32)
        batch, prompts = self.batch(samples), self.processor.group_prompts(samples, settings.grpo_tokens)
        count = torch.tensor(float(settings.grpo_answers * len(prompts.targets)), device=self.device)

        def call() -> None:
            self.configure(UGROUND)
            with self.scripted_answers(length=settings.grpo_tokens):
                sampled = sample_answers(self.model, self.processor, batch, prompts, count, settings, 0)
            self.step(batch, sampled)

        return call

    @contextmanager
    def scripted_answers(self, segs: int = 1, length: int = 12) -> Iterator[None]:
        """The model generates ``length`` tokens, among them ``segs`` [SEG], at the usual cost; with a codebook, each
        [SEG] is several tokens more."""
        ids, codebook = self.processor.tokens, self.model.config.codebook
        script: Iterator[int] = iter(())

        def force(_module, _inputs, logits: torch.Tensor) -> torch.Tensor:
            nonlocal script
            token = next(script, None)
            if token is None:  # the next answer starts
                script = iter([*codebook] * segs + [5] * (length - segs - 1) + [ids.eos])
                token = next(script)
            logits[..., token] = 1e4  # finite, as answers may be sampled
            return logits

        hook = self.model.lm_head.register_forward_hook(force)
        try:
            yield
        finally:
            hook.remove()

    def ask(self, questions: int = 1, answers: bool = False, images: int = 1, **options) -> Callable[[], None]:
        """A call that answers questions about each image with masks: 12 generated tokens, or a teacher-forced answer.
        SAM's features come from the cache."""
        return self.answering(self._cached(self.prompts(self.samples(questions, images=images), answers)), **options)

    def prompts(self, samples: list[Sample], answers: bool = False) -> Batch:
        """The samples' questions on the device, to be answered, or with ``answers`` to be teacher-forced."""
        turns = [[talk[0] if answers else Turn(talk[0].question) for talk in s.conversations] for s in samples]
        batch = self.processor.prompts([sample.image for sample in samples], turns)
        return batch.to(self.device, PRECISIONS[self.preset.precision])

    def answering(self, batch: Batch, **options) -> Callable[[], None]:
        """A call that answers the batch of ``prompts``."""

        def call() -> None:
            self.wrapped.eval()
            with self.scripted_answers():
                self.model.predict(batch, max_new_tokens=11 + len(self.model.config.codebook), **options)
            self.wrapped.train()

        return call

    def generate_without_cache(self) -> None:
        """Generates 12 tokens with a forward pass of the whole sequence for each; the vision tower runs once."""
        batch = self.prompts(self.samples(1, images=1))
        self.wrapped.eval()
        with torch.inference_mode(), self.scripted_answers():
            features = self.model.encode_images(batch.pixel_values, batch.image_cells)
            with replaced(self.model, encode_images=lambda *_: features):
                for _ in range(12):
                    hidden = self.model.forward_language(batch).hidden[-1]
                    token = self.model.lm_head(hidden[:, -1:]).argmax(-1)
                    batch.input_ids = torch.cat([batch.input_ids, token], 1)
                    batch.segment_ids = torch.cat([batch.segment_ids, torch.ones_like(token)], 1)
                    batch.position_ids = torch.cat([batch.position_ids, batch.position_ids[:, -1:] + 1], 1)
        self.wrapped.train()

    def generate_with_cache(self) -> None:
        """Generates 12 tokens with the KV cache."""
        batch = self.prompts(self.samples(1, images=1))
        self.wrapped.eval()
        with self.scripted_answers(segs=0):
            self.model.answer(batch, max_new_tokens=12)
        self.wrapped.train()

    def sam_encoder(self) -> SegmentAnything:
        """The model's SAM without the cache of features."""
        sam: Any = copy.copy(self.model.visual_model)
        sam.cache = None
        return sam

    @contextmanager
    def without_sam(self) -> Iterator[None]:
        """SAM's modules and its upscaling cost nothing; masks are constant, but have a gradient."""
        sam: Any = self.model.visual_model

        def decode(
            embeddings: torch.Tensor, tokens: torch.Tensor, prompts: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return tokens.mean((1, 2))[:, None, None], tokens.mean((1, 2))

        def postprocess(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
            return masks.float().expand(-1, *size)

        zeros = torch.zeros(1, *sam.feature_shape, device=self.device).to(PRECISIONS[self.preset.precision])

        def encode(images: torch.Tensor, keys: list[str]) -> torch.Tensor:
            return zeros.expand(len(images), *sam.feature_shape)

        with replaced(sam, encode=encode, decode=decode, postprocess=postprocess):
            yield

    # -- measurements --------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds: wall time after the GPU has finished, or processor time on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _allocated(self) -> int:
        """Bytes of the GPU, or of the process, without what is free."""
        gc.collect()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated()
        if process_memory.CLEAR_REFS.exists():
            ctypes.CDLL(None).malloc_trim(0)
        return process_memory.resident()

    def seconds(self, call: Callable[[], Any]) -> float:
        start = self.now()
        call()
        return self.now() - start

    def peak(self, call: Callable[[], Any]) -> float:
        """Peak bytes while ``call`` runs, weights included, above what GPU or process held before this model."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() - self.baseline_bytes
        if not process_memory.CLEAR_REFS.exists():
            return math.nan
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: freed memory is returned at once
        libc.malloc_trim(0)
        process_memory.forget_peak()
        call()
        peak = process_memory.peak_resident() - self.baseline_bytes
        libc.mallopt(-3, 2**25)
        return peak

    def parts(self, batch: Batch, samples: list[Sample], repeats: int) -> dict[str, float]:
        """Median seconds of the parts of a step."""
        model, sam, repeated = self.model, self.model.visual_model, []
        watched = {
            "CLIP": (model, "encode_images"),
            "LLaMA forward": (model, "forward_packed"),
            "policy + similarity": (model, "ground"),
            "SAM features from disk": (sam, "encode"),
            "maps, SAM decoder": (model, "mask_as_prompt"),
            "losses": (model, "objective"),
        }
        for turn in range(repeats + 1):
            times: dict[str, float] = {"data": self.seconds(lambda: self.processor.collate(samples))}
            changes: dict[int, tuple[Any, dict[str, Any]]] = {}
            for part, (owner, name) in watched.items():
                changes.setdefault(id(owner), (owner, {}))[1][name] = self._timed(getattr(owner, name), part, times)
            with ExitStack() as stack:
                for owner, methods in changes.values():
                    stack.enter_context(replaced(owner, **methods))
                self._step_in_parts(batch, times)
            if turn:
                repeated.append(times)
        return {part: statistics.median(times[part] for times in repeated) for part in repeated[0]}

    def _timed(self, call: Callable, part: str, times: dict[str, float]) -> Callable:
        def timed(*args, **kwargs):
            start = self.now()
            result = call(*args, **kwargs)
            times[part] = times.get(part, 0.0) + self.now() - start
            if part == "LLaMA forward":  # reached when the backward pass of all later parts is done
                result.hidden[-1].register_hook(lambda _: times.update(reached=self.now()))
            return result

        return timed

    def _step_in_parts(self, batch: Batch, times: dict[str, float]) -> None:
        start = self.now()
        output = self.wrapped(batch)
        middle = self.now()
        output.loss.backward()
        end = self.now()
        reached = times.pop("reached")
        times["other forward"] = middle - start - sum(v for k, v in times.items() if k != "data")
        times["backward of losses, SAM, maps"], times["LLaMA backward"] = reached - middle, end - reached
        times["optimizer"] = self.seconds(lambda: (self.optimizer.step(), self.optimizer.zero_grad()))
        times["whole step without data"] = self.now() - start


def separate(sample: Sample) -> list[Sample]:
    """A sample per question, the image repeated."""
    return [
        replace(sample, conversations=[conversation], masks=masks) for conversation, masks in sample.by_conversation()
    ]


@contextmanager
def replaced(owner: torch.nn.Module, **methods: Any) -> Iterator[None]:
    """Temporarily replaces methods of this instance."""
    before = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    vars(owner).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(owner)[name]
        vars(owner).update(before)


# -- ratios ------------------------------------------------------------------------------------------------------------


@dataclass
class Ratio:
    """A ratio of seconds, (a + plus) / (b + plus), of cases by name.

    Attributes:
        bar: the largest acceptable median. values: of all repeats.
    """

    name: str
    a: str
    b: str
    bar: float | None = None
    plus: str = ""
    values: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        return {**spread(self.values), "bar": self.bar}


def ratios() -> list[Ratio]:
    return [
        Ratio("packed / unpacked step without SAM, 3 questions", "packed 3", "unpacked 3", 0.50),
        Ratio("packed / unpacked step without SAM, 6 questions", "packed 6", "unpacked 6", 0.35),
        Ratio("padded patches left out / kept, step without SAM, 1 question", "packed 1", "padded 1"),
        Ratio("padded patches left out / kept, step without SAM, 3 questions", "packed 3", "padded 3"),
        Ratio("padded patches left out / kept, written, cached features", "1 question", "1 question, padded"),
        Ratio("UGround / fixed last layer, both packed", "UGround", "LISA", 1.10),
        Ratio("UGround packed / fixed last layer unpacked, cached features", "UGround", "LISA unpacked", 0.55),
        Ratio("policy_gradient exact / reinforce", "exact", "UGround"),
        Ratio("objective grpo / supervised, 8 answers of 32 tokens a question", "grpo", "UGround"),
        Ratio("objective both / supervised, the same", "both", "UGround"),
        Ratio("12 tokens with KV cache / without", "written", "written without cache", 0.20),
        Ratio("8 questions / 1, written, whole query", "8 questions", "1 question", 2.5, "SAM encoder"),
        Ratio("8 expressions / 1, answers given, whole query", "8 given", "1 given", 3.0, "SAM encoder"),
        Ratio("mc:16 / argmax, written, whole query", "mc:16", "1 question", 1.5, "SAM encoder"),
        Ratio("8 questions / 1, written, cached features", "8 questions", "1 question"),
        Ratio("8 expressions / 1, answers given, cached features", "8 given", "1 given"),
        Ratio("mc:16 / argmax, written, cached features", "mc:16", "1 question"),
        Ratio("best:4 / argmax, written, whole query", "best:4", "1 question", None, "SAM encoder"),
        Ratio("best:4 / argmax, written, cached features", "best:4", "1 question"),
        Ratio("best:8 / argmax, written, whole query", "best:8", "1 question", None, "SAM encoder"),
        Ratio("best:8 / argmax, written, cached features", "best:8", "1 question"),
        Ratio("8 images / 1, written, cached features", "8 images", "1 question"),
        Ratio("SAM's encoder compiled / as it is", "SAM encoder compiled", "SAM encoder"),
    ]


WARM_UP = ("packed 3", "UGround", "1 question", "1 given", "SAM encoder compiled")


def cases(bench: Bench, compiled: bool) -> dict[str, Callable[[], Any]]:
    """All cases that ratios compare, as calls that run them once; ``compiled``: include the compiled SAM encoder."""
    one, three, six = (bench.samples(questions) for questions in (1, 3, 6))
    default = bench.samples(bench.preset.questions)

    def train(settings: dict[str, Any], batch: Batch, sam: bool = True) -> Callable[[], None]:
        def call() -> None:
            bench.configure(settings)
            with nullcontext() if sam else bench.without_sam():
                bench.step(batch)

        return call

    packed, unpacked = bench.batch(default), bench.batch(default, packed=False)
    calls: dict[str, Callable[[], Any]] = {
        "packed 1": train(UGROUND, bench.batch(one), sam=False),
        "packed 3": train(UGROUND, bench.batch(three), sam=False),
        "unpacked 3": train(UGROUND, bench.batch(three, packed=False), sam=False),
        "packed 6": train(UGROUND, bench.batch(six), sam=False),
        "unpacked 6": train(UGROUND, bench.batch(six, packed=False), sam=False),
        "UGround": train(UGROUND, packed),
        "LISA": train(LISA_STYLE, packed),
        "LISA unpacked": train(LISA_STYLE, unpacked),
        "exact": train(EXACT, packed),
        **{objective: bench.sampled_step(default, objective) for objective in ("grpo", "both")},
        "written": bench.generate_with_cache,
        "written without cache": bench.generate_without_cache,
    }
    calls |= {"1 question": bench.ask(1), "8 questions": bench.ask(8), "8 images": bench.ask(images=8)}
    calls |= {rule: bench.ask(1, layer_policy=rule) for rule in ("mc:16", "best:4", "best:8")}
    calls |= {"1 given": bench.ask(1, answers=True), "8 given": bench.ask(8, answers=True)}
    with bench.padded_patches():
        for questions, samples in ((1, one), (3, three)):
            calls[f"padded {questions}"] = train(UGROUND, bench.batch(samples), sam=False)
        calls["1 question, padded"] = bench.ask(1)
    image = bench.batch(bench.samples(1, images=1)).sam_images
    sam = bench.sam_encoder()
    calls["SAM encoder"] = partial(sam.encode, image)
    if compiled:
        compiled_sam = copy.deepcopy(sam)
        compiled_sam.compile_encoder()
        calls["SAM encoder compiled"] = partial(compiled_sam.encode, image)
    return calls


def compare_cases(
    bench: Bench, repeats: int, compiled: bool = False
) -> tuple[list[Ratio], dict[str, dict[str, float]]]:
    """All ratios, and the seconds (for some also peak bytes) of every case."""
    calls = cases(bench, compiled)
    rows = [row for row in ratios() if row.a in calls]
    for name in WARM_UP:
        if name in calls:
            calls[name]()
    times = in_turn(bench, calls, repeats)
    for row in rows:
        plus = times[row.plus] if row.plus else [0.0] * repeats
        row.values = [(a + p) / (b + p) for a, b, p in zip(times[row.a], times[row.b], plus, strict=True)]
    memory = {name: bench.peak(calls[name]) for name in ("UGround", "LISA", "LISA unpacked")}
    peak = Ratio("the same, peak memory", "UGround", "LISA", 1.05, values=[memory["UGround"] / memory["LISA"]])
    rows.insert(1 + [row.name for row in rows].index("UGround / fixed last layer, both packed"), peak)
    seconds = {
        name: spread(values) | ({"peak_bytes": memory[name]} if name in memory else {})
        for name, values in times.items()
    }
    return rows, seconds


def in_turn(bench: Bench, calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call in every repeat; the calls alternate."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(bench.seconds(call))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# -- utilisation -------------------------------------------------------------------------------------------------------

PEAKS = {  # dense bf16 operations per second, from the data sheets; the first name that fits counts
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


def step_flops(bench: Bench, batch: Batch) -> float:
    """Operations of LLaMA and CLIP in a step with cached SAM features; the rest is not counted.

    2 x weights x tokens for a pass through linear layers, 4 x width x tokens^2 / 2 for causal attention; LLaMA once
    forward and once backward (frozen weights take no gradient; attention's backward pass is twice its forward), CLIP
    forward.
    """
    rows, tokens = batch.input_ids.shape
    model, config = bench.model, bench.model.config
    linear = sum(p.numel() for name, p in model.model.layers.named_parameters() if "lora_" not in name)
    attention = 2 * config.hidden_size * tokens**2 * config.num_hidden_layers
    vision = sum(p.numel() for p in model.clip_layers.parameters()) * (batch.image_tokens.shape[1] + 1)
    return rows * (4 * linear * tokens + 3 * attention + 2 * vision)


def utilisation(bench: Bench, seconds: float) -> float | None:
    """Model FLOPs utilisation of the preset's step; None on a device of unknown peak."""
    if bench.device.type != "cuda":
        return None
    device = torch.cuda.get_device_name(bench.device)
    peak = next((value for name, value in PEAKS.items() if name in device), None)
    return step_flops(bench, bench.batch(bench.samples(bench.preset.questions))) / seconds / peak if peak else None
