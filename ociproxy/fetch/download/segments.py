"""Which connection of a download fetches which bytes, and which readers wait for what.

Not thread-safe: `Assembly` calls it with its lock held.

Tests: tests/fetch/download/test_fill.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ociproxy.store.byte_ranges import ByteRanges

UNKNOWN: Final = 1 << 62
"""Where the last gap ends while the size of the blob is not known."""


@dataclass(slots=True, eq=False)
class Segment:
    """[start, stop) that one connection is fetching; start moves as bytes arrive.

    Segments overlap neither each other nor the bytes that are here. So no byte is written twice,
    and bytes that were hashed stay as they are.
    """

    start: int
    stop: int


class Segments:
    """`segment` is how many bytes one covers at most, unless `take` is told more."""

    def __init__(self, segment: int) -> None:
        self._segment = segment
        self._fetching: list[Segment] = []
        self._wanted: dict[int, int] = {}

    def want(self, offset: int) -> None:
        """One more reader waits for the byte at offset."""
        self._wanted[offset] = self._wanted.get(offset, 0) + 1

    def unwant(self, offset: int) -> None:
        left = self._wanted.pop(offset, 0) - 1
        if left > 0:
            self._wanted[offset] = left

    def take(self, arrived: ByteRanges, size: int | None, most: int = 0) -> Segment | None:
        """The next bytes to fetch; None where all bytes are here or being fetched."""
        gap = self.free_gap(arrived, size)
        if gap is None:
            return None
        segment = Segment(gap[0], min(gap[1], gap[0] + max(self._segment, most)))
        self._fetching.append(segment)
        return segment

    def move(self, segment: Segment, arrived: ByteRanges, offset: int, stop: int) -> bool:
        """Let a used-up segment go on with the first free bytes between `offset`, where its
        connection is, and `stop`. False where there are none."""
        gap = self._taken(arrived).gap(max(offset, segment.stop), stop)
        if gap is None:
            return False
        segment.start, segment.stop = gap
        return True

    def release(self, segment: Segment) -> None:
        """Other connections may fetch what the segment still covers."""
        self._fetching.remove(segment)

    def free_gap(self, arrived: ByteRanges, size: int | None) -> tuple[int, int] | None:
        """The next range that is neither here nor being fetched; one that a reader waits for comes
        first."""
        if size is None:
            return None if self._fetching else arrived.gap(0, UNKNOWN)
        taken = self._taken(arrived)
        for offset in sorted(self._wanted):
            if offset < size and taken.stop_after(offset) == offset:
                return taken.gap(offset, size)
        return taken.gap(0, size)

    def is_coming(self, arrived: ByteRanges, offset: int) -> bool:
        """Whether the byte at offset is here, or a connection is on its way to it."""
        if arrived.stop_after(offset) > offset:
            return True
        return any(segment.start <= offset < segment.stop for segment in self._fetching)

    def _taken(self, arrived: ByteRanges) -> ByteRanges:
        taken = ByteRanges()
        for start, stop in arrived:
            taken.add(start, stop)
        for segment in self._fetching:
            taken.add(segment.start, segment.stop)
        return taken
