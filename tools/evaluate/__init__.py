"""Comparing runtimes: parity, greedy continuations, tolerances."""
