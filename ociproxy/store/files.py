"""Files of the store: locks, publication, translation of OSError, and what a name and times say.

The owner of a locked file that others wait for touches it once a second (`Heartbeat`): so they tell
a process that works from one that was stopped and may never go on.

A file is published in five steps: stage, fsync, seal, rename, fsync of the directory. So a reader
sees a whole file or none, and a power cut loses only files that were not published yet.

A *seal* says "these bytes were verified". The microseconds of the file's mtime are made from its
name, its size and the seconds of its mtime. A later write moves the mtime and so breaks the seal;
`cp -a` and `rsync -a` keep it. There is no second file that could say something else.

The atime is the last use of a file. This program sets it, not the kernel."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
from contextlib import suppress
from hashlib import blake2s
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Final

from ociproxy.errors import DigestInvalid, StoreError, StoreFull
from ociproxy.oci.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO

    from ociproxy.oci.digest import Hasher


READ_SIZE: Final = 1024 * 1024
"""Bytes read in one call from a file that is read as a whole."""
UNREADABLE: Final = frozenset(
    {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA, errno.ESTALE}
)
"""How a disk or a file system says that it has lost the bytes of a file; no socket fails so."""


def read_buffer(size: int) -> memoryview:
    """Memory of `size` bytes to read files into; it begins where a page begins. A large bytearray
    begins 16 bytes later: some processors then copy out of the page cache at a quarter of the speed
    (measured on an AMD EPYC: 2.2 instead of 8.9 GB/s)."""
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def hash_file(
    file: FileIO, hasher: Hasher, hashed: Callable[[int], object] = lambda _: None
) -> int:
    """Hash the rest of the file; returns its size in bytes. `hashed` is told the bytes of each
    piece, and may wait, or end the hashing by what it raises."""
    size = 0
    buffer = read_buffer(READ_SIZE)
    while count := file.readinto(buffer):
        hasher.update(buffer[:count])
        size += count
        hashed(count)
    return size


class store_errors:  # noqa: N801 as `suppress`; a generator would take four times as long
    """Translate OSError: raises StoreFull or StoreError, which name the path."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError):
            raise store_error(Path(self._path), error) from error


def store_error(path: Path, error: OSError) -> StoreError:
    """The same, to be raised by the caller."""
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(path, reason)
    return StoreError(path, reason)


def publish(staged: str | Path, target: str | Path) -> set[str]:
    """Move a verified and fsynced file to the name that readers look for, and make the folders on
    the way. The name survives a power cut once the folders that are returned were fsynced. Raises
    OSError."""
    changed = {os.fspath(target).rpartition(os.sep)[0]}
    try:
        os.replace(staged, target)  # noqa: PTH105 an object for a path takes as long as this
    except FileNotFoundError:
        changed |= set(map(str, _make(Path(*changed))))
        os.replace(staged, target)  # noqa: PTH105
    return changed


def try_lock(file: int, kind: int = fcntl.LOCK_EX) -> bool:
    """False while another open file holds the lock, in this process or another. Never waits."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Heartbeat:
    """Thread-safe. A forked process has none of the files of its parent."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._files: set[int] = set()
        self._touching: int | None = None
        """Not under the lock: where its disk hangs, the files of other disks go on."""
        self._running = False

    def start(self, file: int) -> None:
        """Touch this open file or directory from now on, in a thread that all files share."""
        with self._changed:
            self._files.add(file)
            if not self._running:
                # Without a thread other processes take this one for stopped, and that is all.
                with suppress(RuntimeError):
                    Thread(target=self._run, name="heartbeat", daemon=True).start()
                    self._running = True

    def stop(self, file: int) -> None:
        """Call it before the file is sealed or closed."""
        with self._changed:
            self._files.discard(file)
            self._changed.wait_for(lambda: self._touching != file)

    def _run(self) -> None:
        while True:
            time.sleep(_BEAT)
            with self._changed:
                self._running = bool(self._files)
                if not self._running:
                    return
                files = list(self._files)
            for file in files:
                self._touch(file)

    def _touch(self, file: int) -> None:
        with self._changed:
            if file not in self._files:
                return
            self._touching = file
        with suppress(OSError):
            os.utime(file)
        with self._changed:
            self._touching = None
            self._changed.notify_all()


_BEAT: Final = 1.0
"""Seconds between two touches of a locked file."""
_BEATS: Final = 2
"""How many may be late."""
heartbeat = Heartbeat()
os.register_at_fork(after_in_child=heartbeat.__init__)  # type: ignore[misc]


class Silence:
    """Of the owner of a locked file or directory, as another process sees it."""

    def __init__(self, file: int | str | Path, limit: float) -> None:
        self._file = file
        self._limit = limit
        self._touched: int | None = None
        self._looked = time.monotonic()
        self._seconds = 0.0

    def is_long(self) -> bool:
        """Whether the owner has not touched or written to the file for `limit` seconds, and some
        beats at least. Of a time in which the caller did not look only a beat counts: it may have
        been stopped together with the owner."""
        touched: int | None = None
        with suppress(OSError):  # it has just been removed
            touched = os.stat(self._file).st_mtime_ns  # noqa: PTH116 it may be a number
        now = time.monotonic()
        self._seconds += min(now - self._looked, _BEAT)
        self._looked = now
        if touched != self._touched:
            self._touched, self._seconds = touched, 0.0
        return self._seconds > max(self._limit, _BEATS * _BEAT)


