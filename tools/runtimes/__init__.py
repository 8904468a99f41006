"""The runtimes: one file each, all heavy imports inside functions."""
