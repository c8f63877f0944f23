"""One tree of validated settings: defaults < base YAML < run YAML < flags. ``--help`` is generated from it."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from model import layer_rules
from model.processing.thoughts import NO_THOUGHTS
from model.rewards import weights_of
from model.settings import (
    METHOD_FIELDS,
    RECIPES,
    RUN_NAMES,
    DecoderSettings,
    ExperimentalSettings,
    GrpoSettings,
    LossSettings,
    PpmSettings,
    contradictions,
    decoder_kind,
    kept_settings,
    method_of,
    value_problems,
    without_effect,
)
from utils.command_line.parser import Parser, hint, value_hint
from utils.config.settings import TRACKER_PACKAGES, DataSettings, EvalSettings, ModelSettings, TrainSettings
from utils.files import ShallowAliases, write_atomically
from utils.wording import counted


class ConfigError(ValueError):
    """All problems of a configuration, one per line."""

    shared = True  # raised on every process

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(
            f"{counted(len(self.problems), 'problem')} in the configuration:\n"
            + "\n".join(f"  - {line}" for line in self.problems)
        )


class WithoutEffectError(ConfigError):
    """Flags that other settings switch off.

    Args:
        ignored: flag without its dashes -> problem.
    """

    def __init__(self, ignored: Mapping[str, str]) -> None:
        self.names = set(ignored)
        super().__init__([f"--{name}: {text}" for name, text in ignored.items()])


@dataclass
class Config:
    """All settings. A leaf's name is unique, so that flags are flat: ``config.train.lr`` is ``--lr``."""

    model: ModelSettings = field(default_factory=ModelSettings)
    ppm: PpmSettings = field(default_factory=PpmSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    experimental: ExperimentalSettings = field(default_factory=ExperimentalSettings)

    def __post_init__(self) -> None:
        self.origins: dict[str, str] = {}  # of the settings that a file or a flag gives, for messages

    @property
    def run_folder(self) -> Path:
        return Path(self.train.log_base_dir) / self.train.exp_name

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train.epochs * self.train.steps_per_epoch

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per step: several with answers that are learned from repeatedly."""
        return 1 if self.grpo.objective == "supervised" else self.grpo.grpo_updates

    @property
    def method(self) -> dict[str, Any]:
        """The method's settings as ``UGroundConfig`` takes them."""
        return method_of(self.flat())

    @property
    def start(self) -> dict[str, Any]:
        """What the model is built from, as ``model.loading.pretrained.resolve_start`` takes it."""
        paths = {name: getattr(self.model, name) for name in ("version", "vision_tower", "vision_pretrained")}
        return paths | {"mask_decoder": self.decoder.mask_decoder}

    def images_per_step(self, processes: int = 1) -> int:
        """Images per optimizer step, over all processes."""
        return self.train.batch_size * self.train.grad_accumulation_steps * processes

    def flat(self) -> dict[str, Any]:
        """Leaf name -> value."""
        return {name: value for section in SECTIONS for name, value in vars(getattr(self, section)).items()}

    def save(self, path: str | Path) -> None:
        """Writes a YAML file that loads as this configuration."""
        write_atomically(Path(path), yaml.safe_dump(to_dict(self), sort_keys=False, allow_unicode=True))


SECTIONS: dict[str, type] = get_type_hints(Config)
FIELDS: dict[str, Field] = {f.name: f for section in SECTIONS.values() for f in fields(section)}
SECTION_OF: dict[str, str] = {f.name: name for name, section in SECTIONS.items() for f in fields(section)}
DATA_TYPES = {name.removesuffix("_data") for name in FIELDS if name.endswith("_data")}
KINDS: dict[str, Any] = {name: kind for s in SECTIONS.values() for name, kind in get_type_hints(s).items()}
MOVED = dict.fromkeys(vars(ExperimentalSettings()), ("ppm", "loss"))  # sections that hold them in older files
PROGRAM = "train_ds.py"  # whose settings these are
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as nested dictionaries of numbers, text and lists, for YAML and JSON."""
    sections = asdict(config)
    return {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
        for name, section in sections.items()
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def load_config(argv: Sequence[str] | None = None, needs: Collection[str] = SECTIONS) -> Config:
    """The configuration of a command line: ``--config FILE`` and ``--any_setting value``.

    Args:
        needs: sections whose required settings must be given: a program that reads no weights needs ``data`` alone.

    Raises:
        ConfigError: with all unknown keys, wrong types and invalid values.
    """
    parser = make_parser()
    flags, unknown = parser.parse_known_args(argv)
    if flags.local_rank is not None:  # the launcher passes it
        os.environ.setdefault("LOCAL_RANK", str(flags.local_rank))
    problems = parser.explain(unknown)
    values: dict[str, tuple[Any, str]] = {}
    if flags.config:
        values |= read_yaml(Path(flags.config), problems)
        if not problems and not values:
            problems.append(f"{flags.config}: holds no setting")
        if problems and not values:  # the file could not be read: missing settings are no further problem
            raise ConfigError(problems)
    if flags.recipe is not None:
        _apply_recipe(values, flags.recipe, "--recipe", problems)
    for name in FIELDS:
        if (value := getattr(flags, name)) is not None:
            values[name] = (value, f"--{name}")
    try:
        config = build_config(values, problems, needs)
    except ConfigError as error:
        unset = f"; {flags.config} does not set it" if flags.config else ""
        raise ConfigError([line + unset * (": is missing (" in line) for line in error.problems]) from None
    without = dict(_ignored(config))
    ignored = {name: text for name, text in without.items() if values.get(name, ("", ""))[1] == f"--{name}"}
    of_recipe = [name for name, (_, origin) in values.items() if origin.startswith("--recipe ")]
    if of_recipe and all(name in without for name in of_recipe):  # a part of them may have none
        ignored["recipe"] = (
            f"{flags.recipe} changes nothing: {'; '.join(f'{name} {without[name]}' for name in of_recipe)}"
        )
    if ignored:
        raise WithoutEffectError(ignored)
    return config


def config_from(sections: Mapping[str, Mapping[str, Any]], origin: str) -> Config:
    """The configuration from its ``to_dict``, as a checkpoint holds it."""
    problems: list[str] = []
    return build_config(_flatten(sections, origin, problems), problems)


def build_config(
    values: Mapping[str, tuple[Any, str]], problems: list[str], needs: Collection[str] = SECTIONS
) -> Config:
    """Converts and checks values, each given with its origin; raises ``ConfigError`` for all ``problems``."""
    config = Config()
    config.origins = {name: origin for name, (_, origin) in values.items()}
    unchecked = {name for name, item in FIELDS.items() if item.metadata["required"] and SECTION_OF[name] not in needs}
    for name, (value, origin) in values.items():
        try:
            choices = FIELDS[name].metadata["choices"]
            setattr(getattr(config, SECTION_OF[name]), name, convert(value, KINDS[name], choices))
        except ValueError as error:
            unchecked.add(name)
            problems.append(f"{origin}: {value!r} is not {error}{value_hint(name, PROGRAM)}")
    origins = {name: values[name][1] if name in values else f"--{name}" for name in FIELDS}
    problems += [
        line + (value_hint(name, PROGRAM) if name in values else "")
        for name, line in check(config, origins)
        if name not in unchecked
    ]
    if problems:
        raise ConfigError(problems)
    return config


def convert(value: Any, kind: Any, choices: Sequence[str] = ()) -> Any:
    """Converts ``value`` to ``kind``; raises a ValueError that names what was expected.

    A list of ``choices``, whose names have no comma, may be given as A,B, too.
    """
    if get_origin(kind) is tuple:
        if choices and isinstance(value, str):
            value = value.replace(",", "||")
        return _convert_list(value, get_args(kind)[0])
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if kind is bool and isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    try:
        if kind is int and isinstance(value, str):
            return int(value)
        if kind is float and isinstance(value, (str, int)) and not isinstance(value, bool):  # YAML reads 3e-4 as text
            return float(value)
    except ValueError:
        pass
    hint = " (put it in quotes)" if kind is str and isinstance(value, (int, float)) else ""
    raise ValueError(f"{EXPECTED[kind]}{hint}")


def _convert_list(value: Any, kind: type) -> tuple:
    separator, example = ("||", "a list or text such as A||B") if kind is str else (",", "numbers such as 9,3,1")
    if isinstance(value, str):
        value = [part.strip() for part in value.split(separator) if part.strip()]
    elif isinstance(value, (int, float)) and kind is float:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(example)
    try:
        return tuple(convert(item, kind) for item in value)
    except ValueError:
        raise ValueError(example) from None


class _StrictLoader(ShallowAliases, yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        duplicates = sorted({str(key) for key in keys if keys.count(key) > 1})
        if duplicates:
            raise yaml.MarkedYAMLError(problem=f"{', '.join(duplicates)} given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, problems: list[str], above: tuple[Path, ...] = ()) -> dict[str, tuple[Any, str]]:
    """Leaf name -> (value, origin) of a file and its bases; ``base`` is relative to the file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}" + (f" (base of {above[-1]})" if above else ""))
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        position, reason = "", " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            position, reason = f" (line {error.problem_mark.line + 1})", str(error.problem)
        problems.append(f"{path}{position}: is not valid YAML: {reason}")
        return {}
    content = {} if content is None else content
    if not isinstance(content, dict):
        problems.append(f"{path}: holds a {type(content).__name__}; expected sections: {', '.join(SECTIONS)}")
        return {}
    base, recipe, values = content.pop("base", None), content.pop("recipe", None), {}
    if base is not None:
        parent = path.parent / str(base)
        chain = (*above, path)
        if parent.resolve() in {p.resolve() for p in chain}:
            problems.append(f"{path}: base: {base} leads back to itself")
        else:
            values = read_yaml(parent, problems, chain)
    if recipe is not None:
        _apply_recipe(values, recipe, f"{path}: recipe", problems)
    return values | _flatten(content, str(path), problems)


