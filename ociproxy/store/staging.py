"""`pulls/`: blobs that are arriving.

`pulls/<name>` holds the bytes, each at its final offset (`pulls/<name>-<partition>` where nobody
outside a partition may read them before they are verified), and `pulls/<name>.spans` is an
append-only journal of which ranges are there: first `size <bytes>`, then `<start> <stop>` a line,
written after the bytes; `empty` where what was there has gone. One process leads, holding `flock`
on the bytes; others tail the journal and read the bytes as they come. After a crash the next leader
goes on from the journal; it is a hint, for everything is hashed before commit.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from ociproxy.errors import StoreError
from ociproxy.oci.digest import Digest
from ociproxy.store.byte_ranges import ByteRanges
from ociproxy.store.files import file_name, is_at, remove_abandoned, store_errors, try_lock
from ociproxy.store.workspace import Workspace

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.store.blobs import Blobs

_JOURNAL_SUFFIX: Final = ".spans"
_JOURNAL_INTERVAL: Final = 0.02
"""Seconds between journal lines: how far behind a follower in another process may be."""


class Ingest:
    """One arriving blob, seen by its leader or by a follower in another process."""

    def __init__(self, path: Path, digest: Digest, file: int, *, leading: bool) -> None:
        self.path = path
        self.digest = digest
        self.file = file
        self.leading = leading
        self.size: int | None = None
        self.ranges = ByteRanges()
        self._journal_path = path.with_name(path.name + _JOURNAL_SUFFIX)
        self._journal: int | None = None
        self._read = 0
        self._pending = ByteRanges()
        self._journalled = 0.0

    def refresh(self) -> None:
        """Take in what the journal says by now; on a follower, how far the leader has come."""
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
        """Leader: where nothing is in the file, a journal is that of a blob which was committed by
        a process killed just then. Followers read it too."""
        if os.fstat(self.file).st_size == 0 and self._read:
            # The last line may be half a one.
            self._append("\nempty\n")

    def set_size(self, size: int) -> None:
        """Leader: the blob's size in bytes is known."""
        if self.size != size:
            self.size = size
            self._append(f"size {size}\n")

    def write(self, offset: int, data: bytes) -> None:
        """Leader: put bytes in place; any thread. They count once `arrived` says so."""
        with store_errors(self.path):
            view = memoryview(data)
            while view:
                count = os.pwrite(self.file, view, offset)
                offset += count
                view = view[count:]

    def arrived(self, start: int, stop: int, *, flush: bool = False) -> None:
        """Leader: these bytes are in place. The journal follows when it is time, or at once on
        `flush`."""
        self.ranges.add(start, stop)
        self._pending.add(start, stop)
        now = time.monotonic()
        if flush or now - self._journalled >= _JOURNAL_INTERVAL:
            self._journalled = now
            self._flush()

    def is_led(self) -> bool:
        """Follower: whether some process still leads."""
        if not try_lock(self.file, fcntl.LOCK_SH):
            return True
        fcntl.flock(self.file, fcntl.LOCK_UN)
        return False

    def is_same_file(self, other: Ingest) -> bool:
        return os.path.samestat(os.fstat(self.file), os.fstat(other.file))

    def is_committed(self, blobs: Blobs) -> bool:
        """Follower: whether the stored blob is this very file."""
        return is_at(self.file, blobs.path(self.digest))

    def commit(self, blobs: Blobs) -> None:
        """Leader: publish the verified bytes and end the staging."""
        if self.size is not None:
            with store_errors(self.path):
                # A leader that was killed may have written more than it said, or was verified.
                os.ftruncate(self.file, self.size)
        blobs.commit(self.path, self.digest)
        self._unlink_journal()

    def discard(self) -> None:
        """Leader: these bytes are worth nothing."""
        with store_errors(self.path):
            self._unlink_journal()
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give up the lead, or stop following; what arrived stays for the next leader."""
        # A journal is a hint: one that cannot be written costs the next leader some bytes.
        with suppress(StoreError):
            self._flush()
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        if self.leading:
            # Readers may hold duplicates of this descriptor, and those would keep the lock.
            fcntl.flock(self.file, fcntl.LOCK_UN)
        os.close(self.file)

    def _flush(self) -> None:
        if self._pending.total:
            self._append("".join(f"{first} {last}\n" for first, last in self._pending))
            self._pending = ByteRanges()

    def _append(self, text: str) -> None:
        with store_errors(self._journal_path):
            if self._journal is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._journal = os.open(self._journal_path, flags, 0o644)
            os.write(self._journal, text.encode())

    def _apply(self, words: list[str], held: int) -> None:
        """A line that claims more than the file holds, or than the size, speaks of other bytes."""
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


class Staging:
    def __init__(self, root: Path) -> None:
        self.root = root

    def lead(self, digest: Digest, partition: str = "") -> Ingest | None:
        """Become the one who fetches this blob in this partition; None where another process is.
        Blocks for no lock."""
        path = self._path(digest, partition)
        with store_errors(path):
            while True:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    if not try_lock(file):
                        os.close(file)
                        return None
                    # The file we locked may have been committed or discarded between open and lock.
                    if is_at(file, path):
                        break
                except BaseException:
                    os.close(file)
                    raise
                os.close(file)
        ingest = Ingest(path, digest, file, leading=True)
        try:
            ingest.refresh()
            ingest.disown_journal()
        except BaseException:
            ingest.close()
            raise
        return ingest

    def follow(self, digest: Digest, partition: str = "") -> Ingest | None:
        """Watch another process fetch this blob; None where nobody is any more."""
        path = self._path(digest, partition)
        with store_errors(path):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
        return Ingest(path, digest, file, leading=False)

    def open_committed(self, path: Path, digest: Digest) -> Ingest:
        """A blob that is in the store already, in the shape of one that has arrived."""
        with store_errors(path):
            return Ingest(path, digest, os.open(path, os.O_RDONLY | os.O_CLOEXEC), leading=False)

    def claim(self, name: str) -> int | None:
        """Become the one process that does a thing; None where another one is. Whoever closes the
        file descriptor gives it up."""
        path = self.root / f".{name}"
        with store_errors(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if try_lock(file):
            return file
        os.close(file)
        return None

    def sweep(self, older_than: float) -> int:
        """Remove what nobody leads and nothing was written to since `older_than` (seconds since
        the epoch), and what nobody can go on with whatever its age; returns how many of the former
        went."""
        removed = 0
        remove_abandoned(self.root)
        with store_errors(self.root):
            for path in sorted(self.root.iterdir()):
                if path.suffix == _JOURNAL_SUFFIX and path.with_suffix("").exists():
                    continue
                try:
                    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                except OSError:
                    continue
                try:
                    state = os.fstat(file)
                    if state.st_mtime <= older_than and try_lock(file):
                        if stat.S_ISDIR(state.st_mode):  # a workspace
                            shutil.rmtree(path, ignore_errors=True)
                        else:
                            path.with_name(path.name + _JOURNAL_SUFFIX).unlink(missing_ok=True)
                            path.unlink(missing_ok=True)
                        removed += 1
                finally:
                    os.close(file)
        return removed

    def workspace(self, name: str) -> Workspace | None:
        """Own the directory of this name; None while somebody else does."""
        return Workspace.lead(self.root / name)

    def _path(self, digest: Digest, partition: str) -> Path:
        # It is called as a registry, which is too long for a file name beside the digest.
        suffix = f"-{Digest.of(partition.encode()).encoded[:16]}" if partition else ""
        return self.root / f"{file_name(digest)}{suffix}"
