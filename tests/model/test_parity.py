"""The released checkpoints' numbers (../shared/parity.md, ../shared/goldens), reproduced under the recipe "released".

Each tensor must agree within 1e-4 of its largest value. The goldens hold one row per conversation; here they are packed
with one row per image. Two conversations of one golden image differ in the text BEFORE the image, so that they cannot
share a prefix with the image: the prefix of their packed row is the first token, and each of them contains the image.
"""

import json
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import without_image

from model import losses
from model.backbones.llava import ClipReader
from model.config import UGroundConfig
from model.geometry import Fit, mask_prompts
from model.layer_rules import LastLayer
from model.loading.files import read_config
from model.loading.formats import release_of
from model.loading.weights import load_released
from model.PPM import Grounding, PolicyPromptedMasking, similarity_of_all_layers
from model.processing.collate import PackedSequence, collate_rows
from model.processing.conversation import EncodedConversation, Prefix
from model.structures import IGNORE_LABEL, Batch
from model.UGround import UGroundForCausalLM

GOLDENS = Path(__file__).resolve().parents[3] / "shared" / "goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs ../shared/goldens")
TOLERANCE = 1e-4
IMAGE = -200  # the image placeholder in the goldens' token ids
PATCHES = 64
FORCED = {"case_eval_0": [3], "case_eval_1": [1, 5], "case_eval_2": [3, 3]}


def golden(name: str) -> dict:
    return torch.load(GOLDENS / f"{name}.pt", weights_only=True)


def same(actual, expected, name: str, tolerance: float = TOLERANCE) -> None:
    """Largest difference over largest value; shapes must agree."""
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} and {tuple(expected.shape)}"
    if expected.numel():
        error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        assert error <= tolerance, f"{name}: {error:.2e}"


def same_sample(actual: torch.Tensor, entry: dict, key: str) -> None:
    """Every 16th value in both directions, and (mean, deviation, sum of absolute values) of all."""
    same(actual[..., ::16, ::16], entry[f"{key}_sample_s16"], key)
    stats = [actual.double().mean(), actual.double().std(), actual.double().abs().sum()]
    same(torch.stack(stats)[1:], entry[f"{key}_stats"][1:], f"{key} deviation, sum")
    same(stats[0] / stats[1], entry[f"{key}_stats"][0] / entry[f"{key}_stats"][1], f"{key} mean", 1e-3)


@pytest.fixture(scope="module")
def checkpoint():
    """The golden checkpoint, through the project's loader; treat as read-only."""
    return load()


def load(**settings) -> UGroundForCausalLM:
    ids = json.loads((GOLDENS / "index.json").read_text())["special_ids"]
    tokens = {"seg_token_id": ids["seg"], "rej_token_id": ids["rej"]}
    folder = GOLDENS / "checkpoint"
    raw = read_config(folder, "--version")
    model, _ = load_released(folder, raw, release_of(raw), GOLDENS / "clip", torch.float32, tokens | settings)
    return model


# -- the goldens' inputs as this project's batches ---------------------------------------------------------------------


def inputs_of(case: dict) -> dict:
    """Inputs of a case, by load_case.py, which checks the images' hashes."""
    sys.path.insert(0, str(GOLDENS))
    try:
        from load_case import load_inputs
    finally:
        sys.path.remove(str(GOLDENS))
    return load_inputs(case["inputs"])


def token_rows(inputs: dict) -> list[list[tuple[list[int], list[int]]]]:
    """Per image, (ids, labels) of its conversations without padding; the image is P placeholders with id 0."""
    rows = []
    for ids, labels, kept in zip(inputs["input_ids"], inputs["labels"], inputs["attention_masks"]):
        ids, labels = ids[kept].tolist(), labels[kept].tolist()
        start = ids.index(IMAGE)
        ids[start : start + 1], labels[start : start + 1] = [0] * PATCHES, [IGNORE_LABEL] * PATCHES
        rows.append((ids, labels))
    bounds = inputs["offset"].tolist()
    return [rows[start:end] for start, end in pairwise(bounds)]