def _apply_recipe(values: dict[str, tuple[Any, str]], recipe: Any, origin: str, problems: list[str]) -> None:
    """Sets a recipe's settings, and leaves those of the other recipes to their defaults, in place.

    Settings of the same file or command line, applied later, override them.
    """
    if not isinstance(recipe, str) or recipe not in RECIPES:
        problems.append(f"{origin}: {recipe!r} is not one of {', '.join(RECIPES)}")
        return
    for name, value in RECIPES[recipe].items():
        run_name = RUN_NAMES.get(name, name)
        if value == METHOD_FIELDS[name].default:  # not given, so that a finished model keeps its own
            values.pop(run_name, None)
        else:
            values[run_name] = (value, f"{origin} {recipe}: {run_name}")


def _flatten(content: Mapping[str, Any], origin: str, problems: list[str]) -> dict[str, tuple[Any, str]]:
    values: dict[str, tuple[Any, str]] = {}
    for section, entries in content.items():
        if section not in SECTIONS:
            if section in FIELDS:
                problems.append(f"{origin}: {section} belongs in section {SECTION_OF[section]}")
            else:
                problems.append(f"{origin}: unknown section {section!r}{_hint(section, (*SECTIONS, 'base', 'recipe'))}")
        elif entries is not None and not isinstance(entries, Mapping):
            problems.append(f"{origin}: {section}: {entries!r} is not a mapping of settings")
        else:
            for name, value in (entries or {}).items():
                if name in values:
                    other = values[name][1].rpartition(" ")[2]
                    problems.append(f"{origin}: {section}.{name} is given twice, also as {other}")
                elif SECTION_OF.get(name) == section or section in MOVED.get(name, ()):
                    values[name] = (value, f"{origin}: {section}.{name}")
                elif name in FIELDS:
                    problems.append(f"{origin}: {section}.{name} belongs in section {SECTION_OF[name]}")
                else:
                    problems.append(f"{origin}: unknown setting {section}.{name}{_hint(name, tuple(FIELDS))}")
    return values


