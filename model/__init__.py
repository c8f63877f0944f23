"""UGround: a model that answers questions about an image with text and masks.

    from model import load

    opened = load("runs/tiny/merged")
    answer = opened.ask("photo.jpg", "Where is the red star?")
    print(answer.text)
    answer.masks  # bool [N, H, W], one per [SEG] in the text

Importing this package is cheap: torch and transformers are imported when a name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import UGroundConfig
    from model.loading.pretrained import load
    from model.opened import Opened
    from model.processing.processor import UGroundProcessor
    from model.structures import Prediction
    from model.UGround import UGroundForCausalLM

__all__ = ["Opened", "Prediction", "UGroundConfig", "UGroundForCausalLM", "UGroundProcessor", "load"]
HOMES = {
    "Opened": "model.opened",
    "Prediction": "model.structures",
    "UGroundConfig": "model.config",
    "UGroundForCausalLM": "model.UGround",
    "UGroundProcessor": "model.processing.processor",
    "load": "model.loading.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