def batch_of(inputs: dict, seg: int, prefix: int) -> Batch:
    """One row per image; the first ``prefix`` tokens are shared. Images are resized and padded by this project."""
    rows, masks = [], inputs.get("masks_list") or [torch.zeros(0)] * len(inputs["orig_images"])
    for image, conversations, target in zip(inputs["orig_images"], token_rows(inputs), masks):
        encoded = [EncodedConversation(ids[prefix:], labels[prefix:]) for ids, labels in conversations]
        segs = sum(c.labels.count(seg) for c in encoded)
        kept = [mask.numpy().astype(np.uint8) for mask in target if len(target) == segs or mask.any()]  # [REJ]: empty
        target = np.stack(kept) if kept else np.zeros((0, *image.shape[:2]), np.uint8)
        rows.append(PackedSequence(image, encoded, target, 0))
    first, start = token_rows(inputs)[0][0][0][:prefix], inputs["input_ids"][0].tolist().index(IMAGE)
    holds_image = prefix >= start + PATCHES
    batch = collate_rows(
        rows,
        Prefix(first[:start], 0, first[start + PATCHES :] if holds_image else []),
        ClipReader(112, 14),
        sam_side=1024,
        pad_id=0,
        seg_id=seg,
        keep_padding=True,
    )
    same(batch.pixel_values, inputs["images_clip"], "CLIP's input")
    same(batch.sam_images, inputs["images"], "SAM's input")
    return batch if holds_image else without_image(batch)


@dataclass
class LanguageStates:
    """LLaVA's states of packed rows, split into the goldens' rows: per conversation, L tensors [1, T, D]."""

    hidden: list[tuple[torch.Tensor, ...]]
    starts: list[int]
    embeddings: list[torch.Tensor]
    features: torch.Tensor
    valid: torch.Tensor
    grounding: Grounding
    label_states: torch.Tensor


def image_at(batch: Batch, row: int, start: int) -> Batch:
    """A batch of one row, whose image begins at the token ``start``."""
    tokens = torch.arange(start, start + PATCHES)[None]
    only = slice(row, row + 1)
    return replace(batch, image_tokens=tokens, image_cells=batch.image_cells[only], valid=batch.valid[only])


def forward_conversations(model: UGroundForCausalLM, batch: Batch) -> LanguageStates:
    """Forward pass of packed rows whose conversations contain the image (prefix = the first token)."""
    valid = batch.valid
    features = model.encode_images(batch.pixel_values, batch.image_cells, valid)
    embeddings, key_mask = model.get_input_embeddings()(batch.input_ids), batch.segment_ids >= 0
    conversations, starts = [], []
    for row, questions in enumerate(batch.questions):
        for k in range(1, questions + 1):
            positions = (batch.segment_ids[row] == k).nonzero().flatten()
            image = positions[(batch.input_ids[row, positions] == 0).nonzero().flatten()]
            assert len(image) == PATCHES
            embeddings = embeddings.index_put((torch.tensor(row), image), features[row])
            key_mask[row, image] = valid[row]
            conversations.append((row, k, torch.cat([torch.zeros(1, dtype=torch.int64), positions])))
            starts.append(int(image[0] - positions[0]) + 1)
    output = model.forward_packed(embeddings, batch.segment_ids, batch.position_ids, key_mask)
    hidden = [tuple(layer[row : row + 1, positions] for layer in output.hidden) for row, _, positions in conversations]
    flat = [layer.flatten(0, 1) for layer in output.hidden]
    states = torch.stack([layer[batch.seg_positions] for layer in flat], dim=1)
    segment_ids = batch.segment_ids.flatten()[batch.seg_positions]
    scores = torch.cat([
        similarity_of_all_layers(
            layers, states[segs], torch.zeros(int(segs.sum()), dtype=torch.int64), image_at(batch, row, start)
        )
        for layers, start, (row, k, _) in zip(hidden, starts, conversations)
        for segs in [(batch.seg_rows == row) & (segment_ids == k)]
    ])  # fmt: skip
    counts = [len(masks) for masks in batch.masks]
    grounding = Grounding(states, scores, model.ppm.log_policy(states), batch.seg_rows, counts)
    rows = [embeddings[row : row + 1, positions] for row, _, positions in conversations]
    return LanguageStates(hidden, starts, rows, features, valid, grounding, flat[-1][batch.label_positions])