def _hint(name: Any, known: Sequence[str]) -> str:
    """What follows an unknown name of a YAML file in a message."""
    return hint(str(name), known, PROGRAM, dashes="")


# -- checking ----------------------------------------------------------------------------------------------------------


def check(config: Config, origins: Mapping[str, str]) -> list[tuple[str, str]]:
    """(setting, problem) of every invalid value or combination."""
    problems = [*value_problems(config.flat(), FIELDS), *_contradictions(config)]
    return [(name, f"{origins[name]}: {message}") for name, message in problems]


def _contradictions(config: Config) -> Iterable[tuple[str, str]]:
    """(setting, problem) of combinations of values that cannot be."""
    data, train = config.data, config.train
    for name, text in contradictions(config.method):
        yield RUN_NAMES.get(name, name), text
    if not data.dataset:
        yield "dataset", "is empty; name at least one type"
    known = DATA_TYPES.issuperset(data.dataset)  # an unknown type is reported later
    if known and data.sample_rates and len(data.sample_rates) != len(data.dataset):
        named = f"--dataset names {len(data.dataset)} ({'||'.join(data.dataset)})"
        yield "sample_rates", f"{len(data.sample_rates)} rates, but {named}; give --sample_rates one for each"
    if data.sample_rates and not (min(data.sample_rates) >= 0 and sum(data.sample_rates) > 0):
        yield "sample_rates", f"{list(data.sample_rates)} must be at least 0, and not all 0"
    if -1 < data.explanatory < 0:
        yield "explanatory", f"{data.explanatory} is neither -1 (off) nor a probability"
    if data.thought_probability and config.method["thought_format"] == NO_THOUGHTS:
        yield "thought_probability", f"{data.thought_probability} needs thought_format text or tokens"
    if config.grpo.objective != "supervised":
        yield from _grpo_contradictions(config)
    if train.warmup_steps >= config.total_steps:
        yield (
            "warmup_steps",
            f"{train.warmup_steps} steps of warm-up do not fit into a run of {config.total_steps} "
            f"({train.epochs} epochs of {train.steps_per_epoch}); lower it, or train longer",
        )
    if config.model.train_tables == "new" and not config.model.lora_r:
        yield "train_tables", "new needs LoRA, whose library trains the rows; set lora_r, or train the tables in full"
    if "none" in train.report_to and len(train.report_to) > 1:
        yield "report_to", f"{','.join(train.report_to)} names trackers and none; give one or the other"
    if train.resume and train.auto_resume:
        yield "resume", "together with auto_resume is ambiguous; give one of them"
    if not re.fullmatch(r"[\w][\w.+=-]*", train.exp_name):
        yield "exp_name", f"{train.exp_name!r} is not a folder name (letters, digits, . _ + = -)"
    if not config.eval.no_eval and not config.eval.val_dataset:
        yield "val_dataset", "is empty; name a benchmark, or give --no_eval"


