"""Taking over checkpoints that other tools have quantized, without quantizing again."""
