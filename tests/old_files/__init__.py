"""Checkpoints and exported files as earlier versions wrote them; every later version reads them."""
