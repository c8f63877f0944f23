"""Published checkpoints of related methods (LISA, GSVA, SESAME, READ), in their own layout with random weights.

Each gives the masks of a reference implementation of its own code, on transformers' and segment-anything's modules.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_hub import lay_out
from opening import load_pretrained
from PIL import Image
from segment_anything.modeling import MaskDecoder, TwoWayTransformer
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import chat
from model.loading.formats import RELEASES, release_of, released_settings
from model.loading.pretrained import config_of, load, load_for_training
from model.opened import predict
from model.processing import tokens
from model.processing.template import HUMAN_SYSTEM_PROMPT, SYSTEM_PROMPT
from model.processing.transforms import resize_and_pad
from model.settings import PUBLISHED
from model.structures import Turn
from utils.demo.tiny_model import llama_settings, train_tokenizer

QUESTION, ANSWER = "Where is the red star?", "It is [SEG] and [SEG]."
GIVEN = Turn(QUESTION, ANSWER)
ARCHITECTURES = {
    "LISA": "LISAForCausalLM",
    "GSVA": "LisaGSVAForCausalLM",
    "SESAME": "SESAMEForCausalLM",
    "READ": "READForCausalLM",
}


def test_help_names_every_method_whose_checkpoints_open():
    assert PUBLISHED.replace(" or ", ", ").split(", ") == [release.name for release in RELEASES.values()]


@dataclass
class Published:
    folder: Path
    clip: Path
    model: torch.nn.Module
    tokenizer: object


@pytest.fixture
def publish(tmp_path, make_model, monkeypatch):
    """publish(name) -> a checkpoint in the layout of that method's authors, with the model that it was made from."""

    def write(name: str) -> Published:
        added = ("[SEG]", "[REJ]") if name == "GSVA" else ("[SEG]",)
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "SPECIAL_TOKENS", (*added, "<im_start>", "<im_end>"))
            tokenizer = train_tokenizer(
                [f"{QUESTION} {ANSWER} {SYSTEM_PROMPT} {HUMAN_SYSTEM_PROMPT}"] * 3, vocab_size=320
            )
        linear = name in ("LISA", "GSVA")  # those on LLaVA-1
        model = make_model(mm_projector_type="linear" if linear else "mlp2x_gelu")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for part in (model.model.embed_tokens, model.lm_head, model.text_hidden_fcs):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        inside = ("mm_projector.", "visual_model.", "text_hidden_fcs.")
        state = {
            f"model.{key}" if key.startswith(inside) else key: value
            for key, value in model.state_dict().items()
            if not key.startswith(("vision_tower.", "ppm."))
        }
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        if name == "GSVA":  # the whole training model, CLIP included, under the keys of older transformers
            tower = "model.vision_tower.vision_tower.vision_model"
            state |= {f"{tower}.{key}": value for key, value in model.vision_tower.state_dict().items()}
            state[f"{tower}.embeddings.position_ids"] = torch.arange(17)[None]
        folder = tmp_path / name
        folder.mkdir()
        torch.save(state, folder / "pytorch_model.bin")
        config = llama_settings(len(tokenizer), width=32, layers=4, heads=2) | {
            "model_type": "llava",
            "architectures": [ARCHITECTURES[name]],
            "mm_hidden_size": 32,
            "mm_use_im_start_end": True,
            "train_mask_decoder": True,
            "out_dim": 256,
        }
        if not linear:
            config |= {"mm_projector_type": "mlp2x_gelu", "max_position_embeddings": 4096}
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer.save_pretrained(folder)
        model.vision_tower.save_pretrained(tmp_path / f"{name}.clip")
        return Published(folder, tmp_path / f"{name}.clip", model, tokenizer)

    return write


def reference_states(published: Published, image: np.ndarray, system: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: the last layer's states of the two [SEG], [2, D], and of the image, [P, D]."""
    model, tokenizer = published.model, published.tokenizer
    side = {"shortest_edge": 40}, {"height": 40, "width": 40}
    pixels = CLIPImageProcessorPil(size=side[0], crop_size=side[1])(image, return_tensors="pt")["pixel_values"]
    features = model.mm_projector(model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])[0]
    before = tokenizer(f"{system} USER: <im_start>")["input_ids"]
    after = tokenizer(f"<im_end>\n{QUESTION} ASSISTANT: {ANSWER}</s>")["input_ids"][1:]
    llama = LlamaForCausalLM(LlamaConfig(**llama_settings(len(tokenizer), width=32, layers=4, heads=2))).eval()
    own = {key: value for key, value in model.state_dict().items() if key in llama.state_dict()}
    llama.load_state_dict(own)
    embed = llama.get_input_embeddings()
    embeddings = torch.cat([embed(torch.tensor(before)), features, embed(torch.tensor(after))])
    last = llama.model(inputs_embeds=embeddings[None]).last_hidden_state[0]
    start = len(before)
    positions = [start + len(features) + i for i, token in enumerate(after) if tokenizer.decode([token]) == "[SEG]"]
    return last[torch.tensor(positions) - 1], last[start : start + len(features)]


