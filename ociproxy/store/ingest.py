"""One arriving blob: its file in `pulls/`, and the journal of the byte ranges that are in it.

`pulls/<name>` holds the bytes, each at its final offset. `pulls/<name>.spans` is a journal that
only grows; a blob that is known to be short has none. Its lines are `size <bytes>`, `<start>
<stop>` once those bytes are written, and `empty` where all bytes before are gone. The leader writes
both files, followers in other processes read them. After a crash the next leader goes on from the
journal. A journal that is wrong does no harm: the leader hashes all bytes before it commits.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from bisect import bisect_left, bisect_right
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import StoreError, StoreFull
from ociproxy.metrics.counters import FILLS
from ociproxy.store.files import READ_SIZE, heartbeat, store_errors, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ociproxy.oci.digest import Digest

    Publish = Callable[[Path, Digest, Callable[[], None]], None]
    """`Blobs.commit`: a staged file, its digest, and what to call before it is sealed."""


class ByteRanges:
    """Not thread-safe. It stays short, for ranges that touch become one."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Record that [start, stop) arrived; parts of that may have arrived before."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def stop_after(self, offset: int) -> int:
        """Where the bytes that arrived from `offset` on end; `offset` itself if its byte is
        missing."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or self._stops[index] <= offset:
            return offset
        return self._stops[index]

    def gap(self, offset: int, end: int) -> tuple[int, int] | None:
        """The first missing range between `offset` and `end`; None if there is none."""
        start = self.stop_after(offset)
        if start >= end:
            return None
        index = bisect_right(self._starts, start)
        stop = self._starts[index] if index < len(self._starts) else end
        return start, min(stop, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The arrived ranges, in order."""
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def covers(self, other: ByteRanges) -> bool:
        return all(self.gap(start, stop) is None for start, stop in other)

    @property
    def total(self) -> int:
        """How many bytes have arrived."""
        return sum(self._stops) - sum(self._starts)


JOURNAL_SUFFIX: Final = ".spans"
_JOURNAL_INTERVAL: Final = 0.02
"""Seconds between two writes of the journal, as long as bytes come: where the upstream stalls, the
last ones wait for the next."""
_SHORT: Final = 256 * 1024
"""Bytes that are there in one moment or two: making a journal would take longer than to fetch them
again."""


