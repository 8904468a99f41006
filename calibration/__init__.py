"""Which values: methods, calibration data, the quantized record, checkpoints and their evaluation."""