def reference_points(scores: list[float], size: tuple[int, int]) -> tuple[list[list[float]], list[int]]:
    """Reference: READ's points for one [SEG], from 4x4 similarities: (x, y) in SAM's 64 px frame, and labels."""
    square = torch.tensor(scores).view(1, 1, 4, 4)
    small = F.interpolate(square, (2, 2), mode="bilinear")[0, 0]
    small = (small - small.min()) / (small.max() - small.min())
    height, width = size
    scale = 2 / min(size)
    left, top = (int(width * scale) - 2) // 2, (int(height * scale) - 2) // 2
    padded = F.pad(small, (left, left, top, top), value=-1.0)
    rows, columns = padded.shape
    cells = [(padded[r, c].item(), r, c) for r in range(rows) for c in range(columns)]
    high = sorted((cell for cell in cells if cell[0] >= 0.8), key=lambda cell: -cell[0])
    low = sorted((cell for cell in cells if 0 <= cell[0] <= 0.2), key=lambda cell: cell[0])
    rest = [cell for cell in cells if 0.2 < cell[0] < 0.8]
    labels = [1] * len(high) + [0] * len(low) + [-1] * len(rest)
    k = 64 / max(size)
    points = []
    for _, r, c in (high + low + rest)[:30]:
        x, y = int(min((c + 0.5) * width / columns, width - 1)), int(min((r + 0.5) * height / rows, height - 1))
        points.append([x * int(width * k + 0.5) / width, y * int(height * k + 0.5) / height])
    return points, labels[:30]


def reference_masks(published: Published, image: np.ndarray, system: str, with_points: bool) -> torch.Tensor:
    """Reference: [2, H, W] logits by segment-anything's own prompt encoder and mask decoder."""
    model, size = published.model, image.shape[:2]
    sam, shape = model.visual_model, model.visual_model.shape
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=shape.decoder_mlp)
    decoder = MaskDecoder(transformer_dim=32, transformer=transformer, iou_head_hidden_dim=shape.iou_hidden)
    decoder.load_state_dict(sam.mask_decoder.state_dict())
    states, image_states = reference_states(published, image, system)
    scores = states @ image_states.T
    pixels, resized = resize_and_pad(image, 64)
    embedding = sam.image_encoder(pixels[None])
    masks = []
    for n in range(2):
        points = None
        if with_points:
            coordinates, labels = reference_points(scores[n].tolist(), size)
            points = torch.tensor([coordinates]), torch.tensor([labels])
        sparse, dense = sam.prompt_encoder(points=points, boxes=None, masks=None)
        sparse = torch.cat([sparse, model.text_hidden_fcs[0](states[n])[None, None]], 1)
        low, _ = decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=False)
        full = F.interpolate(low, (64, 64), mode="bilinear", align_corners=False)[..., : resized[0], : resized[1]]
        masks.append(F.interpolate(full, size, mode="bilinear", align_corners=False)[0, 0])
    return torch.stack(masks)


@pytest.mark.parametrize("size", [(48, 64), (64, 40), (50, 50)])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_masks_equal_those_of_the_reference(publish, name, size):
    published = publish(name)
    model, processor = load_pretrained(str(published.folder), vision_tower=str(published.clip))
    image = np.random.default_rng(3).integers(0, 255, (*size, 3), dtype=np.uint8)
    [[prediction]] = predict(model, processor, [image], [[GIVEN]])
    system = HUMAN_SYSTEM_PROMPT if name in ("LISA", "GSVA") else SYSTEM_PROMPT
    expected = reference_masks(published, image, system, with_points=name == "READ")
    assert prediction.layers == [4, 4]
    torch.testing.assert_close(prediction.mask_logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_published_checkpoints_open_in_chat_and_can_be_saved(publish, tmp_path, capsys):
    published = publish("LISA")
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(photo)
    ask = ["--image", str(photo), "--prompt", QUESTION, "--max_new_tokens", "4"]
    assert chat.main(["--version", str(published.folder), "--vision_tower", str(published.clip), *ask]) == 0
    output = capsys.readouterr().out
    model, processor = load_pretrained(str(published.folder), vision_tower=str(published.clip))
    assert processor.tokens.rej is None  # not trained to reject
    [[prediction]] = predict(model, processor, [np.zeros((40, 40, 3), np.uint8)], [[GIVEN]])
    assert prediction.rejected == [False, False]

    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    assert chat.main(["--version", str(tmp_path / "own"), *ask]) == 0
    assert capsys.readouterr().out == output
    settings = tmp_path / "own/uground_processor.json"
    settings.write_text(settings.read_text().replace('"crop"', '"pad"'))
    with pytest.raises(ValueError, match=r"clip_fit is crop in config.json, pad in the processor"):
        load_pretrained(str(tmp_path / "own"))


def test_the_tower_that_a_checkpoint_names_comes_from_the_hub(publish, hub_cache):
    published = publish("LISA")
    path = published.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mm_vision_tower": "org/clip"}))
    with pytest.raises(
        ValueError, match=r"holds no CLIP; give --vision_tower.*--vision_tower org/clip: is no path here"
    ):
        load(published.folder, "fp32", "cpu")
    lay_out(hub_cache, "org/clip", published.clip, "c" * 40)
    opened = load(published.folder, "fp32", "cpu")
    assert opened.sources["vision_tower"] == f"org/clip@{'c' * 40}"
    assert opened.sources["model"] == str(published.folder)
    assert opened.fingerprint == load(published.folder, "fp32", "cpu", vision_tower=str(published.clip)).fingerprint


def test_gsva_rejects(publish):
    published = publish("GSVA")
    model, processor = load_pretrained(str(published.folder), vision_tower=str(published.clip))
    ask = ([np.zeros((40, 40, 3), np.uint8)], [[GIVEN]])
    seg, rej = processor.tokens.seg, processor.tokens.rej
    first = predict(model, processor, *ask)[0][0].rejected
    with torch.no_grad():
        model.lm_head.weight[[seg, rej]] = model.lm_head.weight[[rej, seg]]
    assert predict(model, processor, *ask)[0][0].rejected == [not rejected for rejected in first]


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [("READ", 32, ("read_7b", 30)), ("READ", 40, ("read_13b", 60)), ("LISA", 40, (None, None))],
)
def test_the_13b_checkpoints_have_points_of_their_own(name, layers, expected):
    config = {"architectures": [ARCHITECTURES[name]], "num_hidden_layers": layers, "mm_projector_type": "mlp2x_gelu"}
    settings = released_settings(release_of(config), config)
    assert (settings.get("point_rule"), settings.get("point_prompts")) == expected


