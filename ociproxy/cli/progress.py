"""How far long work has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One thing in work; `key` tells it from others, sizes are bytes, and a size that is not
    known yet is None."""

    key: object
    name: str
    done: int
    size: int | None
