"""Families that do not keep the rules of `rankbook.calibration.model.adapter.ModelAdapter`: one file each, discovered.

A file ends in ``ADAPTER = ...``, its subclass of `ModelAdapter`.
"""
