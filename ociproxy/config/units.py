"""Durations, sizes and times as people write them, and back.

Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# The JSON Schema has these patterns, and the functions below accept nothing else.
DURATION: Final = r"[0-9]{1,12}(?:\.[0-9]{1,6})?(?:ms|s|m|h|d)"
SIZE: Final = r"[0-9]{1,15}(?:(?:\.[0-9]{1,6})?[kKMGT]i?B?)?"

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_POWERS: Final = {"k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_duration(value: object) -> float | None:
    """Seconds of `30s`, `15m`, `500ms`, `0` or a number; None if it is no duration."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    if value == "0":
        return 0.0
    if not isinstance(value, str) or not re.fullmatch(DURATION, value):
        return None
    number = value.rstrip("mshd")
    return float(number) * _SECONDS[value[len(number) :]]


def show_duration(seconds: float) -> str:
    """In the largest unit that gives a whole number, as a user would write it."""
    for unit in ("d", "h", "m", "s"):
        if seconds >= _SECONDS[unit] and seconds % _SECONDS[unit] == 0:
            return f"{int(seconds // _SECONDS[unit])}{unit}"
    return "0" if seconds == 0 else f"{seconds * 1000:g}ms"


def parse_size(value: object) -> int | None:
    """Bytes of `32MiB`, `4.7G` or a whole number; None if it is no size."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or not re.fullmatch(SIZE, value):
        return None
    from decimal import Decimal  # few sizes are written as text, and it takes 2 ms

    number = value.rstrip("kKMGTiB")
    unit = value[len(number) :]
    base = 1024 if "i" in unit else 1000
    return int(Decimal(number) * base ** _POWERS.get(unit[:1], 0))


def show_size(size: int) -> str:
    """Like `show_duration`: in binary units, else in decimal ones."""
    for base, suffix in ((1024, "iB"), (1000, "")):
        for unit in "TGMK":
            count, rest = divmod(size, base ** _POWERS[unit])
            if count and not rest:
                return f"{count}{unit}{suffix}"
    return str(size)


def show_bytes(size: float | None) -> str:
    """For a person, in decimal units; `?` where it is unknown."""
    if size is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def utc_time(seconds: float | None) -> str | None:
    """Seconds since the epoch, as a person and a program read them."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
