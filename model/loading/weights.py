"""Strict loading of backbones, CLIP and SAM under their own keys: keys that do not match are errors, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from model.backbones import BACKBONES, backbone_of
from model.config import GroundingConfig, UGroundConfig, packing_problem
from model.decoders.pixel_decoder import PixelDecoderShape, clip_depths
from model.decoders.segment_anything import SamShape, SegmentAnything
from model.grounding import GroundingModel
from model.loading import formats, hub
from model.loading.files import blame, read_config, read_folder
from model.loading.mask_decoders import read_decoder, read_sam
from model.settings import SAM, decoder_kind

FILE_TYPES = ("dtype", "torch_dtype", "transformers_version")  # of a file, not of the model
UNUSED_SAM = SamShape(  # of a model whose masks are not decoded
    image_size=64,
    encoder_width=32,
    encoder_depth=1,
    encoder_heads=2,
    global_attention=(0,),
    prompt_width=32,
    decoder_mlp=32,
)
NEW_PARTS = ("text_hidden_fcs.", "ppm.")  # trained from scratch; no base has them
CLIP_TEXT_KEYS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # of CLIP's text encoder
LLAMA_KEYS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "head_dim",
    "mlp_bias",
]


@dataclass
class Loaded:
    """One row of the loading report.

    Attributes:
        source: of the module's weights; ``new``: initialized.
        fingerprint: of its weights, but for a new critic, which is random.
        new: what else is new in it: added tokens, or ``critic``.
    """

    module: str
    source: str
    parameters: int
    dtype: str
    fingerprint: str
    new: str = ""


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], source: str, new: tuple[str, ...] = ()) -> None:
    """Loads ``state`` into ``module``; the keys of both must match.

    Tensors of the parameter's dtype are assigned without a copy. The others are converted one by one, and a file's
    memory is released with the last of its tensors.

    Args:
        state: its values are replaced by the module's tensors.
        source: path of the weights, or of the configuration beside them, for messages.
        new: prefixes of keys that ``state`` may lack.

    Raises:
        ValueError: naming missing, unexpected and mis-shaped keys, with the likely cause.
    """
    own = module.state_dict()
    tied = module.all_tied_weights_keys if isinstance(module, PreTrainedModel) else {}  # SmolLM: lm_head, embeddings
    missing = sorted(key for key in own.keys() - state.keys() - tied.keys() if not key.startswith(new))
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{key}: file {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    if problems := misfits(missing, unexpected, shapes):
        cause, lines = _cause(own.keys(), missing, unexpected, shapes), "\n  ".join(problems)
        raise ValueError(f"{source}: the weights do not fit {type(module).__name__} ({cause}):\n  {lines}")
    for key in state:
        state[key] = state[key].to(own[key].dtype)
    module.load_state_dict(state, strict=False, assign=True)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()


def _cause(own: Collection[str], missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    """The likely cause, by the kinds of keys that do not fit."""
    if len(missing) == len(own):
        return "no key fits: another kind of model, or its keys carry another prefix"
    if any("lora_" in key for key in unexpected):
        return "an adapter that was not merged"
    if shapes and not missing and not unexpected:
        return "the same architecture in another size: its configuration does not belong to these weights"
    if missing and not unexpected and not shapes:
        return "an incomplete file: a shard is missing, or only trained parts were saved"
    return "another architecture or version"


def misfits(missing: Iterable[Any], unexpected: Iterable[Any], mismatched: Iterable[Any], most: int = 6) -> list[str]:
    """The keys that do not fit, such as ``2 missing: a, b``, a text per kind that has any."""
    texts = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if names := sorted(map(str, keys)):
            more = f", and {len(names) - most} more" if len(names) > most else ""
            texts.append(f"{len(names)} {kind}: {', '.join(names[:most])}{more}")
    return texts


def fingerprint(tensors: Iterable[torch.Tensor], most: int = 4096) -> str:
    """16 hex digits that tell checkpoints apart: SHA-256 of about ``most`` evenly spaced values of each tensor."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // most)
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def path_setting(module: str, read: Collection[str]) -> str:
    """The setting that names the files of a module's base weights.

    Args:
        read: the settings whose files were read; ``version`` holds the modules of the others.
    """
    setting = {"vision_tower": "vision_tower", "visual_model": "vision_pretrained"}.get(module, "version")
    return setting if setting in read else "version"


