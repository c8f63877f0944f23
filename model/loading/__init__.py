"""Loading: folders of any kind, strict loading of LLaVA, CLIP and SAM files, adapters, devices and quantization."""