class Spy:
    """Records inputs and outputs of SAM's mask decoder."""

    def __init__(self, model: UGroundForCausalLM) -> None:
        self.hook = model.visual_model.mask_decoder.register_forward_hook(self._record)

    def _record(self, _module, inputs, outputs) -> None:
        _, _, self.sparse, self.dense = inputs
        self.low_res, self.iou = outputs

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()


def check_masks(entry: dict, spy: Spy, logits: torch.Tensor, maps: torch.Tensor, n: slice) -> None:
    """Compares the ``per_image`` part of a case: map, prompts, masks."""
    side, original = entry["map_stride"], entry["orig_stride"]
    same(maps[:, ::original, ::original], entry["simmap_orig"], "map at the original size")
    same(mask_prompts(maps, Fit("pad", 256))[..., ::side, ::side], entry["map256"], "mask prompt")
    if "text_embeds" in entry:
        same(spy.sparse[n], entry["text_embeds"], "phi")
    if "sparse" in entry:
        same(spy.sparse[n], entry["sparse"], "sparse prompt")
    if "dense_sample_s16" in entry:
        same_sample(spy.dense[n], entry, "dense")
        same(spy.iou[n], entry["iou_pred"], "predicted IoU")
    same(spy.low_res[n][..., ::side, ::side], entry["low_res_masks"], "low-resolution masks")
    if "pred_masks" in entry:
        same(logits[:, ::original, ::original], entry["pred_masks"], "masks")
        area = entry["pred_mask_area"].double()
        assert ((logits > 0).flatten(1).sum(1) - area).abs().max() <= 1e-4 * logits[0].numel()


def check_language(case: dict, model: UGroundForCausalLM, batch: Batch, language: LanguageStates) -> None:
    """Compares the ``shared`` part of a case: everything before a layer is chosen."""
    shared = case["shared"]
    rows = torch.arange(len(batch.sizes)).repeat_interleave(torch.tensor(batch.questions))
    same(language.features[rows], shared["image_features"], "image features")
    same(language.valid[rows].float(), shared["vit_mask_for_llm"], "valid patches")
    for row, (layers, embedded, start) in enumerate(zip(language.hidden, language.embeddings, language.starts)):
        width = embedded.shape[1]
        same(embedded[0], shared["mm_inputs_embeds"][row, :width], "embeddings")
        key_mask = torch.ones(width, dtype=torch.bool)
        key_mask[start : start + PATCHES] = language.valid[rows[row]]
        assert torch.equal(key_mask, shared["mm_attention_mask"][row, :width])
        assert not shared["mm_attention_mask"][row, width:].any()
        for i, layer in enumerate(shared["image_hidden_layers"]):
            same(layers[layer][0, start : start + PATCHES], shared["image_hidden"][row, i], f"image states {layer}")
        if "lm_logits" in shared:
            same(model.lm_head(layers[-1]), shared["lm_logits"][row : row + 1], "logits")
    if language.hidden[0][0].shape[1] == shared["mm_attention_mask"].shape[1]:
        same(torch.cat([layer[0, -1:] for layer in language.hidden[0]]), shared["last_hidden_all_layers_row0"], "last")
    same(language.grounding.states, shared["seg_hidden_all_layers"], "[SEG] states")
    same(language.grounding.scores, shared["raw_similarity_all_layers"], "similarities")
    embeddings = model.visual_model.encode(batch.sam_images)
    same_sample(embeddings, {k.replace("sam_embed", "sam"): v for k, v in shared.items()}, "sam")


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["case_eval_0", "case_eval_1", "case_eval_2"])
def test_evaluation(checkpoint, name):
    case = golden(name)
    batch = batch_of(inputs_of(case), checkpoint.config.seg_token_id, prefix=1)
    with torch.inference_mode(), Spy(checkpoint) as spy:
        language = forward_conversations(checkpoint, batch)
        check_language(case, checkpoint, batch, language)
        embeddings = checkpoint.visual_model.encode(batch.sam_images)
        for kind, layers in (("legacy", [6] * len(FORCED[name])), ("forced", FORCED[name])):
            entry, chosen = case[kind], torch.tensor(layers)
            logits, maps, _ = checkpoint.mask_as_prompt(language.grounding, chosen, embeddings, batch)
            check_masks(entry["per_image"][0], spy, logits[0], maps[0], slice(None))
            index = torch.arange(len(layers))
            same(language.grounding.states[index, chosen], entry["ppm_seg_for_similarity"], "[SEG] for the map")
            same(language.grounding.states[index, chosen], entry["ppm_seg_for_sam"], "[SEG] for SAM")
            same(language.grounding.scores[index, chosen], entry["similarity_chosen"], "chosen similarities")
            if kind == "forced":
                assert layers == entry["forced_layer"].tolist()
                same(language.grounding.log_policy[index, chosen], entry["log_probs"], "log-probabilities")