def report(model: nn.Module, sources: dict[str, str], new: Mapping[str, str] | None = None) -> list[Loaded]:
    """The loading report, a row per top-level module.

    Args:
        sources: module -> source of its weights; modules without one are ``new``.
        new: module -> what is new in a module that has a source.
    """
    rows = []
    for name, child in model.named_children():
        source = hub.name_of(sources.get(name, "new"))
        partly = (new or {}).get(name, "") if name in sources else ""
        parameters = dict(child.named_parameters())
        count, dtype = sum(p.numel() for p in parameters.values()), next(iter(parameters.values())).dtype
        kept = [p for key, p in parameters.items() if not (partly == "critic" and key.startswith("critic."))]
        rows.append(Loaded(name, source, count, str(dtype).removeprefix("torch."), fingerprint(kept), partly))
    return rows


def base_config(version: Path, tower: Path, keys: Collection[str], settings: dict) -> UGroundConfig:
    """The configuration of a model built from a LLaVA folder, a CLIP folder and a mask decoder.

    Args:
        version, tower: folders of LLaVA and CLIP.
        keys: of LLaVA's tensors, renamed to this project's; they determine the kind of projector.
        settings: of ``UGroundConfig``, with the mask decoder's sizes.

    Raises:
        ValueError: if the folder is no LLaVA, or its projector was trained for another tower.
    """
    file = f"--version: {version / 'config.json'}"
    raw = read_config(version, "--version")
    with blame(file):
        raw = formats.llava_config(raw)
    read_config(tower, "--vision_tower")
    tower_file = f"--vision_tower: {tower / 'config.json'}"
    with blame(tower_file):
        clip = CLIPVisionConfig.from_pretrained(tower)
    expected = raw.get("mm_hidden_size", clip.hidden_size)
    if clip.hidden_size != expected:
        raise ValueError(
            f"{tower_file} has width {clip.hidden_size}, the projector of {version / 'config.json'} expects {expected}"
        )
    if (side := formats.tower_side(raw)) not in (None, clip.image_size):
        raise ValueError(
            f"{tower_file} reads images of {clip.image_size} pixels, {version / 'config.json'} was trained with {side}"
        )
    llama = {key: raw[key] for key in LLAMA_KEYS if raw.get(key) is not None}
    with blame(file):
        return UGroundConfig(
            vision_config=clip,
            mm_vision_select_layer=raw.get("mm_vision_select_layer", -2),
            mm_projector_type="linear" if "mm_projector.weight" in keys else "mlp2x_gelu",
            **(llama | settings),
        )


def new_model(config: GroundingConfig, dtype: torch.dtype) -> GroundingModel:
    """The model with initialized phi, gate and pixel decoder; all other weights are uninitialized memory."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with no_init_weights():
            model = BACKBONES[config.backbone].model(config)
        for part in (model.text_hidden_fcs, model.ppm):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        if not config.decoder_kind.has_encoder:
            model.visual_model.reset_parameters()
    finally:
        torch.set_default_dtype(default)
    return model


def read_tower(folder: str | Path) -> dict[str, torch.Tensor]:
    """CLIP's vision tower under this project's keys, without the text encoder of a whole CLIP.

    Raises:
        ValueError: naming a file that is damaged, or keys that are missing, unexpected or of another shape, which
            transformers would initialize randomly.
    """
    read_config(Path(folder), "--vision_tower")
    with blame("--vision_tower"):
        read_folder(Path(folder))  # mapped, not read: transformers' errors name no file
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # transformers warns of every weight of the text encoder
    try:
        with blame(f"--vision_tower: {Path(folder) / 'config.json'} does not describe a CLIP that can be loaded"):
            loaded: Any = CLIPVisionModel.from_pretrained(
                folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
            )
    finally:
        transformers_logging.set_verbosity(level)
    tower, info = loaded  # transformers' annotation lacks the pair
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(CLIP_TEXT_KEYS)]
    if problems := misfits(info["missing_keys"], unexpected, info["mismatched_keys"]):
        raise ValueError(
            f"--vision_tower: the weights in {folder} are not those of its config.json: {'; '.join(problems)}. "
            "Is the download complete, and is it a CLIP?"
        )
    return {f"vision_tower.{key}": value for key, value in tower.state_dict().items()}


def fit_positions(state: dict[str, torch.Tensor], config: UGroundConfig, shifted: bool = False) -> None:
    """Interpolates CLIP's position embeddings in place for another side of its input (``clip_resize``), bilinearly.

    Args:
        state: the model's tensors, with the tower's.
        shifted: as PixelLM's code does (clip_encoder.py): it takes the last row for the class token's, which is the
            first, so that all patches move by one. Its published weights were trained on that.
    """
    key = "vision_tower.embeddings.position_embedding.weight"
    table, grid = state[key], config.clip_side // config.clip_patch
    if not config.clip_resize or len(table) == grid**2 + 1:
        return
    before = round((len(table) - 1) ** 0.5)
    token, patches = (table[-1:], table[:-1]) if shifted else (table[:1], table[1:])
    square = patches.float().T.unflatten(1, (before, before))[None]
    resized = nn.functional.interpolate(square, (grid, grid), mode="bilinear", align_corners=False)[0].flatten(1).T
    resized = resized.to(table.dtype)
    state[key] = torch.cat([resized, token] if shifted else [token, resized])


def load_base(
    version: str, vision_tower: str, vision_pretrained: str | None, dtype: torch.dtype, settings: dict
) -> tuple[GroundingModel, dict[str, str]]:
    """Builds UGround from base weights of a backbone and a mask decoder.

    Args:
        version: LLaVA-1.5, or another backbone (``model.backbones.BACKBONES``).
        vision_tower: LLaVA's CLIP; not read for the others, which hold their tower.
        vision_pretrained: the mask decoder that ``settings`` name; not read if it is a new one; None = the model's
            masks are not used: its SAM is a small one with undefined weights.
        settings: of ``GroundingConfig``, beyond the sizes.

    Returns:
        the model, and module -> source of its weights.

    Raises:
        ValueError: if a file is missing, or weights do not fit.
    """
    folder = Path(version)
    decoder: dict[str, torch.Tensor] = {}
    sizes: dict[str, Any] = {}
    if vision_pretrained is None:
        sizes = {"sam_config": UNUSED_SAM.to_dict()}
    elif decoder_kind(settings).has_encoder:
        decoder, sizes = read_decoder(settings.get("mask_decoder", SAM), vision_pretrained)
    config: GroundingConfig
    if base_backbone(folder) == "llava":
        config, state, has_tower = read_llava(folder, vision_tower, settings | sizes)
        sources = dict.fromkeys(("model", "lm_head", "mm_projector"), version)
        sources["vision_tower"] = version if has_tower else vision_tower
    else:
        config, state = read_whole(folder, settings | sizes)
        sources = dict.fromkeys(("model", "lm_head"), version)
    with blame(f"--version: {folder / 'config.json'} does not describe a model that can be built"):
        model = new_model(config, dtype)
    if decoder and vision_pretrained:
        load_strictly(model.visual_model, decoder, vision_pretrained)
        sources["visual_model"] = vision_pretrained
    load_strictly(model, state, str(folder / "config.json"), new=("visual_model.", *NEW_PARTS))
    return model.eval(), sources


def read_llava(folder: Path, vision_tower: str, settings: dict) -> tuple[UGroundConfig, dict[str, torch.Tensor], bool]:
    """Configuration and tensors of a LLaVA-1.5 with its CLIP, and whether the LLaVA holds its own, perhaps fine-tuned,
    which takes precedence."""
    nested = "text_config" in read_config(folder, "--version")
    llava = formats.renamed(read_folder(folder), formats.LLAVA_TRANSFORMERS if nested else formats.LLAVA)
    config = base_config(folder, Path(vision_tower), llava.keys(), settings)
    has_tower = any(key.startswith("vision_tower.") for key in llava)
    llava = read_tower(vision_tower) | llava
    fit_positions(llava, config)
    return config, llava, has_tower


def read_whole(folder: Path, settings: dict) -> tuple[GroundingConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of a backbone that is one folder.

    Raises:
        ValueError: if ``config.json`` describes no such model, or one that cannot be packed.
    """
    backbone = BACKBONES[base_backbone(folder)]
    state = formats.renamed(read_folder(folder), backbone.model.published_keys)
    return whole_config(folder, state.keys(), settings), state


def whole_config(folder: Path, keys: Collection[str], settings: dict) -> GroundingConfig:
    """The configuration of a backbone that is one folder.

    Args:
        keys: of its tensors, under any names. They tell whether ``lm_head`` is the table of the embeddings:
            configurations default to that, also where the weights have both.
        settings: of ``GroundingConfig``, with the mask decoder's sizes.
    """
    raw = _without_types(read_config(folder, "--version"))
    tied = {"tie_word_embeddings": not any(key.endswith("lm_head.weight") for key in keys)}
    if isinstance(text := raw.get("text_config"), dict):
        raw["text_config"] = text | tied
    others = {key: value for key, value in raw.items() if key not in ("model_type", "architectures", "auto_map")}
    with blame(f"--version: {folder / 'config.json'}"):
        return BACKBONES[base_backbone(folder)].config(**others | tied | settings)


def _without_types(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the precision of its file, also in its parts: the run's holds."""
    return {
        key: _without_types(value) if isinstance(value, dict) else value
        for key, value in raw.items()
        if key not in FILE_TYPES
    }


def base_backbone(folder: Path) -> str:
    """The backbone whose base weights a folder holds.

    Raises:
        ValueError: if it is none.
    """
    raw = read_config(folder, "--version")
    if name := backbone_of(raw.get("model_type"), base=True):
        return name
    text = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and (problem := packing_problem(str(raw.get("model_type")), kinds)):
        raise ValueError(f"--version: {folder / 'config.json'}: {problem}, such as {', '.join(BACKBONES)}")
    known = {name: " or ".join(backbone.base_types) for name, backbone in BACKBONES.items()}
    raise ValueError(
        f"--version: {folder / 'config.json'} is of type {raw.get('model_type')!r}, not base weights of a backbone ("
        f"{', '.join(f'{name}: {types}' for name, types in known.items())}), nor a model of this project or a related "
        "method"
    )


def released_config(
    folder: Path, raw: dict, release: formats.Release, vision_tower: str | Path, settings: dict
) -> tuple[UGroundConfig, dict[str, torch.Tensor]]:
    """The configuration of a published checkpoint, and its tensors under this project's names.

    Args and errors are those of ``load_released``.
    """
    state = formats.renamed(read_folder(folder), release.rules)
    with blame(f"--version: {folder / 'config.json'}"):
        method = formats.released_settings(release, raw) | settings
    decoder, kind = formats.below(state, "visual_model."), decoder_kind(method)
    if kind != decoder_kind(release.settings):
        raise ValueError(
            f"--version: {folder} is a published {release.name}, whose masks {decoder_kind(release.settings).title} "
            f"decodes; leave out --mask_decoder {method['mask_decoder']}, or start from base weights"
        )
    try:
        if kind.has_encoder:
            method["sam_config"] = SamShape.from_state_dict(decoder).to_dict()
        else:
            method |= _pixel_sizes(Path(vision_tower), raw, state, decoder)
    except (KeyError, IndexError) as error:
        wrapped = any(key.startswith("base_model.") for key in state)
        hint = ": an adapter that was not merged; merge it with its own code" if wrapped else ""
        raise ValueError(f"--version: {folder} holds no {kind.title} (no {error}){hint}") from error
    config = base_config(folder, Path(vision_tower), state.keys(), method)
    return config, state


def _pixel_sizes(
    tower: Path, raw: Mapping[str, Any], state: dict[str, torch.Tensor], decoder: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Settings of ``UGroundConfig`` for the sizes of a published PixelLM.

    Args:
        tower: folder of CLIP; raw: the checkpoint's ``config.json``; state: its tensors; decoder: those of its decoder.
    """
    read_config(tower, "--vision_tower")
    depths = clip_depths(
        CLIPVisionConfig.from_pretrained(tower).num_hidden_layers, raw.get("mm_vision_select_layer", -2)
    )
    shape = PixelDecoderShape.from_state_dict(decoder, depths)
    width = state["mm_projector.0.weight"].shape[0]
    return {"decoder_config": shape.to_dict(), "mm_projector_width": width, "decoder_width": shape.prompt_width}


def load_released(
    folder: Path, raw: dict, release: formats.Release, vision_tower: str | Path, dtype: torch.dtype, settings: dict
) -> tuple[GroundingModel, dict[str, str]]:
    """Builds the model of a checkpoint published by the authors of UGround or a related method (``formats.RELEASES``).

    The checkpoint has keys of its own and contains SAM; CLIP is in a separate folder.

    Args:
        raw: the folder's ``config.json``; release: its method (``release_of``).
        settings: of ``UGroundConfig``; they override those that reproduce the release.

    Returns:
        the model, and module -> source of its weights.

    Raises:
        ValueError: if a file is missing, or weights do not fit.
    """
    config, state = released_config(folder, raw, release, vision_tower, settings)
    with blame(f"--version: {folder / 'config.json'} does not describe a model that can be built"):
        model = new_model(config, dtype)
    sources = dict.fromkeys((name for name, _ in model.named_children()), str(folder))
    if not any(key.startswith("vision_tower.") for key in state):
        sources["vision_tower"] = str(vision_tower)
    if not any(key.startswith("ppm.") for key in state):
        del sources["ppm"]  # new
    state = read_tower(vision_tower) | state
    fit_positions(state, config, shifted=release.shifted_positions)
    load_strictly(model, state, str(folder / "config.json"), new=release.absent)
    return model.eval(), sources


def grow_vocabulary(model: GroundingModel, old_size: int, size: int) -> None:
    """Initializes the embeddings of added tokens with the mean of the others, as LLaVA does; adds rows if needed.

    Args:
        old_size, size: numbers of tokens before and after. Some LLaVAs have more embeddings than tokens, published
            checkpoints no embedding of ``<image>``.
    """
    if size == old_size:
        return
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    old_size = min(old_size, rows)
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
    embeddings = model.get_input_embeddings()
    tied = embeddings.weight is model.lm_head.weight
    with torch.no_grad():
        for table in [embeddings.weight] if tied else [embeddings.weight, model.lm_head.weight]:
            table[old_size:size] = table[:old_size].float().mean(0).to(table.dtype)


def base_fingerprints(loaded: Iterable[Loaded]) -> dict[str, str]:
    """Module -> fingerprint of its base weights, without those that are initialized at random."""
    return {row.module: row.fingerprint for row in loaded if row.source != "new"}


def load_original_sam(path: str, model: GroundingModel) -> SegmentAnything:
    """Loads the SAM that a checkpoint was trained from.

    Raises:
        ValueError: if the checkpoint has none, or another image encoder, which training never changes.
    """
    if type(model.visual_model) is not SegmentAnything:
        decoder = model.config.mask_decoder
        raise ValueError(f"--sam {path} is a SAM 1, and {decoder} decodes the checkpoint's masks: leave it out")
    file = str(hub.resolve_file(path, "--sam").path)
    state, shape = read_sam(file, "--sam")
    sam = SegmentAnything(shape)
    load_strictly(sam, state, file)
    sam = sam.to(model.device, model.dtype).eval()
    trained, original = (each.image_encoder.state_dict() for each in (model.visual_model, sam))
    if trained.keys() != original.keys() or any(not torch.equal(trained[name], original[name]) for name in trained):
        raise ValueError(f"--sam {path}: its image encoder is not the checkpoint's; give the SAM it was trained from")
    return sam
