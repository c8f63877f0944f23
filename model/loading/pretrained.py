"""Loading of any model folder with its processor: ``load`` for inference, ``load_for_training``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from model.backbones import BACKBONES, backbone_of
from model.config import GroundingConfig
from model.grounding import GroundingModel
from model.loading import adapter, hub
from model.loading.files import blame, read_config, read_folder, run_of
from model.loading.formats import Release, release_of, released_settings
from model.loading.hub import Resolved
from model.loading.mask_decoders import read_decoder
from model.loading.placement import PRECISIONS, pick_device, pick_precision, place
from model.loading.weights import (
    Loaded,
    base_backbone,
    base_config,
    fingerprint,
    grow_vocabulary,
    load_base,
    load_released,
    load_strictly,
    misfits,
    new_model,
    released_config,
    report,
    whole_config,
)
from model.opened import Opened
from model.processing.processor import UGroundProcessor
from model.processing.template import check_template
from model.processing.thoughts import MARKS
from model.processing.tokens import IMAGE, add_special_tokens, codebook_size_of, load_tokenizer, token_ids
from model.settings import METHOD_FIELDS, SAM, decoder_kind, kept_settings

logger = logging.getLogger(__name__)
Kind = Literal["merged", "adapter", "released", "base", "run", "unknown"]
CRITIC = "ppm.critic."
Parts = tuple[GroundingModel, UGroundProcessor, dict[str, str]]  # model, processor, module -> source of its weights


def kind_of(folder: str | Path) -> Kind:
    """The kind of a model folder, by its files and its ``config.json``.

    Returns:
        ``merged`` (of scripts/merge_lora.py or ``save_pretrained``), ``adapter`` (of ``merge_lora.py --adapter_only``),
        ``released`` (published by the authors of a method), ``base`` (weights of a backbone), ``run`` (of train_ds.py,
        or a checkpoint in its folder), or ``unknown`` (another kind of model).

    Raises:
        ValueError: if the folder does not exist, or has no readable ``config.json``.
    """
    folder = Path(folder)
    if adapter.is_adapter(folder):
        return "adapter"
    if folder.is_dir() and not (folder / "config.json").is_file() and run_of(folder):
        return "run"
    config = read_config(folder, "--version")
    if release_of(config):
        return "released"
    if backbone_of(config.get("model_type")):
        return "merged"
    return "base" if backbone_of(config.get("model_type"), base=True) else "unknown"


def load(
    folder: str | Path,
    precision: str = "auto",
    device: str = "auto",
    *,
    vision_tower: str = "",
    base: str = "",
    vision_pretrained: str = "",
    quantize: str | None = None,
    device_map: str | None = None,
) -> Opened:
    """Loads a merged model, an adapter or a published checkpoint for inference.

    Args:
        folder: written by ``scripts/merge_lora.py``, with or without ``--adapter_only``, or a published checkpoint
            (``formats.RELEASES``); a path, or a repository of the hub (``hub.resolve_folder``).
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto`` = bf16 on a GPU, fp32 elsewhere.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto`` = the GPU if there is one.
        vision_tower: folder of CLIP for a published checkpoint, which holds none; by default, what it names.
        base, vision_tower, vision_pretrained: for an adapter whose base has moved: what it was trained from
            (base weights or a finished model), CLIP and SAM.
        quantize: ``8bit`` or ``4bit``, of the language model's layers, by bitsandbytes.
        device_map: ``auto`` = spread the language model's layers over all GPUs and main memory.

    Raises:
        ValueError: if the folder is of another kind, its weights are incomplete, or the device does not support the
            request. The message names the argument as a flag of chat.py and test.py.
    """
    transformers_logging.disable_progress_bar()  # clutters output that goes to a file
    device = pick_device(device)
    precision = pick_precision(precision, device)
    folder = hub.resolve_folder(folder, "--version").path
    kind = kind_of(folder)
    if kind not in LOADERS:
        model_type = read_config(folder, "--version").get("model_type")  # raises for a run, with the fix
        raise ValueError(
            f"--version: {folder / 'config.json'} is of type {model_type!r}, not a UGround model; "
            "merge a trained run with scripts/merge_lora.py first"
        )
    paths = {"version": base, "vision_tower": vision_tower, "vision_pretrained": vision_pretrained}
    paths = {name: path for name, path in paths.items() if path}
    model, processor, sources = LOADERS[kind](folder, precision, paths)
    processor.keep_padding = model.config.reads_padding
    return _placed((model, processor, sources), folder, precision, device, quantize, device_map)


def _placed(
    parts: Parts, folder: Path, precision: str, device: str, quantize: str | None, device_map: str | None
) -> Opened:
    """The loaded parts, with the model on its device."""
    model, processor, sources = parts
    sources = {module: hub.name_of(source) for module, source in sources.items()}
    weights_fingerprint = fingerprint(model.state_dict().values())  # before layers are quantized or offloaded
    place(model, device, quantize, device_map)
    precision_text = ", ".join(filter(None, (precision, quantize)))
    return Opened(model.eval(), processor, device, precision_text, weights_fingerprint, hub.name_of(folder), sources)


def _load_merged(folder: Path, precision: str, paths: dict[str, str]) -> Parts:
    backbone = BACKBONES[read_merged_config(folder).backbone]  # before the tokenizer, which reads the file, too
    if (generation := folder / "generation_config.json").is_file():
        with blame(f"--version: {generation}"):
            GenerationConfig.from_pretrained(folder)
    processor = UGroundProcessor.from_pretrained(folder)
    with blame("--version"):
        read_folder(folder)  # mapped, not read: transformers' errors name no file
    with blame(f"--version: {folder / 'config.json'} does not describe a model that can be built"):
        loaded: Any = backbone.model.from_pretrained(
            folder,
            dtype=PRECISIONS[precision],
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below
            trust_remote_code=False,
        )
    model, info = loaded  # transformers' annotation lacks the pair
    if problems := misfits(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]):
        raise ValueError(f"--version: {folder / 'config.json'} and the weights do not fit: {'; '.join(problems)}")
    check_processor(model.config, processor, folder, "config.json")
    return model, processor, dict.fromkeys((name for name, _ in model.named_children()), str(folder))


def read_merged_config(folder: Path) -> GroundingConfig:
    """The configuration of a merged model, of any backbone.

    Raises:
        ValueError: if the file is damaged, or a setting is invalid.
    """
    name = backbone_of(read_config(folder, "--version").get("model_type"))
    assert name is not None
    with blame(f"--version: {folder / 'config.json'}"):
        return BACKBONES[name].config.from_pretrained(folder)


def check_processor(config: GroundingConfig, processor: UGroundProcessor, folder: Path, file: str) -> None:
    """Raises a ValueError if the processor in ``folder`` is not of the model, whose configuration is in ``file``."""
    expected = config.processor_settings(folder)
    of_reader = expected["reader"].settings().items(), processor.reader.settings()
    for name, of_model, of_processor in (
        ("[SEG]", config.seg_token_id, processor.tokens.seg),
        ("[REJ]", config.rej_token_id, processor.tokens.rej),
        ("the codebook", config.codebook, tuple(processor.codebook)),
        *((name, expected[name], getattr(processor, name)) for name in ("sam_side", "sam_input", "thought_format")),
        *((name, value, of_reader[1].get(name)) for name, value in of_reader[0]),
    ):
        if of_model != of_processor:
            raise ValueError(
                f"--version: {folder}: {name} is {of_model} in {file}, {of_processor} in the processor's files"
            )


def _load_adapter(folder: Path, precision: str, paths: dict[str, str]) -> Parts:
    meta = adapter.read_adapter_meta(folder)
    recorded = adapter.recorded_base(folder) | paths
    base = recorded["version"], recorded["vision_tower"], recorded["vision_pretrained"]
    settings = adapter.settings_of(folder, meta)
    if problems := start_problems(*base, flag="--base", mask_decoder=settings.get("mask_decoder", SAM)):
        raise ValueError(
            f"--version: the base of the adapter {folder} is not here: {'; '.join(problems)}. {adapter.WHERE}"
        )
    model, _, rows = load_for_training(*base, meta["config"]["model"]["precision"], settings)
    adapter.check_base(folder, meta, rows)
    adapter.apply(model, folder, meta)
    cast_parameters(model, precision)
    trained = {adapter.plain_name(name).split(".")[0] for name in meta["trained"]}
    sources = {
        row.module: f"{row.source}, trained parts of {hub.name_of(folder)}" if row.module in trained else row.source
        for row in rows
    }
    sources |= {row.module: str(folder) for row in rows if row.source == "new"}
    processor = UGroundProcessor.from_pretrained(folder)
    check_processor(model.config, processor, folder, adapter.META)
    return model, processor, sources


def _load_released(folder: Path, precision: str, paths: dict[str, str]) -> Parts:
    raw_config = read_config(folder, "--version")
    release = release_of(raw_config)
    assert release is not None
    tower = paths.get("vision_tower") or str(raw_config.get("mm_vision_tower") or "")
    try:
        if not tower:
            raise ValueError("its configuration has no name")
        vision_tower = hub.resolve_folder(tower, "--vision_tower").path
    except ValueError as error:
        raise ValueError(
            f"--version: {folder} is a published checkpoint (config.json), which holds no CLIP; give --vision_tower, "
            f"the folder of the tower that it was trained with ({error})"
        ) from error
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([IMAGE], special_tokens=True)  # placeholder of image features; it has no embedding
    where = f"--version: the tokenizer of {folder}"
    ids = token_ids(tokenizer, where, codebook_size_of(tokenizer))
    settings = {"seg_token_id": ids.seg, "rej_token_id": ids.rej, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    settings |= _published_codebook(tokenizer, where, release)
    model, sources = load_released(folder, raw_config, release, vision_tower, PRECISIONS[precision], settings)
    config = model.config
    if (largest := max(ids.added)) >= config.vocab_size:
        raise ValueError(
            f"--version: {folder}: the tokenizer has a token {largest}, the model embeds {config.vocab_size}; they are "
            "of different checkpoints"
        )
    processor = UGroundProcessor(tokenizer, **config.processor_settings(), system_prompt=release.system_prompt)
    if config.codebook_size > 1:
        config.codebook_ids = processor.codebook
    return model, processor, sources


def _published_codebook(tokenizer: Any, where: str, release: Release) -> dict[str, int]:
    """The setting of ``UGroundConfig`` that a published tokenizer tells: [SEG] tokens per scale."""
    size, scales = codebook_size_of(tokenizer), decoder_kind(release.settings).scales
    if size % scales:
        raise ValueError(f"{where} has {size} [SEG] tokens per target, no multiple of the {scales} scales")
    return {"codebook_tokens": size // scales}


LOADERS: dict[Kind, Callable[[Path, str, dict[str, str]], Parts]] = {
    "merged": _load_merged,
    "adapter": _load_adapter,
    "released": _load_released,
}
UNREAD: dict[Kind, tuple[str, ...]] = {  # settings beside ``version`` whose parts a model of this kind holds
    "merged": ("vision_tower", "vision_pretrained"),
    "released": ("vision_pretrained",),
}


def resolve_start(
    version: str,
    vision_tower: str = "",
    vision_pretrained: str = "",
    download: bool = True,
    mask_decoder: str = SAM,
) -> dict[str, Resolved]:
    """What training starts from: ``version``, and those of the paths beside it that are read.

    Args:
        version, vision_tower, vision_pretrained: paths or hub ids (``model.loading.hub``).
        download: what the hub's cache lacks; otherwise that is an error.
        mask_decoder: of a model that is built from base weights.

    Raises:
        ValueError: naming all that cannot be resolved.
    """
    found, problems = _start(version, vision_tower, vision_pretrained, download, mask_decoder=mask_decoder)
    if problems:
        raise ValueError("; ".join(problems))
    return found


def start_problems(
    version: str, vision_tower: str, vision_pretrained: str, flag: str = "--version", mask_decoder: str = SAM
) -> list[str]:
    """The messages of ``resolve_start``, one each; ``flag`` gave ``version``."""
    return _start(version, vision_tower, vision_pretrained, True, flag, mask_decoder)[1]


def _start(
    version: str, tower: str, sam: str, download: bool, flag: str = "--version", mask_decoder: str = SAM
) -> tuple[dict[str, Resolved], list[str]]:
    found: dict[str, Resolved] = {}
    problems: list[str] = []
    of_decoder = decoder_kind({"mask_decoder": mask_decoder})

    def resolve(name: str, text: str, flag: str) -> None:
        function = hub.resolve_folder
        if name == "vision_pretrained" and of_decoder.weights == "file":
            function = hub.resolve_file
        try:
            if name == "vision_pretrained" and of_decoder.weights == "folder" and Path(text).is_file():
                raise ValueError(
                    f"{flag} {text}: is a file; --mask_decoder {mask_decoder} takes a folder of transformers' weights, "
                    f"such as {of_decoder.example}"
                )
            found[name] = function(text, flag, download)
        except ValueError as error:
            hint = f"; --mask_decoder {mask_decoder} takes {of_decoder.title}, such as {of_decoder.example}"
            of_another = name == "vision_pretrained" and mask_decoder != SAM and of_decoder.example not in str(error)
            problems.append(f"{error}{hint if of_another else ''}")

    resolve("version", version, flag)
    if not found:  # whether it holds CLIP and SAM is unknown
        for name, text in {"vision_tower": tower, "vision_pretrained": sam}.items():
            if text:
                resolve(name, text, f"--{name}")
        return found, problems
    folder = found["version"].path
    try:
        kind = kind_of(folder)
        if kind == "run":
            read_config(folder, flag)  # raises, with the fix
        if kind == "unknown":
            base_backbone(folder)  # raises, naming those that are known
    except ValueError as error:
        return found, [str(error)]
    if kind == "adapter":  # what its base needs
        base, recorded = adapter.recorded_base(folder), adapter.recorded_decoder(folder).get("mask_decoder", SAM)
        paths = base["version"], tower or base["vision_tower"], sam or base["vision_pretrained"]
        below, missing = _start(*paths, download, mask_decoder=recorded)
        found |= {name: part for name, part in below.items() if name != "version"}
        again = f"Put it there, or export {version} again: merge_lora.py --checkpoint RUN --version ITS_BASE"
        problems += [f"the base of the adapter {version} is not here: {problem}. {again}" for problem in missing]
        return found, problems
    unread = (*UNREAD.get(kind, ()), *["vision_pretrained"] * (not of_decoder.has_encoder))
    if kind == "base" and base_backbone(folder) != "llava":
        unread = (*unread, "vision_tower")
    flags = {name: f"--{name}" for name in ("vision_tower", "vision_pretrained")}
    if kind == "released" and not tower:
        tower = str(read_config(folder, flag).get("mm_vision_tower") or "")
        flags["vision_tower"] += f" (mm_vision_tower in {folder / 'config.json'})"
    for name, text in {"vision_tower": tower, "vision_pretrained": sam}.items():
        if name in unread:
            continue
        if text:
            resolve(name, text, flags[name])
        else:
            problems.append(f"--{name}: is missing; {version} holds no {'CLIP' if name == 'vision_tower' else 'SAM'}")
    return found, problems


def load_for_training(
    version: str,
    vision_tower: str = "",
    vision_pretrained: str = "",
    precision: str = "bf16",
    settings: dict[str, Any] | None = None,
    max_tokens: int = 2048,
) -> tuple[GroundingModel, UGroundProcessor, list[Loaded]]:
    """The model that training starts from: base weights of a backbone and a mask decoder, or any that ``load`` opens.

    A finished model keeps all weights that it holds; what the settings need beyond them (a critic), and tokens that its
    tokenizer lacks (LISA's has no [REJ]), are new.

    Args:
        version: base weights or a finished model, a folder or hub id.
        vision_tower, vision_pretrained: CLIP and mask decoder, paths or hub ids, as far as ``version`` lacks them.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        settings: of ``GroundingConfig`` (layer_selection, loss weights, ...); a finished model's where none is given.
        max_tokens: longest conversation with its prefix, in tokens (``--model_max_length``).

    Returns:
        the model, its processor, and the rows of the loading report.

    Raises:
        ValueError: for wrong paths, weights that do not fit, a tokenizer without the special tokens, or settings that
            contradict those of a finished model (``kept_settings``).
    """
    transformers_logging.disable_progress_bar()  # clutters output that goes to a file
    settings = settings or {}
    found = resolve_start(version, vision_tower, vision_pretrained, mask_decoder=settings.get("mask_decoder", SAM))
    start = {name: str(part.path) for name, part in found.items()}
    folder = found["version"].path
    if (kind := kind_of(folder)) in LOADERS:
        check_kept(folder, settings)
        loaded, finished, sources = LOADERS[kind](folder, precision, {k: start[k] for k in start if k != "version"})
        model, new = with_settings(loaded, settings, str(folder))
        tokenizer = finished.tokenizer
        system_prompt: str | None = finished.builder.system_prompt
    else:
        most = settings.get("max_image_tokens", METHOD_FIELDS["max_image_tokens"].default)
        if base_backbone(folder) != "llava" and most >= max_tokens:  # before minutes of loading
            raise ValueError(
                f"max_image_tokens {most} leaves no room for text in rows of {max_tokens} tokens (--model_max_length): "
                "lower the one or raise the other"
            )
        paths = {"vision_tower": "", "vision_pretrained": "", **start}
        model, sources = load_base(**paths, dtype=PRECISIONS[precision], settings=settings)
        new = {}
        tokenizer, system_prompt = _base_texts(model, folder)
    config = model.config
    processor, added = _with_tokens(model, folder, tokenizer, system_prompt, max_tokens)
    warn_of_dynamic_positions(config, max_tokens)
    ids = processor.tokens
    config.seg_token_id, config.rej_token_id = ids.seg, ids.rej
    config.codebook_ids = processor.codebook if config.codebook_size > 1 else None
    config.eos_token_id, config.pad_token_id = ids.eos, ids.pad
    new |= {name: ", ".join(added) for name in ("model", "lm_head") if added}
    return model, processor, report(model, sources, new)


def _base_texts(model: GroundingModel, folder: Path) -> tuple[PreTrainedTokenizerBase, str | None]:
    """Tokenizer and system prompt of base weights; None = the template's.

    Raises:
        ValueError: if the tokenizer's own chat template writes other texts.
    """
    tokenizer = load_tokenizer(folder)
    if model.config.backbone != "llava":  # whose prompts are LISA's
        check_template(model.config.template, tokenizer, f"--version: {folder}")
    return tokenizer, read_config(folder, "--version").get("system_prompt")


def _with_tokens(
    model: GroundingModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    max_tokens: int = 2048,
) -> tuple[UGroundProcessor, list[str]]:
    """The processor of a model to which the tokens are added that its tokenizer lacks, and these."""
    config, old_size = model.config, len(tokenizer)
    marks = MARKS[config.thought_format].tokens if config.thought_format in MARKS else ()
    added = add_special_tokens(tokenizer, config.codebook_size, config.template.added, marks)
    grow_vocabulary(model, old_size, len(tokenizer))
    settings = config.processor_settings(folder)
    processor = UGroundProcessor(tokenizer, **settings, system_prompt=system_prompt, max_tokens=max_tokens)
    processor.keep_padding, processor.thought_weight = config.reads_padding, config.thought_loss_weight
    return processor, added


def load_backbone(
    version: str,
    precision: str = "auto",
    device: str = "auto",
    *,
    vision_tower: str = "",
    quantize: str | None = None,
    device_map: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Opened:
    """Base weights of a backbone as they are, without a mask decoder: for its states alone, not for masks.

    Args:
        version, vision_tower, settings: as for training; the others as in ``load``.

    Raises:
        ValueError: as ``load``, and if the folder holds no base weights.
    """
    transformers_logging.disable_progress_bar()  # clutters output that goes to a file
    device = pick_device(device)
    precision = pick_precision(precision, device)
    folder = hub.resolve_folder(version, "--version").path
    tower = ""
    if base_backbone(folder) == "llava":
        if not vision_tower:
            raise ValueError(f"--vision_tower: is missing; {version} holds no CLIP")
        tower = str(hub.resolve_folder(vision_tower, "--vision_tower").path)
    model, sources = load_base(str(folder), tower, None, PRECISIONS[precision], settings or {})
    processor, _ = _with_tokens(model, folder, *_base_texts(model, folder))
    return _placed((model, processor, sources), folder, precision, device, quantize, device_map)


def warn_of_dynamic_positions(config: GroundingConfig, max_tokens: int) -> None:
    """Logs where a long row would change the positions of the rows beside it (InternVL3's dynamic frequencies)."""
    rope: Any = getattr(config.text, "rope_parameters", None) or {}
    most: Any = getattr(config.text, "max_position_embeddings", max_tokens)
    if "dynamic" in str(rope.get("rope_type")) and max_tokens > most:
        logger.warning(
            "--model_max_length %s is more than the %s positions that the language model was trained for "
            "(max_position_embeddings). Its rotary frequencies are dynamic: a longer row changes them for the whole "
            "batch; give at most %s",
            max_tokens,
            most,
            most,
        )


def settings_of(folder: str | Path) -> dict[str, Any]:
    """The settings of ``UGroundConfig`` that a finished model was trained with; {} for base weights.

    Raises:
        ValueError: as ``kind_of``, or if the folder's settings cannot be read.
    """
    folder, kind = Path(folder), kind_of(folder)
    raw: dict[str, Any] | None = None
    if kind == "adapter":
        raw = adapter.settings_of(folder, adapter.read_adapter_meta(folder))
    elif kind == "released" and (release := release_of(read_config(folder, "--version"))):
        with blame(f"--version: {folder / 'config.json'}"):
            raw = released_settings(release, read_config(folder, "--version"))
        if decoder_kind(raw).scales > 1:
            raw |= _published_codebook(load_tokenizer(folder), f"--version: the tokenizer of {folder}", release)
    elif kind == "merged":
        raw = vars(read_merged_config(folder))
    return {} if raw is None else {name: raw.get(name, item.default) for name, item in METHOD_FIELDS.items()}


def config_of(
    version: str, vision_tower: str = "", vision_pretrained: str = "", *, settings: dict[str, Any]
) -> GroundingConfig:
    """The configuration of the model that ``load_for_training`` would build, without its weights.

    Args:
        version, vision_tower, vision_pretrained: paths of ``resolve_start``.

    Raises:
        ValueError: as ``load_for_training``.
    """
    folder, kind = Path(version), kind_of(version)
    if kind == "merged":
        finished = read_merged_config(folder)
        with blame(f"--version: {folder / 'config.json'}"):
            return type(finished).from_dict(finished.to_dict() | settings)
    if kind == "adapter":
        below = hub.resolve_folder(adapter.recorded_base(folder)["version"], "--version", download=False)
        return config_of(str(below.path), vision_tower, vision_pretrained, settings=settings_of(folder) | settings)
    raw = read_config(folder, "--version")
    if release := release_of(raw):
        return released_config(folder, raw, release, vision_tower, settings)[0]
    if decoder_kind(settings).has_encoder:
        settings = settings | read_decoder(settings.get("mask_decoder", SAM), vision_pretrained)[1]
    if base_backbone(folder) != "llava":
        return whole_config(folder, read_folder(folder).keys(), settings)
    keys = ["mm_projector.2.weight"]  # LLaVA-1.5's; another one weighs as little
    return base_config(folder, Path(vision_tower), keys, settings)


def check_kept(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Raises a ValueError if settings contradict a finished model's (``kept_settings``), naming both values."""
    trained = settings_of(folder)
    problems = [
        f"{name} is {settings[name]}, {folder} was trained with {trained[name]}"
        for name in (kept_settings(trained) if trained else ())
        if name in settings and settings[name] != trained[name]
    ]
    if problems:
        raise ValueError(f"--version: {'; '.join(problems)}: leave it out, or start from base weights")


def with_settings(
    model: GroundingModel, settings: dict[str, Any], source: str
) -> tuple[GroundingModel, dict[str, str]]:
    """A finished model's weights under other settings.

    Another reward starts the baseline anew: the moving average and the critic know the former one's scale.

    Args:
        source: of the weights, for messages.

    Returns:
        the model, which takes over the tensors, and module -> what is new in it: parts that only these settings need.
    """
    config = type(model.config).from_dict(model.config.to_dict() | settings)
    same_reward = all(getattr(config, name) == getattr(model.config, name) for name in ("reward", "reward_terms"))
    keeps_critic = same_reward and config.baseline == model.config.baseline  # the two kinds have other shapes
    state = {key: value for key, value in model.state_dict().items() if keeps_critic or not key.startswith(CRITIC)}
    if not same_reward:
        state["ppm.baseline"] = torch.zeros_like(state["ppm.baseline"])
    needs_critic = config.baseline != "average" and not keeps_critic
    started = new_model(config, model.dtype)
    load_strictly(started, state, source, new=(CRITIC,) if needs_critic else ())
    return started.eval(), {"ppm": "critic"} if needs_critic else {}


def cast_parameters(model: torch.nn.Module, precision: str) -> None:
    """Casts all parameters; buffers (the reward's baseline, rotary frequencies) stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(PRECISIONS[precision])
