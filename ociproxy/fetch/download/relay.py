"""A blob that passes through memory to one client, for the store cannot keep it: it is full, or
read-only, or its disk fails.

It is the same download as any other, verified in flight, over one connection. Its file is in memory
and has a window of bytes: what the client has read is freed, and the connection waits for a client
that is slower.

Tests: tests/serve/test_failing_store.py.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from threading import Condition
from typing import TYPE_CHECKING, Final

from ociproxy.errors import Interrupted
from ociproxy.fetch.download.fill import Fill
from ociproxy.store.ingest import Ingest

if TYPE_CHECKING:
    from ociproxy.fetch.download.download import Download
    from ociproxy.store.ingest import Publish

_WINDOW: Final = 4 * 1024 * 1024
"""Bytes in memory of one blob."""
_LOOK: Final = 0.2
"""Seconds between looks, while the client reads nothing, at whether the download has ended."""


class PassingIngest(Ingest):
    """Its file is in memory, no other process sees it, and nothing of it is kept."""

    is_kept = False

    def __init__(self, download: Download) -> None:
        """Raises OSError."""
        file = os.memfd_create("blob", os.MFD_CLOEXEC)
        super().__init__(Path("memory"), download.digest, file, leading=True)
        self._download = download
        self._freed = 0
        self._closed = False
        self._room = Condition()
        """Guards `_freed` and `_closed`."""

    def write(self, offset: int, data: bytes) -> None:
        """Waits until the client has read so much that the window has room. Raises
        Interrupted where the download is told to stop meanwhile."""
        stop = offset + len(data)
        with self._room:
            while stop - self._freed > _WINDOW:
                if self._download.stopped.is_set():
                    raise Interrupted(
                        self._download.repository.registry, "no client waits for it any more"
                    )
                self._download.tell_arrival()
                self._room.wait(_LOOK)
            skipped = self._freed - offset
        if skipped < len(data):
            super().write(offset, data)

    def free(self, offset: int) -> None:
        """The client needs no byte before this one. No effect once the file is closed."""
        with self._room:
            if self._closed:
                return
            start, stop = self._freed, offset - offset % mmap.ALLOCATIONGRANULARITY
            self._freed = max(start, stop)
            self._room.notify_all()
            held = min(stop, os.fstat(self.file).st_size)
            if start < held:
                with mmap.mmap(self.file, held - start, offset=start) as pages:
                    pages.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        with self._room:
            self._closed = True
        super().close()

    def check_room(self, size: int) -> None:
        """There is always room for the window."""

    def commit(self, publish: Publish) -> None:
        """Nothing is kept."""

    def discard(self) -> None:
        """Nothing was kept."""

    def _append(self, text: str) -> None:
        """No process reads along."""


class Relay(Fill):
    """A fill with one reader, who reads on from one offset."""

    on_disk = False

    def __init__(self, download: Download, passing: PassingIngest) -> None:
        super().__init__(download)
        self._passing = passing

    def leave(self) -> None:
        """Its one client reads no more: the download ends."""
        self.download.abort()

    async def available(self, offset: int, *, early: bool = False) -> int:
        self._passing.free(offset)
        with self.listening():
            while (stop := self.download.assembly.available(offset, early=early)) <= offset:
                self._check_end(offset)
                await self.change()
        return stop
