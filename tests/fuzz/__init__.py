"""Damaged and hostile files: every loader gives a result or a sentence, soon and within bounded memory.

``python -m tests.fuzz --seconds 60`` (``make fuzz``) tries new inputs; a target and a number name one again.
"""
