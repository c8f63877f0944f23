"""Files of an answer: a lossless mask per [SEG], an overlay, a JSON record. Chat and dashboard share them."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from model.structures import Prediction
from utils.datasets.masks import encode_mask
from utils.plotting.overlays import heat_map, overlay, save_picture


def answer_record(
    image: str, pixels: np.ndarray, prompt: str, prediction: Prediction, layer_policy: str
) -> dict[str, Any]:
    """An answer as a JSON object; each mask has its box (x, y, width, height; None if it is empty) and COCO RLE.

    ``thought`` is there if one stands before the answer; ``cut``, and true, if the answer reached the longest length.

    Args:
        image: its name; pixels: uint8 [H, W, 3].
    """
    masks = []
    for number, mask in enumerate(prediction.masks.numpy()):
        entry = {
            "layer": prediction.layers[number],
            "policy": [round(share, 4) for share in prediction.policy[number].tolist()],
            "pixels": int(mask.sum()),
            "box_xywh": bounding_box(mask),
            "rle": encode_mask(mask),
        }
        for name in ("ambiguity", "predicted_iou"):
            if values := getattr(prediction, name):
                entry[name] = round(values[number], 4)
        if prediction.uncertainty:
            uncertainty = prediction.uncertainty[number]
            shares = {str(layer): round(share, 4) for layer, share in enumerate(uncertainty.layers.tolist()) if share}
            entry["uncertainty"] = {"score": uncertainty.score, "layers": shares}
        masks.append(entry)
    return (
        {
            "image": image,
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "prompt": prompt,
            "answer": prediction.text,
            "layer_policy": layer_policy,
            "masks": masks,
        }
        | ({"thought": prediction.thought} if prediction.thought else {})
        | ({"cut": True} if prediction.cut else {})
    )


def save_pictures(folder: Path, stem: str, pixels: np.ndarray, values: dict[str, Any], prediction: Prediction) -> None:
    """Writes STEM_overlay.png and STEM_mask_K.png per [SEG] (0 and 255), and adds their names to ``values``.

    With ``mc:T`` also STEM_deviation_K.png: the standard deviation of the T probabilities, yellow where it is 0.5.

    Args:
        values: from ``answer_record``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    masks = prediction.masks.numpy()
    for number, (mask, entry) in enumerate(zip(masks, values["masks"]), start=1):
        entry["file"] = f"{stem}_mask_{number}.png"
        save_picture(folder / entry["file"], mask.astype(np.uint8) * 255)
    for number, (uncertainty, entry) in enumerate(zip(prediction.uncertainty, values["masks"]), start=1):
        entry["uncertainty"]["file"] = f"{stem}_deviation_{number}.png"
        deviation = heat_map(pixels, 2 * uncertainty.deviation.numpy())
        save_picture(folder / entry["uncertainty"]["file"], deviation)
    values["overlay"] = f"{stem}_overlay.png"
    save_picture(folder / values["overlay"], overlay(pixels, masks))


def save_answer(folder: Path, stem: str, pixels: np.ndarray, values: dict[str, Any], prediction: Prediction) -> None:
    """``save_pictures``, then STEM.json; replaces an earlier answer of that name, but no other file.

    Raises:
        ValueError: if STEM.json exists and is not an answer.
    """
    record = folder / f"{stem}.json"
    remove_old(record)
    save_pictures(folder, stem, pixels, values, prediction)
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    record.write_text(text, encoding="utf-8", errors="backslashreplace")  # bytes in a file name become \udc.. escapes


def free_stem(folder: Path, stem: str, ending: str = ".json") -> str:
    """``STEM_001``, or the next number for which no file with that ending exists."""
    return next(name for name in (f"{stem}_{n:03d}" for n in count(1)) if not (folder / f"{name}{ending}").exists())


def remove_old(record: Path) -> None:
    """Deletes an earlier answer with its pictures: it may have more masks than the new one."""
    try:
        old = json.loads(record.read_text(encoding="utf-8"))["masks"]
        pictures = [part["file"] for mask in old for part in (mask, mask.get("uncertainty")) if part]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{record} exists and is not an answer of this program; give another --output") from error
    record.unlink()
    for name in pictures:
        (record.parent / Path(name).name).unlink(missing_ok=True)


def bounding_box(mask: np.ndarray) -> list[int] | None:
    """x, y, width, height in pixels; None for an empty mask."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        return None
    return [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
