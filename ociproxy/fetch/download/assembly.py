"""The bytes of one blob being put together: what is here, what is being fetched, what is wanted.

Readers in the event loop and the threads of all connections meet here, so one lock guards which
file it is, its byte ranges and the segments. No other object takes it. Bytes are written without
it: no two segments overlap.

Tests: tests/fetch/download/test_fill.py, tests/serve/test_fills.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from threading import Lock
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy.errors import Interrupted, SizeMismatch
from ociproxy.store.hashing import InOrderHasher
from ociproxy.store.ingest import ByteRanges

if TYPE_CHECKING:
    from ociproxy.oci.digest import Digest
    from ociproxy.store.ingest import Ingest


READ: Final = 1024 * 1024
"""Bytes asked from a connection at a time; a few of these wait in memory to be hashed. Half as many
cost a fast upstream a tenth of its speed, twice as many bring nothing (measured on loopback).

A connection may be writing as many from where its segment starts: no segment is split within."""
UNKNOWN: Final = 1 << 62
"""Where the last gap ends while the size of the blob is not known."""


class State(IntEnum):
    """How far a download is. It only moves forward."""

    STARTING = 0
    """The size is not known; readers wait for it."""
    ARRIVING = 1
    """Readers may read what has arrived; the size is known, or will not be before the end."""
    WHOLE = 2
    """All bytes are in the file. The digest is not compared yet."""
    VERIFIED = 3
    """The bytes are right; readers may read the last byte."""


class Fetcher(Protocol):
    """What brings the bytes of a download that leads: the connections of the HTTP backend."""

    def run(self) -> None:
        """Return when all bytes are in the file. Raises what ended it."""

    def abort(self) -> None:
        """Make `run` end soon; any thread."""

    def help(self) -> None:
        """A reader waits for bytes that no connection is on its way to; any thread."""


@dataclass(slots=True, eq=False)
class Segment:
    """[start, stop) that one connection is fetching; start moves as bytes arrive. A split moves
    stop, and the connection is closed there.

    Segments overlap neither each other nor the bytes that are here. So no byte is written twice,
    and bytes that were hashed stay as they are.
    """

    start: int
    stop: int


class Assembly:
    """`size` is a claim, of a manifest or a journal, until the upstream has told it; None where
    neither has. The end of a body without a length tells it, too."""

    def __init__(self, digest: Digest, upstream: str, *, size: int | None, segment: int) -> None:
        """A segment covers `segment` bytes at most, unless `take` is told more."""
        self.size = size or None  # no byte would be asked for where nothing is claimed to be there
        self._told = False
        """The upstream has told the size: from then on there is no other one."""
        self.state = State.STARTING
        self.files = 0
        """How many files readers have been given. What they have read is in each, but an earlier
        one grows no more."""
        self._digest = digest
        self._upstream = upstream
        self._lock = Lock()
        self._segment = segment
        self._fetching: list[Segment] = []
        self._wanted: dict[int, int] = {}
        """How many readers wait for the byte at an offset."""
        self._ingest: Ingest | None = None
        self.hasher: InOrderHasher | None = None

    # For readers

    def available(self, offset: int, *, early: bool = False) -> int:
        """The end of the bytes that can be read from offset. The last byte waits for the
        verification, so that no reader ever has all of a wrong blob; but not with `early`, for a
        reader that looks at the end alone."""
        with self._lock:
            if self.state is State.VERIFIED and self.size is not None:
                return self.size
            if self._ingest is None:
                return offset
            stop = self._ingest.ranges.stop_after(offset)
            # Where the size is not known, any byte may be the last one.
            return max(
                offset, stop - 1 if self.size is None else min(stop, self.size - (not early))
            )

    def want(self, offset: int) -> bool:
        """A reader waits for the byte at offset: it is fetched first. True where no connection is
        about to bring it."""
        with self._lock:
            self._wanted[offset] = self._wanted.get(offset, 0) + 1
            if self.size is None or self._ingest is None:
                return False
            return not self._is_coming(self._ingest.ranges, offset)

    def unwant(self, offset: int) -> None:
        with self._lock:
            left = self._wanted.pop(offset, 0) - 1
            if left > 0:
                self._wanted[offset] = left

    def duplicate_file(self) -> int | None:
        """A file descriptor of the bytes that are `available`, which the caller closes; None once
        the file is closed here."""
        with self._lock:
            return None if self._ingest is None else os.dup(self._ingest.file)

    # For the download

    @property
    def has_file(self) -> bool:
        return self._ingest is not None

    @property
    def led(self) -> Ingest | None:
        """The file, where this process leads."""
        ingest = self._ingest
        return ingest if ingest is not None and ingest.leading else None

    def adopt(self, ingest: Ingest) -> bool:
        """Readers read this file from now on. False where it lacks bytes that were promised to
        them: then nothing changes."""
        with self._lock:
            old = self._ingest
            if old is None or not old.is_same_file(ingest):
                if old is not None and not ingest.ranges.covers(old.ranges):
                    return False
                self.files += 1
            self._ingest = ingest
        if old is not None:
            old.close()
        return True

    def refresh(self) -> None:
        """A follower: take in what the leader's journal says."""
        with self._lock:
            ingest = self._current()
            ingest.refresh()
            if ingest.size is not None:
                self.size = ingest.size

    def learn_size(self, size: int, *, told: bool = True) -> None:
        """The upstream has `told` it, whatever was claimed, or it is a claim still. Raises
        SizeMismatch where it told another one before, and StoreFull where there is no room for the
        rest."""
        with self._lock:
            if self._told and self.size != size:
                raise SizeMismatch(f"blob {self._digest}", self.size, size)
            self.size, self._told = size, told or self._told
            if self._ingest is not None and self._ingest.leading:
                self._ingest.check_room(size)
                self._ingest.set_size(size)

    def resume(self, ingest: Ingest) -> None:
        """Go on with what arrived before, there or in the file of a leader that was stopped. Its
        journal knows the size better than a manifest does, and what is there already refutes a
        smaller claim. Raises StoreError, or Interrupted where bytes that were promised to
        readers cannot be read."""
        old = self._ingest
        if old is not None and not old.is_same_file(ingest):
            ingest.copy_from(old)
        if not self.adopt(ingest):
            raise Interrupted(self._upstream, "the process that fetched it gave up")
        with self._lock:
            end = max((stop for _, stop in ingest.ranges), default=0)
            size = (ingest.size or self.size) if not self._told else self.size
            self.size = None if size is None or (size < end and not self._told) else size

    def begin_hashing(self, ingest: Ingest) -> InOrderHasher:
        """Of this file, or go on with what was hashed of it: its start may be freed by now."""
        if self.hasher is None or not self.hasher.is_of(ingest):
            self.hasher = InOrderHasher(self._digest, ingest, self.arrived_until)
        return self.hasher

    def arrived_until(self, offset: int) -> int:
        """The end of the bytes that are in the file from offset on."""
        with self._lock:
            return self._current().ranges.stop_after(offset)

    def close(self) -> None:
        """No more bytes come from this file. Readers keep the descriptors that they duplicated."""
        with self._lock:
            ingest, self._ingest = self._ingest, None
        if ingest is not None:
            ingest.close()

    def leave_to_store(self, size: int) -> None:
        """The blob is there, so readers open its file: it may be another one."""
        self.close()
        self.size = size
        self.files += 1

    # For connections

    def take(self, most: int) -> Segment | None:
        """The next bytes to fetch: a segment, or `most` bytes where that is more. None where all
        bytes are here or being fetched."""
        with self._lock:
            gap = self._free_gap(self._current().ranges)
            if gap is None:
                return None
            segment = Segment(gap[0], min(gap[1], gap[0] + max(self._segment, most)))
            self._fetching.append(segment)
            return segment

    def move(self, segment: Segment, offset: int, stop: int) -> bool:
        """Let a used-up segment go on with the first free bytes between `offset`, where its
        connection is, and `stop`. False where there are none."""
        with self._lock:
            gap = self._taken(self._current().ranges).gap(max(offset, segment.stop), stop)
            if gap is None:
                return False
            segment.start, segment.stop = gap
            return True

    def far_awaited(self, near: int) -> Segment | None:
        """The bytes from the first offset that a reader waits for, where a connection is on its
        way to it that has more than `near` bytes to bring before. Not taken yet."""
        with self._lock:
            for offset in sorted(self._wanted):
                running = self._splittable(offset, max(near, READ))
                if running is not None and self.size is not None and offset < self.size:
                    return Segment(offset, min(running.stop, offset + self._segment))
            return None

    def split(self, segment: Segment) -> bool:
        """Take a segment that `far_awaited` returned from the one that covers it. False where that
        one has come too near, or has been split elsewhere."""
        with self._lock:
            running = self._splittable(segment.start, READ)
            if running is None:
                return False
            segment.stop = min(segment.stop, running.stop)
            running.stop = segment.start
            self._fetching.append(segment)
            return True

    def end_at(self, segment: Segment, size: int) -> None:
        """The upstream says where the blob ends."""
        with self._lock:
            segment.stop = min(segment.stop, size)

    def release(self, segment: Segment) -> bool:
        """A connection ends: others may fetch what its segment still covers. False where the
        segment was never taken."""
        with self._lock:
            if segment not in self._fetching:
                return False
            self._fetching.remove(segment)
            return True

    @property
    def is_all_taken(self) -> bool:
        """Whether every byte is here or being fetched."""
        with self._lock:
            ingest = self._ingest
            return ingest is None or self._free_gap(ingest.ranges) is None

    @property
    def bytes_here(self) -> int:
        with self._lock:
            return 0 if self._ingest is None else self._ingest.ranges.total

    @property
    def bytes_left(self) -> int:
        with self._lock:
            return (self.size or 0) - self._current().ranges.total

    def put(self, segment: Segment, data: bytes) -> None:
        """Write the next bytes of a segment. Raises StoreError."""
        ingest = self._current()
        ingest.write(segment.start, data)
        with self._lock:
            start, segment.start = segment.start, segment.start + len(data)
            ingest.arrived(start, segment.start, flush=segment.start == segment.stop)

    def hash(self, start: int, data: bytes) -> None:
        """Of bytes that were put. Waits while hashing is too far behind. Raises StoreError."""
        if self.hasher is not None:
            self.hasher.take(start, data)

    def _current(self) -> Ingest:
        if self._ingest is None:
            raise Interrupted(self._upstream, "the download has ended")
        return self._ingest

    # Under the lock

    def _free_gap(self, arrived: ByteRanges) -> tuple[int, int] | None:
        """The next range that is neither here nor being fetched; one that a reader waits for comes
        first."""
        if self.size is None:
            return None if self._fetching else arrived.gap(0, UNKNOWN)
        taken = self._taken(arrived)
        for offset in sorted(self._wanted):
            if offset < self.size and taken.stop_after(offset) == offset:
                return taken.gap(offset, self.size)
        return taken.gap(0, self.size)

    def _is_coming(self, arrived: ByteRanges, offset: int) -> bool:
        """Whether the byte at offset is here, or a connection is about to bring it."""
        if arrived.stop_after(offset) > offset:
            return True
        return any(s.start <= offset < min(s.stop, s.start + READ) for s in self._fetching)

    def _splittable(self, offset: int, near: int) -> Segment | None:
        return next((s for s in self._fetching if s.start + near < offset < s.stop), None)

    def _taken(self, arrived: ByteRanges) -> ByteRanges:
        taken = ByteRanges()
        for start, stop in arrived:
            taken.add(start, stop)
        for segment in self._fetching:
            taken.add(segment.start, segment.stop)
        return taken
