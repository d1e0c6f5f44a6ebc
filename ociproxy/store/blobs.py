"""`blobs/`: configs and layers, a file for each digest.

A file is right for certain while it is sealed, or while this process remembers that it was.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import DigestMismatch, SizeMismatch
from ociproxy.metrics.counters import count_stored
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE
from ociproxy.store.files import (
    file_name,
    fsync_directory,
    hash_file,
    identity,
    is_at,
    is_sealed,
    is_use_due,
    open_unused,
    publish,
    read_unused,
    seal,
    store_errors,
    take_out,
    touch,
    try_lock,
)
from ociproxy.store.read_only import BlobFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from io import FileIO
    from pathlib import Path

    from ociproxy.clock import Clock
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.store.read_only import ReadOnlyContent
    from ociproxy.store.usage import UsageFile


_UNSEALABLE: Final = 8192
"""How many verified blobs a process remembers where it cannot seal: read-only, or full."""
_LOCK_LIMIT: Final = 30.0
"""Seconds to wait for another process that hashes the same blob: time for some 30 GB."""
_LOCK_INTERVAL: Final = 0.02
"""Seconds between two tries, for flock itself cannot wait with a limit."""


class Blobs:
    def __init__(
        self,
        root: Path,
        quarantine: Path,
        clock: Clock,
        usage: UsageFile,
        below: Sequence[ReadOnlyContent] = (),
        *,
        keep_names: Callable[[], None] = lambda: None,
        is_remote: bool = False,
    ) -> None:
        """`keep_names` is called after each commit: the folder has to be flushed soon. `is_remote`
        is that of the store."""
        self._is_remote = is_remote
        self._keep_names = keep_names
        self.folder = root
        self._prefix = f"{root}{os.sep}"
        self._quarantine = quarantine
        self._clock = clock
        self._usage = usage
        self._below = below
        self._verified: BoundedCache[Digest, tuple[int, int, int]] = BoundedCache(_UNSEALABLE)

    def path(self, digest: Digest) -> Path:
        return self.folder / file_name(digest)

    def find(self, digest: Digest) -> BlobFile | None:
        """Open a stored blob and record its use; the caller closes it. Waits for the disk. Raises
        StoreError."""
        name = file_name(digest)
        try:
            file = open(self._prefix + name, "rb", buffering=0)  # noqa: PTH123, SIM115 hot path; the caller closes
        except FileNotFoundError:
            found = (content.find_blob(digest) for content in self._below)
            return next((blob for blob in found if blob is not None), None)
        except OSError:
            with store_errors(self.path(digest)):
                raise
        try:
            state = os.fstat(file.fileno())
        except BaseException:
            file.close()
            with store_errors(self.path(digest)):
                raise
        touch(file.fileno(), state, self._clock.now())
        return BlobFile(file, state.st_size, self._is_verified(digest, state))

    def find_cached(self, digest: Digest) -> tuple[BlobFile | None, bool]:
        """The same without waiting for the disk, and whether that is the answer: False where the
        disk would be asked, for the blob or to record the use."""
        if self._is_remote:
            return None, False
        try:
            descriptor = _open_cached(self._prefix + file_name(digest))
        except FileNotFoundError:
            return None, not self._below
        if descriptor is None:
            return None, False
        file = open(descriptor, "rb", buffering=0)  # noqa: PTH123, SIM115 the caller closes it
        state = os.fstat(descriptor)
        if is_use_due(state, self._clock.now()):
            file.close()
            return None, False
        return BlobFile(file, state.st_size, self._is_verified(digest, state)), True

    def find_size(self, digest: Digest) -> int | None:
        """Bytes of a stored blob; records no use. Raises StoreError."""
        found = self.look(digest)
        return None if found is None else found[0]

    def look(self, digest: Digest) -> tuple[int, float] | None:
        """Bytes of a stored blob, and its last use in seconds since the epoch, 0 if unknown.
        Records no use. Raises StoreError."""
        try:
            state = os.stat(self._prefix + file_name(digest))  # noqa: PTH116 hot path
        except FileNotFoundError:
            found = (content.find_blob_size(digest) for content in self._below)
            return next(((size, 0.0) for size in found if size is not None), None)
        except OSError:
            with store_errors(self.path(digest)):
                raise
        return state.st_size, state.st_atime

    def peek(self, digest: Digest) -> bytes:
        """A config, which is no larger than a manifest may be, as it stands in the store's own
        files: not verified, and no use is recorded. Empty where there is none."""
        try:
            raw, _ = read_unused(self._prefix + file_name(digest), MANIFEST_MAX_SIZE)
        except OSError:
            return b""
        return raw if len(raw) <= MANIFEST_MAX_SIZE else b""

    def commit(
        self,
        staged: Path,
        digest: Digest,
        sealing: Callable[[], None] = lambda: None,
    ) -> None:
        """Publish a staged file whose bytes the caller verified. Raises StoreError.

        `sealing` is called once the bytes are on the disk: from then on nothing touches the file.
        The name survives a power cut within a second, or after `flush`.
        """
        target = self.path(digest)
        with store_errors(target):
            file = os.open(staged, os.O_RDONLY)
            try:
                os.fchmod(file, 0o644)
                os.fsync(file)
                sealing()
                seal(file, target.name, self._clock.now())
                size = os.fstat(file).st_size
            finally:
                os.close(file)
            publish(staged, target)
        count_stored("blob", size)
        self._usage.add(size)
        self._keep_names()

    def adopt(self, path: Path, blob: Descriptor) -> None:
        """Verify and publish what another program wrote, which stays at `path`. Blocks for the
        length of the blob. Raises SizeMismatch, DigestMismatch or StoreError."""
        # A name of our own: the program may put another file at `path` while this one is hashed.
        own = path.with_name("verified")
        with store_errors(own):
            own.unlink(missing_ok=True)  # a process that died just here left it
            own.hardlink_to(path)
            with own.open("rb", buffering=0) as file:
                size, actual = _hash(file, blob.digest)
        if size != blob.size:
            raise SizeMismatch(f"blob {blob.digest}", blob.size, size)
        if actual != blob.digest:
            raise DigestMismatch("blob", blob.digest, actual)
        self.commit(own, blob.digest)

    def flush(self) -> None:
        """Make the names of all committed blobs survive a power cut. Raises StoreError."""
        with store_errors(self.folder):
            fsync_directory(self.folder)

    def verify(self, digest: Digest, content: ReadOnlyContent | None = None) -> None:
        """Hash a stored blob and seal it; blocks for the length of the blob. `content` is the
        content below the store that `find` took the blob from, if it did.

        Another caller for the same blob, in any process, waits up to `_LOCK_LIMIT`. A file that was
        written to meanwhile stays unverified. Raises StoreError, or DigestMismatch for wrong bytes:
        they are moved to `quarantine/`, unless another file has taken their name.
        """
        if content is not None:
            content.verify_blob(digest)
            return
        path = self.path(digest)
        with store_errors(path), suppress(FileNotFoundError), open_unused(path) as file:
            _await_lock(file.fileno())
            before = os.fstat(file.fileno())
            if not is_at(file.fileno(), path) or self._is_verified(digest, before):
                return
            _, actual = _hash(file, digest)
            if actual == digest:
                # Not sealed if it was written to while we read it: the next caller hashes it again.
                if os.fstat(file.fileno()).st_mtime_ns == before.st_mtime_ns:
                    self._mark_verified(digest, file.fileno(), path.name)
                return
            take_out(file.fileno(), path, self._quarantine)
            raise DigestMismatch(f"stored blob {path.name}", digest, actual)

    def _is_verified(self, digest: Digest, state: os.stat_result) -> bool:
        return is_sealed(state, file_name(digest)) or self._verified.get(digest) == identity(state)

    def _mark_verified(self, digest: Digest, file: int, name: str) -> None:
        with suppress(OSError):
            # What was read may be in memory only: a seal must not outlive the bytes.
            os.fsync(file)
            seal(file, name)
        state = os.fstat(file)
        # The file is read-only, its file system has no room for a time or keeps no microseconds.
        if not is_sealed(state, name):
            self._verified.put(digest, identity(state))


def _await_lock(file: int) -> None:
    """Wait for another process that hashes this file. After `_LOCK_LIMIT` both hash it, as they do
    where files cannot be locked."""
    deadline = time.monotonic() + _LOCK_LIMIT
    with suppress(OSError):
        while not try_lock(file) and time.monotonic() < deadline:
            time.sleep(_LOCK_INTERVAL)


def _hash(file: FileIO, expected: Digest) -> tuple[int, Digest]:
    """Size in bytes, and the digest by the algorithm of the expected one."""
    hasher = expected.hasher()
    return hash_file(file, hasher), Digest.finish(hasher, expected.algorithm)


class _OpenHow(ctypes.Structure):
    """`struct open_how` of openat2(2)."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_syscall: Final = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (
    *(ctypes.c_long, ctypes.c_int, ctypes.c_char_p),
    *(ctypes.POINTER(_OpenHow), ctypes.c_size_t),
)
_syscall.restype = ctypes.c_long
_OPENAT2: Final = 437
_AT_FDCWD: Final = -100
_RESOLVE_CACHED: Final = 0x20
_FROM_CACHE: Final = _OpenHow(os.O_RDONLY | os.O_CLOEXEC, 0, _RESOLVE_CACHED)


def _open_cached(path: str) -> int | None:
    """Open a file to read it, if the kernel finds it without asking the disk: the event loop may
    call this. None else, and where the kernel is older than 5.12 or lets no program ask so. Raises
    FileNotFoundError where the kernel knows as much that there is none."""
    where, size = os.fsencode(path), ctypes.sizeof(_OpenHow)
    file: int = _syscall(_OPENAT2, _AT_FDCWD, where, ctypes.byref(_FROM_CACHE), size)
    if file < 0 and ctypes.get_errno() == errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return None if file < 0 else file
