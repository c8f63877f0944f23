"""Settings: files, inheritance, flags, help, and errors that name the fix."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from model.config import UGroundConfig
from model.settings import METHOD_FIELDS, RECIPES
from utils.config import (
    FIELDS,
    SECTIONS,
    Config,
    ConfigError,
    config_from,
    keep_trained,
    load_config,
    make_parser,
    to_dict,
)
from utils.datasets import TYPES, DataOptions, trained_types

ROOT = Path(__file__).resolve().parents[2]
NO_RUNS = ("base.yaml", "zoo.yaml", "quoted.yaml")
SHIPPED = sorted(path for path in (ROOT / "configs").glob("**/*.yaml") if path.name not in NO_RUNS)
NEEDED = ["--version", "v", "--vision_tower", "t", "--vision_pretrained", "p", "--dataset_dir", "d"]


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(list(argv))
    return error.value.problems


def written(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_parse(path):
    config = load_config(["--config", str(path), "--version", "a model"])  # finetune.yaml names none
    assert config.total_steps > config.train.warmup_steps
    assert (ROOT / config.train.deepspeed_config).is_file()


def test_base_holds_the_defaults():
    """base.yaml documents the paper's settings; were it to differ, a run without a file would be another one."""
    base = yaml.safe_load((ROOT / "configs/base.yaml").read_text())
    default = Config().flat()
    for section in base.values():
        for name, value in section.items():
            assert float(value) == default[name] if isinstance(default[name], float) else value == default[name], name


def test_paper_settings():
    """Section 5.1 of the paper."""
    small, large = (load_config(["--config", str(ROOT / f"configs/{size}_reason_seg.yaml")]) for size in ("7b", "13b"))
    assert (small.model.lora_r, large.model.lora_r) == (8, 64)
    for config in (small, large):
        loss, train = config.loss, config.train
        assert (train.lr, train.warmup_steps) == (3e-4, 100)
        assert (loss.text_loss_weight, loss.mask_loss_weight, loss.policy_loss_weight) == (1.0, 1.0, 0.1)
        assert (loss.bce_loss_weight, loss.dice_loss_weight) == (2.0, 4.0)
        assert (train.batch_size, train.grad_accumulation_steps, config.model.precision) == (2, 10, "bf16")


def test_tiny_lisa_differs_from_tiny_in_the_method_alone():
    tiny, lisa = (
        load_config(["--config", str(ROOT / f"configs/{name}.yaml")]).flat() for name in ("tiny", "tiny_lisa")
    )
    changed = {name for name in tiny if tiny[name] != lisa[name]}
    assert changed == {"layer_selection", "mask_prompt", "map_loss_weight", "policy_loss_weight", "exp_name"}


def test_the_related_methods_differ_in_what_they_are_known_for():
    """The files of configs/methods: layers, prompts and map constraints of their papers."""
    expected = {  # layer, [SEG] prompt, mask prompt, points, constraints of the map
        "lisa": ("last", True, False, False, 0),
        "sesame": ("last", True, False, False, 0),
        "gsva": ("last", True, False, False, 0),
        "read": ("last", True, False, True, 0),
        "uground": ("policy", True, True, False, 2),
        "pixellm": ("last", True, False, False, 0),
    }
    folder = ROOT / "configs/methods"
    assert {path.stem for path in folder.glob("*.yaml")} == set(expected)
    for name, method in expected.items():
        config = load_config(["--config", str(folder / f"{name}.yaml")])
        ppm, terms = config.ppm, config.loss.map_terms
        settings = ppm.layer_selection, ppm.seg_prompt, ppm.mask_prompt, ppm.point_prompts > 0, len(terms)
        assert settings == method, name
        shape = UGroundConfig(vision_config={"image_size": 336, "patch_size": 14}, **config.method)
        assert shape.decoder_kind.has_encoder == (name != "pixellm")
        comment = (folder / f"{name}.yaml").read_text().partition("base:")[0]
        assert "Taken from its paper" in comment
        assert "Not taken" in comment
    method = load_config(["--config", str(folder / "uground.yaml")]).method
    assert method == load_config(["--config", str(ROOT / "configs/7b_reason_seg.yaml")]).method


