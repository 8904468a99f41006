"""Rankbook: low-bit LLMs with low-rank codebooks, from PyTorch to ONNX and TensorRT."""

from rankbook.calibration.checkpoint.hf_hook import install as _install

_install()  # from here on transformers can load our checkpoints; neither it nor torch is imported by this
