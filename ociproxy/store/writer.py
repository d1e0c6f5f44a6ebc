"""Blobs that come from front to end, as out of an archive.

The caller's thread reads and writes, and hashes short blobs. One thread hashes the others; further
threads commit, which is mostly waiting for the disk. Staged files are locked, so the next load
or import can remove those of a killed process.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy.errors import DigestMismatch, SizeMismatch
from ociproxy.oci.digest import Digest
from ociproxy.store.files import read_buffer, store_errors
from ociproxy.store.hashing import BEHIND, Hashing
from ociproxy.store.reader import fill
from ociproxy.store.sequential import SequentialWriter
from ociproxy.store.staging import stage

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.store.blobs import Blobs
    from ociproxy.store.reader import Reader
    from ociproxy.store.room import Room

_COMMITTERS: Final = 4
"""Threads that commit: a disk serves several fsyncs at once."""
_MAX_COMMITS: Final = 8
"""Staged blobs that are committed or wait for it; each costs an open file."""
_BUFFERS: Final = BEHIND + 1
_BUFFER_SIZE: Final = 512 * 1024
"""Bytes. The reader is up to seven buffers, 3.5 MiB, ahead of the hashing thread: neither has to
wait when the other one is given no processor."""
_INLINE: Final = 128 * 1024
"""Bytes. The caller hashes smaller blobs sooner than another thread wakes up."""


class Sink(Protocol):
    def write(self, data: memoryview, /) -> None:
        """Take the bytes, which the caller overwrites after that. Raises OSError."""


class BlobWriter:
    """Use as a context manager, which ends the threads and, after no error, drains. Belongs to one
    thread."""

    def __init__(self, staging: Path, blobs: Blobs, room: Room | None = None) -> None:
        """`room` says what fits the store; without it, everything does."""
        self._staging = staging
        self._blobs = blobs
        self._room = room
        self._buffers = tuple(read_buffer(_BUFFER_SIZE) for _ in range(_BUFFERS))
        self._hashing = Hashing("hash")
        self._committing = ThreadPoolExecutor(_COMMITTERS, "commit")
        self._commits: set[Future[None]] = set()
        self._unflushed = False

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._hashing.close()
        self._committing.shutdown()
        if kind is None:
            self.drain()

    def write(self, source: Reader, size: int, digest: Digest | None = None) -> Digest:
        """Read `size` bytes and commit them under their digest, which is returned; sha256 unless a
        digest is given.

        The blob is in the store for certain once `drain` has returned. Nothing is kept on an error:
        SizeMismatch if the source ends early, DigestMismatch if the bytes have another digest than
        the one given, NoRoom before anything is read, StoreError. May also raise what the commit of
        an earlier blob ended with.
        """
        self._collect(_MAX_COMMITS - 1)
        with ExitStack() as held:
            if self._room is not None:
                held.enter_context(self._room.held(size, Event()))
            with store_errors(self._staging):
                file, staged = stage(self._staging)
            writing = SequentialWriter(file)
            kept = False
            try:
                actual = self.copy(source, size, writing, digest)
                kept = not self._is_stored(actual)
            finally:
                if not kept:
                    writing.close()
                    staged.unlink(missing_ok=True)
            if kept:
                self._unflushed = True
                work = partial(self._commit, writing, staged, actual, held.pop_all())
                self._commits.add(self._committing.submit(work))
        return actual

    def drain(self) -> None:
        """Wait until all written blobs are in the store and survive a power cut. Raises
        StoreError."""
        self._collect(0)
        if self._unflushed:
            self._blobs.flush()
            self._unflushed = False

    def _collect(self, limit: int) -> None:
        """Wait until at most `limit` commits are under way. Raises the error of a commit."""
        while len(self._commits) > limit:
            done, self._commits = wait(self._commits, return_when=FIRST_COMPLETED)
            for commit in done:
                commit.result()

    def copy(self, source: Reader, size: int, sink: Sink, expected: Digest | None) -> Digest:
        """Read `size` bytes, give them to the sink in pieces, and return their digest. Raises as
        `write` does."""
        algorithm = expected.algorithm if expected else "sha256"
        hasher = (expected or Digest.of(b"")).hasher()
        remaining, turn = size, 0
        try:
            while remaining:
                view = self._buffers[turn][:remaining]
                count = fill(source, view)
                if not count:
                    raise SizeMismatch(f"blob {expected or ''}".strip(), size, size - remaining)
                if size > _INLINE:
                    self._hashing.update(view[:count], hasher)
                else:
                    hasher.update(view[:count])
                with store_errors(self._staging):
                    sink.write(view[:count])
                remaining -= count
                turn = (turn + 1) % _BUFFERS
        finally:
            self._hashing.wait()
        actual = Digest.finish(hasher, algorithm)
        if expected is not None and actual != expected:
            raise DigestMismatch("blob", expected, actual)
        return actual

    def _is_stored(self, digest: Digest) -> bool:
        """Whether a verified blob is there, which need not be written again."""
        found = self._blobs.find(digest)
        if found is None:
            return False
        found.file.close()
        return found.sealed

    def _commit(
        self, writing: SequentialWriter, staged: Path, digest: Digest, held: ExitStack
    ) -> None:
        """`held` is the room that it was promised."""
        try:
            with store_errors(staged):
                writing.settle()
            self._blobs.commit(staged, digest)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        finally:
            writing.close()
            held.close()
