"""Weights of mask decoders as published: segment-anything's file, or folders of transformers' SAM, SAM 2 and SAM 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.decoders import DECODERS
from model.decoders.sam2 import Sam2
from model.decoders.segment_anything import SamShape
from model.loading import formats
from model.loading.files import blame, read_config, read_folder, read_torch_file
from model.settings import DECODER_KINDS, SAM

FLAG = "--vision_pretrained"
TYPES: dict[str, dict[str, formats.Rules]] = {  # decoder -> model_type of config.json -> rules for its keys
    "sam2": {"sam2": (), "sam2_video": formats.VIDEO},
    "sam3_tracker": dict.fromkeys(("sam3_video", "sam3_tracker", "sam3_tracker_video"), formats.SAM3),
}
MOBILE, VIT = "image_encoder.patch_embed.seq.0.c.weight", "image_encoder.pos_embed"  # keys of one encoder alone
TITLES = {"sam": "SAM", "sam_hq": "HQ-SAM", "sam2": "SAM 2", "sam2_video": "SAM 2", "sam3": "SAM 3's detector alone"}
TITLES |= dict.fromkeys(TYPES["sam3_tracker"], "SAM 3")
POSITIONS = ("shared_image_embedding.", "prompt_encoder.shared_embedding.")  # one matrix, of which files may hold one


def read_decoder(mask_decoder: str, path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a mask decoder under this project's keys, and its sizes as settings of ``UGroundConfig``.

    Args:
        mask_decoder: a name in ``DECODER_KINDS``; path: a file or folder, as that decoder takes it.

    Raises:
        ValueError: if the path holds another model, naming both, or is damaged.
    """
    folder = Path(path)
    if mask_decoder in TYPES:
        return read_stretched(mask_decoder, folder)
    if mask_decoder == "mobile_sam":
        return read_mobile(folder), {}
    state, shape = read_sam(path)
    return state, {"sam_config": shape.to_dict()}


def read_mobile(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of MobileSAM's ``mobile_sam.pt``; its sizes are constants."""
    state = read_torch_file(file)
    if MOBILE not in state:
        hint = " it is SAM: set --mask_decoder segment_anything, or give" if VIT in state else " give"
        raise ValueError(f"{FLAG}: {file} is no MobileSAM (no {MOBILE!r});{hint} mobile_sam.pt")
    return state


def read_sam(path: str, flag: str = FLAG) -> tuple[dict[str, torch.Tensor], SamShape]:
    """A SAM's tensors and sizes, from segment-anything's ``.pth`` or a folder of transformers' SamModel.

    Args:
        flag: that gave the path, for messages.

    Raises:
        ValueError: if the path is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        check_type(folder, SAM, ("sam",), flag)
    state = formats.sam_renamed(read_folder(folder)) if folder.is_dir() else read_torch_file(folder)
    try:
        return state, SamShape.from_state_dict(state)
    except (KeyError, IndexError) as error:
        hint = "; it is MobileSAM: set --mask_decoder mobile_sam" if MOBILE in state else ""
        raise ValueError(f"{flag}: {path} is no segment-anything checkpoint (no {error}){hint}") from error


def check_type(folder: Path, mask_decoder: str, types: tuple[str, ...], flag: str = FLAG) -> None:
    """Raises a ValueError if a folder's ``config.json`` names another model than ``types``, with what reads that."""
    actual = read_config(folder, flag).get("model_type") if (folder / "config.json").is_file() else None
    if actual in types or (actual not in TITLES and mask_decoder not in TYPES):
        return
    kind = DECODER_KINDS[mask_decoder]
    given = f"is {TITLES[str(actual)]}" if actual in TITLES else f"is of type {actual!r}"
    others = [name for name, known in {SAM: ("sam",), **TYPES}.items() if actual in known]
    hint = f"set --mask_decoder {others[0]}, or give" if others and flag == FLAG else "give"
    taker = f"--mask_decoder {mask_decoder}" if flag == FLAG else flag
    raise ValueError(
        f"{flag}: {folder / 'config.json'} {given}, but {taker} takes {kind.title} (model_type {' or '.join(types)}); "
        f"{hint} {kind.example}"
    )


def read_stretched(mask_decoder: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """``read_decoder`` of SAM 2, or SAM 3's tracker."""
    raw = read_config(folder, FLAG)
    check_type(folder, mask_decoder, tuple(TYPES[mask_decoder]))
    model_type, decoder = raw["model_type"], DECODERS[mask_decoder]
    assert issubclass(decoder, Sam2)
    with blame(f"{FLAG}: {folder / 'config.json'}"):
        if model_type == "sam3_video":  # as Sam3VideoModel: the tracker looks through the detector's encoder
            raw = raw["tracker_config"] | {"vision_config": raw["detector_config"]["vision_config"]}
        sizes = decoder.sizes(raw)
    with blame(FLAG):
        state = formats.renamed(read_folder(folder), TYPES[mask_decoder][model_type])
    names = [f"{part}positional_embedding" for part in POSITIONS]
    for name, other in zip(names, reversed(names)):
        if other in state:
            state.setdefault(name, state[other].clone())
    return state, {"decoder_config": sizes}
