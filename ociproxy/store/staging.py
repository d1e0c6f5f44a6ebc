"""`pulls/`: files that are not published yet, and the process that owns each.

`pulls/<name>` is an arriving blob (`ingest`). `pulls/<name>-<hash>` comes from an unlisted
upstream, and only its clients may have bytes that are not verified; or it lies beside the file of a
leader that was stopped. A `Workspace` is a directory for another program, `.write-*` a temporary
file. The owner holds `flock` on its file or directory. One without a lock was left by a process
that ended: the next owner of the name takes it over, or the sweep removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import stat
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from ociproxy.oci.digest import Digest
from ociproxy.store.files import (
    Silence,
    digest_of,
    file_name,
    fsync_directory,
    heartbeat,
    is_at,
    publish,
    store_errors,
    try_lock,
)
from ociproxy.store.ingest import JOURNAL_SUFFIX, Ingest

if TYPE_CHECKING:
    from collections.abc import Iterator

_WRITING: Final = ".write-"
USING: Final = f"{_WRITING}using-"
"""Then, in nanoseconds since the epoch, since when content may be needed (`pruning/users`). A file
that a killed process left is removed as others are."""


class Staging:
    def __init__(self, root: Path) -> None:
        self.root = root

    def lead(self, digest: Digest, partition: str = "") -> Ingest | None:
        """Become the process that fetches this blob in this partition; None while another one is.
        Never waits. Raises StoreError."""
        path = self._path(digest, partition)
        with store_errors(path):
            file = _own(path, os.O_RDWR | os.O_CREAT)
        if file is None:
            return None
        ingest = Ingest(path, digest, file, leading=True)
        try:
            ingest.refresh()
            ingest.disown_journal()
        except BaseException:
            ingest.close()
            raise
        return ingest

    def follow(self, digest: Digest, partition: str = "") -> Ingest | None:
        """Watch another process fetch this blob; None if no file of it is there. Raises
        StoreError."""
        path = self._path(digest, partition)
        with store_errors(path):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
        return Ingest(path, digest, file, leading=False)

    def is_arriving(self, digest: Digest, registry: str) -> bool:
        """Whether a process fetches this blob now, for clients of this registry or for all. Raises
        StoreError."""
        for partition in ("", registry):
            watched = self.follow(digest, partition)
            if watched is not None:
                try:
                    if watched.is_led():
                        return True
                finally:
                    watched.close()
        return False

    def arriving(self) -> set[str]:
        """The blobs that processes fetch now, by the names of their files. Raises StoreError."""
        found = set()
        with store_errors(self.root):
            for path in self.root.iterdir():
                # A partition follows the name.
                digest = digest_of(path.name) or digest_of(path.name.rpartition("-")[0])
                if digest is not None:
                    with suppress(FileNotFoundError), path.open("rb") as file:
                        if not try_lock(file.fileno(), fcntl.LOCK_SH):
                            found.add(file_name(digest))
        return found

    @contextmanager
    def using(self, now: float) -> Iterator[None]:
        """Inside, no other process removes what was used or stored since `now` (seconds since the
        epoch): a load or an import may need it long after it looked. One that was stopped loses
        that (`pruning/users`), so it looks once more before it publishes. A store that cannot be
        written keeps nothing, and nothing is removed from it. Before, what killed processes left of
        such work is removed. Raises StoreError."""
        try:
            # The name says since when: a full disk has no room for content.
            file, path = stage(self.root, f"{USING}{int(now * 10**9)}-")
        except OSError as exc:
            if exc.errno in (errno.EROFS, errno.EACCES):
                yield
                return
            with store_errors(self.root):
                raise
        heartbeat.start(file)
        try:
            remove_abandoned(self.root)
            yield
        finally:
            heartbeat.stop(file)
            os.close(file)
            path.unlink(missing_ok=True)

    def sweep(self, older_than: float) -> int:
        """Remove temporary files without an owner, and all else without one that was not written to
        since `older_than` (seconds since the epoch). Returns how many of the latter, without the
        journals of blobs. Raises StoreError."""
        remove_abandoned(self.root)
        return sum(self.remove(path, older_than) for path in self.abandoned(older_than))

    def abandoned(self, older_than: float) -> list[Path]:
        """What `sweep` would remove and count. Raises StoreError."""
        found = []
        with store_errors(self.root):
            for path in sorted(self.root.iterdir()):
                if path.suffix == JOURNAL_SUFFIX and path.with_suffix("").exists():
                    continue
                with _abandoned(path, older_than) as state:
                    if state is not None:
                        found.append(path)
        return found

    def remove(self, path: Path, older_than: float) -> bool:
        """Remove one of `abandoned`, with its journal; False if it has an owner now. Raises
        StoreError."""
        with store_errors(path), _abandoned(path, older_than) as state:
            if state is None:
                return False
            if stat.S_ISDIR(state.st_mode):  # a workspace
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.with_name(path.name + JOURNAL_SUFFIX).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            return True

    def workspace(self, name: str) -> Workspace | None:
        """Own the directory of this name; None while another owner has it. Never waits. Raises
        StoreError."""
        path = self.root / name
        with store_errors(path):
            while True:
                path.mkdir(mode=0o700, exist_ok=True)
                with suppress(FileNotFoundError):  # its owner removed it after our mkdir
                    lock = _own(path, os.O_RDONLY | os.O_DIRECTORY)
                    return None if lock is None else Workspace(path, lock)

    def silence_of(self, workspace: str, limit: float) -> Silence:
        """Of the process that owns the workspace of this name."""
        return Silence(self.root / workspace, limit)

    def held(self, digest: Digest, partition: str = "") -> int:
        """Bytes on the disk of a blob that is arriving, or has arrived in part. 0 if none are."""
        try:
            return self._path(digest, partition).stat().st_blocks * 512
        except OSError:
            return 0

    def _path(self, digest: Digest, partition: str) -> Path:
        # A partition is the name of a registry, and may be too long for a file name.
        suffix = f"-{Digest.of(partition.encode()).encoded[:16]}" if partition else ""
        return self.root / f"{file_name(digest)}{suffix}"


class Workspace:
    """A directory in `pulls/` for another program, whose files are not verified yet. Its owner
    calls `remove`, or uses it as a context manager."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        heartbeat.start(lock)

    def remove(self) -> None:
        """Remove the directory, then let go of its lock."""
        heartbeat.stop(self._lock)
        try:
            shutil.rmtree(self.path, ignore_errors=True)
        finally:
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Pending(dict[str, object]):
    """By path, what a group commit will rename: the bytes of manifests, the content of records. Any
    thread may look."""

    def names(self, folder: str) -> list[str]:
        """Of the files in a folder, in the order of staging."""
        found = (path.rpartition("/") for path in list(self))
        return [name for parent, _, name in found if parent == folder]


