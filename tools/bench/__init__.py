"""Measures speed: single layers and whole models, rankbook's and those of peers, interleaved in one run."""
