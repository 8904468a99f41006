"""Continuing a prompt: what a model asks for, the loop, and text as it comes."""
