"""What a run starts from: messages about paths that lack a part, the lineage of models of the hub, frozen parts."""

from __future__ import annotations

import json
import re

import pytest

from model.config import UGroundConfig
from model.loading import adapter
from model.loading.pretrained import start_problems
from model.loading.weights import Loaded
from train_ds import unread_paths
from utils.config import Config
from utils.config.settings import ModelSettings
from utils.training.engine import check_frozen
from utils.training.lineage import lineage_of, own_entry

COMMIT = "0123456789abcdef" * 2 + "01234567"
LISA = {"model_type": "llava", "architectures": ["LISAForCausalLM"], "mm_vision_tower": "/authors/clip"}


@pytest.fixture
def folder(tmp_path):
    """folder(name, config) -> a folder with a ``config.json``, without weights."""

    def write(name, config):
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        return path

    return write


def adapter_on(path, base):
    """An adapter's metadata without its weights."""
    path.mkdir()
    (path / adapter.PARTS).touch()
    model = {"version": str(base), "vision_tower": "", "vision_pretrained": ""}
    (path / adapter.META).write_text(json.dumps({"config": {"model": model}, "base": {}, "trained": {}}))
    return path


def test_a_version_that_is_not_there_is_the_only_problem(tmp_path):
    """Whether CLIP and SAM are needed is then unknown."""
    [problem] = start_problems(str(tmp_path / "gone"), "", "")
    assert problem.startswith(f"--version {tmp_path / 'gone'}: no such folder")


def test_what_is_no_model_is_not_asked_for_its_clip(tmp_path, folder):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/index.json").write_text("{}")
    [problem] = start_problems(str(tmp_path / "run"), "", "")
    assert "is of a training run, not a model. Write the model first" in problem
    [problem] = start_problems(str(folder("other", {"model_type": "qwen2_vl"})), "", "")
    assert "is of type 'qwen2_vl', not base weights of a backbone (llava: " in problem
    (tmp_path / "empty").mkdir()
    [problem] = start_problems(str(tmp_path / "empty"), "", "")
    assert problem.endswith("empty has no config.json")


def test_a_tower_that_config_json_names_is_told_so(folder):
    lisa = folder("lisa", LISA)
    [problem] = start_problems(str(lisa), "", "")
    assert problem.startswith(f"--vision_tower (mm_vision_tower in {lisa / 'config.json'}) /authors/clip: no such")


def test_an_adapter_whose_base_is_gone_names_the_fix(tmp_path):
    first = adapter_on(tmp_path / "first", tmp_path / "gone")
    [problem] = start_problems(str(adapter_on(tmp_path / "second", first)), "", "")
    assert f"export {first} again: merge_lora.py --checkpoint RUN --version ITS_BASE" in problem


def test_paths_that_an_adapters_base_makes_needless_are_named(tmp_path, folder):
    version = adapter_on(tmp_path / "adapter", folder("merged", {"model_type": "uground"}))
    config = Config(ModelSettings(version=str(version), vision_tower="clip"))
    assert unread_paths(config).endswith(": --vision_tower clip\n")


def test_another_base_is_named_by_what_was_read(tmp_path):
    """A merged base holds SAM: --vision_pretrained of the run was not read."""
    model = {"version": "merged", "vision_tower": "unread", "vision_pretrained": "unread"}
    meta = {"config": {"model": model}, "resolved": {"version": "merged"}, "base": {"visual_model": "aaaa"}}
    with pytest.raises(ValueError, match="visual_model: other has bbbb, merged had aaaa"):
        adapter.check_base(tmp_path, meta, [Loaded("visual_model", "other", 1, "float32", "bbbb")])


def test_the_lineage_names_repositories_and_commits(folder):
    published = folder(f"models--org--lisa/snapshots/{COMMIT}", LISA)
    assert lineage_of(published) == [{"name": f"org/lisa@{COMMIT}", "source": "published, LISA"}]
    meta = {
        "config": {"train": {"exp_name": "run"}, "model": {"version": "org/lisa"}},
        "resolved": {"version": f"org/lisa@{COMMIT}"},
        "step": 3,
        "data": [],
        "commit": "abc",
    }
    assert own_entry(meta)["source"] == f"org/lisa@{COMMIT}"
    del meta["resolved"]  # as older runs
    assert own_entry(meta)["source"] == "org/lisa"


def test_a_new_part_cannot_stay_frozen():
    rows = [Loaded("text_hidden_fcs", "new", 1, "float32", ""), Loaded("ppm", "merged", 1, "float32", "", "critic")]
    check_frozen(("gate", "lm_head", "sam_mask_decoder"), UGroundConfig(), rows)
    with pytest.raises(ValueError, match=r"--freeze phi: .* a new one must train"):
        check_frozen(("gate", "phi"), UGroundConfig(), rows)


def test_of_a_new_pixel_decoder_what_is_random_in_pixellm_can_stay_frozen():
    config = UGroundConfig(mask_decoder="pixel_decoder")
    rows = [Loaded("visual_model", "new", 1, "float32", "")]
    check_frozen(("image_neck", "sam_prompt_encoder"), config, rows)
    for part in ("sam_mask_decoder", "mask_projector"):
        with pytest.raises(ValueError, match=rf"--freeze {part}: .* a new one must train"):
            check_frozen((part,), config, rows)
        check_frozen((part,), config, [Loaded("visual_model", "merged", 1, "float32", "")])


def test_a_part_that_does_not_train_anyway_cannot_be_frozen():
    for parts, settings in (
        (("projector", "mask_projector", "image_neck"), {}),
        (("projector",), {"mask_decoder": "pixel_decoder"}),
        (("mask_projector", "image_neck"), {"clip_resize": 448}),
    ):
        with pytest.raises(ValueError, match=rf"--freeze {re.escape('||'.join(parts))}: has no effect"):
            check_frozen((*parts, "lm_head"), UGroundConfig(**settings), [])
    check_frozen(("projector",), UGroundConfig(clip_resize=448), [])
