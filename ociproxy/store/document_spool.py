"""Documents that wait in a temporary file until the importer knows what they are.

The file has no name: the kernel removes it with the process, also one that is killed. Memory is
used for each document's place in the file only.
Tests: tests/store/test_extract.py.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from ociproxy.oci.digest import Digest


class DocumentSpool:
    """Use as a context manager. Callers put in verified bytes only. Raises StoreError."""

    def __init__(self, staging: Path) -> None:
        self._staging = staging
        self._places: dict[Digest, tuple[int, int]] = {}
        self._end = 0
        with store_errors(staging):
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 closed on exit
                dir=staging, buffering=0
            )

    def __enter__(self) -> DocumentSpool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._places

    def put(self, digest: Digest, raw: bytes) -> None:
        if digest not in self._places:
            with store_errors(self._staging):
                offset, view = self._end, memoryview(raw)
                while view:
                    count = os.pwrite(self._file.fileno(), view, self._end)
                    self._end, view = self._end + count, view[count:]
                self._places[digest] = offset, len(raw)

    def find(self, digest: Digest) -> bytes | None:
        """The bytes; from any thread."""
        place = self._places.get(digest)
        if place is None:
            return None
        offset, size = place
        with store_errors(self._staging):
            return os.pread(self._file.fileno(), size, offset)
