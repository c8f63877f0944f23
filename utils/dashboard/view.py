"""Views of the dashboard: answers as HTML, masks over the image, the policy as a chart, files to download.

Text by visitors and by the model is escaped: it is shown, and never executed.
"""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from model import layer_rules
from model.processing.tokens import REJ, SEG
from model.structures import Turn
from utils.dashboard.examples import Example
from utils.dashboard.service import FORMATS, Dashboard, Visit
from utils.inference import answer_files
from utils.plotting.overlays import PALETTE, color, heat_map, paint

SMALLEST, LARGEST = 640, 1280  # long side of a picture on the page
FUNCTION_WORDS = frozenset(("it", "they", "this", "that", "these", "here", "there", "is", "are", "yes", "no", "sure"))
BOUNDARY = re.compile(r"\[SEG\]|\[REJ\]|[.,;:!?]|\b(?:and|or)\b", re.IGNORECASE)
EMPTY = '<p class="ug-hint ug-placeholder">The picture with its masks appears here.</p>'
NO_MASK = '<p class="ug-hint">No mask, no layer: ask for something that is in the picture.</p>'
COPULA = re.compile(r"(?:(?:\bis|\bare|:)\s*)*$", re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------- text


def css_color(number: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color(number))


def ink(number: int) -> str:
    """Black or white, whichever is easier to read on the color of the ``number``-th [SEG] (WCAG's luminance)."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in color(number)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#fff"


def palette_css() -> str:
    """CSS that depends on the palette: the chips of the mask switches, the marks in answers."""
    chips = [
        f"#ug-masks label:nth-of-type({len(PALETTE)}n+{n + 1}) {{ border-left: 10px solid {css_color(n)}; }}"
        for n in range(len(PALETTE))
    ]
    marks = [f'.ug-seg[style="--ug: {css_color(n)}"] {{ color: {ink(n)}; }}' for n in range(len(PALETTE))]
    return "\n".join(chips + marks)


def words_before(text: str, end: int) -> int:
    """Start of the words that the [SEG] at ``end`` refers to: "the red star is [SEG]" -> 0; ``end`` if none."""
    close = COPULA.search(text, 0, end).start()  # type: ignore[union-attr]  # also matches an empty string
    stop = max((match.end() for match in BOUNDARY.finditer(text, 0, close)), default=0)
    words = list(re.finditer(r"\S+", text[stop:close]))
    start = end
    for word in reversed(words):
        if word[0].lower() in FUNCTION_WORDS:
            break
        start = stop + word.start()
    return start


def answer_html(text: str, colored: bool = True) -> str:
    """An answer with each [SEG], and the words it refers to, in the color of its mask."""
    pieces, done = [], 0
    for number, match in enumerate(re.finditer(re.escape(SEG), text)):
        begin = max(done, words_before(text, match.start()))
        style = f' style="--ug: {css_color(number)}"' if colored else ""
        pieces.append(escape(text[done:begin]))
        if begin < match.start():
            pieces.append(f'<span class="ug-words"{style}>{escape(text[begin : match.start()].rstrip())}</span> ')
        pieces.append(f'<mark class="ug-seg"{style}>{SEG}<sub>{number + 1}</sub></mark>')
        done = match.end()
    rest = escape(text[done:]).replace(REJ, f'<span class="ug-rej" title="the model rejects the premise">{REJ}</span>')
    return "".join(pieces) + rest


def transcript_html(turns: Sequence[Turn], writing: bool = False, error: str = "", cut: bool = False) -> str:
    """The conversation, the newest answer colored.

    Args:
        writing: whether the last answer is still being generated.
        error: a message to show.
        cut: whether the last answer was cut off before its end.
    """
    rows = []
    for number, turn in enumerate(turns, start=1):
        last = number == len(turns)
        answer = answer_html(turn.answer, colored=last) + (
            '<span class="ug-caret">▍</span>' if last and writing else ""
        )
        thought = ""
        if turn.thought:  # open while it is being written
            is_open = " open" if last and writing and not turn.answer else ""
            thought = f'<details class="ug-thought"{is_open}><summary>Thought</summary>{escape(turn.thought)}</details>'
        rows.append(
            f'<p class="ug-question"><span class="ug-who">You</span> {escape(turn.question)}</p>{thought}'
            f'<p class="ug-answer"><span class="ug-who">Model</span> {answer}</p>'
        )
    if cut:
        rows.append('<p class="ug-hint">The answer was cut off before its end.</p>')
    if error:
        rows.append(error_html(error))
    if not rows:
        rows.append('<p class="ug-hint">Answers appear here.</p>')
    return (
        '<div class="ug-chat" role="log" aria-live="polite" tabindex="0" aria-label="Conversation">'
        f"<div>{''.join(rows)}</div></div>"
    )


def error_html(text: str) -> str:
    return f'<p class="ug-error" role="alert">{escape(text)}</p>'


# ------------------------------------------------------------------------------------------------------------ pictures


def picture_html(picture: np.ndarray, alt: str) -> str:
    """An image [H, W, 3] embedded in the page, so that there is no file that others could fetch."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", quality=92, method=1)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img class="ug-picture" alt="{escape(alt)}" src="data:image/webp;base64,{data}">'