def write_atomically(target: Path, data: bytes, *, staging: Path) -> None:
    """Write a small file so that readers see all of it or none. Raises StoreError."""
    with store_errors(target):
        descriptor, staged = stage(staging, mode=0o644)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
                # While the file is open and so locked: else the sweep could remove it.
                for changed in publish(staged, target):
                    fsync_directory(changed)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise


def stage(staging: Path, prefix: str = _WRITING, *, mode: int = 0o600) -> tuple[int, Path]:
    """A new temporary file, open and locked; the lock keeps `remove_abandoned` off. Raises
    OSError."""
    file, path = stage_as_text(str(staging), prefix, mode=mode)
    return file, Path(path)


def stage_as_text(staging: str, prefix: str = _WRITING, *, mode: int = 0o600) -> tuple[int, str]:
    """The same for many small files: an object for the path takes as long as the file."""
    while True:
        # Not `tempfile`, which takes three times as long; a name that is taken fails. Each call of
        # the system costs a thread its turn: so neither names nor modes ask for one of their own.
        path = f"{staging}{os.sep}{prefix}{random.getrandbits(64):016x}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            state = os.fstat(file)
            if mode & ~state.st_mode:  # the umask of the process took bits away
                os.fchmod(file, mode)
            # Another process may have removed it before we locked it.
            if state.st_nlink:
                return file, path
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def write_all(file: int, data: bytes) -> None:
    """Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def remove_abandoned(staging: Path) -> None:
    """Remove the temporary files that killed processes left. Raises StoreError."""
    with store_errors(staging):
        for path in staging.glob(f"{_WRITING}*"):
            with _abandoned(path) as state:
                if state is not None:
                    path.unlink(missing_ok=True)


def _own(path: Path, flags: int) -> int | None:
    """Open and lock the file or directory of this name; None while another owner has it."""
    while True:
        file = os.open(path, flags | os.O_CLOEXEC, 0o600)
        owned = False
        try:
            if not try_lock(file):
                return None
            # Its last owner may have published or removed it between our open and our lock.
            owned = is_at(file, path)
            if owned:
                return file
        finally:
            if not owned:
                os.close(file)


@contextmanager
def _abandoned(path: Path, older_than: float = inf) -> Iterator[os.stat_result | None]:
    """Lock a file or directory without an owner; None if it has one, is gone, or was written to
    since `older_than`."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        state = _state_of(file)
        # Its age first: our lock on a new file would keep out the process that made it. Between our
        # open and our lock its owner may have published it, and another one made a new file.
        free = state and state.st_mtime <= older_than and try_lock(file) and is_at(file, path)
        yield state if free else None
    finally:
        os.close(file)


def _state_of(file: int) -> os.stat_result | None:
    """None where a network file system, or FUSE, says that an open file is gone: its owner has
    published or removed it, maybe with its last call before it was killed."""
    try:
        return os.fstat(file)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
