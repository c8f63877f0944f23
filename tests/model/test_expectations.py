"""Numbers that this project's own code gave after it had reproduced the released ones (test_parity.py), for checkouts
without ../shared: a model of formula-made weights, two images with packed rows, the paper's and the release's settings.

``PYTHONPATH=.:tests python tests/model/test_expectations.py`` writes them anew; they change only where the method is
meant to.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, build_tiny_model, drawn_sample

from model.processing.processor import UGroundProcessor
from model.settings import RECIPES
from utils.demo.tiny_model import train_tokenizer

EXPECTED = Path(__file__).with_name("expectations.json")
SETTINGS = {
    "paper": {},
    "released": RECIPES["released"],
    "flash": RECIPES["released"] | {"padded_patches_attend": False},
}


def measure(processor: UGroundProcessor, settings: dict) -> dict[str, list[float]]:
    """Terms of a training step, gradients' norms per part, and a few values of maps and masks."""
    model = build_tiny_model(processor, **settings)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(value.shape))
            scale = 0.3 if value.ndim < 2 else 1.5 * value[0].numel() ** -0.5
            value.copy_(torch.from_numpy(noise) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    output = model(processor.collate([drawn_sample(3, (30, 64), (1, 0, 2)), drawn_sample(1, (64, 40), (2,))]))
    output.loss.backward()
    found = {name: [float(value.detach())] for name, value in output.terms.items()} | {
        "loss": [float(output.loss.detach())]
    }
    found |= {"layers": [float(layer) for layer in output.layers], "rewards": output.rewards.tolist()}
    for name, values in (("maps", output.maps), ("masks", output.mask_logits)):
        found[name] = torch.cat([value.detach()[:, ::13, ::17].flatten() for value in values]).tolist()
    for part in ("model.layers.0.self_attn.q_proj", "mm_projector.0", "text_hidden_fcs.0.0", "lm_head"):
        found[f"gradient of {part}"] = [float(model.get_submodule(part).weight.grad.norm())]
    return found | {"gradient of the gate": model.ppm.gate.grad.norm(dim=1).tolist()}


@pytest.mark.parametrize("kind", SETTINGS)
def test_numbers_are_those_of_the_code_that_passed(tiny_processor, kind):
    expected = json.loads(EXPECTED.read_text())[kind]
    found = measure(tiny_processor, SETTINGS[kind])
    assert found.keys() == expected.keys()
    for name, values in found.items():
        theirs = torch.tensor(expected[name])
        tolerance = 1e-4 * float(theirs.abs().max()) + 1e-9
        torch.testing.assert_close(
            torch.tensor(values), theirs, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_settings_differ():
    """Each kind is told from the others by the numbers, or its test would show nothing."""
    maps = [tuple(kind["maps"]) for kind in json.loads(EXPECTED.read_text()).values()]
    assert len(set(maps)) == len(SETTINGS)


if __name__ == "__main__":
    tokenizer = train_tokenizer([WORDS] * 4, vocab_size=340)
    processor = UGroundProcessor(tokenizer, clip_side=40, clip_patch=10, sam_side=64, system_prompt="")
    rounded = {
        kind: {name: [float(f"{value:.7g}") for value in values] for name, values in measure(processor, s).items()}
        for kind, s in SETTINGS.items()
    }
    EXPECTED.write_text(json.dumps(rounded) + "\n")
