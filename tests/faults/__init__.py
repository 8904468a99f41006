"""Killed at any moment, a full disk at any write, a disk that cannot be written, a clock that goes back.

What is finished stays, and a run that goes on gives the same files. ``RANKBOOK_FAULTS=50`` tries so many moments of
each kind (``make faults``); CI tries a few.
"""
