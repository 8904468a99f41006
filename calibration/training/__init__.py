"""Training of quantized layers by the output of their block."""
