"""`locks/usage`: about how large the store is, for processes that must not walk it.

A prune counts what is there; after that, each process adds what it commits. The number is a hint
for when to count again: what is removed by hand is missed until then. Where the file is missing or
damaged, nothing is known, and a server that has a limit to keep has the store counted.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Final

from ociproxy.store.files import store_errors, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SIZE: Final = 512
"""Bytes of the file, always: it is overwritten in place, which needs no room on a full disk."""
_LOCKS_MODE: Final = 0o700
_TRIES: Final = 20
"""For the lock, which is held for microseconds. A process that was stopped holds up no other."""
_INTERVAL: Final = 0.002
"""Seconds between two tries."""
WANTED: Final = 10.0
"""Seconds for which room stays wanted after a download asked for it last: longer than one waits
without asking again. What a killed process wanted is void by then."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Sizes are bytes, times are seconds since the epoch."""

    stored: int = 0
    """Blobs, manifests, and what only a prune removes."""
    written: int = 0
    """All that was ever committed: tells what came while the store was counted."""
    counted: float = 0.0
    """When the store was counted."""
    wanted: int = 0
    """Room that downloads wait for. A count ends it: those that got none ask again."""
    asked: float = 0.0
    """When a download asked for room last."""
    reserved: int = 0
    """What is being committed, and has been promised room."""
    runs: int = 0
    """How often the store was counted."""
    stuck: float = 0.0
    """Since when the limits are exceeded, or would be by what is wanted, though next to
    nothing may go; 0 if they are not."""
    unmet: int = 0
    """While it is stuck: the room that was wanted, and could not be made."""
    evicted: int = 0
    """Bytes that were removed since the file was made."""


def make_lock_folder(path: Path) -> None:
    """Make `locks/`, for its owner alone: each user who may read a file may lock it, and so hold up
    all that the store does. Raises OSError."""
    path.mkdir(mode=_LOCKS_MODE, exist_ok=True)


def close_lock_folder(path: Path) -> None:
    """Do the same for the folder of an earlier version. A user who may not is no danger to it."""
    with suppress(OSError):
        if path.stat().st_mode & ~_LOCKS_MODE & 0o777:
            path.chmod(_LOCKS_MODE)


