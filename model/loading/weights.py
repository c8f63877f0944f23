"""Reading LLaVA, CLIP and SAM files by their own key names, strictly: nothing is left at random without being said."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from model.loading import formats
from model.sam import SamShape
from model.UGround import UGroundConfig, UGroundForCausalLM

LLAVA_TYPES = ("llava", "llava_llama", "llava_next")
WEIGHT_FILES = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
NEW_PARTS = ("text_hidden_fcs.", "ppm.")  # what training starts from scratch
OTHER_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # of CLIP, which reads texts
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
    """One row of the loading report: a module, where its weights came from, and a fingerprint of them."""

    module: str
    source: str
    parameters: int
    dtype: str
    fingerprint: str


def read_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """A ``.pth`` or ``.bin`` of plain tensors; a file that carries code is refused.

    Raises:
        ValueError: if the file is missing, truncated, or holds anything but tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint of plain tensors, or is damaged: {first}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return state


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a transformers-style folder: safetensors or ``.bin``, one file or shards.

    Raises:
        ValueError: if the folder has no weights, or the index names a shard that is missing.
    """
    for pattern, index_name in WEIGHT_FILES:
        index = folder / index_name
        if index.is_file():
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            files = sorted(folder.glob(pattern))
        if missing := [str(path) for path in files if not path.is_file()]:
            raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
        if files:
            state: dict[str, torch.Tensor] = {}  # mapped into memory, and read when they are used
            for path in files:
                state |= load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
            return state
    raise ValueError(f"{folder} holds no weights (looked for model*.safetensors and pytorch_model*.bin)")


def run_of(folder: Path) -> Path | None:
    """The training run that a folder is, or lies in, as its checkpoints do."""
    above = (folder, *folder.absolute().parents[:2])
    return next((run for run in above if (run / "checkpoints/index.json").is_file()), None)


def read_json(folder: Path, what: str) -> dict:
    """``config.json`` of a folder, or a ValueError that says what the folder should have been."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"{what}: {folder} is no folder; download it first and give its path")
    if not path.is_file():
        if run := run_of(folder):
            raise ValueError(
                f"{what}: {folder} is of a training run, not a model. Write the model first, with "
                f"python scripts/merge_lora.py --checkpoint {run} --output {run / 'merged'}, and give that folder"
            )
        raise ValueError(f"{what}: {folder} has no config.json")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: {path} is no valid JSON ({error})") from error


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], source: str, new: tuple[str, ...] = ()) -> None:
    """Moves ``state`` into ``module``; every key must find its place and every parameter its key.

    A tensor of the right type becomes the parameter itself, so that nothing is copied; the others are converted one by
    one, and a file is let go with the last of its tensors.

    Args:
        state: in the end it holds what ``module`` holds.
        new: prefixes of what ``state`` need not hold.

    Raises:
        ValueError: naming missing, unexpected and mis-shaped keys, with a guess at the cause.
    """
    own = module.state_dict()
    shared = (
        module.all_tied_weights_keys if isinstance(module, PreTrainedModel) else {}
    )  # lm_head.weight, where it is the embeddings' (SmolLM)
    missing = sorted(key for key in own.keys() - state.keys() - shared.keys() if not key.startswith(new))
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{key}: file {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    lines = [f"  {len(keys)} {kind}: {_some(keys)}" for kind, keys in problems if keys]
    if lines:
        cause = _cause(own.keys(), missing, unexpected, shapes)
        raise ValueError(f"the weights of {source} do not fit {type(module).__name__} ({cause}):\n" + "\n".join(lines))
    for key in state:
        state[key] = state[key].to(own[key].dtype)
    module.load_state_dict(state, strict=False, assign=True)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()


def _cause(own: Collection[str], missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    """What most likely went wrong, from which kinds of keys do not fit."""
    if len(missing) == len(own):
        return "no key fits: another kind of model, or its keys carry another prefix"
    if any("lora_" in key for key in unexpected):
        return "an adapter that was not merged"
    if shapes and not missing and not unexpected:
        return "the same architecture in another size: its configuration does not belong to these weights"
    if missing and not unexpected and not shapes:
        return "an incomplete file: a shard is missing, or only trained parts were saved"
    return "another architecture or version"


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def fingerprint(tensors: Iterable[torch.Tensor], most: int = 4096) -> str:
    """16 hex digits over at most ``most`` evenly spread values of each tensor: enough to tell checkpoints apart."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // most)
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def report(model: nn.Module, sources: dict[str, str]) -> list[Loaded]:
    """Rows (module, source, parameters, dtype, fingerprint) for every top-level module."""
    rows = []
    for name, child in model.named_children():
        parameters = list(child.parameters())
        source = sources.get(name, "new")
        count, dtype = sum(p.numel() for p in parameters), str(parameters[0].dtype).removeprefix("torch.")
        rows.append(Loaded(name, source, count, dtype, fingerprint(parameters)))
    return rows


def read_sam(path: str) -> tuple[dict[str, torch.Tensor], SamShape]:
    """A SAM and its size: segment-anything's ``.pth``, or a folder of transformers' SamModel.

    Raises:
        ValueError: if it is none.
    """
    folder = Path(path)
    state = formats.sam_renamed(read_folder(folder)) if folder.is_dir() else read_torch_file(folder)
    try:
        return state, SamShape.from_state_dict(state)
    except (KeyError, StopIteration, IndexError) as error:
        raise ValueError(f"--vision_pretrained: {path} is no segment-anything checkpoint (no {error})") from error


def base_config(version: Path, tower: Path, sam: SamShape, keys: Collection[str], settings: dict) -> UGroundConfig:
    """The configuration that a LLaVA folder, a CLIP folder and a SAM make together.

    Args:
        keys: of the LLaVA's tensors, by this project's names; they tell the kind of projector.

    Raises:
        ValueError: if the folder is no LLaVA, or the tower is not the one its projector was trained for.
    """
    raw = formats.llava_config(read_json(version, "--version"))
    if raw.get("model_type") not in LLAVA_TYPES:
        raise ValueError(
            f"--version: {version} is of type {raw.get('model_type')!r}, not a LLaVA-1.5 base "
            f"({' or '.join(LLAVA_TYPES)}); a merged UGround folder is for test.py and chat.py"
        )
    read_json(tower, "--vision_tower")
    clip = CLIPVisionConfig.from_pretrained(tower)
    wanted = raw.get("mm_hidden_size", clip.hidden_size)
    if clip.hidden_size != wanted:
        raise ValueError(
            f"--vision_tower: {tower} has width {clip.hidden_size}, the projector of {version} expects {wanted}"
        )
    if (side := formats.tower_side(raw)) not in (None, clip.image_size):
        raise ValueError(
            f"--vision_tower: {tower} reads images of {clip.image_size} pixels, {version} was trained with {side}"
        )
    llama = {key: raw[key] for key in LLAMA_KEYS if raw.get(key) is not None}
    return UGroundConfig(
        vision_config=clip,
        mm_vision_select_layer=raw.get("mm_vision_select_layer", -2),
        mm_projector_type="linear" if "mm_projector.weight" in keys else "mlp2x_gelu",
        sam_config=sam.to_dict(),
        **(llama | settings),
    )


def build(config: UGroundConfig, dtype: torch.dtype) -> UGroundForCausalLM:
    """The model with new phi and gate; all else has no values yet."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with no_init_weights():
            model = UGroundForCausalLM(config)
        for part in (model.text_hidden_fcs, model.ppm):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        nn.init.zeros_(model.ppm.gate)
    finally:
        torch.set_default_dtype(default)
    return model


def read_tower(folder: str | Path) -> dict[str, torch.Tensor]:
    """CLIP's vision tower as this project names it; a whole CLIP's other half is left out.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape: transformers would fill it with noise.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of every weight of the other half
    try:
        loaded: Any = CLIPVisionModel.from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )  # these are named below
    except OSError as error:
        raise ValueError(f"--vision_tower: {folder} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
    tower, info = loaded  # a pair, which transformers' annotation does not say
    strange = [key for key in info["unexpected_keys"] if not key.startswith(OTHER_HALF)]
    found = {"missing": info["missing_keys"], "unexpected": strange, "of another shape": info["mismatched_keys"]}
    problems = [f"{len(keys)} {what} ({', '.join(map(str, sorted(keys)[:5]))})" for what, keys in found.items() if keys]
    if problems:
        raise ValueError(
            f"--vision_tower: the weights in {folder} are not those of its config.json: {'; '.join(problems)}. "
            "Is the download complete, and is it a CLIP?"
        )
    return {f"vision_tower.{key}": value for key, value in tower.state_dict().items()}


def load_base(
    version: str, vision_tower: str, vision_pretrained: str, dtype: torch.dtype, settings: dict
) -> tuple[UGroundForCausalLM, list[Loaded]]:
    """Builds UGround from a LLaVA-1.5 folder, a CLIP folder and a SAM ``.pth`` (its size is read off the file).

    Args:
        settings: of ``UGroundConfig``, beyond the sizes.

    Raises:
        ValueError: if a file is missing, or a key does not find its place.
    """
    sam, shape = read_sam(vision_pretrained)
    nested = "text_config" in read_json(Path(version), "--version")
    rules = formats.LLAVA_TRANSFORMERS if nested else formats.LLAVA
    llava = formats.renamed(read_folder(Path(version)), rules)
    model = build(base_config(Path(version), Path(vision_tower), shape, llava.keys(), settings), dtype)
    load_strictly(model.visual_model, sam, vision_pretrained)
    has_tower = any(key.startswith("vision_tower.") for key in llava)  # then it may have been trained along
    llava = read_tower(vision_tower) | llava
    load_strictly(model, llava, version, new=("visual_model.", *NEW_PARTS))
    sources = dict.fromkeys(("model", "lm_head", "mm_projector"), version)
    sources |= {"vision_tower": version if has_tower else vision_tower, "visual_model": vision_pretrained}
    return model.eval(), report(model, sources)


def load_released(
    folder: str | Path, vision_tower: str | Path, dtype: torch.dtype, settings: dict
) -> tuple[UGroundForCausalLM, list[Loaded]]:
    """A checkpoint that UGround's authors or those of a relative published (``formats.RELEASES``).

    It has its own keys, SAM inside, and CLIP in a folder of its own.

    Args:
        settings: of ``UGroundConfig``, over those that reproduce the release.

    Raises:
        ValueError: if the folder is of no known kind, a file is missing, or a key does not find its place.
    """
    folder = Path(folder)
    raw = read_json(folder, "--version")
    release = formats.release_of(raw)
    if release is None:
        raise ValueError(f"--version: {folder} names no known architecture ({', '.join(formats.RELEASES)})")
    state = formats.renamed(read_folder(folder), formats.LLAVA)
    try:
        shape = SamShape.from_state_dict(formats.below(state, "visual_model."))
    except KeyError as error:
        wrapped = any(key.startswith("base_model.") for key in state)
        hint = ": an adapter that was not merged; merge it with its own code" if wrapped else ""
        raise ValueError(f"--version: {folder} holds no SAM (no {error}){hint}") from error
    method = formats.released_settings(release, raw) | settings
    model = build(base_config(folder, Path(vision_tower), shape, state.keys(), method), dtype)
    sources = dict.fromkeys((name for name, _ in model.named_children()), str(folder))
    if not any(key.startswith("vision_tower.") for key in state):
        sources["vision_tower"] = str(vision_tower)
    state = read_tower(vision_tower) | state
    load_strictly(model, state, str(folder), new=release.absent)
    return model.eval(), report(model, sources)


def grow_vocabulary(model: UGroundForCausalLM, known: int, size: int) -> None:
    """Makes room for added tokens; their rows start at the mean of the others, as in LLaVA.

    Args:
        known: tokens before they were added; size: and after. Some LLaVAs have more rows than tokens.
    """
    if size == known:
        return
    if size > model.config.vocab_size:
        model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            table[known:size] = table[:known].float().mean(0).to(table.dtype)


def base_fingerprints(loaded: Iterable[Loaded]) -> dict[str, str]:
    """Fingerprints of the base weights per module, without the parts that training starts from scratch."""
    return {row.module: row.fingerprint for row in loaded if row.source != "new"}
