"""What turns [SEG] states into masks: a module per mask decoder, all with the five steps of ``base.MaskDecoder``."""