def test_evaluation_where_attention_skips_padding():
    """Flash attention excludes padded patches: only the min-max over all patches depends on it."""
    case, whole = golden("case_flashpad_0"), golden("case_eval_0")
    model = load(padded_patches_attend=False)
    batch = batch_of(inputs_of(whole), model.config.seg_token_id, prefix=1)
    with torch.inference_mode(), Spy(model) as spy:
        language = forward_conversations(model, batch)
        embeddings = model.visual_model.encode(batch.sam_images)
        for kind, layer in (("legacy", 6), ("forced", FORCED["case_eval_0"][0])):
            entry = case[kind]
            same(language.grounding.scores, entry["raw_similarity_all_layers"], "similarities")
            logits, maps, _ = model.mask_as_prompt(language.grounding, torch.tensor([layer]), embeddings, batch)
            check_masks(entry, spy, logits[0], maps[0], slice(None))
            assert abs(int((logits[0] > 0).sum()) - int(entry["pred_mask_area"])) <= 1e-4 * logits[0].numel()


@pytest.mark.parametrize("name", ["case_eval_0", "case_eval_1"])
@pytest.mark.parametrize("kind", ["legacy", "forced"])
def test_evaluation_by_predict(checkpoint, name, kind):
    """The same numbers through ``predict``, as in evaluation and chat, with the image in the shared prefix."""
    case, layers = golden(name), FORCED[name]
    inputs = inputs_of(case)
    prefix = inputs["input_ids"][0].tolist().index(IMAGE) + PATCHES
    batch = batch_of(inputs, checkpoint.config.seg_token_id, prefix)
    entry = case[kind]["per_image"][0]
    policies = [None] if kind == "legacy" else [f"fixed:{layer}" for layer in layers]  # None: last, by its settings
    for n, policy in enumerate(policies):
        prediction = checkpoint.predict(batch, policy)[0][0]
        assert prediction.layers == [layers[n] if policy else 6] * len(layers)
        segs = slice(None) if policy is None else slice(n, n + 1)
        stride = entry["orig_stride"]
        same(prediction.maps[segs, ::stride, ::stride], entry["simmap_orig"][segs], "map")
        same(prediction.mask_logits[segs, ::stride, ::stride], entry["pred_masks"][segs], "masks")


def test_generation(checkpoint):
    """With a cache, which the goldens were made without: the same tokens, states, prompts and masks."""
    case = golden("case_generate")
    for name in ("two", "one", "none"):
        entry = case[name]
        new = entry["output_ids"].shape[1] - entry["input_ids"].shape[1]
        prompt = {**case["inputs"], "input_ids": entry["input_ids"], "labels": entry["input_ids"] * 0 + IGNORE_LABEL}
        prompt |= {"attention_masks": entry["input_ids"] == entry["input_ids"], "offset": torch.tensor([0, 1])}
        inputs = inputs_of({"inputs": prompt})
        prefix = inputs["input_ids"][0].tolist().index(IMAGE) + PATCHES
        batch = batch_of(inputs, checkpoint.config.seg_token_id, prefix)
        with Spy(checkpoint) as spy:
            prediction = checkpoint.predict(batch, max_new_tokens=new)[0][0]
            answer = entry["output_ids"][0, -new:].tolist()
            assert prediction.token_ids == answer
            segs = answer.count(checkpoint.config.seg_token_id)
            assert len(prediction.maps) == segs == len(entry["seg_hidden_all_layers"])
            assert bool(segs) == entry["object_presence"][0]
            if segs:
                same(spy.low_res[..., ::2, ::2], entry["low_res_masks_s2"][0], "low-resolution masks")
                same(
                    mask_prompts(prediction.maps, Fit("pad", 256))[..., ::2, ::2], entry["map256_s2"][0], "mask prompts"
                )
                mask = (prediction.mask_logits[0] > 0).to(torch.uint8)
                assert (mask != entry["pred_masks_returned"][0]).double().mean() <= 1e-4
            else:
                assert not entry["pred_masks_returned"][0].any()
        whole = {**prompt, "input_ids": entry["output_ids"], "labels": entry["output_ids"].clone()}
        whole["labels"][:, :-new] = IGNORE_LABEL
        whole["attention_masks"] = whole["labels"] == whole["labels"]
        batch = batch_of(inputs_of({"inputs": whole}), checkpoint.config.seg_token_id, prefix=1)
        with torch.inference_mode():
            language = forward_conversations(checkpoint, batch)
            same(checkpoint.lm_head(language.label_states), entry["next_logits_per_step"], "logits of every step")
            same(language.grounding.states, entry["seg_hidden_all_layers"], "[SEG] states")


