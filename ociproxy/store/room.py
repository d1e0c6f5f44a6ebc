"""Room for what comes: a blob that is published has to fit the limits of the store.

A server's download waits at the cap while images are removed; it passes through the mirror,
uncached, where nothing may be removed. What an operator asks for waits longer, and is refused.
Tests: tests/store/test_limits.py, tests/serve/test_eviction.py, tests/cli/test_capped_store.py.
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing, contextmanager, suppress
from math import inf
from typing import TYPE_CHECKING, Final

from ociproxy.config.units import show_bytes, show_size
from ociproxy.errors import NoRoom, StoreFull
from ociproxy.store.files import store_errors
from ociproxy.store.limits import Limits
from ociproxy.store.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path
    from threading import Event

    from ociproxy.config.local_settings import Store as Settings
    from ociproxy.store.ingest import Ingest, Publish
    from ociproxy.store.usage import UsageFile

_WAIT: Final = 8.0
"""Seconds that a download waits for room. On a full disk the client gets no byte meanwhile, and it
has `fetch.timeouts.answer` (18 s) in all. If no room comes, the mirror must ask the upstream once
more."""
_LONG_WAIT: Final = 120.0
"""Seconds that an operator's command waits for room: longer than a run on a large store takes."""
_REMEMBERED: Final = 60.0
"""Seconds in which a command does not wait again for as much as it was refused: a list may have a
thousand images that do not fit."""
_ASK_AGAIN: Final = 5.0
"""Seconds: less than `usage.WANTED`."""
_LOOK: Final = 0.1
"""Seconds between two looks."""


