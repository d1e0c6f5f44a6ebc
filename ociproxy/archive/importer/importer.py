"""Import: archives and folders into the store, without a network.

A source is read once, and its blobs are kept as they come; images are published at its end, each
when all of it is there. What is wrong with one image, or one source, holds back no other.
"""

from __future__ import annotations

import stat
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy.archive.importer.decompress import MAX_SIZE, ArchiveStream
from ociproxy.archive.importer.ociregistry import CacheFolder
from ociproxy.archive.importer.publishing import ImportResult, OnExisting, Publisher
from ociproxy.archive.importer.tar_import import Received, TarImport
from ociproxy.archive.importer.volume_reader import VolumeLabel, grouped, read_label
from ociproxy.archive.naming import GivenName
from ociproxy.errors import ConfigError, LayoutInvalid
from ociproxy.oci.layout import MARKER, LayoutDirectory
from ociproxy.store.extract import Extractor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from ociproxy.errors import OciProxyError
    from ociproxy.store.store import Store

STDIN: Final = Path("-")
_STORE_MARKER: Final = "store.json"


class Watcher(Protocol):
    """Who is told what happens."""

    def image(self, outcome: ImportResult) -> None: ...

    def note(self, source: str, text: str) -> None:
        """Something that is no failure and should be known."""

    def failed(self, source: str, error: OciProxyError) -> None:
        """A source that cannot be used, or not to its end."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How to import; `max_size` is in bytes, of what an archive expands to."""

    on_existing: OnExisting = OnExisting.REPLACE
    name: GivenName | None = None
    max_size: int = MAX_SIZE


class Importer:
    def __init__(self, store: Store, rules: Rules, watcher: Watcher) -> None:
        self._store = store
        self._rules = rules
        self._watcher = watcher
        self._publisher = Publisher(store, rules.on_existing, rules.name, watcher.image)
        self._stream: ArchiveStream | None = None
        self._done = 0
        self._nameless = False
        self.size: int | None = 0
        """Bytes of all files; None where a folder or a pipe is among the sources."""

    @property
    def consumed(self) -> int:
        """Bytes of the files that have been read or skipped."""
        return self._done + (self._stream.consumed if self._stream else 0)

    def run(self, sources: Sequence[Path]) -> None:
        """Import everything that can be; the watcher is told what cannot.

        Raises ConfigError where a source cannot be opened or a volume is missing, before anything
        is read, and StoreError.
        """
        labels = {source: self._look_at(source) for source in sources}
        for group in grouped(labels):
            try:
                self._import(group)
            except LayoutInvalid as exc:
                self._watcher.failed(str(group[0]), exc)
        if self._rules.name is not None and not self._nameless:
            self._watcher.note(
                "--name", "every image has a name of its own; it is for those without"
            )

    def _look_at(self, source: Path) -> VolumeLabel | None:
        if source == STDIN:
            self.size = None
            return None
        try:
            state = source.stat()
        except OSError as exc:
            raise ConfigError((exc.strerror or str(exc)).lower(), file=str(source)) from exc
        if self.size is not None:
            self.size = self.size + state.st_size if stat.S_ISREG(state.st_mode) else None
        if not stat.S_ISREG(state.st_mode):
            return None
        try:
            with _opened(source) as file:
                return read_label(file, str(source))
        except LayoutInvalid:
            return None  # said when it is this one's turn

    def _import(self, group: list[Path]) -> None:
        with Extractor(self._store) as extractor:
            if group[0] != STDIN and group[0].is_dir():
                received = self._receive_folder(group[0], extractor)
            else:
                received = self._receive_files(group, extractor)
            for note in received.notes:
                self._watcher.note(received.source, note)
            self._nameless |= any(image.reference is None for image in received.images)
            self._publisher.publish(received, extractor)
            if received.damage:
                self._watcher.failed(
                    received.source, LayoutInvalid(received.source, received.damage)
                )

    def _receive_files(self, group: list[Path], extractor: Extractor) -> Received:
        """An archive, or the volumes of one in order."""
        whole: Received | None = None
        for path in group:
            with _opened(path) as file:
                self._stream = ArchiveStream(file, str(path), max_size=self._rules.max_size)
                whole = TarImport(extractor, self._stream, first=whole).run()
                self._done += self._stream.consumed
                self._stream = None
        assert whole is not None, "a group has a source"  # noqa: S101 a bug in us
        return whole

    def _receive_folder(self, root: Path, extractor: Extractor) -> Received:
        received = Received(str(root))
        if (root / MARKER).is_file():
            layout = LayoutDirectory(root)
            layout.check()
            received.images += layout.images()
            for image in received.images:
                extractor.take_layout(layout, image.descriptor)
        elif (root / _STORE_MARKER).is_file():
            raise LayoutInvalid(
                str(root), "is a store of ociproxy's: export it, or copy the folder as it is"
            )
        elif CacheFolder.is_one(root):
            cache = CacheFolder(root)
            received.images += cache.images(extractor)
            for image in received.images:
                if not image.problem:
                    extractor.take_layout(cache, image.descriptor)
        else:
            raise LayoutInvalid(
                str(root), f"has no {MARKER}, and is no cache of ociregistry's: nothing to import"
            )
        extractor.drain()
        return received


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path == STDIN:
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as file:
            yield file
        return
    try:
        file = path.open("rb", buffering=0)
    except OSError as exc:
        raise ConfigError((exc.strerror or str(exc)).lower(), file=str(path)) from exc
    with file:
        yield file
