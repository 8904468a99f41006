"""A quantization run: options, what is chosen for each layer, solving block by block, resuming, the report."""
