"""Tests of rankbook.plugins."""
