"""A bundle: an archive that is served from as it is, as read-only content under the store.

The manifests of a bundle are hashed when it is opened. A blob is hashed before it is served for the
first time, and not again while the process runs and the file stays as it was.
"""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING

from ociproxy.archive.bundle_index import BundleIndex
from ociproxy.archive.importer.decompress import GZIP, ZSTD
from ociproxy.errors import ConfigError, DigestMismatch, LayoutInvalid
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, ManifestHolder
from ociproxy.store.files import READ_SIZE, read_buffer, store_errors
from ociproxy.store.read_only import BlobFile

if TYPE_CHECKING:
    from io import FileIO
    from pathlib import Path


class Bundle:
    """One archive, open until `close`. All methods may be called from several threads; those that
    read raise StoreError where the disk fails.

    The constructor raises ConfigError for a file that cannot be opened, LayoutInvalid for one that
    is no archive or is compressed, and LayoutDamaged or DigestMismatch for a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        self._state = _state(self._file)
        self._verified: set[Digest] = set()
        self._damaged: dict[Digest, DigestMismatch] = {}
        self._verifying: dict[Digest, threading.Lock] = {}
        self._guard = threading.Lock()
        try:
            index = BundleIndex(self._file, str(path))
        except BaseException:
            self.close()
            raise
        self._extents = index.extents
        self.records = index.records
        self.images = index.images
        self.left_out = index.left_out
        self.label = index.label
        self.origin: object = self if index.label is None else index.label.set_id
        self.base = index.base

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Blobs that a reader has open stay open."""
        self._file.close()

    def find_blob(self, digest: Digest) -> BlobFile | None:
        extent = self._extent(digest)
        if extent is None:
            return None
        offset, size = extent
        with store_errors(self.path):
            verified = self._is_verified(digest)
            file = os.fdopen(os.dup(self._file.fileno()), "rb", 0)
        return BlobFile(file, size, verified, offset, self)

    def find_blob_size(self, digest: Digest) -> int | None:
        extent = self._extent(digest)
        return None if extent is None else extent[1]

    def verify_blob(self, digest: Digest) -> None:
        """Hash a blob unless it is verified already; of several callers for one blob the first
        hashes and the others wait. Raises DigestMismatch; the blob is then absent for good."""
        with self._guard:
            turn = self._verifying.setdefault(digest, threading.Lock())
        with turn:
            try:
                if digest in self._damaged:
                    raise self._damaged[digest].with_traceback(None)
                with store_errors(self.path):
                    if not self._is_verified(digest):
                        self._verify(digest)
            finally:
                with self._guard:
                    self._verifying.pop(digest, None)

    def find_manifest(self, digest: Digest) -> ManifestHolder | None:
        """None also for bytes that no longer match the digest, or are no manifest."""
        extent = self._extent(digest)
        if extent is None or extent[1] > MANIFEST_MAX_SIZE:
            return None
        with store_errors(self.path):
            raw = os.pread(self._file.fileno(), extent[1], extent[0])
        if Digest.of(raw, digest.algorithm) != digest:
            return None
        try:
            return ManifestHolder.of(raw, algorithm=digest.algorithm)
        except MalformedManifest:
            return None

    def _extent(self, digest: Digest) -> tuple[int, int] | None:
        return None if digest in self._damaged else self._extents.get(digest)

    def _is_verified(self, digest: Digest) -> bool:
        with self._guard:
            state = _state(self._file)
            if state != self._state:
                # Another process wrote into the file, so every blob must be hashed again.
                self._state = state
                self._verified.clear()
            return digest in self._verified

    def _verify(self, digest: Digest) -> None:
        offset, left = self._extents[digest]
        state = _state(self._file)
        hasher = digest.hasher()
        buffer = read_buffer(READ_SIZE)
        while left:
            count = os.preadv(self._file.fileno(), [buffer[: min(left, READ_SIZE)]], offset)
            if not count:
                break
            hasher.update(buffer[:count])
            offset, left = offset + count, left - count
        actual = Digest.finish(hasher, digest.algorithm)
        if actual != digest:
            self._damaged[digest] = DigestMismatch(f"{self.path}: blob {digest}", digest, actual)
            raise self._damaged[digest]
        with self._guard:
            # If the file was written to during the hashing, the next reader hashes the blob again.
            if state == self._state == _state(self._file):
                self._verified.add(digest)


def _open(path: Path) -> FileIO:
    try:
        file = open(path, "rb", buffering=0)  # noqa: PTH123, SIM115 open for as long as it is served
    except OSError as exc:
        raise ConfigError((exc.strerror or str(exc)).lower(), file=str(path)) from exc
    reason = ""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        reason = "is not a file: a bundle is an archive in one"
    elif os.pread(file.fileno(), 4, 0).startswith((GZIP, ZSTD)):
        reason = "is compressed: unpack it to serve it, as with zstd -d"
    if reason:
        file.close()
        raise LayoutInvalid(str(path), reason)
    return file


def _state(file: FileIO) -> tuple[int, int]:
    """Size in bytes and time of the last write in nanoseconds: a write changes one of them."""
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns
