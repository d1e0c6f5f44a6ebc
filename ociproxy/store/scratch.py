"""Small documents set aside until it is known what they are, in a file without a name.

It ends with the process, however that ends, and costs memory only for its table of contents.
"""

from __future__ import annotations

import io
import tempfile
from typing import TYPE_CHECKING

from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from ociproxy.digest import Digest


class Scratch:
    """Use as a context manager. Whoever puts something in has verified it. Raises StoreError."""

    def __init__(self, staging: Path) -> None:
        self._staging = staging
        self._places: dict[Digest, tuple[int, int]] = {}
        with store_errors(staging):
            self._file = tempfile.TemporaryFile(dir=staging)  # noqa: SIM115 closed on exit

    def __enter__(self) -> Scratch:
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
                self._places[digest] = self._file.seek(0, io.SEEK_END), len(raw)
                self._file.write(raw)

    def find(self, digest: Digest) -> bytes | None:
        place = self._places.get(digest)
        if place is None:
            return None
        offset, size = place
        with store_errors(self._staging):
            self._file.seek(offset)
            return self._file.read(size)
