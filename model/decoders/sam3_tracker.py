"""SAM 3's tracker by transformers' classes, for single images: SAM 2's design on SAM 3's image encoder.

Source: Sam3TrackerModel of transformers. SAM 3's detector answers texts and takes no masks: it is not built.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedModel, Sam3TrackerConfig, Sam3TrackerModel

from model.decoders.sam2 import Sam2, _both


class Sam3Tracker(Sam2):
    """A Sam3TrackerModel's modules under its own key names.

    SAM 3's neck has a fourth, coarser scale for the detector alone; the third, of 14 pixels per feature, is the
    tracker's image. (Sam3TrackerModel.forward adds ``no_memory_embedding`` to the last scale, whatever it is; SAM 3's
    own code and transformers' tracker for videos add it to this one.)
    """

    config_class: ClassVar[type[PreTrainedConfig]] = Sam3TrackerConfig
    model_class: ClassVar[type[PreTrainedModel]] = Sam3TrackerModel
    default_sizes: ClassVar[dict[str, Any]] = {}  # transformers' defaults are those of facebook/sam3

    @staticmethod
    def coarsest_stride(vision: Any) -> float:
        return _both(vision.backbone_config.patch_size)[0] / vision.scale_factors[2]
