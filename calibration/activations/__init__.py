"""Low-bit activations, keys and values as an evaluation in PyTorch sees them."""
