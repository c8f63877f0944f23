"""Mask decoders: ``DECODERS`` names them, ``base.MaskDecoder`` is what each must provide."""

from model.decoders.base import MaskDecoder
from model.decoders.pixel_decoder import PixelDecoder
from model.decoders.segment_anything import SegmentAnything

DECODERS: dict[str, type[MaskDecoder]] = {"segment_anything": SegmentAnything, "pixel_decoder": PixelDecoder}
