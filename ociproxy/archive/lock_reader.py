"""Locks, from wherever one is: a lock file, or an archive that has one inside."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Final

from ociproxy.archive.export.content import LOCK_NAME
from ociproxy.archive.importer.decompress import ArchiveStream
from ociproxy.archive.importer.tar_reader import members
from ociproxy.archive.lock import LOCK_MAX_SIZE, Lock
from ociproxy.errors import LockInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO
    from pathlib import Path

_LOOKED_AT: Final = 16
"""Members at the front of an archive among which its lock is."""


def read_lock(path: Path) -> Lock:
    """Of a lock file or an archive. Raises LockInvalid or LayoutInvalid, naming it."""
    with _opened(path) as file:
        head = file.read(1)
    return read_lock_file(path) if head in (b"{", b" ", b"\n", b"") else read_archive_lock(path)


def read_lock_file(path: Path) -> Lock:
    """Raises LockInvalid."""
    with _opened(path) as file:
        raw = file.read(LOCK_MAX_SIZE + 1)
    return Lock.parse(raw, str(path))


def read_archive_lock(path: Path) -> Lock:
    """The lock at the front of an archive, of which no more is read. Raises LayoutInvalid for
    what is no archive, LockInvalid for one without a lock."""
    with _opened(path) as file:
        for member in islice(members(ArchiveStream(file, str(path))), _LOOKED_AT):
            if member.name == LOCK_NAME:
                return Lock.parse(member.read(LOCK_MAX_SIZE), f"{path}: {LOCK_NAME}")
    raise LockInvalid(
        str(path), f"has no {LOCK_NAME}: it is no archive of ociproxy's, or not its first volume"
    )


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        file = path.open("rb", buffering=0)
    except OSError as exc:
        raise LockInvalid(str(path), f"cannot be read: {exc.strerror or exc}".lower()) from exc
    with file:
        yield file
