"""Operators: one list of cases, one registry of what runs them, one numpy reference they are all compared with."""