def _grpo_contradictions(config: Config) -> Iterable[tuple[str, str]]:
    """(setting, problem) of settings that sampled answers cannot be learned from with."""
    grpo, model = config.grpo, config.model
    try:
        weights_of(grpo.grpo_rewards)
    except ValueError as error:
        yield "grpo_rewards", str(error)
    if model.lora_dropout:
        yield (
            "lora_dropout",
            f"{model.lora_dropout} with objective {grpo.objective}: answers are sampled without dropout, and their "
            "probabilities must be of the same model; set lora_dropout 0",
        )
    tables_stay = model.train_tables == "new" or {"embed_tokens", "lm_head"} <= set(model.freeze)
    projector_stays = not config.method["clip_resize"] or "projector" in model.freeze
    if grpo.grpo_kl and not (model.lora_r and tables_stay and projector_stays):
        yield (
            "grpo_kl",
            f"{grpo.grpo_kl}: the reference is the model without LoRA, so that nothing else may change its words; set "
            "lora_r above 0, and freeze embed_tokens||lm_head (or train_tables new); with clip_resize the projector, "
            "too",
        )


def _ignored(config: Config) -> Iterable[tuple[str, str]]:
    """(setting, problem) of settings that a run would silently ignore.

    An error for flags alone: a run may choose from a file that describes more, and its saved configuration must load.
    """
    yield from without_effect(config.method)
    if not decoder_kind(config.method).has_encoder:
        reason = f"has no effect: mask_decoder {config.decoder.mask_decoder} has no image encoder; leave it out"
        if config.data.sam_feature_cache:
            yield "sam_feature_cache", reason
        if config.model.compile_sam:
            yield "compile_sam", reason
    yield from _grpo_ignored(config)
    supervised = config.grpo.objective == "supervised"
    if config.method["thought_format"] != NO_THOUGHTS and not config.data.thought_probability and supervised:
        yield "thought_format", "has no effect: set thought_probability above 0, or leave it out"
    if not DATA_TYPES.issuperset(config.data.dataset):  # reported later
        return
    for kind in sorted(DATA_TYPES.difference(config.data.dataset)):
        if getattr(config.data, f"{kind}_data"):
            reason = f"--dataset {'||'.join(config.data.dataset)} does not name {kind}; name it there, or leave it out"
            yield f"{kind}_data", f"has no effect: {reason}"


OF_THE_GROUND_TRUTH = (  # what shapes its loss, and not that of sampled answers
    *(item.name for item in fields(LossSettings)),
    *("policy_gradient", "policy_samples", "reward", "reward_terms", "baseline", "baseline_start", "baseline_decay"),
    *("thought_loss_weight", "critic_width", "critic_loss_weight", "entropy_bonus", "scale_advantage"),
)


