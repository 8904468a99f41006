"""Measures speed: single layers and whole models, ours and others', interleaved in one run."""
