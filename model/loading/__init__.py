"""Strict loading of LLaVA, CLIP and SAM files, and of published checkpoints under their own key names."""
