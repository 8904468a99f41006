"""From a checkpoint to one ONNX file: trace, packed initializers, graph passes, checks."""
