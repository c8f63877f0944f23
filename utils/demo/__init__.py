"""Synthetic scenes with exact masks, in the layouts of the real data sets, and the tiny model trained on them."""
