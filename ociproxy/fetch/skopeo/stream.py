"""A blob that comes with its image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ociproxy.errors import UpstreamUnavailable

if TYPE_CHECKING:
    from io import FileIO

    from ociproxy.fetch.skopeo.blob_index import Image
    from ociproxy.fetch.skopeo.copy import CopyJobs
    from ociproxy.oci.digest import Digest
    from ociproxy.store.store import Store

_LOOK: Final = 0.5
"""Seconds between looks at the store where nobody says that something has come."""


class StoredBlobStream:
    """A `BlobStream` that is delivered: its bytes can be read when they are in the store."""

    def __init__(
        self,
        image: Image,
        digest: Digest,
        size: int,
        *,
        copies: CopyJobs,
        store: Store,
        upstream: str,
        start: int,
        stop: int | None,
    ) -> None:
        self._image = image
        self._digest = digest
        self._size = size
        self._copies = copies
        self._store = store
        self._upstream = upstream
        self._start = min(start, size)
        self._stop = size if stop is None else min(stop, size)
        self._position = self._start
        self._file: FileIO | None = None
        self._aborted = False

    @property
    def size(self) -> int | None:
        return self._size

    @property
    def start(self) -> int:
        return self._start

    @property
    def stop(self) -> int | None:
        return self._stop

    def deliver(self) -> bool:
        if self._is_stored():
            return True
        copy = self._copies.join(self._image)
        with self._copies.changed:
            while not self._is_stored():
                self._check()
                if copy.done:
                    raise copy.error_for(self._digest, self._upstream)
                self._copies.changed.wait(_LOOK)
        return True

    def read(self, limit: int) -> bytes:
        self._check()
        if self._file is None:
            self.deliver()
            found = self._store.blobs.find(self._digest)
            if found is None:
                raise UpstreamUnavailable(self._upstream, "its blob has gone from the store")
            self._file = found.file
            self._file.seek(self._position)
        data = self._file.read(min(limit, self._stop - self._position)) or b""
        self._position += len(data)
        return data

    def abort(self) -> None:
        self._aborted = True
        with self._copies.changed:
            self._copies.changed.notify_all()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _is_stored(self) -> bool:
        return self._store.blobs.find_size(self._digest) is not None

    def _check(self) -> None:
        if self._aborted or self._copies.closed:
            raise UpstreamUnavailable(self._upstream, "read was aborted")