class Ingest:
    """One arriving blob, seen by its leader or by a follower in another process."""

    is_kept = True
    """Whether the store has the blob once it is committed."""

    def __init__(self, path: Path, digest: Digest, file: int, *, leading: bool) -> None:
        self.path = path
        self.digest = digest
        self.file = file
        self.leading = leading
        self.size: int | None = None
        self.ranges = ByteRanges()
        self._journal_path = path.with_name(path.name + JOURNAL_SUFFIX)
        self._journal: int | None = None
        self._is_short = False
        self._torn = False
        self._read = 0
        self._pending = ByteRanges()
        self._journalled = 0.0
        if leading:
            heartbeat.start(file)

    def refresh(self) -> None:
        """Read the new lines of the journal: how far the leader has come. Raises StoreError."""
        with store_errors(self._journal_path):
            try:
                with self._journal_path.open("rb") as journal:
                    journal.seek(self._read)
                    data = journal.read()
            except FileNotFoundError:
                return
        held = os.fstat(self.file).st_size
        complete = data[: data.rfind(b"\n") + 1]
        self._read += len(complete)
        for line in complete.decode("ascii", "replace").splitlines():
            self._apply(line.split(), held)

    def disown_journal(self) -> None:
        """Leader: a crash after commit leaves a journal, and the next leader makes an empty file
        beside it. Void that journal, for followers read it, too."""
        if os.fstat(self.file).st_size == 0 and self._read:
            # The last line may lack its end: do not write on in it.
            self._append("\nempty\n")

    def set_size(self, size: int) -> None:
        """Leader: tell followers the size of the blob, in bytes."""
        if self.size != size:
            self._is_short = size <= _SHORT and not self._read and self._journal is None
            self.size = size
            self._note(f"size {size}\n")

    def check_room(self, size: int) -> None:
        """Leader: raises StoreFull where the file system has no room for the rest of `size` bytes:
        so a client hears of it before its first byte."""
        with store_errors(self.path):
            state = os.fstatvfs(self.file)
        rest = size - self.ranges.total
        # Some file systems tell no size at all: tmpfs without a limit, some of FUSE.
        if state.f_blocks and rest > state.f_bavail * state.f_frsize:
            raise StoreFull(self.path, f"no space left on device for {rest} bytes more")

    def write(self, offset: int, data: bytes) -> None:
        """Leader, any thread: put bytes in place. They count after a call of `arrived`."""
        with store_errors(self.path):
            view = memoryview(data)
            while view:
                count = os.pwrite(self.file, view, offset)
                offset += count
                view = view[count:]

    def copy_from(self, other: Ingest) -> None:
        """Leader: take over what has arrived in another file of the blob. Raises StoreError; this
        file is removed then, for a part of a copy would keep a full disk full."""
        try:
            self._copy(other)
        except StoreError:
            with suppress(StoreError):
                self.discard()
            raise

    def _copy(self, other: Ingest) -> None:
        for start, stop in other.ranges:
            while (gap := self.ranges.gap(start, stop)) is not None:
                first, last = gap
                with store_errors(other.path):
                    data = os.pread(other.file, min(last - first, READ_SIZE), first)
                if not data:
                    return  # its journal is wrong
                self.write(first, data)
                self.arrived(first, first + len(data))

    def arrived(self, start: int, stop: int, *, flush: bool = False) -> None:
        """Leader: these bytes are in place. The journal gets them with the first call that comes
        `_JOURNAL_INTERVAL` after the last write; at once with `flush`."""
        self.ranges.add(start, stop)
        self._pending.add(start, stop)
        now = time.monotonic()
        if flush or now - self._journalled >= _JOURNAL_INTERVAL:
            self._journalled = now
            self.flush()

    def is_led(self) -> bool:
        """Follower: whether a process still leads."""
        if not try_lock(self.file, fcntl.LOCK_SH):
            return True
        fcntl.flock(self.file, fcntl.LOCK_UN)
        return False

    def is_same_file(self, other: Ingest) -> bool:
        return os.path.samestat(os.fstat(self.file), os.fstat(other.file))

    def commit(self, publish: Publish) -> None:
        """Leader: publish the bytes, which the caller has verified, with `Blobs.commit`. Raises
        StoreError."""
        if self.size is not None:
            with store_errors(self.path):
                # An earlier leader, killed since, may have written bytes beyond the end.
                os.ftruncate(self.file, self.size)
        # A touch would break the seal; followers wait for the flush of a large blob before it.
        publish(self.path, self.digest, lambda: heartbeat.stop(self.file))
        FILLS.add()
        self._unlink_journal()

    def discard(self) -> None:
        """Leader: remove the file and its journal: the bytes are wrong, or there are none."""
        with store_errors(self.path):
            self._unlink_journal()
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop leading or following. The bytes that arrived stay for the next leader."""
        heartbeat.stop(self.file)
        self.flush()
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        if self.leading:
            # Readers may have duplicated this descriptor, and a duplicate keeps the lock.
            fcntl.flock(self.file, fcntl.LOCK_UN)
        os.close(self.file)

    def flush(self) -> None:
        """Leader: write the lines of the journal that wait. They are given up where that fails:
        the next try is that of `close`, which the event loop may call."""
        waiting, self._pending = self._pending, ByteRanges()
        if waiting.total:
            self._note("".join(f"{first} {last}\n" for first, last in waiting))

    def _note(self, text: str) -> None:
        """A journal that cannot be written ends no download. The next leader fetches some bytes
        again, and followers in other processes wait for the whole blob."""
        try:
            if not (self._torn or self._is_short):
                self._append(text)
        except StoreError as exc:
            self._torn = True  # a line may lack its end: nothing may follow it
            log.event(logging.WARNING, "journal not written", digest=self.digest, reason=exc)

    def _append(self, text: str) -> None:
        with store_errors(self._journal_path):
            if self._journal is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._journal = os.open(self._journal_path, flags, 0o644)
            data = text.encode()
            while data:
                data = data[os.write(self._journal, data) :]

    def _apply(self, words: list[str], held: int) -> None:
        """Take in one line; `held` is the size of the data file in bytes. A range is cut there, and
        at the size of the blob."""
        match words:
            case ["empty"]:
                self.ranges = ByteRanges()
            case ["size", size] if size.isdecimal():
                self.size = int(size)
            case [start, stop] if start.isdecimal() and stop.isdecimal():
                limit = held if self.size is None else min(held, self.size)
                self.ranges.add(int(start), min(int(stop), limit))

    def _unlink_journal(self) -> None:
        self._pending = ByteRanges()
        with store_errors(self._journal_path):
            self._journal_path.unlink(missing_ok=True)