def test_released_settings_are_those_of_the_loader():
    method = load_config(["--config", str(ROOT / "configs/released.yaml")]).method
    assert {name: method[name] for name in RECIPES["released"]} == RECIPES["released"]


def test_the_model_answers_with_the_layer_rule_of_validation():
    flags = [*NEEDED, "--layer_selection", "policy"]
    assert UGroundConfig(**load_config(flags).method).layer_policy == "argmax"
    assert UGroundConfig(**load_config([*flags, "--val_layer_policy", "last"]).method).layer_policy == "last"


def test_flags_override_file_overrides_base_overrides_defaults(tmp_path):
    written(tmp_path, "train: {lr: 1e-2, seed: 5, epochs: 7}\n", "base.yaml")
    path = written(tmp_path, "base: base.yaml\ntrain: {seed: 6, epochs: 8}\n")
    config = load_config(["--config", path, *NEEDED, "--epochs", "9"])
    assert (config.train.lr, config.train.seed, config.train.epochs, config.train.beta1) == (1e-2, 6, 9, 0.9)


def test_flag_values_are_converted():
    flags = ["--no_eval", "--auto_resume", "false", "--mask_prompt", "no", "--sample_rates", "9,3", "--lr=1e-4"]
    config = load_config([*NEEDED, *flags, "--dataset", "vqa||reason_seg", "--explanatory", "-1"])
    assert config.eval.no_eval is True
    assert config.train.auto_resume is False
    assert config.ppm.mask_prompt is False
    assert config.data.sample_rates == (9.0, 3.0)
    assert config.data.dataset == ("vqa", "reason_seg")
    assert load_config([*NEEDED, "--map_terms", ""]).loss.map_terms == ()
    assert load_config([*NEEDED, "--map_terms", "bce||gaussian_dice"]).loss.map_terms == ("bce", "gaussian_dice")
    assert (
        load_config([*NEEDED, "--seg_prompt", "no", "--mask_prompt", "no", "--point_prompts", "4"]).ppm.point_prompts
        == 4
    )
    assert config.train.lr == 1e-4


