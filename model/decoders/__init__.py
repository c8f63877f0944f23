"""Mask decoders: ``DECODERS`` names them, ``base.MaskDecoder`` is what each must provide."""

from model.decoders.base import MaskDecoder
from model.decoders.mobile_sam import MobileSam
from model.decoders.pixel_decoder import PixelDecoder
from model.decoders.sam2 import Sam2
from model.decoders.sam3_tracker import Sam3Tracker
from model.decoders.segment_anything import SegmentAnything

DECODERS: dict[str, type[MaskDecoder]] = {
    "segment_anything": SegmentAnything,
    "sam2": Sam2,
    "sam3_tracker": Sam3Tracker,
    "mobile_sam": MobileSam,
    "pixel_decoder": PixelDecoder,
}
