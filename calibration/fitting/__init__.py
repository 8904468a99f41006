"""Mathematics of one layer that the methods share: rounding, error feedback, codebooks, error branches."""
