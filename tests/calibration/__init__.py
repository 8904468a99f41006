"""Tests of rankbook.calibration."""
