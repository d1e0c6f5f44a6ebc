"""`locks/usage`: about how large the store is, for processes that must not walk it.

A prune counts what is there; after that, each process adds what it commits. What is removed by hand
is missed until the next count. Where the file is missing or damaged, nothing is known, and a server
that has a limit to keep has the store counted.

What a process is about to commit, it has promised room for: `locks/promised-*` has the bytes, and
the process holds its lock and touches it. The next count drops those of a process that ended. It
counts them once more where they were touched since it began: the process may have been killed after
the rename of a blob and before it added the bytes. So the number is never too small, but for what
is put there by hand; it is too large by what came while the store was counted, until the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import inf
from threading import Lock
from typing import TYPE_CHECKING, Final

from ociproxy.store.claim import LOCKS_MODE
from ociproxy.store.files import heartbeat, store_errors, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SIZE: Final = 512
"""Bytes of the file, always: it is overwritten in place, which needs no room on a full disk."""
_TRIES: Final = 20
"""For the lock, which is held for microseconds. A process that was stopped holds up no other."""
_INTERVAL: Final = 0.002
"""Seconds between two tries."""
_PROMISED: Final = "promised-"
_DEAD: Final = 2.0
"""Seconds without a touch after which a process has ended for certain: it touches once a second."""
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
    """What is being committed, and has been promised room, by all processes."""
    runs: int = 0
    """How often the store was counted."""
    stuck: float = 0.0
    """Since when the limits are exceeded, or would be by what is wanted, though next to
    nothing may go; 0 if they are not."""
    unmet: int = 0
    """While it is stuck: the room that was wanted, and could not be made."""
    evicted: int = 0
    """Bytes that were removed since the file was made."""
    pinned: int = 0
    """Bytes of what was pinned at the last run that looked; 0 where none did since the pins were
    changed. What does not fit beside them gets no room, whatever is removed."""


class UsageFile:
    """Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._pending = 0
        self._given_back = 0
        """Bytes that this process has still to add, and to take from what is reserved, in the
        file."""
        self._promised = 0
        """Bytes that this process was promised, those included."""
        self._promise: tuple[int, Path] | None = None
        """The file that says so, open and locked."""

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
        """So many bytes were committed. Where another process has the file for long, they are added
        with the next change. Raises nothing, for the commit has succeeded."""
        with self._lock:
            self._pending += size
            if self._promised > self._given_back:
                return  # they count as promised until `release` adds them, soon
        with suppress(OSError):
            self._change(lambda usage: usage)

    def reserve(self, size: int, limit: int) -> bool:
        """Promise room for so many bytes in a store of at most `limit`; False where there is none,
        the store was never counted, or another process has the file. The caller commits them, then
        calls `release`. A count ends the promise of a process that has ended. Raises StoreError."""
        promised = False

        def reserved(usage: Usage) -> Usage:
            nonlocal promised
            more = usage.reserved + size
            promised = usage.counted > 0 and usage.stored + more <= limit
            if not promised:
                return usage
            self._promised += size
            return replace(usage, reserved=more)

        with store_errors(self._path):
            self._change(reserved)
        return promised

    def release(self, size: int) -> None:
        """Raises nothing: at worst room for so many bytes is missed until this process changes the
        file again, or ends."""
        with self._lock:
            self._given_back += size
        with suppress(OSError):
            self._change(lambda usage: usage)

    def promised(self) -> int:
        """Bytes that running processes were promised. 0 where this process may not write, or
        another one has the file. Raises nothing."""
        found = 0

        def look(usage: Usage) -> Usage:
            # With the lock: else a process that makes its file just now could not lock it.
            nonlocal found
            found = self._promises()
            return usage

        with suppress(OSError):
            self._change(look)
        return found

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

    def forget_pinned(self) -> None:
        """Other images are pinned than at the last run. Raises StoreError."""
        with store_errors(self._path):
            self._change(lambda usage: replace(usage, pinned=0))

    def record(
        self,
        size: int,
        before: Usage,
        *,
        freed: int,
        stuck: bool | None = None,
        pinned: int | None = None,
        began: float = inf,
    ) -> None:
        """The store was counted, and has this size after so much was freed; `before` was read
        before it was counted, from `began` on (seconds since the epoch). `stuck` None says nothing
        of limits, and `pinned` None nothing of pins. Raises StoreError."""

        def counted(usage: Usage) -> Usage:
            now = time.time()
            since = usage.stuck if stuck is None else (usage.stuck or now) if stuck else 0.0
            return replace(
                usage,
                stored=size + max(0, usage.written - before.written),
                counted=now,
                wanted=0,
                reserved=max(0, self._promises(began, sweep=True) - self._given_back),
                runs=usage.runs + 1,
                stuck=since,
                unmet=usage.unmet if stuck is None else before.wanted if stuck else 0,
                evicted=usage.evicted + freed,
                pinned=usage.pinned if pinned is None else pinned,
            )

        with store_errors(self._path):
            self._change(counted, make=stuck is not None)

    def _change(self, change: Callable[[Usage], Usage], *, make: bool = False) -> bool:
        """Change the file, by what is still to be added, too. False where another process has it.
        True also where it is not there: nothing is known then. Raises OSError."""
        with self._lock:
            flags = os.O_RDWR | os.O_CLOEXEC
            try:
                file = os.open(self._path, flags)
            except FileNotFoundError:
                if not make:
                    self._settle()
                    return True
                self._path.parent.mkdir(mode=LOCKS_MODE, exist_ok=True)
                file = os.open(self._path, flags | os.O_CREAT, 0o644)
                _give_to_owner(file, self._path)
            try:
                for _ in range(_TRIES):
                    if try_lock(file, fcntl.LOCK_EX):
                        self._write(file, change)
                        return True
                    time.sleep(_INTERVAL)
                return False
            finally:
                os.close(file)

    def _write(self, file: int, change: Callable[[Usage], Usage]) -> None:
        usage = _parse(os.pread(file, _SIZE, 0)) or Usage()
        before, more = self._promised, self._pending
        usage = replace(
            usage,
            stored=usage.stored + more,
            written=usage.written + more,
            reserved=max(0, usage.reserved - self._given_back),
        )
        try:
            text = json.dumps(asdict(change(usage)))
            os.pwrite(file, f"{text:<{_SIZE - 1}}\n".encode(), 0)
        except BaseException:
            self._promised = before
            raise
        self._settle()

    def _settle(self) -> None:
        """All that was to be added is in the file, whose lock this process holds."""
        self._promised -= self._given_back
        self._pending = self._given_back = 0
        # On a full disk there is no such file: then the next count ends the promise.
        with suppress(OSError):
            if self._promise is None:
                if not self._promised:
                    return
                path = self._path.with_name(f"{_PROMISED}{secrets.token_hex(8)}")
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                self._promise = file, path
                try_lock(file)
                heartbeat.start(file)
                _give_to_owner(file, path)
            file, path = self._promise
            if self._promised:
                os.pwrite(file, b"%20d" % self._promised, 0)
                return
            self._promise = None
            try:
                path.unlink(missing_ok=True)
            finally:
                heartbeat.stop(file)
                os.close(file)

    def _promises(self, began: float = inf, *, sweep: bool = False) -> int:
        """Bytes promised to processes that run, or that ended since `began`. With `sweep` the files
        of others are removed; this process has the lock then. Raises OSError."""
        found = 0
        for path in self._path.parent.glob(f"{_PROMISED}*"):
            with suppress(FileNotFoundError), path.open("rb") as file:
                ended = try_lock(file.fileno(), fcntl.LOCK_SH)
                if not ended or os.fstat(file.fileno()).st_mtime > began - _DEAD:
                    with suppress(ValueError):  # made just now
                        found += int(file.read())
                elif sweep:
                    path.unlink()
        return found


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
