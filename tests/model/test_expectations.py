"""Regression test for checkouts without ../shared: values of the code that passed test_parity.py.

A model with weights by formula, two images in packed rows, the paper's and the release's settings.
``PYTHONPATH=.:tests python tests/model/test_expectations.py`` updates the values, only when the method itself changes.
"""

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, build_tiny_model, drawn_sample

from model.backbones.llava import ClipReader
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
    """Terms of a training step, gradient norms per part, and a few values of maps and masks."""
    model = build_tiny_model(processor, **settings)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(value.shape))
            scale = 0.3 if value.ndim < 2 else 1.5 * value[0].numel() ** -0.5
            value.copy_(torch.from_numpy(noise) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    processor = copy.copy(processor)  # other tests share it
    processor.keep_padding = model.config.reads_padding
    output = model(processor.collate([drawn_sample(3, (30, 64), (1, 0, 2)), drawn_sample(1, (64, 40), (2,))]))
    output.loss.backward()
    measured = {name: [float(value.detach())] for name, value in output.terms.items()}
    measured |= {"loss": [float(output.loss.detach())]}
    measured |= {"layers": [float(layer) for layer in output.layers], "rewards": output.rewards.tolist()}
    for name, values in (("maps", output.maps), ("masks", output.mask_logits)):
        measured[name] = torch.cat([value.detach()[:, ::13, ::17].flatten() for value in values]).tolist()
    for part in ("model.layers.0.self_attn.q_proj", "mm_projector.0", "text_hidden_fcs.0.0", "lm_head"):
        measured[f"gradient of {part}"] = [float(model.get_submodule(part).weight.grad.norm())]
    return measured | {"gradient of the gate": model.ppm.gate.grad.norm(dim=1).tolist()}


@pytest.mark.parametrize("kind", SETTINGS)
def test_values_equal_those_of_the_code_that_passed_the_parity_tests(tiny_processor, kind):
    expected = json.loads(EXPECTED.read_text())[kind]
    measured = measure(tiny_processor, SETTINGS[kind])
    assert measured.keys() == expected.keys()
    for name, values in measured.items():
        actual, wanted = torch.tensor(values), torch.tensor(expected[name])
        tolerance = 1e-4 * float(wanted.abs().max()) + 1e-9
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_the_settings_differ():
    """Each kind of settings has values of its own; otherwise its test would show nothing."""
    maps = [tuple(kind["maps"]) for kind in json.loads(EXPECTED.read_text()).values()]
    assert len(set(maps)) == len(SETTINGS)


if __name__ == "__main__":
    tokenizer = train_tokenizer([WORDS] * 4, vocab_size=340)
    processor = UGroundProcessor(tokenizer, ClipReader(40, 10), sam_side=64, system_prompt="")
    rounded = {
        kind: {name: [float(f"{value:.7g}") for value in values] for name, values in measure(processor, s).items()}
        for kind, s in SETTINGS.items()
    }
    EXPECTED.write_text(json.dumps(rounded) + "\n")
