"""Checkpoints on disk, and how transformers loads them."""