def test_reevaluation(checkpoint):
    """gRefCOCO's second pass: a [REJ] of the answer replaced by [SEG] gets a mask.

    The released code flips [SEG] and [REJ] wherever the model's first choice is another token (parity.md, section 7):
    its output follows from the logits, which agree, but this project does not inherit that.
    """
    case, seg, rej = golden("case_reeval_0"), checkpoint.config.seg_token_id, checkpoint.config.rej_token_id
    inputs = inputs_of(case) | {"masks_list": [torch.zeros(0)]}
    with torch.inference_mode():
        layers = forward_conversations(checkpoint, batch_of(inputs, seg, prefix=1)).hidden[0]
        logits = checkpoint.lm_head(layers[-1])
        same(logits, case["logits_first_pass"], "logits")
        ((ids, _),) = token_rows(inputs)[0]
        best, flip = logits[0].argmax(-1).tolist(), {seg: rej, rej: seg}
        flipped = ids[:1] + [flip.get(t, t) if guess != t else t for guess, t in zip(best, ids[1:])]
        assert flipped == case["output_ids"][0].tolist()

        for key in ("input_ids", "labels"):
            inputs[key] = inputs[key].masked_fill(inputs[key] == rej, seg)
        batch = batch_of(inputs, seg, prefix=inputs["input_ids"][0].tolist().index(IMAGE) + PATCHES)
        with Spy(checkpoint) as spy:
            prediction = checkpoint.predict(batch)[0][0]
        check_masks(case["legacy"]["per_image"][0], spy, prediction.mask_logits, prediction.maps, slice(None))
        assert prediction.rejected == [False, True]  # as in the given answer
        language = forward_conversations(checkpoint, batch_of(inputs, seg, prefix=1))
        same(language.grounding.states, case["seg_hidden_all_layers"], "[SEG] states")
        same(language.grounding.scores[:, -1], case["legacy"]["similarity_chosen"], "similarities")


# -- training ----------------------------------------------------------------------------------------------------------


def released_name(name: str) -> str:
    """A parameter's name in the released checkpoints."""
    if name.startswith(("mm_projector.", "visual_model.", "text_hidden_fcs.")):
        return f"model.{name}"
    return {"ppm.gate": "ppm._layer_gate_W_similarity"}.get(name, name)


