"""The model benchmark of scripts/bench.py: random weights at a preset's full shape, and what it costs.

Times are processor time on a CPU (other programs may run) and wall time on a GPU. What is compared runs in turns in one
process, after a warm-up; a ratio is the median over the turns.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPVisionConfig

from model.loading.placement import PRECISIONS
from model.lora import add_lora, set_trainable
from model.opened import cache_sam_features
from model.processing.processor import UGroundProcessor
from model.sam import SamShape
from model.structures import Batch, Sample, Turn
from model.UGround import UGroundConfig, UGroundForCausalLM
from utils.demo.tiny_model import clip_config, llama_settings, sam_shape
from utils.diagnostics import process_memory

ROOT = Path(__file__).resolve().parents[2]
UGROUND: dict[str, Any] = {
    "layer_selection": "policy",
    "mask_prompt": True,
    "map_terms": ("gaussian_bce", "gaussian_dice"),
    "policy_gradient": "reinforce",
}
EXACT = UGROUND | {"policy_gradient": "exact"}
LISA = UGROUND | {"layer_selection": "last", "mask_prompt": False, "map_terms": ()}  # the fixed last layer, no maps
ANSWER = "Sure, it is [SEG]."


@dataclass(frozen=True)
class Preset:
    """Shapes and the work of a step.

    Attributes:
        llama: of ``llama_settings``, without the vocabulary. size: (height, width) of the photographs.
        questions: per image. precision: of ``PRECISIONS``. gpu: whether it takes a GPU.
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


