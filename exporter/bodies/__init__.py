"""The operators in standard ONNX, one file for each kind."""
