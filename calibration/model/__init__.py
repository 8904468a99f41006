"""A whole model: loading, what differs between families, running it block by block, packed layers in place."""
