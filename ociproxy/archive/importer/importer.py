"""Import: archives and folders into the store, without a network.

Each source is read once, from front to end, and its blobs are stored as they come. Its images are
published after its end, each when all of it is there. A problem with one image or one source holds
back no other.

Tests: tests/archive/importer/test_importer.py, tests/archive/test_import_export.py,
tests/archive/importer/test_hostile.py, tests/real/test_import.py.
"""

from __future__ import annotations

import stat
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy.archive.export.content import DOCKER_NAME
from ociproxy.archive.importer.decompress import MAX_SIZE, ArchiveStream
from ociproxy.archive.importer.dockersave import SKOPEO_DIR
from ociproxy.archive.importer.ociregistry import CacheFolder
from ociproxy.archive.importer.publishing import Publisher
from ociproxy.archive.importer.results import OnExisting, Received
from ociproxy.archive.importer.tar_import import TarImport
from ociproxy.archive.volumes import VolumeLabel, grouped, read_label
from ociproxy.errors import ConfigError, LayoutInvalid, NoRoom
from ociproxy.oci.layout import BLOBS, INDEX, MARKER, NO_IMAGES, LayoutDirectory
from ociproxy.store.extract import Extractor
from ociproxy.store.store import is_store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from ociproxy.archive.importer.naming import GivenName
    from ociproxy.archive.importer.results import ImportResult
    from ociproxy.errors import OciProxyError
    from ociproxy.store.store import Store

STDIN: Final = Path("-")
_SKOPEO_VERSION: Final = "version"
"""A file in each folder that skopeo writes as `dir:`."""


class Watcher(Protocol):
    """Hears how an import goes; called from the importing thread."""

    def image(self, result: ImportResult) -> None: ...

    def note(self, source: str, text: str) -> None:
        """A fact that is no failure and that the operator should know."""

    def failed(self, source: str, error: OciProxyError) -> None:
        """A source could not be read, or not to its end."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How to import; `max_size` is how many bytes an archive may expand to. With `isolated`, a
    repository gets only what came with the archive, or what it has already."""

    on_existing: OnExisting = OnExisting.REPLACE
    name: GivenName | None = None
    max_size: int = MAX_SIZE
    isolated: bool = False


class Sources:
    """Reads archives and folders, each once and from front to end, for one Extractor each."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._stream: ArchiveStream | None = None
        self._done = 0
        self.size: int | None = 0
        """Bytes of all files; None where a folder or a pipe is among the sources."""

    @property
    def consumed(self) -> int:
        """Bytes of the files that have been read or skipped."""
        return self._done + (self._stream.consumed if self._stream else 0)

    def groups(self, sources: Sequence[Path]) -> list[list[Path]]:
        """The sources in their order, the volumes of one archive together. Raises ConfigError where
        one cannot be opened or a volume is missing."""
        return grouped({source: self._open_once(source) for source in sources})

    def receive(self, volumes: list[Path], extractor: Extractor) -> Received:
        """Take in a folder, or the files of one archive. Raises LayoutInvalid, StoreError."""
        if volumes[0] != STDIN and volumes[0].is_dir():
            return _receive_folder(volumes[0], extractor)
        return self._receive_files(volumes, extractor)

    def _open_once(self, source: Path) -> VolumeLabel | None:
        """The label of a volume; None for all other sources. Adds to `size`. Raises ConfigError."""
        if source == STDIN:
            self.size = None
            return None
        try:
            state = source.stat()
        except OSError as exc:
            raise ConfigError((exc.strerror or str(exc)).lower(), file=str(source)) from exc
        if not stat.S_ISREG(state.st_mode):
            self.size = None
            return None
        if self.size is not None:
            self.size += state.st_size
        try:
            with _opened(source) as file:
                return read_label(file, str(source))
        except LayoutInvalid:
            return None  # The watcher hears of it when the source is read.

    def _receive_files(self, volumes: list[Path], extractor: Extractor) -> Received:
        """An archive in one file, or the volumes of one in order."""
        received = Received(str(volumes[0]))
        for path in volumes:
            with _opened(path) as file:
                self._stream = ArchiveStream(file, str(path), max_size=self._max_size)
                TarImport(extractor, self._stream, received, first=path == volumes[0]).run()
                self._done += self._stream.consumed
                self._stream = None
        return received


class Importer(Sources):
    def __init__(self, store: Store, rules: Rules, watcher: Watcher) -> None:
        super().__init__(rules.max_size)
        self._store = store
        self._rules = rules
        self._watcher = watcher
        self._nameless = False

    def run(self, sources: Sequence[Path]) -> None:
        """Import all images that are whole, and tell the watcher of the others.

        Raises ConfigError where a source cannot be opened or a volume is missing, before anything
        is written; StoreError at any time.
        """
        for volumes in self.groups(sources):
            try:
                self._import(volumes)
            except (LayoutInvalid, NoRoom) as exc:
                self._watcher.failed(str(volumes[0]), exc)
        if self._rules.name is not None and not self._nameless:
            self._watcher.note(
                "--name", "every image has a name of its own; it is for those without"
            )

    def _import(self, volumes: list[Path]) -> None:
        with Extractor(self._store, isolated=self._rules.isolated) as extractor:
            received = self.receive(volumes, extractor)
            for note in received.notes:
                self._watcher.note(received.source, note)
            self._nameless |= any(image.reference is None for image in received.images)
            Publisher(
                self._store,
                received,
                extractor,
                on_existing=self._rules.on_existing,
                tell=self._watcher.image,
            ).publish(self._rules.name)
            if received.damage:
                error = LayoutInvalid(received.source, received.damage)
                self._watcher.failed(received.source, error)


def _receive_folder(root: Path, extractor: Extractor) -> Received:
    received = Received(str(root))
    folder: LayoutDirectory | CacheFolder
    # Some tools write no marker, as hauler into its store. As in a tar, the index is enough.
    if (root / MARKER).is_file() or (root / INDEX).is_file():
        folder = LayoutDirectory(root)
        if (root / MARKER).is_file():
            folder.check()
        received.images += folder.images()
        if not received.images and any(root.glob(f"{BLOBS}/*/*")):
            raise LayoutInvalid(str(root), NO_IMAGES)
    elif is_store(root):
        raise LayoutInvalid(
            str(root), "is a store of ociproxy's: export it, or copy the folder as it is"
        )
    elif CacheFolder.is_one(root):
        folder = CacheFolder(root)
        received.images += folder.images(extractor)
    elif (root / DOCKER_NAME).is_file() and (root / _SKOPEO_VERSION).is_file():
        raise LayoutInvalid(str(root), SKOPEO_DIR)
    else:
        raise LayoutInvalid(
            str(root),
            f"has no {MARKER} and no {INDEX}, and is no cache of ociregistry's: nothing to import",
        )
    for image in received.images:
        extractor.take_layout(folder, image.descriptor)
    extractor.drain()
    return received


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """An unbuffered file. Raises ConfigError."""
    if path == STDIN:
        if not sys.stdin:  # Python has none where it is closed
            raise ConfigError("is closed", file="standard input")
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as file:
            yield file
        return
    try:
        file = path.open("rb", buffering=0)
    except OSError as exc:
        raise ConfigError((exc.strerror or str(exc)).lower(), file=str(path)) from exc
    with file:
        yield file
