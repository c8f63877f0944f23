"""Inference: flags of a model, conversations, folders of images, answer files."""