def test_wrong_pairs(publish):
    published = publish("LISA")
    path, tower = published.folder / "config.json", str(published.clip)
    config = json.loads(path.read_text())

    def refused(match: str, **changed) -> None:
        path.write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=match):
            load_pretrained(str(published.folder), vision_tower=tower)

    refused("LLaMA-2's prompt template", max_position_embeddings=4096)
    refused("reads images of 40 pixels, .* trained with 224", mm_vision_tower="openai/clip-vit-large-patch14")
    refused("has width 32, .* expects 1024", mm_hidden_size=1024)
    refused("of another shape", vocab_size=config["vocab_size"] + 8)
    path.write_text(json.dumps(config))
    state = torch.load(published.folder / "pytorch_model.bin", weights_only=True)
    torch.save({f"base_model.model.{k}": v for k, v in state.items()}, published.folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no SAM .* not merged"):
        load_pretrained(str(published.folder), vision_tower=tower)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_starts_from_each_published_checkpoint(publish, name):
    """What the checkpoint holds is taken, what it lacks is new and named."""
    published = publish(name)
    where = str(published.folder), str(published.clip), "no_sam.pth"  # the checkpoint holds SAM
    settings = {"layer_selection": "policy", "mask_prompt": True, "baseline": "critic"}
    model, processor, rows = load_for_training(*where, "fp32", settings)
    opened, _ = load_pretrained(published.folder, vision_tower=str(published.clip))
    rows_before, state = opened.config.vocab_size, model.state_dict()
    for key, value in opened.state_dict().items():
        assert torch.equal(state[key][: len(value)] if value.dim() else state[key], value), key
    assert not model.ppm.gate.any()  # uniform
    found = {row.module: (row.source, row.new) for row in rows}
    added = "" if name == "GSVA" else "[REJ]"
    own = str(published.folder)
    tower = own if name == "GSVA" else str(published.clip)
    assert found == {
        **dict.fromkeys(("model", "lm_head"), (own, added)),
        **dict.fromkeys(("mm_projector", "visual_model", "text_hidden_fcs"), (own, "")),
        "vision_tower": (tower, ""),
        "ppm": ("new", ""),
    }
    assert processor.tokens.rej == model.config.rej_token_id is not None
    if added:
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            expected = table[:rows_before].mean(0).expand(len(table) - rows_before, -1)
            torch.testing.assert_close(table[rows_before:], expected)
    assert (model.config.clip_fit, processor.reader.fit.kind, model.config.layer_policy) == ("crop", "crop", "argmax")
    with pytest.raises(ValueError, match=rf"--version: clip_fit is pad, {published.folder} was trained with crop"):
        load_for_training(*where, "fp32", {"clip_fit": "pad"})


def test_a_tokenizer_that_lost_its_added_tokens_is_refused(publish):
    published = publish("LISA")
    path = published.folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[SEG]"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not know \[SEG\]"):
        load_for_training(str(published.folder), str(published.clip), "", "fp32")


def test_another_mask_decoder_than_the_published_one_is_refused(publish):
    published = publish("LISA")
    start = str(published.folder), str(published.clip)
    with pytest.raises(
        ValueError, match=r"is a published LISA, whose masks SAM decodes; leave out --mask_decoder sam2"
    ):
        config_of(*start, settings={"mask_decoder": "sam2"})
    with pytest.raises(ValueError, match=r"mask_decoder is sam2, .* was trained with segment_anything"):
        load_for_training(*start, "", "fp32", {"mask_decoder": "sam2"})