def _large(width: int, layers: int, lora_r: int) -> Preset:
    clip = clip_config(336, 14, 1024, 24)
    clip.num_attention_heads = 16
    llama = {"width": width, "layers": layers, "heads": width // 128}
    return Preset(llama, clip, SamShape(), lora_r=lora_r, precision="bf16", gpu=True)


SAM_VIT_B = SamShape(encoder_width=768, encoder_depth=12, encoder_heads=12, global_attention=(2, 5, 8, 11))
PRESETS = {
    "tiny": Preset({}, clip_config(), sam_shape(), size=(120, 160)),
    "medium": Preset(
        {"width": 512, "layers": 12, "heads": 8}, clip_config(336, 14, 256, 6), SAM_VIT_B, batch=1, questions=3
    ),
    "7b": _large(4096, 32, 8),
    "13b": _large(5120, 40, 64),
}


class Bench:
    """A random model, and the steps to time.

    Args:
        device: ``cpu`` or a GPU; folder: for the cache of SAM's features.
    """

    def __init__(self, preset: Preset, device: str, folder: str) -> None:
        self.preset, self.device, self.resting = preset, torch.device(device), process_memory.resident()
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny/llava")
        vision = preset.clip.to_dict()
        sides = vision["image_size"], vision["patch_size"], preset.sam.image_size
        self.processor = UGroundProcessor(tokenizer, *sides)
        ids = self.processor.tokens
        vocabulary = 32_004 if preset.gpu else len(tokenizer)
        config = UGroundConfig(
            vision_config=vision,
            sam_config=preset.sam.to_dict(),
            seg_token_id=ids.seg,
            rej_token_id=ids.rej,
            **llama_settings(vocabulary, **preset.llama),
        )
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks for it by its old name
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(PRECISIONS[preset.precision])
        try:
            with self.device:
                self.model = UGroundForCausalLM(config)
                self.wrapped = add_lora(self.model, preset.lora_r)
        finally:
            torch.set_default_dtype(before)
        self.wrapped.train()
        self.configure(UGROUND)
        trained = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        cache_sam_features(self.model, self.processor, folder, 10.0)

    def configure(self, settings: dict[str, Any]) -> None:
        """Another method on the same weights."""
        for name, value in settings.items():
            setattr(self.model.config, name, value)
        set_trainable(self.wrapped)

    def samples(
        self, questions: int, segs: int = 1, images: int = 0, size: tuple[int, int] | None = None
    ) -> list[Sample]:
        """Drawn photographs with ``questions`` questions, the answers of which have ``segs`` masks."""
        height, width = size or self.preset.size
        answer = ANSWER.replace("[SEG]", " and ".join(["[SEG]"] * segs))
        found = []
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
            found.append(Sample(f"drawn/{number}", image, turns, masks, number))
        return found

    def batch(self, samples: list[Sample], packed: bool = True) -> Batch:
        """On the device; SAM's features lie on the disk. Unpacked: a row per question, as LISA has it."""
        if not packed:
            samples = [row for sample in samples for row in separate(sample)]
        batch = self.processor.collate(samples).to(self.device, PRECISIONS[self.preset.precision])
        return self._cached(batch)

    def _cached(self, batch: Batch) -> Batch:
        """Random features on the disk stand for SAM's: nothing that is timed depends on their values."""
        sam, cache = self.preset.sam, self.model.visual_model.cache
        grid = sam.image_size // sam.patch_size
        assert cache is not None
        cache.get(batch.image_keys, batch.sam_images, lambda x: torch.randn(len(x), sam.prompt_width, grid, grid).to(x))
        return batch

    def step(self, batch: Batch) -> None:
        """Forward, backward, optimizer."""
        self.wrapped(batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def says(self, segs: int = 1, length: int = 12) -> Iterator[None]:
        """The model writes ``length`` tokens, among them ``segs`` [SEG], at the usual cost."""
        ids = self.processor.tokens
        script: Iterator[int] = iter(())

        def force(_module, _inputs, logits: torch.Tensor) -> torch.Tensor:
            nonlocal script
            token = next(script, None)
            if token is None:  # the next answer begins
                script = iter([ids.seg] * segs + [5] * (length - segs - 1) + [ids.eos])
                token = next(script)
            logits[..., token] = torch.inf
            return logits

        hook = self.model.lm_head.register_forward_hook(force)
        try:
            yield
        finally:
            hook.remove()

    def ask(self, questions: int = 1, answers: bool = False, images: int = 1, **options) -> Callable[[], None]:
        """A call that answers questions about each image with masks: written in 12 tokens, or given. SAM's features are
        read from the disk."""
        samples = self.samples(questions, images=images)
        asked = [[talk[0] if answers else Turn(talk[0].question) for talk in row.conversations] for row in samples]
        batch = self.processor.prompts([sample.image for sample in samples], asked)
        batch = self._cached(batch.to(self.device, PRECISIONS[self.preset.precision]))

        def call() -> None:
            self.wrapped.eval()
            with self.says():
                self.model.predict(batch, max_new_tokens=12, **options)
            self.wrapped.train()

        return call

    def write_without_cache(self) -> None:
        """LLaVA's 12 tokens by reading the whole row for each; the vision tower runs once."""
        sample = self.samples(1, images=1)[0]
        batch = self.processor.prompts([sample.image], [[Turn(sample.conversations[0][0].question)]])
        batch = batch.to(self.device, PRECISIONS[self.preset.precision])
        self.wrapped.eval()
        with torch.inference_mode(), self.says():
            features = self.model.encode_images(batch.clip_images, batch.clip_sizes)
            with replaced(self.model, encode_images=lambda *_: features):
                for _ in range(12):
                    hidden = self.model.forward_language(batch)[0].hidden[-1]
                    token = self.model.lm_head(hidden[:, -1:]).argmax(-1)
                    batch.input_ids = torch.cat([batch.input_ids, token], 1)
                    batch.segment_ids = torch.cat([batch.segment_ids, torch.ones_like(token)], 1)
                    batch.position_ids = torch.cat([batch.position_ids, batch.position_ids[:, -1:] + 1], 1)
        self.wrapped.train()

    def write_with_cache(self) -> None:
        sample = self.samples(1, images=1)[0]
        batch = self.processor.prompts([sample.image], [[Turn(sample.conversations[0][0].question)]])
        self.wrapped.eval()
        with self.says(segs=0):
            self.model.answer(batch.to(self.device, PRECISIONS[self.preset.precision]), max_new_tokens=12)
        self.wrapped.train()

    @contextmanager
    def without_sam(self) -> Iterator[None]:
        """SAM's modules and its upscaling cost nothing; masks, with a gradient, are constant."""
        sam = self.model.visual_model

        def decode(embeddings: torch.Tensor, tokens: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
            return tokens.mean((1, 2))[:, None, None]

        def upscale(masks: torch.Tensor, resized: tuple[int, int], original: tuple[int, int]) -> torch.Tensor:
            return masks.float().expand(-1, *original)

        grid = self.preset.sam.image_size // self.preset.sam.patch_size
        nothing = torch.zeros(1, self.preset.sam.prompt_width, grid, grid, device=self.device)
        nothing = nothing.to(PRECISIONS[self.preset.precision])

        def encode(images: torch.Tensor, keys: list[str]) -> torch.Tensor:
            return nothing.expand(len(images), -1, -1, -1)

        with replaced(sam, encode=encode, decode=decode, upscale=upscale):
            yield

    # -- what is measured ----------------------------------------------------------------------------------------------

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def seconds(self, call: Callable[[], Any]) -> float:
        start = self.now()
        call()
        return self.now() - start

    def peak(self, call: Callable[[], Any]) -> float:
        """Bytes while ``call`` runs, weights included: of the GPU, or of the process beyond Python."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated()
        if not process_memory.CLEAR_REFS.exists():
            return math.nan
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once
        libc.malloc_trim(0)
        process_memory.forget_peak()
        call()
        found = process_memory.peak_resident() - self.resting
        libc.mallopt(-3, 2**25)
        return found

    def parts(self, batch: Batch, samples: list[Sample], repeats: int) -> dict[str, float]:
        """Median seconds of a step's parts."""
        model, sam, found = self.model, self.model.visual_model, []
        watched = {
            "CLIP": (model, "encode_images"),
            "LLaMA forward": (model, "read"),
            "policy + similarity": (model, "ground"),
            "SAM features from disk": (sam, "encode"),
            "maps, SAM decoder": (model, "draw"),
            "losses": (model, "objective"),
        }
        for turn in range(repeats + 1):
            times: dict[str, float] = {"data": self.seconds(lambda: self.processor.collate(samples))}
            changes: dict[int, tuple[Any, dict[str, Any]]] = {}
            for part, (owner, name) in watched.items():
                changes.setdefault(id(owner), (owner, {}))[1][name] = self._timed(getattr(owner, name), part, times)
            (first, second) = changes.values()
            with replaced(first[0], **first[1]), replaced(second[0], **second[1]):
                self._step_in_parts(batch, times)
            if turn:
                found.append(times)
        return {part: statistics.median(times[part] for times in found) for part in found[0]}

    def _timed(self, call: Callable, part: str, times: dict[str, float]) -> Callable:
        def timed(*args, **kwargs):
            start = self.now()
            result = call(*args, **kwargs)
            times[part] = times.get(part, 0.0) + self.now() - start
            if part == "LLaMA forward":  # its backward pass begins when all that came after it is done
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
    """A row per question, the image repeated."""
    masks = iter(sample.masks)
    rows = []
    for turns in sample.conversations:
        own = [next(masks) for _ in range(sum(turn.answer.count("[SEG]") for turn in turns))]
        rows.append(Sample(sample.source, sample.image, [turns], np.stack(own), sample.sample_id))
    return rows


@contextmanager
def replaced(owner: torch.nn.Module, **methods: Any) -> Iterator[None]:
    """Other methods for a while, on this instance alone."""
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
    """Case ``a`` over case ``b``, what it may be at most, and the values of all turns; ``plus``: a case in both."""

    name: str
    a: str
    b: str
    bar: float | None = None
    plus: str = ""
    values: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        middle, low, high = statistics.median(self.values), min(self.values), max(self.values)
        return {"median": middle, "min": low, "max": high, "bar": self.bar}


def ratios() -> list[Ratio]:
    return [
        Ratio("packed / unpacked step without SAM, 3 questions", "packed 3", "unpacked 3", 0.50),
        Ratio("packed / unpacked step without SAM, 6 questions", "packed 6", "unpacked 6", 0.35),
        Ratio("UGround / fixed last layer, both packed", "UGround", "LISA", 1.10),
        Ratio("UGround packed / fixed last layer unpacked, cached features", "UGround", "LISA unpacked", 0.55),
        Ratio("policy_gradient exact / reinforce", "exact", "UGround"),
        Ratio("12 tokens with KV cache / without", "written", "written without cache", 0.20),
        Ratio("8 questions / 1, written, whole query", "8 questions", "1 question", 2.5, "SAM encoder"),
        Ratio("8 expressions / 1, answers given, whole query", "8 given", "1 given", 3.0, "SAM encoder"),
        Ratio("mc:16 / argmax, written, whole query", "mc:16", "1 question", 1.5, "SAM encoder"),
        Ratio("8 questions / 1, written, cached features", "8 questions", "1 question"),
        Ratio("8 expressions / 1, answers given, cached features", "8 given", "1 given"),
        Ratio("mc:16 / argmax, written, cached features", "mc:16", "1 question"),
        Ratio("8 images / 1, written, cached features", "8 images", "1 question"),
        Ratio("SAM's encoder compiled / as it is", "SAM encoder compiled", "SAM encoder"),
    ]


WARM_UP = ("packed 3", "UGround", "1 question", "1 given", "SAM encoder compiled")


def cases(bench: Bench, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Everything that ratios compare, as calls that do it once; ``compiled``: SAM's encoder in that form, too."""
    three, six = bench.samples(3), bench.samples(6)
    usual = bench.samples(bench.preset.questions)

    def train(settings: dict[str, Any], batch: Batch, sam: bool = True) -> Callable[[], None]:
        def call() -> None:
            bench.configure(settings)
            if sam:
                bench.step(batch)
            else:
                with bench.without_sam():
                    bench.step(batch)

        return call

    packed, unpacked = bench.batch(usual), bench.batch(usual, packed=False)
    found: dict[str, Callable[[], Any]] = {
        "packed 3": train(UGROUND, bench.batch(three), sam=False),
        "unpacked 3": train(UGROUND, bench.batch(three, packed=False), sam=False),
        "packed 6": train(UGROUND, bench.batch(six), sam=False),
        "unpacked 6": train(UGROUND, bench.batch(six, packed=False), sam=False),
        "UGround": train(UGROUND, packed),
        "LISA": train(LISA, packed),
        "LISA unpacked": train(LISA, unpacked),
        "exact": train(EXACT, packed),
        "written": bench.write_with_cache,
        "written without cache": bench.write_without_cache,
    }
    found |= {"1 question": bench.ask(1), "8 questions": bench.ask(8), "8 images": bench.ask(images=8)}
    found |= {"mc:16": bench.ask(1, layer_policy="mc:16")}
    found |= {"1 given": bench.ask(1, answers=True), "8 given": bench.ask(8, answers=True)}
    image = bench.batch(bench.samples(1, images=1)).sam_images
    sam = copy.copy(bench.model.visual_model)
    sam.cache = None
    found["SAM encoder"] = partial(sam.encode, image)
    if compiled:
        twin = copy.deepcopy(sam)
        twin.compile_encoder()
        found["SAM encoder compiled"] = partial(twin.encode, image)
    return found


def compare_cases(
    bench: Bench, repeats: int, compiled: bool = False
) -> tuple[list[Ratio], dict[str, dict[str, float]]]:
    """All ratios, and seconds and peak bytes of every case."""
    calls = cases(bench, compiled)
    rows = [row for row in ratios() if row.a in calls]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in WARM_UP:
        if name in calls:
            calls[name]()
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(bench.seconds(call))
    for row in rows:
        plus = times[row.plus] if row.plus else [0.0] * repeats
        row.values = [(a + c) / (b + c) for a, b, c in zip(times[row.a], times[row.b], plus, strict=True)]
    memory = {name: bench.peak(calls[name]) for name in ("UGround", "LISA", "LISA unpacked")}
    share = Ratio("the same, peak memory", "UGround", "LISA", 1.05, values=[memory["UGround"] / memory["LISA"]])
    rows.insert(1 + [row.name for row in rows].index("UGround / fixed last layer, both packed"), share)
    spread = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        | ({"peak_bytes": memory[name]} if name in memory else {})
        for name, values in times.items()
    }
    return rows, spread


# -- utilisation and growth --------------------------------------------------------------------------------------------

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 operations per second, as the maker states them


def step_flops(bench: Bench, batch: Batch) -> float:
    """Operations that a step with cached SAM features demands of LLaMA and CLIP; the rest is left out.

    2 x weights x tokens for a pass through linear layers, 4 x width x tokens^2 / 2 for causal attention; LLaMA once
    forward and once backward (frozen weights take no gradient; attention's backward pass is twice its forward), CLIP
    forward.
    """
    rows, tokens = batch.input_ids.shape
    config = bench.model.config
    linear = sum(p.numel() for name, p in bench.model.model.layers.named_parameters() if "lora_" not in name)
    attention = 2 * config.hidden_size * tokens**2 * config.num_hidden_layers
    vision = sum(p.numel() for p in bench.model.vision_tower.parameters())
    return rows * (4 * linear * tokens + 3 * attention + 2 * vision * (config.num_image_tokens + 1))


def utilisation(bench: Bench, seconds: float) -> float | None:
    """Model FLOPs utilisation of the usual step; None on a device whose peak is not known."""
    if bench.device.type != "cuda":
        return None
    device = torch.cuda.get_device_name(bench.device)
    peak = next((value for name, value in PEAKS.items() if name in device), None)
    return step_flops(bench, bench.batch(bench.samples(bench.preset.questions))) / seconds / peak if peak else None


GROWTH: dict[str, tuple[Any, ...]] = {
    "questions per image": (1, 2, 4, 8, 16),
    "[SEG] per answer": (1, 2, 4, 8, 16),
    "megapixels on disk": (1, 3, 6, 12),
    "images per batch": (1, 2, 4),
    "layers that may be chosen": (1, 4, 12),
    "layers of LLaMA": (4, 8, 12),
}


def growth(preset: Preset, device: str, folder: str, repeats: int) -> list[list[Any]]:
    """Rows (what, value, median seconds, peak MB) of a training step with cached features."""
    bench, rows = Bench(preset, device, folder), []
    for what, values in GROWTH.items():
        for value in values:
            samples, settings = bench.samples(1), UGROUND | {"first_candidate_layer": 1}
            if what == "questions per image":
                samples = bench.samples(value)
            elif what == "[SEG] per answer":
                samples = bench.samples(1, segs=value)
            elif what == "megapixels on disk":
                side = round((value * 1e6 / 12) ** 0.5)
                samples = bench.samples(preset.questions, size=(3 * side, 4 * side))
            elif what == "images per batch":
                samples = bench.samples(1, images=value)
            elif what == "layers that may be chosen":
                layers = bench.model.config.num_hidden_layers
                settings["first_candidate_layer"] = max(1, layers + 1 - value)
            else:
                resting = bench.resting  # memory is counted from before the first model
                del bench
                bench = Bench(replace(preset, llama=preset.llama | {"layers": value}), device, folder)
                bench.resting = resting
                samples = bench.samples(1)
            bench.configure(settings)
            batch = bench.batch(samples)
            bench.step(batch)
            step = partial(bench.step, batch)
            seconds = statistics.median(bench.seconds(step) for _ in range(repeats))
            rows.append([what, value, seconds, bench.peak(step) / 2**20])
    return rows