def test_saved_configuration_reads_back(tmp_path):
    config = load_config(["--config", str(ROOT / "configs/tiny.yaml"), "--lr", "2e-4", "--val_limit", "3"])
    config.save(tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert config_from(to_dict(config), "test") == config


def test_all_problems_at_once():
    messages = problems("--lr", "fast", "--seed", "-1", "--epoch", "3", "--gaussian_kernel", "4", "--precision", "half")
    text = "\n".join(messages)
    for expected in (
        "--lr: 'fast' is not a number",
        "--seed: -1 is too small; at least 0",
        "unknown flag --epoch; did you mean --epochs?",
        "--gaussian_kernel: 4 is even",
        "'half' is not one of fp32, bf16",
        "--version: is missing",
        "--dataset_dir: is missing",
    ):
        assert expected in text
    assert len(messages) == 7  # and nothing twice


def test_names_of_other_trainers_are_understood():
    assert "did you mean --lr?" in problems(*NEEDED, "--learning_rate", "1")[0]
    assert problems(*NEEDED, "--eval_only", "true")[0].endswith("unknown flag --eval_only: evaluate with test.py")
    assert "did you mean --version?" in problems(*NEEDED, "--weight", "w")[0]


def test_the_mixing_example_names_every_referring_set():
    """docs/training.md; without --refer_seg_data the file's refcocog would be the only one."""
    text = (ROOT / "docs/training.md").read_text()
    [command] = re.findall(r"train_ds.py (--config \S+ --dataset .*?\n.*?)\n\n", text, flags=re.DOTALL)
    config = load_config(shlex.split(command.replace("\\\n", " ")))
    assert config.data.refer_seg_data == tuple(TYPES["refer_seg"].default.split("||"))
    assert len(config.data.dataset) == len(config.data.sample_rates) == 3


def test_the_commands_of_the_page_for_other_projects_are_read():
    text = (ROOT / "docs/migrating.md").read_text()
    commands = re.findall(r"```bash\n.*?train_ds.py (.*?)```", text, flags=re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        load_config(shlex.split(command.replace("\\\n", " ")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian: {lr: 1}", "unknown section 'trian'; did you mean train?"),
        ("train: {learn_rate: 1}", "unknown setting train.learn_rate"),
        ("train: {stepsperepoch: 1}", "did you mean steps_per_epoch?"),
        ("train: {lora_r: 1}", "train.lora_r belongs in section model"),
        ("lora_r: 1", "lora_r belongs in section model"),
        ("train: {epochs: 2.5}", "train.epochs: 2.5 is not a whole number"),
        ("train: {epochs: true}", "train.epochs: True is not a whole number"),
        ("train: {exp_name: 7}", "train.exp_name: 7 is not text (put it in quotes)"),
        ("train: {auto_resume: maybe}", "train.auto_resume: 'maybe' is not true or false"),
        ("data: {sample_rates: [1, x]}", "is not numbers such as 9,3,1"),
        ("data: {dataset: {a: 1}}", "is not a list or text such as A||B"),
        ("train: 3", "train: 3 is not a mapping of settings"),
        ("train: {gate_lr_factor: .nan}", "nan must be larger than 0"),
        ("train: {lr: 1, lr: 2}", "lr given twice"),
        ("train: {x: &a [[1]], y: *a}", "(line 1): is not valid YAML: *a stands for nested values; write them out"),
        ("train: {lr: 1", "is not valid YAML"),
        ("- a\n- b", "holds a list"),
        ("base: nowhere.yaml", "nowhere.yaml: cannot be read: No such file or directory (base of"),
        ("base: run.yaml", "base: run.yaml leads back to itself"),
        ("train: {exp_name: ../up}", "'../up' is not a folder name"),
        ("ppm: {layer_selection: fixed:x}", "'fixed:x' is not one of policy, last, uniform, fixed:K"),
        ("ppm: {seg_prompt: off, mask_prompt: off}", "SAM would have no prompt"),
        ("ppm: {first_candidate_layer: 9, last_candidate_layer: 3}", "3 is below first_candidate_layer"),
        ("ppm: {policy_gradient: exact, baseline: critic}", "takes reward seg and baseline average"),
        ("loss: {map_terms: [gaussian_bce, iou]}", "'iou' is not one of gaussian_bce, gaussian_dice, bce, dice"),
        ("eval: {val_layer_policy: softly}", "'softly' is not one of argmax, sample, last, uniform"),
        ("data: {sample_rates: [1, 2, 3]}", "3 rates, but --dataset names 2 (refer_seg||reason_seg)"),
        ("train: {epochs: 1, steps_per_epoch: 50}", "do not fit into a run of 50"),
        ("train: {resume: x, auto_resume: true}", "ambiguous"),
        ("eval: {val_dataset: []}", "name a benchmark, or give --no_eval"),
    ],
)
def test_a_bad_file_is_named_with_key_and_fix(tmp_path, text, expected):
    path = written(tmp_path, text)
    messages = problems("--config", path, *NEEDED)
    assert len(messages) == 1
    assert expected in messages[0]
    assert str(tmp_path) in messages[0] or messages[0].startswith("--warmup_steps")


def test_half_a_configuration_needs_half_of_what_is_required():
    assert load_config(["--dataset_dir", "d"], needs=("data",)).model.version == ""
    assert load_config(NEEDED[:6], needs=("model",)).data.dataset_dir == ""
    assert load_config(["--lora_r", "64"], needs=()).model.lora_r == 64
    with pytest.raises(ConfigError, match=r"1 problem.*\n.*--dataset_dir: is missing"):
        load_config([], needs=("data",))
    with pytest.raises(ConfigError, match=r"1 problem.*\n.*--lr: -1.0 is too small"):  # what is given is checked
        load_config(["--lr", "-1"], needs=())


def test_missing_file():
    assert "nowhere.yaml: cannot be read" in problems("--config", "nowhere.yaml", *NEEDED)[0]


def test_names_are_unique_and_every_setting_has_help():
    assert sum(len(fields(section)) for section in SECTIONS.values()) == len(FIELDS)
    text = make_parser().format_help()
    for name, item in FIELDS.items():
        assert len(item.metadata["help"]) > 10, name
        assert f"--{name} " in text, name
    for section in SECTIONS.values():
        assert section.__doc__ in text


def test_every_type_has_its_setting():
    assert all(f"{kind}_data" in FIELDS for kind in trained_types())


def attributes(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_setting_is_read_somewhere():
    """A flag that does nothing is a bug. Reading it in order to check it does not count."""
    own = ast.parse((ROOT / "utils/config/config.py").read_text())
    read = attributes(next(node for node in own.body if getattr(node, "name", "") == "Config"))
    handed = "utils/training/group_samples.py", "model/group_policy.py", "model/grounding.py"  # GrpoSettings as a whole
    for name in ("train_ds.py", "utils/training/engine.py", "utils/datasets/mixture.py", *handed):
        path = ROOT / name
        read |= attributes(ast.parse(path.read_text()))
    read |= {option.name for option in fields(DataOptions)}  # handed over by name in mixture.py
    method = Config().method  # handed over as a whole, see the next test
    unread = [name for name in FIELDS if name not in read and name not in method and not name.endswith("_data")]
    assert unread == []
    mixture = (ROOT / "utils/datasets/mixture.py").read_text()
    assert 'getattr(data, f"{kind}_data")' in mixture
    assert "getattr(data, option.name)" in mixture


def test_the_method_settings_are_those_of_the_model():
    method = Config().method
    config = UGroundConfig(**method)
    assert all(getattr(config, name) == value for name, value in method.items())
    assert set(method) <= set(METHOD_FIELDS)


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_a_recipe_overrides_the_base_and_single_settings_override_it(tmp_path):
    written(tmp_path, "loss: {policy_loss_weight: 0.2}\nppm: {map_side: 100}\n", "base.yaml")
    path = written(tmp_path, "base: base.yaml\nrecipe: released\nppm: {reward: seg}\n")
    config = load_config(["--config", path, *NEEDED, "--map_side", "7"])
    assert (config.loss.policy_loss_weight, config.ppm.reward, config.ppm.map_side) == (0.4, "seg", 7)
    assert config.eval.val_layer_policy == "last"
    again = load_config(["--config", path, *NEEDED, "--recipe", "paper"])
    assert again.method == Config().method
    assert again.eval.val_layer_policy == ""
    recommended = load_config(["--config", path, *NEEDED, "--recipe", "recommended"])
    assert recommended.method == Config().method | {"policy_gradient": "exact"}
    assert load_config(["--config", written(tmp_path, "recipe: recommended"), *NEEDED]).method == recommended.method


def test_what_a_recipe_resets_is_not_given(tmp_path):
    """So that training from a finished model takes it from the model."""
    path = written(tmp_path, "recipe: released")
    recommended = load_config(["--config", path, *NEEDED, "--recipe", "recommended"])
    keep_trained(recommended, Config().method | {"map_side": 336, "map_normalization": "all"}, "a published UGround")
    assert (recommended.ppm.map_side, recommended.ppm.map_normalization) == (336, "all")
    with pytest.raises(ConfigError, match="recipe released: map_side: 336 contradicts --version other"):
        keep_trained(load_config(["--config", path, *NEEDED]), Config().method | {"map_side": 48}, "other")


def test_a_recipe_without_effect_is_refused(tmp_path):
    path = written(tmp_path, "ppm: {layer_selection: last}")
    assert load_config(["--config", path, *NEEDED, "--recipe", "paper"]).ppm.layer_selection == "last"
    [line] = problems("--config", path, *NEEDED, "--recipe", "recommended")
    assert line.startswith(
        "--recipe: recommended changes nothing: policy_gradient exact has no effect: layer_selection last"
    )
    released = load_config(["--config", path, *NEEDED, "--recipe", "released"])  # a part has an effect
    assert released.ppm.map_normalization == "all"


def test_an_unknown_recipe_is_refused(tmp_path):
    assert (
        "'relased' is not one of paper, released, recommended"
        in problems("--config", written(tmp_path, "recipe: relased"), *NEEDED)[0]
    )
    assert (
        "is not one of paper, released, recommended"
        in problems("--config", written(tmp_path, "recipe: [released]"), *NEEDED)[0]
    )
    assert "--layer_selection: " in problems(*NEEDED, "--layer_selection", "")[0]
    assert "--recipe: 'lisa' is not one of paper, released, recommended" in problems(*NEEDED, "--recipe", "lisa")[0]


# -- what a run would silently ignore ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--policy_gradient", "exact", "--baseline_start", "first"),
        ("--policy_gradient", "exact", "--baseline_decay", "0.5"),
        ("--policy_gradient", "exact", "--scale_advantage"),
        ("--layer_selection", "last", "--entropy_bonus", "0.1"),
        ("--layer_selection", "soft", "--baseline", "critic"),
        ("--layer_selection", "ce_soft", "--policy_gradient", "exact"),
        ("--baseline", "critic", "--baseline_start", "first"),
        ("--critic_width", "64"),
        ("--policy_samples", "8"),
        ("--policy_gradient", "leave_one_out", "--baseline_start", "first"),
        ("--layer_selection", "uniform", "--policy_gradient", "leave_one_out"),
        ("--layer_selection", "last", "--baseline", "state_critic"),
        ("--codebook_tokens", "3", "--decoder_width", "64"),
    ],
)
def test_method_settings_without_effect_are_refused(flags):
    """The last one named does nothing beside the first."""
    name = [flag for flag in flags if flag.startswith("--")][-1]
    messages = problems(*NEEDED, *flags)
    assert len(messages) == 1
    assert messages[0].startswith(f"{name}: ")
    assert "has no effect" in messages[0]


def test_sets_of_a_type_that_is_not_mixed(tmp_path):
    found = problems(*NEEDED, "--dataset", "vqa", "--refer_seg_data", "grefcoco")
    hint = "name it there, or leave it out"
    assert found == [f"--refer_seg_data: has no effect: --dataset vqa does not name refer_seg; {hint}"]
    path = written(tmp_path, "data: {dataset: vqa||refer_seg, refer_seg_data: grefcoco}")
    assert load_config(["--config", path, *NEEDED, "--dataset", "vqa"]).data.dataset == ("vqa",)  # chosen from a file


def test_the_saved_configuration_of_every_accepted_run_loads(tmp_path):
    """A run may choose from a file: its config.yaml holds what it did not use."""
    text = "data: {dataset: vqa||refer_seg, refer_seg_data: grefcoco}\nppm: {baseline: critic}"
    flags = ["--config", written(tmp_path, text), *NEEDED, "--dataset", "vqa", "--layer_selection", "last"]
    config = load_config(flags)
    config.save(tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_checkpoint_with_settings_without_effect_still_loads():
    """They were accepted once: a finished run must merge."""
    saved = to_dict(load_config(NEEDED))
    saved["ppm"] |= {"layer_selection": "last", "entropy_bonus": 0.1, "scale_advantage": True}
    saved["loss"]["critic_loss_weight"] = 2.0
    del saved["experimental"]
    config = config_from(saved, "meta.json")
    assert (config.experimental.entropy_bonus, config.experimental.critic_loss_weight) == (0.1, 2.0)


def test_a_moved_setting_is_given_once():
    saved = to_dict(load_config(NEEDED))
    saved["ppm"]["entropy_bonus"] = 0.1
    with pytest.raises(ConfigError, match=r"experimental.entropy_bonus is given twice, also as ppm.entropy_bonus"):
        config_from(saved, "meta.json")


def test_short_aliases_are_read_and_a_bomb_of_them_is_refused_at_once(tmp_path):
    path = written(tmp_path, "train: {lr: &rate 0.001, warmup_steps: 3, epochs: 5}\nloss: {dice_loss_weight: *rate}")
    assert load_config(["--config", str(path), *NEEDED]).loss.dice_loss_weight == 0.001
    levels = [f"{name}: &{name} [{', '.join([f'*{above}'] * 9)}]" for above, name in itertools.pairwise("abcdefghij")]
    path = written(tmp_path, "\n".join(["a: &a [x]", *levels, "data: {dataset: *j}"]))
    assert "*b stands for nested values" in problems("--config", path, *NEEDED)[0]
