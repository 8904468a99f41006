"""The widths of codes; apart from the layout so that the command line's help can name them without numpy."""

BITS = (2, 3, 4, 8)
"""Bits of a code that the layout defines."""
