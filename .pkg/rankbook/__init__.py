"""Rankbook: low-bit LLMs with low-rank codebooks, from PyTorch to ONNX and TensorRT."""