class Room:
    """What is asked before something is kept. Thread-safe; blocks.

    Without settings there is room for all. With `must_keep` what gets no room is refused, for an
    operator asked for it; without `evicts` no process makes any.
    """

    def __init__(
        self,
        root: Path,
        usage: UsageFile,
        settings: Settings | None = None,
        *,
        must_keep: bool = False,
        evicts: bool = True,
    ) -> None:
        self._root = root
        self._usage = usage
        self._settings = settings
        self._must_keep = must_keep
        self._evicts = evicts
        self._began = time.time()
        self._refused = inf, 0.0
        """The bytes that a command got no room for last, and until when that is remembered."""

    def within(self, settings: Settings, *, must_keep: bool = False, evicts: bool = True) -> Room:
        """That of the same store with these limits."""
        return Room(self._root, self._usage, settings, must_keep=must_keep, evicts=evicts)

    def check(self, size: int) -> None:
        """Raises StoreFull where the store has no room for so many bytes, and nothing may be
        removed."""
        limits, usage = self._look()
        if limits is not None and usage is not None and self._is_stuck(usage):
            reason = limits.exceeded(usage.stored + size)
            if reason is not None:
                raise self._refusal(f"{reason}, and nothing may be removed")

    def make(self, coming: Callable[[], int], stopped: Event) -> None:
        """Return once the store has room for the bytes that are to come, or `stopped` is set: fewer
        are, the more of them it has. Raises NoRoom where it gets none, or StoreError."""
        limits, _ = self._look()
        if limits is None or limits.max_size is None:
            return
        size, usage = coming(), self._usage.read()
        if usage is not None and _fits(size, usage, limits.max_size):
            return
        with closing(self._looks(size, limits, stopped)) as looks:
            found = any(_fits(coming(), each, limits.max_size) for each in looks)
            if not found and not stopped.is_set():
                raise NoRoom(self._root, self._no_room(size, limits))

    @contextmanager
    def held(self, size: int, stopped: Event) -> Iterator[bool]:
        """Inside, the caller publishes a blob of so many bytes, for which the store has room. False
        where it gets none, also since `stopped` is set. True also where no limit holds, or the size
        of the store is not known and the blob could fit. Raises NoRoom with `must_keep`, or
        StoreError."""
        limits, _ = self._look()
        if limits is None or limits.max_size is None:
            yield True
            return
        promised = self._promise(size, limits, stopped)
        try:
            usage = self._usage.read()
            known = usage is not None and usage.counted > 0
            has_room = promised or (not known and limits.can_fit(size))
            if self._must_keep and not has_room and not stopped.is_set():
                raise NoRoom(self._root, self._no_room(size, limits))
            yield has_room
        finally:
            if promised:
                self._usage.release(size)

    def keep(self, ingest: Ingest, publish: Publish, size: int, stopped: Event) -> str | None:
        """Commit what has arrived, of `size` bytes and verified, as `held` allows. Where there is
        no room, nothing is kept, for readers have the file open, and this returns why. Raises as
        that does; what has arrived stays in `pulls/` then, for the next run of the command."""
        try:
            with self.held(size, stopped) as has_room:
                if has_room:
                    ingest.commit(publish)
                elif stopped.is_set():
                    ingest.flush()  # the next process goes on with it
                else:
                    ingest.discard()
        except NoRoom:
            ingest.flush()  # here, for it is the event loop that closes the file
            raise
        if has_room or stopped.is_set() or self._settings is None:
            return None
        return self._no_room(size, Limits.of(self._settings, self._root))

    def wait_for_disk(self, begin: Callable[[int], None], size: int, stopped: Event) -> None:
        """Begin to store so many bytes. Where the disk has no room for them, wait as `held` does,
        and begin once more after each prune: the first one may have begun before this download
        asked. Raises what `begin` does, or StoreError."""
        try:
            begin(size)
        except StoreFull:
            limits, _ = self._look()
            if limits is None or not limits.exist:
                raise
            seen = self._usage.read()
            with closing(self._looks(size, limits, stopped)) as looks:
                for usage in looks:
                    if seen is None or usage.runs > seen.runs:
                        seen = usage
                        with suppress(StoreFull):
                            return begin(size)
            raise

    def _promise(self, size: int, limits: Limits, stopped: Event) -> bool:
        """Wait for room, and have it promised."""
        cap, file = limits.max_size or 0, self._usage
        if file.reserve(size, cap):
            return True
        with closing(self._looks(size, limits, stopped)) as looks:
            # A promise may fail though it fits: where another process has the file just then.
            return any(file.reserve(size, cap) for each in looks if _fits(size, each, cap))

    def _looks(self, size: int, limits: Limits, stopped: Event) -> Generator[Usage]:
        """Ask for room, and look every `_LOOK` seconds, until the store may not be reduced any more
        or the wait is over. Close it: then the room is not wanted any more."""
        file = self._usage
        before = file.read() or Usage()
        least, until = self._refused
        is_refused = self._must_keep and size >= least and time.monotonic() < until
        can_fit = limits.can_fit(size, before.pinned)
        if not self._evicts or not can_fit or self._is_stuck(before) or is_refused:
            return
        first = before.runs
        began = asked = time.monotonic()
        runs = file.want(size)
        try:
            while not stopped.wait(_LOOK):
                now, usage = time.monotonic(), file.read()
                if now - began > (_LONG_WAIT if self._must_keep else _WAIT):
                    break
                if usage is not None:
                    yield usage
                    has_run = usage.runs > first
                    if has_run and (usage.stuck or not limits.can_fit(size, usage.pinned)):
                        break
                ended = usage is not None and usage.runs != runs
                if ended or now - asked > _ASK_AGAIN:  # others were faster, or it becomes void
                    file.take_back(size, runs)
                    runs, asked = file.want(size), now
            self._refused = size, time.monotonic() + _REMEMBERED
        finally:
            file.take_back(size, runs)

    def _is_stuck(self, usage: Usage) -> bool:
        """Whether nothing may be removed. A command that has just begun may be the first one for
        long that looks."""
        return usage.stuck > 0 and (not self._must_keep or usage.counted > self._began)

    def _refusal(self, reason: str) -> StoreFull:
        return (NoRoom if self._must_keep else StoreFull)(self._root, reason)

    def _look(self) -> tuple[Limits | None, Usage | None]:
        if self._settings is None:
            return None, None
        return Limits.of(self._settings, self._root), self._usage.read()

    def _no_room(self, size: int, limits: Limits) -> str:
        cap, more = f"store.max_size ({show_size(limits.max_size or 0)})", show_bytes(size)
        if not limits.can_fit(size):
            return f"{more} are too many for {cap}"
        pinned = (self._usage.read() or Usage()).pinned
        if not limits.can_fit(size, pinned):
            return f"{cap} leaves no room for {more} beside {show_bytes(pinned)} that are pinned"
        return f"{cap} leaves no room for {more} more, and nothing else may be removed"


def _fits(size: int, usage: Usage, cap: int) -> bool:
    return usage.counted > 0 and usage.stored + usage.reserved + size <= cap


def free_space(root: Path) -> int:
    """Bytes that this user may still write where the store is, or will be. Raises StoreError."""
    with store_errors(root):
        while not root.exists() and root != root.parent:
            root = root.parent
        return shutil.disk_usage(root).free
