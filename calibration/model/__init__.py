"""A whole model: loading, running it block by block, choosing and replacing layers, resuming."""
