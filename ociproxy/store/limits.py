"""How large the store may be, by `store.max_size` and `store.min_free`; and what a download does
where it is that large.

A server removes images in the background (`prune --to-limits`) from 98 % of the cap on, so that
downloads seldom wait for it. A download waits at the cap; it passes through the mirror, uncached,
where nothing may be removed.
Tests: tests/store/test_limits.py, tests/serve/test_eviction.py.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ociproxy.config.local_settings import Share
from ociproxy.config.units import GIB, show_size
from ociproxy.errors import StoreFull
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path
    from threading import Event

    from ociproxy.config.local_settings import Store as Settings
    from ociproxy.store.ingest import Ingest
    from ociproxy.store.store import Store
    from ociproxy.store.usage import Usage

_DEFAULT_FREE: Final = (Share(5), 2 * GIB)
"""The smaller one of these has to stay free."""
_EARLY: Final = 98
"""Percent of the cap above which images are removed."""
_DOWN_TO: Final = 90
"""Percent of the cap that stay: else each download would be followed by a walk of the store."""
_SPARE: Final = 10
"""Percent of `min_free` that are freed beyond it, for the same reason."""
_WAIT: Final = 8.0
"""Seconds that a download waits for room. On a full disk its client waits for the first byte with
it, has `fetch.timeouts.answer` (18 s) in all, and needs the upstream once more where none comes."""
_LOOK: Final = 0.1
"""Seconds between two looks."""


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
            return f"less than store.min_free ({show_size(self.min_free)}) is free"
        return None

    def can_fit(self, size: int) -> bool:
        """Whether so much could be kept if all else were removed."""
        capped = self.max_size is not None and size > self.max_size * _DOWN_TO // 100
        return not capped and (not self.total or size + self.min_free <= self.total)

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


class Room:
    """What the downloads of a server ask for before they keep something. Thread-safe; blocks.

    Without settings there is room for all: what an operator loads is kept.
    """

    def __init__(self, store: Store, settings: Settings | None = None) -> None:
        self._store = store
        self._settings = settings

    def check(self, size: int) -> None:
        """Raises StoreFull where the store has no room for so many bytes, and nothing may be
        removed."""
        limits, usage = self._look()
        if limits is not None and usage is not None and usage.stuck:
            reason = limits.exceeded(usage.stored + size)
            if reason is not None:
                raise StoreFull(self._store.root, f"{reason}, and nothing may be removed")

    def keep(self, ingest: Ingest, size: int, stopped: Event) -> bool:
        """Commit what has arrived, of `size` bytes and verified, once the store has room for it,
        or `stopped` is set. Where it gets none, nothing is kept, and False returned: readers have
        the file open. Raises StoreError."""
        limits, _ = self._look()
        if limits is None or limits.max_size is None:
            ingest.commit(self._store.blobs.commit)
            return True
        promised = self._promise(size, limits, stopped)
        usage = self._store.usage.read()
        if not promised and usage is not None and usage.counted and not stopped.is_set():
            ingest.discard()
            return False
        try:
            ingest.commit(self._store.blobs.commit)
        finally:
            if promised:
                self._store.usage.release(size)
        return True

    def wait_for_disk(self, begin: Callable[[int], None], size: int, stopped: Event) -> None:
        """Begin to store so many bytes; where the disk has no room for them, wait in the same way,
        and begin once more after each run: the first may have begun before this download asked.
        Raises what `begin` does, or StoreError."""
        try:
            begin(size)
        except StoreFull:
            limits, _ = self._look()
            if limits is None or not limits.exist:
                raise
            with closing(self._runs(size, limits, stopped)) as runs:
                for _ in runs:
                    with suppress(StoreFull):
                        return begin(size)
            raise

    def _promise(self, size: int, limits: Limits, stopped: Event) -> bool:
        """Whether the store has room for so many bytes in the end."""
        cap, file = limits.max_size or 0, self._store.usage
        if file.reserve(size, cap):
            return True
        with closing(self._runs(size, limits, stopped)) as runs:
            return any(file.reserve(size, cap) for _ in runs)

    def _runs(self, size: int, limits: Limits, stopped: Event) -> Generator[Usage]:
        """Ask for room, and yield once each time that the store was reduced, until it may not be
        reduced any more or `_WAIT` is over. Close it: then the room is not wanted any more."""
        file = self._store.usage
        before = file.read()
        if not limits.can_fit(size) or (before is not None and before.stuck):
            return
        runs, end = file.want(size), time.monotonic() + _WAIT
        try:
            while time.monotonic() < end and not stopped.wait(_LOOK):
                usage = file.read()
                if runs is None:
                    runs = file.want(size)
                elif usage is not None and usage.runs > runs:
                    yield usage
                    if usage.stuck:
                        return
                    runs = file.want(size)  # other downloads were faster
        finally:
            file.take_back(size, runs)

    def _look(self) -> tuple[Limits | None, Usage | None]:
        if self._settings is None:
            return None, None
        return Limits.of(self._settings, self._store.root), self._store.usage.read()


def _bytes(value: int | Share, total: int) -> int:
    return value.of(total) if isinstance(value, Share) else value


def free_space(root: Path) -> int:
    """Bytes that this user may still write where the store is, or will be. Raises StoreError."""
    with store_errors(root):
        while not root.exists() and root != root.parent:
            root = root.parent
        return shutil.disk_usage(root).free
