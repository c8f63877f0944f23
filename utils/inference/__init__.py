"""Inference: loading a model with its processor, conversations, folders of images, answer files."""
