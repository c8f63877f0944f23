"""The cache of SAM's features: the same masks without the encoder, whatever happens to the folder."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import says_seg_often
from conftest import drawn_sample
from safetensors.torch import load

from model import sam_cache
from model.backbones.llava import ClipReader
from model.loading.weights import fingerprint
from model.opened import cache_sam_features, predict
from model.processing.processor import UGroundProcessor
from model.sam_cache import FeatureCache, image_key
from model.structures import Turn
from utils.inference.session import ImageSession

KEYS = ["a", "b", "c"]
IMAGES = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 8, 8)


def encode(images: torch.Tensor) -> torch.Tensor:
    return 2 * images[:, :1, :4, :4]


def never(images: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the encoder ran")


@pytest.fixture
def cached(make_model, tiny_tokenizer, tmp_path):
    """A model with a cache, its processor, and the number of images in each call of its encoder."""
    model, processor = make_model(), UGroundProcessor(tiny_tokenizer, ClipReader(40, 10), 64, "")
    cache_sam_features(model, processor, str(tmp_path / "cache"), 1.0)
    calls: list[int] = []
    model.visual_model.image_encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return model, processor, calls


def test_training_and_predictions_are_the_same_without_the_encoder(cached, make_model, tiny_processor):
    model, processor, calls = cached
    samples = [drawn_sample(0), drawn_sample(1, (64, 40), (2,))]
    uncached = make_model()(tiny_processor.collate(samples))
    for _ in range(2):
        output = model(processor.collate(samples))
        assert all(map(torch.equal, output.mask_logits, uncached.mask_logits))
        output.loss.backward()
    assert calls == [1, 1]  # one image at a time
    ask = ([samples[1].image, drawn_sample(5).image], [[Turn("star", "it is [SEG].")], [Turn("circle", "[SEG]")]])
    predictions, expected = predict(model, processor, *ask), predict(make_model(), tiny_processor, *ask)
    assert calls == [1, 1, 1]  # the new image
    for [actual], [wanted] in zip(predictions, expected):
        torch.testing.assert_close(actual.mask_logits, wanted.mask_logits)


def test_a_batch_without_image_keys_is_refused(cached, tiny_processor):
    model, processor, calls = cached
    image = drawn_sample(0).image
    with pytest.raises(ValueError, match=r"1 of the batch's 1 images have no key.*use cache_sam_features"):
        predict(model, tiny_processor, [image], [[Turn("star", "[SEG]")]])
    says_seg_often(model, processor).lm_head.weight.data[processor.tokens.seg] *= -2  # and in this answer
    for _ in range(2):  # a conversation's batch has the key, too
        assert ImageSession(model, processor, image).ask("star", max_new_tokens=2).layers
    assert calls == [1]


def test_other_pixels_encoder_precision_or_side_are_other_entries(tmp_path):
    FeatureCache(tmp_path, 1, "one").get(KEYS, IMAGES, encode)
    reopened = FeatureCache(tmp_path, 1, "one")
    torch.testing.assert_close(reopened.get(KEYS, IMAGES, never), encode(IMAGES))
    assert (reopened.hits, reopened.misses) == (3, 0)
    for encoder, images in (("two", IMAGES), ("one", IMAGES.bfloat16()), ("one", IMAGES[..., :4, :4])):
        cache = FeatureCache(tmp_path, 1, encoder)
        assert cache.get(KEYS, images, encode).dtype == images.dtype
        assert cache.misses == 3
    image = np.zeros((4, 6, 3), np.uint8)
    other = image.copy()
    other[0, 0, 0] = 1
    assert len({image_key(image), image_key(other), image_key(image.reshape(6, 4, 3))}) == 3
    assert image_key(image) == image_key(image[::-1])  # not contiguous


def test_entries_of_earlier_versions_are_still_found(make_model, tiny_tokenizer, tmp_path):
    """The name of an entry, and what stands in it for SAM's encoder, as released."""
    model, processor = make_model(), UGroundProcessor(tiny_tokenizer, ClipReader(40, 10), 64, "")
    cache_sam_features(model, processor, str(tmp_path), 1.0)
    assert model.visual_model.cache.encoder == fingerprint(model.visual_model.image_encoder.state_dict().values())
    FeatureCache(tmp_path, 1, "one").get(["a"], IMAGES[:1], encode)
    (entry,) = tmp_path.glob("*.sam")
    assert entry.stem == hashlib.blake2b(b"a one torch.float32 8", digest_size=16).hexdigest()
    assert load(entry.read_bytes()[16:])["embedding"].shape == (1, 4, 4)


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 500])
def test_a_damaged_entry_is_computed_again(tmp_path, damage):
    cache = FeatureCache(tmp_path, 1, "one")
    cache.get(KEYS, IMAGES, encode)
    for path in tmp_path.glob("*.sam"):
        path.write_bytes(damage or path.read_bytes()[:-1])
    torch.testing.assert_close(cache.get(KEYS, IMAGES, encode), encode(IMAGES))
    torch.testing.assert_close(cache.get(KEYS, IMAGES, never), encode(IMAGES))


def test_the_least_recently_used_entries_go(tmp_path):
    cache = FeatureCache(tmp_path, 1, "one")
    cache.get(["first"], IMAGES[:1], encode)
    (first,) = tmp_path.glob("*.sam")
    size = first.stat().st_size
    cache.limit = 3 * size
    for number, key in enumerate(["second", "third", "first", "fourth"]):
        cache.get([key], IMAGES[:1], encode)
        assert first.is_file(), number
    assert len(list(tmp_path.glob("*.sam"))) == 2  # 90% of three
    cache.get(["first", "fourth"], IMAGES[:2], never)


def test_abandoned_temporary_files_are_removed_and_fresh_ones_kept(tmp_path, monkeypatch):
    for name in ("old.tmp", "new.tmp"):
        (tmp_path / name).touch()
    monkeypatch.setattr(sam_cache, "STALE", 1000.0)
    os.utime(tmp_path / "old.tmp", (0, 0))
    FeatureCache(tmp_path, 1, "one").get(KEYS, IMAGES, encode)
    assert {path.name for path in tmp_path.glob("*.tmp")} == {"new.tmp"}


def _use(folder: Path, seed: int) -> None:
    cache = FeatureCache(folder, 1, "one")
    cache.limit = 40_000  # a few entries: evictions all the time
    rng = np.random.default_rng(seed)
    for _ in range(60):
        numbers = rng.choice(30, size=3, replace=False)
        images = torch.from_numpy(numbers).float().view(3, 1, 1, 1).expand(3, 3, 32, 32)
        embeddings = cache.get([str(n) for n in numbers], images, lambda x: 2 * x[:, :1])
        assert torch.equal(embeddings, 2 * images[:, :1])


def test_processes_share_a_folder(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=_use, args=(tmp_path, s)) for s in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert not list(tmp_path.glob("*.tmp"))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.sam")) < 60_000


def test_an_invalid_folder_is_refused_and_a_full_disk_is_not(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="sam_feature_cache"):
        FeatureCache(tmp_path / "file/cache", 1, "one")
    with pytest.raises(ValueError, match="sam_feature_cache_gb 0"):
        FeatureCache(tmp_path, 0, "one")
    cache = FeatureCache(tmp_path / "cache", 1, "one")

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    torch.testing.assert_close(cache.get(KEYS, IMAGES, encode), encode(IMAGES))
    assert "No space left" in caplog.text