class UsageFile:
    """Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._pending = 0

    def read(self) -> Usage | None:
        """None where nothing is known, or to a user who may only read the store. Raises
        StoreError."""
        with store_errors(self._path):
            try:
                file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError):
                return None
            try:
                return _parse(os.pread(file, _SIZE, 0))
            finally:
                os.close(file)

    def add(self, size: int) -> None:
        """So many bytes were committed. Never waits: where another process has the file, they are
        added with the next ones. Raises nothing, for the commit has succeeded."""
        with self._lock:
            self._pending += size
            more = self._pending

            def grown(usage: Usage) -> Usage:
                return replace(usage, stored=usage.stored + more, written=usage.written + more)

            with suppress(OSError):
                if self._change(grown, tries=1):
                    self._pending = 0

    def reserve(self, size: int, limit: int) -> int | None:
        """Promise room for so many bytes in a store of at most `limit`; None where there is none,
        or the store was never counted. The caller commits them, then calls `release` with what is
        returned. A count ends the promise: a process may have been killed that had it. Raises
        StoreError."""
        runs: int | None = None

        def reserved(usage: Usage) -> Usage:
            nonlocal runs
            more = usage.reserved + size
            if not usage.counted or usage.stored + more > limit:
                return usage
            runs = usage.runs
            return replace(usage, reserved=more)

        with store_errors(self._path):
            self._change(reserved)
        return runs

    def release(self, size: int, runs: int) -> None:
        """Raises nothing: at worst room for so many bytes is missed until the next count."""

        def released(usage: Usage) -> Usage:
            # What is promised after a count, others were promised.
            left = max(0, usage.reserved - size)
            return replace(usage, reserved=left) if usage.runs == runs else usage

        with suppress(OSError):
            self._change(released)

    def want(self, size: int) -> int | None:
        """A download waits for room: until the store was counted, for `WANTED` seconds, or until it
        calls `take_back` with what is returned. None where another process has the file: ask again.
        Raises StoreError."""
        runs = 0

        def wanting(usage: Usage) -> Usage:
            nonlocal runs
            runs = usage.runs
            return replace(usage, wanted=usage.wanted + size, asked=time.time())

        with store_errors(self._path):
            return runs if self._change(wanting, make=True) else None

    def take_back(self, size: int, runs: int | None) -> None:
        """The room is not wanted any more. Raises nothing: at worst it is wanted for `WANTED`
        seconds."""

        def without(usage: Usage) -> Usage:
            # A count has ended what was wanted before: what is wanted now, others want.
            left = max(0, usage.wanted - size)
            return replace(usage, wanted=left) if usage.runs == runs else usage

        with suppress(OSError):
            self._change(without)

    def retry(self) -> None:
        """The limits may be kept by now. Raises StoreError."""
        with store_errors(self._path):
            self._change(lambda usage: replace(usage, stuck=0.0, unmet=0))

    def record(self, size: int, before: Usage, *, freed: int, stuck: bool | None = None) -> None:
        """The store was counted, and has this size after so much was freed; `before` was read
        before it was counted. `stuck` None says nothing of limits. Raises StoreError."""

        def counted(usage: Usage) -> Usage:
            now = time.time()
            since = usage.stuck if stuck is None else (usage.stuck or now) if stuck else 0.0
            return replace(
                usage,
                stored=size + max(0, usage.written - before.written),
                counted=now,
                wanted=0,
                reserved=0,
                runs=usage.runs + 1,
                stuck=since,
                unmet=usage.unmet if stuck is None else before.wanted if stuck else 0,
                evicted=usage.evicted + freed,
            )

        with store_errors(self._path):
            self._change(counted, make=stuck is not None)

    def _change(
        self, change: Callable[[Usage], Usage], *, tries: int = _TRIES, make: bool = False
    ) -> bool:
        """False where another process has the file, or it is not there. Raises OSError."""
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            file = os.open(self._path, flags)
        except FileNotFoundError:
            if not make:
                return True
            make_lock_folder(self._path.parent)
            file = os.open(self._path, flags | os.O_CREAT, 0o644)
            _give_to_owner(file, self._path)
        try:
            for _ in range(tries):
                if try_lock(file, fcntl.LOCK_EX):
                    usage = _parse(os.pread(file, _SIZE, 0)) or Usage()
                    text = json.dumps(asdict(change(usage)))
                    os.pwrite(file, f"{text:<{_SIZE - 1}}\n".encode(), 0)
                    return True
                time.sleep(_INTERVAL)
            return False
        finally:
            os.close(file)


def size_of(folder: Path) -> tuple[int, int]:
    """Files of a folder and of those in it, and their bytes. Raises StoreError."""
    objects = size = 0
    waiting = [os.fspath(folder)]
    while waiting:
        with store_errors(folder):
            try:
                entries = os.scandir(waiting.pop())
            except FileNotFoundError:
                continue
            with entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        continue
                    try:
                        size += entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:
                        continue
                    objects += 1
    return objects, size


def _parse(data: bytes) -> Usage | None:
    try:
        document = json.loads(data)
        whole = all(type(value) in (int, float) and value >= 0 for value in document.values())
        usage = Usage(**document) if whole else None
    except (ValueError, TypeError, AttributeError):
        return None
    if usage is not None and abs(time.time() - usage.asked) > WANTED:
        return replace(usage, wanted=0)
    return usage


def _give_to_owner(file: int, path: Path) -> None:
    """A command that root runs must not keep the server from the file."""
    owner = path.parent.parent.stat()
    with suppress(PermissionError):
        os.fchown(file, owner.st_uid, owner.st_gid)