@pytest.mark.parametrize("name", ["case_train_0", "case_train_1"])
def test_training(name):
    case, model = golden(name), load()
    assert model.config.policy_loss_weight == case["lambda_pg"]
    batch = batch_of(inputs_of(case), model.config.seg_token_id, prefix=1)
    layers = case["forced_actions"]
    with Spy(model) as spy:
        language = forward_conversations(model, batch)
        check_language(case, model, batch, language)
        embeddings = model.visual_model.encode(batch.sam_images)
        logits, maps, _ = model.mask_as_prompt(language.grounding, layers, embeddings, batch)
    same(language.grounding.scores[torch.arange(len(layers)), layers], case["sam"]["similarity_chosen"], "similarity")
    end = 0
    for entry, image_logits, image_maps in zip(case["sam"]["per_image"], logits, maps):
        start, end = end, end + len(image_logits)
        check_masks(entry, spy, image_logits, image_maps, slice(start, end))

    log_policy = language.grounding.log_policy
    output = model.objective(batch, model.lm_head(language.label_states), logits, maps, layers, log_policy)
    terms, expected = output.terms, case["losses"]
    same(log_policy[torch.arange(len(layers)), layers], case["log_probs"], "log-probabilities")
    same(terms["text"], expected["ce_loss"], "text")
    same(2 * (terms["mask_bce"] + terms["map_bce"]), expected["mask_bce_loss"], "BCE")
    same(4 * (terms["mask_dice"] + terms["map_dice"]), expected["mask_dice_loss"], "dice")
    same(terms["reward"], case["reward"], "reward")
    same(terms["baseline"], case["ema_after"], "baseline")
    same(terms["policy"], case["policy_loss"], "policy")
    same(output.loss, expected["loss"], "loss")
    per_mask, present = model.objective.mask_terms(batch.masks, logits, maps)
    counts = [len(masks) for masks in batch.masks]
    assert [int(p.sum()) for p in present.split(counts)] == case["terms"]["n_nonempty_per_image"].tolist()
    for term, key in (
        ("mask_bce", "sam_bce"),
        ("mask_dice", "sam_dice"),
        ("map_bce", "gauss_bce"),
        ("map_dice", "gauss_dice"),
    ):
        means = [values.mean() if len(values) else torch.zeros(()) for values in per_mask[term].split(counts)]
        same(torch.stack(means), case["terms"][f"{key}_per_image"], key)

    output.loss.backward()
    gradients = {released_name(key): p.grad for key, p in model.named_parameters() if p.grad is not None}
    frozen = ("vision_tower.", "model.visual_model.image_encoder.")  # the released code does not train these
    gradients = {key: value for key, value in gradients.items() if not key.startswith(frozen)}
    idle = {key for key, value in gradients.items() if not value.any()}
    assert gradients.keys() - idle <= case["grad_norms"].keys() <= gradients.keys()
    for key, norm in case["grad_norms"].items():
        if not key.endswith("k_proj.bias"):  # zero up to rounding: the softmax is invariant to it
            same(gradients[key].norm(), norm, f"gradient norm of {key}")
    for key, value in case["grads"].items():
        same(gradients[key], value, f"gradient of {key}")


def policy_of(case, **settings) -> PolicyPromptedMasking:
    """PPM with the case's gate."""
    layers, width = case["W"].shape
    sizes = {"num_hidden_layers": layers - 1, "hidden_size": width, "num_attention_heads": 1}
    policy = PolicyPromptedMasking(UGroundConfig(first_candidate_layer=0, baseline_decay=0.9, **sizes, **settings))
    with torch.no_grad():
        policy.gate.copy_(case["W"])
    return policy


@pytest.mark.parametrize("name", ["case_ppm_0", "case_ppm_1"])
def test_policy(name):
    case = golden(name)
    hidden, n = case["hidden_states"], len(case["actions"])
    policy = policy_of(case)
    rows, positions = case["seg_token_mask"].nonzero(as_tuple=True)
    states = torch.stack([layer[rows, positions] for layer in hidden], dim=1)
    same(states, case["seg_token_embeds"], "[SEG] states")
    log_policy = policy.log_policy(states)
    same(log_policy, case["log_prob_table"], "log-probabilities")
    same(log_policy.exp(), case["probs"], "probabilities")
    same(case["logits"].log_softmax(-1), log_policy, "logits")
    index, actions, last = torch.arange(n), case["actions"], len(hidden) - 1
    for kind, for_map, for_sam in (("mode1", last, last), ("mode2", actions, last), ("mode3", actions, actions)):
        entry = case[f"{kind}_train"]
        same(states[index, for_map], entry["seg_for_similarity"], f"{kind}: [SEG] for the map")
        same(states[index, for_sam], entry["seg_for_sam"], f"{kind}: [SEG] for SAM")
        if entry["log_probs"] is not None:
            same(log_policy[index, actions], entry["log_probs"], f"{kind}: log-probabilities")
        starts = [ids.tolist().index(IMAGE) for ids in case["input_ids"]]
        images = [slice(starts[row], starts[row] + case["num_patches"]) for row in rows]
        picked = torch.full((n,), for_map) if isinstance(for_map, int) else for_map
        states_of_image = torch.stack([hidden[layer][row, image] for layer, row, image in zip(picked, rows, images)])
        same(states_of_image, entry["img_for_similarity"], f"{kind}: image states")
    same(states[:, LastLayer().choose(log_policy, log_policy)[0]], case["mode3_eval_legacy_seg"], "evaluation: last")

    for entry, reward in zip(case["ema"], case["rewards"]):
        advantage = policy.advantage(torch.tensor([reward]))
        same(advantage[0], entry["advantage"], "advantage")
        same(policy.baseline, entry["running_mean"], "baseline")
        policy.gate.grad = None
        loss = -(advantage * policy.log_policy(states)[index, actions]).mean()
        loss.backward()
        same(loss, entry["loss"], "loss")
        same(policy.gate.grad, entry["grad_W"], "the gate's gradient")
    before = policy.baseline.clone()
    assert len(policy.advantage(torch.zeros(0))) == 0
    assert torch.equal(policy.baseline, before)  # a batch without [SEG] changes nothing


