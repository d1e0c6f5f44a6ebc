"""How large the store may be: what `store.max_size` and `store.min_free` mean on its disk.

A server removes images in the background (`prune --to-limits`) from 98 % of the cap on, so that
downloads seldom wait for room (`room`).
Tests: tests/store/test_limits.py, tests/serve/test_eviction.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ociproxy.config.local_settings import Share
from ociproxy.config.units import GIB, show_bytes, show_size
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.config.local_settings import Store as Settings

_DEFAULT_FREE: Final = (Share(5), 2 * GIB)
"""The smaller one of these has to stay free."""
_EARLY: Final = 98
"""Percent of the cap above which images are removed."""
_DOWN_TO: Final = 90
"""Percent of the cap that stay: else each download would be followed by a walk of the store."""
_SPARE: Final = 10
"""Percent of `min_free` that are freed beyond it, for the same reason."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the settings mean on the file system as it is now. All are bytes; `max_size` is None
    without a cap."""

    max_size: int | None
    min_free: int
    free: int
    total: int

    @staticmethod
    def of(settings: Settings, root: Path) -> Limits:
        """Raises StoreError."""
        with store_errors(root):
            state = os.statvfs(root)
        # Some file systems tell no size at all, so that nothing is too little.
        total = state.f_blocks * state.f_frsize
        share, most = _DEFAULT_FREE
        return Limits(
            None if settings.max_size is None else _bytes(settings.max_size, total),
            min(share.of(total), most)
            if settings.min_free is None
            else _bytes(settings.min_free, total),
            state.f_bavail * state.f_frsize,
            total,
        )

    @property
    def exist(self) -> bool:
        return self.max_size is not None or self.min_free > 0

    def exceeded(self, stored: int) -> str | None:
        """Which limit a store of this size exceeds, in words; None if it keeps both."""
        if self.max_size is not None and stored > self.max_size:
            return f"store.max_size ({show_size(self.max_size)}) is reached"
        if self.total and self.free < self.min_free:
            return f"less than store.min_free ({show_bytes(self.min_free)}) is free"
        return None

    def can_fit(self, size: int, pinned: int = 0) -> bool:
        """Whether so much could be kept if all but so many pinned bytes were removed."""
        if self.max_size is not None and (
            size > self.max_size * _DOWN_TO // 100 or size + pinned > self.max_size
        ):
            return False
        return not self.total or size + pinned + self.min_free <= self.total

    def cause(self, stored: int, wanted: int = 0) -> str | None:
        """The key of the setting by which `target` says what it does, or None."""
        if self._is_near_cap(stored + wanted):
            return "store.max_size"
        return "store.min_free" if self._is_free_short(wanted) else None

    def target(self, stored: int, wanted: int = 0) -> int | None:
        """To which size a store of this size has to be reduced so that `wanted` fits; None where it
        keeps the limits as it is."""
        found = []
        if self.max_size is not None and self._is_near_cap(stored + wanted):
            # With what is wanted, it is no more than what begins the next run.
            early = self.max_size * _EARLY // 100
            found.append(min(self.max_size * _DOWN_TO // 100, early - wanted))
        if self._is_free_short(wanted):
            lacking = self.min_free * (100 + _SPARE) // 100 + wanted - self.free
            found.append(stored - lacking)
        return max(0, min(found)) if found else None

    def _is_near_cap(self, size: int) -> bool:
        return self.max_size is not None and size > self.max_size * _EARLY // 100

    def _is_free_short(self, wanted: int) -> bool:
        return bool(self.min_free and self.total) and self.free - wanted < self.min_free

    def are_kept(self, stored: int, wanted: int, *, freed: int) -> bool:
        """Whether a store of this size keeps them since so many bytes were removed."""
        return replace(self, free=self.free + freed).target(stored, wanted) is None


def _bytes(value: int | Share, total: int) -> int:
    return value.of(total) if isinstance(value, Share) else value