def is_at(file: int, path: str | Path) -> bool:
    """Whether the open file still has this name: another process may move or replace it between an
    open and a lock."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))  # noqa: PTH116 it may be text
    except FileNotFoundError:
        return False


def take_out(file: int, path: Path, quarantine: Path) -> bool:
    """Move a damaged file, which is open as `file`, out of service, so that a power cut does not
    bring it back. False where another file has taken its name: that one stays. Raises OSError."""
    if not is_at(file, path):
        return False
    make_folder(quarantine)
    target = quarantine / path.name
    try:
        path.replace(target)
    except FileNotFoundError:
        return False
    if not is_at(file, target):
        # Another process has published a right one between our look and our move.
        target.replace(path)
        return False
    fsync_directory(quarantine)
    fsync_directory(path.parent)
    return True


def identity(state: os.stat_result) -> tuple[int, int, int]:
    """Inode, size and time of modification (ns): equal while the file is neither replaced nor
    written to."""
    return state.st_ino, state.st_size, state.st_mtime_ns


def make_folder(path: Path) -> None:
    """Make a folder and its parents. Each parent is flushed: else a power cut could take the folder
    away with the files that were published in it."""
    for changed in _make(path):
        fsync_directory(changed)


def _make(path: Path) -> set[Path]:
    """Returns the parents of the folders that were made."""
    if path.is_dir():
        return set()
    changed = {path.parent, *_make(path.parent)}
    path.mkdir(exist_ok=True)
    return changed


def fsync_directory(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


TOUCH_AFTER: Final = 60.0
"""Seconds between two records of a use, so that a hot file is not written to at each request."""


def file_name(digest: Digest) -> str:
    """`<hex>` for sha256, `<algorithm>-<hex>` for the rest."""
    if digest.algorithm == "sha256":
        return digest.encoded
    return f"{digest.algorithm}-{digest.encoded}"


def digest_of(name: str) -> Digest | None:
    """The digest that `file_name` made this name of; None for any other name."""
    algorithm, dash, encoded = name.rpartition("-")
    try:
        digest = Digest.parse(f"{algorithm if dash else 'sha256'}:{encoded}")
    except DigestInvalid:
        return None
    return digest if file_name(digest) == name else None


def seal(file: int, name: str, used: float | None = None) -> None:
    """Mark an open file as verified under this name and, with `used` (seconds since the epoch), as
    used then. Raises OSError."""
    state = os.fstat(file)
    seconds = state.st_mtime_ns // 10**9
    mtime = seconds * 10**9 + _seal_microseconds(name, state.st_size, seconds) * 1000
    os.utime(file, ns=(state.st_atime_ns if used is None else int(used * 10**9), mtime))


def is_sealed(state: os.stat_result, name: str) -> bool:
    """Whether the file was verified under this name and not written to since."""
    seconds, nanoseconds = divmod(state.st_mtime_ns, 10**9)
    return nanoseconds == _seal_microseconds(name, state.st_size, seconds) * 1000


def touch(file: int, state: os.stat_result, now: float) -> None:
    """Record a use at `now` (seconds since the epoch) and keep the seal. A store that is read-only,
    full or failing records none: what was read is good all the same, and a copy-on-write file
    system needs room for a time."""
    if is_use_due(state, now):
        with suppress(OSError):
            os.utime(file, ns=(int(now * 10**9), state.st_mtime_ns))


def is_use_due(state: os.stat_result, now: float) -> bool:
    """Whether `touch` would write."""
    return now - state.st_atime >= TOUCH_AFTER


def keep(path: str | Path, now: float) -> bool:
    """Record a use at `now`, whenever the one before it was, so that no other process removes the
    file as unused. False where there is no such file, or it belongs to another user."""
    try:
        os.utime(path, ns=(int(now * 10**9), os.stat(path).st_mtime_ns))  # noqa: PTH116 it may be text
    except OSError as exc:  # where it is full, or read-only, nothing is removed from it, either
        return not isinstance(exc, FileNotFoundError | PermissionError)
    return True


def open_unused(path: str | Path, flags: int = 0) -> FileIO:
    """Open a file to read it without a use; the caller closes it. Raises OSError.

    The kernel would record one, once a day at least, and what a command looks through every day
    would never be unused. Only the file's owner may ask the kernel not to.
    """
    file = _open_unused(path, flags)
    try:
        return os.fdopen(file, "rb", buffering=0)
    except OSError:  # a folder
        os.close(file)
        raise


def read_unused(path: str, most: int) -> tuple[bytes, os.stat_result]:
    """The bytes of a small file, and its state before they were read, without a use. Of a file with
    more than `most` bytes one byte more than that. Raises OSError."""
    file = _open_unused(path)
    try:
        state = os.fstat(file)
        # A read in one call may be short: of a network file system, or where a signal arrives.
        data = os.read(file, min(state.st_size, most) + 1)
        while len(data) < state.st_size and (more := os.read(file, most + 1 - len(data))):
            data += more
        return data, state
    finally:
        os.close(file)


def _open_unused(path: str | Path, flags: int = 0) -> int:
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(path, flags)


def _seal_microseconds(name: str, size: int, seconds: int) -> int:
    digest = blake2s(f"{name} {size} {seconds}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10**6