@pytest.mark.parametrize("name", ["case_ppm_0", "case_ppm_1"])
def test_critic(name):
    case = golden(name)
    entry, rewards, actions = case["critic"], torch.tensor(case["rewards"][:1]), case["actions"]
    width = len(entry["params"]["0.bias"])
    policy = policy_of(case, baseline="critic", critic_width=width)
    policy.critic.load_state_dict(entry["params"])
    rows, positions = case["seg_token_mask"].nonzero(as_tuple=True)
    log_policy = policy.log_policy(torch.stack([layer[rows, positions] for layer in case["hidden_states"]], dim=1))
    expected = policy.expected_reward(log_policy)
    chosen = log_policy[torch.arange(len(actions)), actions]
    parts = {
        "policy_part": -((rewards - expected.detach()) * chosen).mean(),
        "critic_part": (expected - rewards[0]) ** 2,
    }
    same(log_policy.exp().mean(0), entry["critic_input"], "mean policy")
    same(expected, entry["baseline"], "expected reward")
    for key, value in parts.items():
        same(value, entry[key], key)
    loss = sum(parts.values())
    loss.backward()
    same(loss, entry["loss"], "loss")
    same(policy.gate.grad, entry["grad_W"], "the gate's gradient")
    for key, parameter in policy.critic.named_parameters():
        same(parameter.grad, entry["grad_critic"][key], f"gradient of {key}")
    assert float(policy.baseline) == entry["running_mean_untouched"]


@pytest.mark.parametrize("number", range(6))
def test_gaussian_targets(number):
    case = golden("gaussian")["cases"][number]
    masks, maps = (case["mask_u8"] > 0).to(torch.uint8), case["pred"].clone().requires_grad_()
    soft, hard, valid = losses.soften(masks, 31, 7.0), masks.float(), torch.ones_like(masks, dtype=torch.bool)
    same(soft, case["heat"], "target")
    count = max(1, len(masks))
    for target, prefix, weight_key in ((soft, "gauss", "soft_pos_weight"), (hard, "auto", "hard_pos_weight")):
        weight = losses.positive_weight(target, shared=True)
        same(weight, torch.full((len(masks),), case[weight_key]), weight_key)
        for key, term in ((f"{prefix}_bce", losses.map_bce), (f"{prefix}_dice", losses.map_dice)):
            value = term(maps, target, weight, valid).sum() / count
            same(value, case[key], key)
            if f"grad_{key}" in case:
                (gradient,) = torch.autograd.grad(value, maps)
                same(gradient, case[f"grad_{key}"], f"gradient of {key}")
    for key in ("uground_sigmoid_ce", "simi_sigmoid_ce"):
        same(losses.mask_bce(maps, masks).sum() / count, case[key], key)
    same(losses.mask_dice(maps, masks).sum() / count, case["uground_dice_scale1000"], "mask dice")
    same(losses.dice(maps.sigmoid(), hard).sum() / count, case["simi_dice"], "dice without scale")
