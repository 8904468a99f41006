"""Engines: building them, their shapes, logs and commands."""