def _grpo_ignored(config: Config) -> Iterable[tuple[str, str]]:
    """(setting, problem) of settings of sampled answers that others switch off."""
    grpo, defaults = config.grpo, GrpoSettings()
    changed = [name for name, value in vars(defaults).items() if getattr(grpo, name) != value]
    if grpo.objective == "supervised":
        for name in changed:
            yield name, "has no effect: set objective grpo or both, or leave it out"
        return
    if grpo.objective == "grpo":
        if config.data.thought_probability:
            yield (
                "thought_probability",
                "has no effect with objective grpo, which samples its answers; grpo_think says whether they think",
            )
        if "grpo_weight" in changed:
            yield "grpo_weight", "has no effect with objective grpo, whose loss is the only one; leave it out"
        for name in OF_THE_GROUND_TRUTH:
            weighs_layers = name == "policy_loss_weight" and grpo.grpo_layers == "apart"
            if config.method[name] != METHOD_FIELDS[name].default and not weighs_layers:
                yield (
                    name,
                    "has no effect with objective grpo, which has rewards alone; set objective both, or leave it out",
                )
    if grpo.grpo_layers == "apart" and not config.loss.policy_loss_weight:
        yield "grpo_layers", "apart has no effect with policy_loss_weight 0; raise that, or set off"
    if grpo.grpo_updates == 1 and "grpo_clip" in changed:
        yield "grpo_clip", "has no effect with grpo_updates 1, where the ratio is 1; raise these, or leave it out"
    selection = config.method["layer_selection"]
    if "grpo_layers" in changed and layer_rules.parse(selection, use="training").gate != "policy":
        yield "grpo_layers", f"has no effect: layer_selection {selection} trains no policy; leave it out"


def keep_trained(config: Config, trained: Mapping[str, Any], source: str) -> None:
    """Sets what further training of a finished model must keep (``kept_settings``) to the values it was trained with.

    Args:
        trained: the method's settings of the model; source: its folder, for messages.

    Raises:
        ConfigError: naming every file or flag that gives another value.
    """
    problems = []
    for name in kept_settings(trained):
        section = getattr(config, SECTION_OF[name])
        value = getattr(section, name)
        if value != trained[name] and name in config.origins:
            problems.append(
                f"{config.origins[name]}: {value!r} contradicts --version {source}, which was trained with "
                f"{trained[name]!r}; leave it out, or start from base weights"
            )
        setattr(section, name, trained[name])
    problems = problems or [line for _, line in check(config, {name: f"--{name}" for name in FIELDS} | config.origins)]
    if problems:
        raise ConfigError(problems)


def missing_paths(config: Config) -> list[str]:
    """A message for every file, folder and package of the settings that is missing. Fetches weights from the hub."""
    from model.loading.pretrained import start_problems

    deepspeed_config = config.train.deepspeed_config
    missing = start_problems(**config.start)
    if not Path(config.data.dataset_dir).is_dir():
        missing.append(f"--dataset_dir {config.data.dataset_dir}: no such folder")
    if not Path(deepspeed_config).exists():
        missing.append(f"--deepspeed_config {deepspeed_config}: no such file")
    if config.train.resume and not Path(config.train.resume).is_dir():
        missing.append(f"--resume {config.train.resume}: no such folder")
    return missing + [text for name in config.train.report_to if (text := _missing_tracker(name))]


def _missing_tracker(name: str) -> str | None:
    """A message if a value of ``report_to`` is an optional package that cannot be used."""
    if name not in TRACKER_PACKAGES:
        return None
    try:
        if hasattr(importlib.import_module(name), "init"):
            return None
        reason = f"a folder {name}/ hides the package"
    except Exception as error:  # a broken package can raise anything
        reason = f"{type(error).__name__}: {error}"
    return f"--report_to {name}: the package cannot be imported ({reason}); pip install {name}, or leave it out"


# -- flags -------------------------------------------------------------------------------------------------------------


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def make_parser() -> Parser:
    """The command line's parser; ``build_config`` converts the values, which stay text here."""
    parser = _Parser(
        usage="%(prog)s --config FILE [--setting value ...]",
        description="Train UGround: LoRA on the language model, Policy-Prompted Masking, the mask decoder.",
        epilog="Values: A||B for several names, 9,3,1 for several numbers, true or false for switches "
        "(a switch without a value is true). Flags override the YAML file, which overrides the defaults shown here.",
        program=PROGRAM,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings (sections as below); see configs/")
    parser.add_argument(
        "--recipe",
        metavar="{" + ",".join(RECIPES) + "}",
        help="the method of the paper, that of its published checkpoints, or the recommended one (docs/training.md); "
        "as a flag it overrides the file, and other flags override it; in a YAML file: recipe, beside base",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    names = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", tuple[str, ...]: "A||B", tuple[float, ...]: "X,Y"}
    for section in SECTIONS.values():
        group = parser.add_argument_group(section.__doc__)
        for item in fields(section):
            choices, kind = item.metadata["choices"], KINDS[item.name]
            options: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
            group.add_argument(
                f"--{item.name}",
                metavar="{" + ",".join(choices) + "}" if choices and kind is str else names[kind],
                help=f"{item.metadata['help']} [{_shown(item)}]".replace("%", "%%"),
                **options,
            )
    return parser


def _shown(item: Field) -> str:
    default = "||".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
    if item.metadata["required"]:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default) if default != "" else "empty"
