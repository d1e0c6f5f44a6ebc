"""How many inputs each property was given, and how many it is to be given."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings

PROFILE = "fuzz"
TRIED: Counter[str] = Counter()
"""Inputs by property; each property counts its own."""


def is_fuzzing() -> bool:
    return settings.get_current_profile_name() == PROFILE


def inputs(fuzzing: int, testing: int = 50) -> settings:
    """How many a property gets whose inputs are dear, in `make fuzz` and in `make test`."""
    return settings(max_examples=fuzzing if is_fuzzing() else testing)