def thumbnail_html(example: Example, side: int = 120) -> str:
    with Image.open(example.path, formats=FORMATS) as image:
        image.thumbnail((side, side))
        return picture_html(np.array(image), f"Example: {example.title}")


def shown_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) on the page: small images are enlarged, so that outlines are smooth, large ones reduced."""
    scale = min(max(SMALLEST / max(height, width), 1.0), LARGEST / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if values.shape[:2] == size:
        return values
    smaller = size[0] < values.shape[0]
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def masks_html(visit: Visit, chosen: Sequence[int], opacity: float, outline: bool) -> str:
    """The image with the chosen masks (numbers from 0) of the latest answer."""
    size = shown_size(*visit.image.shape[:2])
    layers = []
    if visit.prediction is not None:
        logits = visit.prediction.mask_logits.numpy()
        layers = [(resized(logits[n], size) > 0, color(n)) for n in chosen if n < len(logits)]
    picture = paint(resized(visit.image, size), layers, opacity, outline)
    names = ", ".join(f"{SEG} {n + 1}" for n in chosen) or "none"
    return picture_html(picture, f"The image; masks over it: {names}")


def layer_map_html(image: np.ndarray, similarity: np.ndarray, seg: int, layer: int) -> str:
    """A similarity map [H, W] in [0, 1] over the image [H, W, 3]."""
    caption = f"Similarity of {SEG} {seg + 1} and the image at layer {layer}: violet = least, yellow = most."
    return figure_html(image, similarity, caption)


def figure_html(image: np.ndarray, heat: np.ndarray, caption: str) -> str:
    size = shown_size(*image.shape[:2])
    picture = picture_html(heat_map(resized(image, size), resized(heat, size)), caption)
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def uncertainty_html(visit: Visit, seg: int) -> str:
    """The uncertainty of a [SEG]: standard deviation per pixel of the masks of sampled layers."""
    if visit.monte_carlo is None:
        return ""
    uncertainty = visit.monte_carlo.uncertainty[seg]
    layers = [f"{layer} ({share:.0%})" for layer, share in enumerate(uncertainty.layers.tolist()) if share]
    caption = (
        f"Uncertainty of {SEG} {seg + 1}: {uncertainty.score:.2f} (0 = the masks of all sampled layers agree, 1 = they "
        f"have nothing in common). Yellow = they differ. Sampled layers: {', '.join(layers)}."
    )
    return figure_html(visit.image, 2 * uncertainty.deviation.numpy(), caption)


def policy_html(visit: Visit, seg: int) -> str:
    """The policy's distribution over layers as bars, the chosen layer in the mask's color."""
    assert visit.prediction is not None
    policy = visit.prediction.policy[seg].tolist()
    chosen, highest = visit.prediction.layers[seg], max(policy)
    width, height, base = 600, 150, 120
    step = width / len(policy)
    bars = []
    every = -(-len(policy) // 21)  # so that the labels fit
    for layer, probability in enumerate(policy):
        x, tall = layer * step + step * 0.12, base * 0.85 * probability / highest
        look = f'class="ug-bar ug-chosen" style="--ug: {css_color(seg)}"' if layer == chosen else 'class="ug-bar"'
        bars.append(
            f'<rect {look} x="{x:.1f}" y="{base - tall:.1f}" width="{step * 0.76:.1f}" height="{max(tall, 0.5):.1f}">'
            f"<title>layer {layer}: {probability:.1%}</title></rect>"
        )
        if layer % every == 0 or layer == chosen:
            bold = ' font-weight="700"' if layer == chosen else ""
            bars.append(
                f'<text x="{(layer + 0.5) * step:.1f}" y="{base + 18}" text-anchor="middle"{bold}>{layer}</text>'
            )
    where = layer_rules.parse(visit.policy).words(chosen)
    caption = (
        f"{SEG} {seg + 1} uses {where} (layer policy “{escape(visit.policy)}”; layers 0 to {len(policy) - 1}). "
        f"The policy's probability of layer {chosen} is {policy[chosen]:.1%}. "
    )
    if highest - min(probability for probability in policy if probability) < 1e-3:
        caption += "The policy is untrained: all layers are equally probable."
    elif policy[chosen] < highest:
        caption += f"The most probable is layer {policy.index(highest)} ({highest:.1%})."
    return (
        f'<figure><svg class="ug-chart" viewBox="0 0 {width} {height}" role="img" aria-label="{caption}">'
        f"{''.join(bars)}</svg><figcaption>{caption}</figcaption></figure>"
    )


# --------------------------------------------------------------------------------------------------------------- files


def answer_json(visit: Visit, model: str, pictures: str = "rle") -> dict[str, Any]:
    """The latest answer as a JSON object, for programs.

    Args:
        model: its name.
        pictures: format of the masks: COCO ``rle``, or ``png`` (0 and 255, base64).
    """
    prediction = visit.prediction
    assert prediction is not None
    if visit.monte_carlo is not None:
        prediction = replace(prediction, uncertainty=visit.monte_carlo.uncertainty)
    values = answer_files.answer_record("", visit.image, visit.turns[-1].question, prediction, visit.policy)
    del values["image"]  # names of uploads are random
    for n, (logits, mask, entry) in enumerate(zip(prediction.mask_logits, visit.masks, values["masks"])):
        inside = logits.sigmoid()[torch.from_numpy(mask)]
        score = round(float(inside.mean()), 4) if len(inside) else 0.0
        entry |= {"number": n + 1, "color": css_color(n), "score": score}
        if pictures == "png":
            del entry["rle"]
            entry["png"] = base64.b64encode(encode_png(mask)).decode()
    return values | {"model": model}


def check_pictures(kind: str) -> None:
    if kind not in ("rle", "png"):
        raise ValueError(f"masks {kind!r} is unknown; use rle or png")


def explain(dashboard: Dashboard, visitor: str, number: int, layer: int, uncertainty: bool) -> dict[str, Any]:
    """The panel "Why this mask?" for programs: layer, policy, similarity map and Monte-Carlo uncertainty of a [SEG].

    Args:
        number: of the [SEG], from 1.
        layer: of the similarity map; -1 = the chosen one.
        uncertainty: whether to measure it, too.

    Raises:
        ValueError: for a [SEG] or a layer that does not exist.
    """
    visit = dashboard.visits.get(visitor)
    if visit is None or visit.prediction is None or not 1 <= number <= len(visit.prediction.layers):
        raise ValueError(f"the latest answer has no [SEG] number {number}; call /ask first")
    if not -1 <= layer < dashboard.num_layers:
        raise ValueError(
            f"layer {layer} does not exist: choose 0 to {dashboard.num_layers - 1}, or -1 for the chosen one"
        )
    seg = number - 1
    chosen = visit.prediction.layers[seg]
    layer = chosen if layer == -1 else layer
    similarity = (dashboard.layer_map(visit, seg, layer) * 255 + 0.5).astype(np.uint8)
    policy = [round(probability, 5) for probability in visit.prediction.policy[seg].tolist()]
    values: dict[str, Any] = {"number": number, "layer": chosen, "layer_policy": visit.policy, "policy": policy}
    values |= {"similarity_layer": layer, "similarity_png": base64.b64encode(encode_png(similarity)).decode()}
    if uncertainty:
        monte_carlo = dashboard.measure_uncertainty(visitor).monte_carlo
        assert monte_carlo is not None
        deviation = (monte_carlo.uncertainty[seg].deviation * 510 + 0.5).clamp(max=255).numpy().astype(np.uint8)
        values["uncertainty"] = round(monte_carlo.uncertainty[seg].score, 4)
        values["deviation_png"] = base64.b64encode(encode_png(deviation)).decode()
    return values


def encode_png(picture: np.ndarray) -> bytes:
    """PNG of a mask [H, W] bool (as 0 and 255), or of a uint8 map [H, W] or picture [H, W, 3]."""
    stream = io.BytesIO()
    values = picture.astype(np.uint8) * 255 if picture.dtype == bool else picture
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def write_overlay(visit: Visit, chosen: Sequence[int], opacity: float, outline: bool) -> str:
    """Writes overlay.png: what the page shows, at the image's own size."""
    layers = [(visit.masks[n], color(n)) for n in chosen if n < len(visit.masks)]
    return write_file(visit.folder / "overlay.png", encode_png(paint(visit.image, layers, opacity, outline)))


def write_masks(visit: Visit) -> str:
    """Writes masks.zip: a mask_K.png per [SEG], 0 and 255, at the image's size."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number, mask in enumerate(visit.masks, start=1):
            archive.writestr(f"mask_{number}.png", encode_png(mask))
    return write_file(visit.folder / "masks.zip", stream.getvalue())


def write_record(visit: Visit, model: str) -> str:
    """Writes answer.json (see ``answer_json``)."""
    text = json.dumps(answer_json(visit, model), indent=1, ensure_ascii=False) + "\n"
    return write_file(visit.folder / "answer.json", text.encode())


def write_file(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)
