"""A random model of the smallest size that has every part, its processor, and a few samples of drawn circles."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the numbers are the CPU's, on a machine with a GPU, too; scripts/gpu_check.py compares a GPU with them
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"  # a mistyped path must not be looked for on the hub; tests of it have their own

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import write_base

from model.backbones.llava import ClipReader
from model.config import UGroundConfig
from model.loading import hub
from model.processing.processor import UGroundProcessor
from model.structures import Sample, Turn
from model.UGround import UGroundForCausalLM
from scripts import make_demo_data
from utils import distributed
from utils.demo.tiny_model import clip_config, llama_settings, sam_shape, train_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def process_group_stays():
    """DeepSpeed keeps the first process group for good: a program called in this process must not destroy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "shutdown", lambda: None)
        yield


WORDS = (
    "where is the red green blue star circle square please segment it sure , it is . there is no such thing here , so "
    "USER: ASSISTANT: what can you see in this image ? all of the shapes a and"
)


def build_tiny_processor() -> UGroundProcessor:
    tokenizer = train_tokenizer([WORDS] * 4, vocab_size=340)
    return UGroundProcessor(tokenizer, ClipReader(40, 10), sam_side=64, system_prompt="")


@pytest.fixture(scope="session")
def tiny_processor() -> UGroundProcessor:
    return build_tiny_processor()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_processor):
    return tiny_processor.tokenizer


def build_tiny_model(processor: UGroundProcessor, seed: int = 0, **settings) -> UGroundForCausalLM:
    """A random model; the gate is random too, so that the policy is not uniform."""
    torch.manual_seed(seed)
    config = UGroundConfig(
        vision_config=clip_config(side=40, patch=10, width=32, layers=3),
        sam_config=sam_shape(side=64, patch=8, encoder_width=16, depth=2, width=32).to_dict(),
        seg_token_id=processor.tokens.seg,
        rej_token_id=processor.tokens.rej,
        **llama_settings(len(processor.tokenizer), width=32, layers=4, heads=2),
        **settings,
    )
    model = UGroundForCausalLM(config)
    torch.nn.init.normal_(model.ppm.gate, std=0.3)
    return model.eval()


@pytest.fixture
def tiny_model(tiny_processor) -> UGroundForCausalLM:
    return build_tiny_model(tiny_processor)


@pytest.fixture(scope="session")
def make_model(tiny_processor):
    """build(seed=0, **settings) -> a fresh random model."""
    return lambda seed=0, **settings: build_tiny_model(tiny_processor, seed, **settings)


def drawn_sample(number: int, size: tuple[int, int] = (48, 64), segs: tuple[int, ...] = (1, 2, 0)) -> Sample:
    """An image with circles; conversation k has ``segs[k]`` masks."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    masks, conversations = [], []
    for count in segs:
        for _ in range(count):
            mask = np.zeros(size, np.uint8)
            center = int(rng.integers(10, size[1] - 10)), int(rng.integers(10, size[0] - 10))
            cv2.circle(mask, center, int(rng.integers(5, 9)), 1, -1)
            masks.append(mask)
        answer = "it is " + " and ".join(["[SEG]"] * count) + "." if count else "there is no such thing, so [REJ]."
        conversations.append((Turn("where is the red star", f"sure, {answer}" if count else answer),))
    stacked = np.stack(masks) if masks else np.zeros((0, *size), np.uint8)
    return Sample(f"drawn/{number}", image, conversations, stacked, number)


@pytest.fixture(scope="session")
def tiny_samples() -> list[Sample]:
    """Three images of different shape with 0, 1 and 2 [SEG] per conversation."""
    return [drawn_sample(0), drawn_sample(1, (64, 40), (2,)), drawn_sample(2, (50, 50), (0,))]


def assert_same_masks(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-3) -> None:
    """Mask logits of a random SAM are about 1e-5: they are compared relative to the largest of all masks."""
    assert actual.shape == expected.shape
    if len(expected):
        scale = expected.abs().max()
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_tokenizer, make_model):
    """Base weights on disk: a random LLaVA, CLIP and SAM."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, make_model(), tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Demo data of all sets that a run needs, a few images each."""
    folder = tmp_path_factory.mktemp("data")
    assert make_demo_data.main(["--out", str(folder), "--train", "8", "--val", "4", "--test", "2"]) == 0
    return folder


@pytest.fixture(scope="module")
def no_report():
    """Runs without report.html: drawing its charts takes longer than the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_ds.report_run", lambda run: None)
        yield


def save_model(folder: Path, processor, talks: bool) -> str:
    """A random model on disk; with ``talks``, every answer begins with [SEG]."""
    model = build_tiny_model(processor)
    if talks:
        image = np.full((48, 64, 3), 90, np.uint8)
        batch = processor.prompts([image], [[Turn("where is the red star")]])
        with torch.no_grad():
            state = model.forward_language(batch).hidden[-1][0, -1]
            model.lm_head.weight.zero_()
            model.lm_head.weight[processor.tokens.seg] = state
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def write_jpg(path: Path, seed: int, size=(48, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="session")
def version(tmp_path_factory, tiny_processor):
    return save_model(tmp_path_factory.mktemp("model"), tiny_processor, talks=True)


@pytest.fixture(scope="session")
def mute_version(tmp_path_factory, tiny_processor):
    """A model whose answers have no [SEG]."""
    return save_model(tmp_path_factory.mktemp("mute"), tiny_processor, talks=False)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    write_jpg(path, 0)
    return path


@pytest.fixture
def val_data(tmp_path):
    """A dataset directory: ReasonSeg|val with 5 images (3 short, 2 long queries)."""
    folder = tmp_path / "data" / "reason_seg" / "ReasonSeg" / "val"
    for number in range(5):
        write_jpg(folder / f"{number}.jpg", number, (48 + number, 64))
        shape = {"label": "target", "points": [[10, 10], [40, 10], [40, 30], [10, 30]]}
        values = {"text": ["the red star"], "is_sentence": number % 2 == 1, "shapes": [shape]}
        values["meta"] = {"family": "attribute" if number < 2 else "relation"}  # as in scripts/make_demo_data.py
        (folder / f"{number}.json").write_text(json.dumps(values))
    return tmp_path / "data"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The folder of an empty cache of the hub; this process is offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    hub._download.cache_clear()
    yield tmp_path / "hub_cache"
    hub._download.cache_clear()
