"""What is wrong in an archive, by image: read as `import` reads it, and nothing of it is kept.

Each blob is hashed as it comes. A temporary store then has a hole of its size in its place, so the
Extractor examines the images as it does for an import. Only manifests and configs take room there.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ociproxy.archive.importer.decompress import MAX_SIZE
from ociproxy.archive.importer.importer import Importer, Rules, Sources
from ociproxy.archive.lock import Lock
from ociproxy.oci.layout import blob_path
from ociproxy.oci.reference import Repository
from ociproxy.store.check import Fault
from ociproxy.store.damage import Throttle
from ociproxy.store.extract import Extractor
from ociproxy.store.files import seal, store_errors
from ociproxy.store.inventory import inventory
from ociproxy.store.store import Store
from ociproxy.store.writer import BlobWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ociproxy.archive.importer.importer import Watcher
    from ociproxy.archive.importer.results import Received
    from ociproxy.oci.digest import Digest
    from ociproxy.store.examined import Problem
    from ociproxy.store.inventory import Entry
    from ociproxy.store.reader import Reader

_ANY: Final = Repository("localhost", "archive")
"""Whose images they are: that matters only where repositories share nothing."""
_HEAD: Final = 8
"""Bytes at the start of a layer that are kept: they tell how it is compressed."""
_CONFIG: Final = 64 * 1024
"""Bytes of a blob that is kept whole: a config, which tells the platform, has a few thousand."""


@dataclass(slots=True)
class ArchiveFindings:
    """Numbers of what an archive has. `damaged` are its files with other bytes than their name
    says: the digest, why, and the images that need it. `broken` are images that are not whole, by
    name and digest."""

    source: str
    blobs: int = 0
    manifests: int = 0
    images: int = 0
    read: int = 0
    """Bytes of these blobs and manifests."""
    damaged: dict[str, tuple[Digest, str, list[str]]] = field(default_factory=dict)
    broken: list[tuple[str, Digest, list[Fault]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damage: str = ""
    """Why the end of the archive did not come."""


class ArchiveCheck(Sources):
    """Checks archives, one after the other. `throttle` bounds the rate of hashing."""

    def __init__(self, throttle: Throttle) -> None:
        super().__init__(MAX_SIZE)
        self._throttle = throttle

    def check(self, volumes: list[Path]) -> ArchiveFindings:
        """All findings in one archive, given as all its volumes. Raises LayoutInvalid for what is
        no archive or is refused, StoreError where temporary files cannot be written."""
        with tempfile.TemporaryDirectory(prefix="ociproxy-check-") as folder:
            store = _HollowStore(Path(folder), self._throttle)
            with Extractor(store) as extractor:
                received = self.receive(volumes, extractor)
                return _judge(received, extractor)


def entries_of(sources: Sequence[Path], watcher: Watcher) -> Iterator[Entry]:
    """What a store would have that imported these archives and folders, and nothing else. Every
    byte is read; `watcher` hears of what an import would leave out.

    Raises ConfigError where a source cannot be opened or a volume is missing, StoreError where
    temporary files cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="ociproxy-list-") as folder:
        store = _HollowStore(Path(folder), Throttle(None))
        Importer(store, Rules(), watcher).run(sources)
        for entry in inventory(store):
            yield replace(entry, resolved=None, last_used=None)


def _judge(received: Received, extractor: Extractor) -> ArchiveFindings:
    found = ArchiveFindings(received.source, notes=received.notes, damage=received.damage)
    lock = received.lock or Lock(())
    gaps = {digest for image in lock.images for digest in image.missing}
    expected = lock.contents.keys() - lock.omitted - gaps
    files = {digest: blob_path(digest) for digest in extractor.damaged}
    for digest, reason in extractor.damaged.items():
        found.damaged[files[digest]] = digest, reason, []
    blobs: dict[Digest, int] = {}
    manifests: dict[Digest, int] = {}
    # As for an import: where the end did not come, no child of an index may be absent.
    sparse = received.lock is not None or not received.damage
    for image in received.images:
        found.images += 1
        faults = {}
        if image.problem:  # of its name, or its source does not say what it consists of
            faults[image.descriptor.digest] = Fault(image.descriptor.digest, image.problem)
        # A child whose manifest came has to be whole, though an import can do without it.
        waiting = [] if image.problem else [image.descriptor]
        seen: set[Digest] = set()
        for descriptor in waiting:
            if descriptor.digest in seen:
                continue
            seen.add(descriptor.digest)
            examined = extractor.examine(descriptor, _ANY, sparse=sparse)
            blobs.update((each.digest, each.size) for each in examined.blobs.values())
            manifests.update((each.digest, each.size) for each in examined.manifests.values())
            for problem in examined.problems:
                fault = _fault(problem, files)
                faults[fault.digest] = fault
            for child in examined.left_out:
                if extractor.holds(child.digest) or child.digest in extractor.damaged:
                    waiting.append(child)
                elif child.digest in expected:
                    reason = "listed in the lock, but not in the archive"
                    faults[child.digest] = Fault(child.digest, reason)
        for digest in lock.omitted:
            faults.pop(digest, None)
        if faults:
            found.broken.append((str(image), image.descriptor.digest, list(faults.values())))
        for fault in faults.values():
            if fault.file:
                found.damaged[fault.file][2].append(str(image))
    found.blobs, found.manifests = len(blobs), len(manifests)
    found.read = sum(blobs.values()) + sum(manifests.values())
    return found


def _fault(problem: Problem, files: dict[Digest, str]) -> Fault:
    digest = problem.descriptor.digest
    reason = problem.reason if problem.damaged else "not in the archive"
    return Fault(digest, f"{problem.what} {reason}", problem.damaged, files.get(digest, ""))


class _HollowStore(Store):
    """A store that has a hole in the place of each blob."""

    def __init__(self, root: Path, throttle: Throttle) -> None:
        super().__init__(root)
        self._throttle = throttle

    def blob_writer(self) -> BlobWriter:
        return _HollowWriter(self, self._throttle)


class _HollowWriter(BlobWriter):
    """Hashes what comes, and keeps its first bytes and its size."""

    def __init__(self, store: Store, throttle: Throttle) -> None:
        super().__init__(store.staging.root, store.blobs)
        self._store = store
        self._throttle = throttle

    def write(self, source: Reader, size: int, digest: Digest | None = None) -> Digest:
        head = _Head(self._throttle, size if size <= _CONFIG else _HEAD)
        actual = self.copy(source, size, head, digest)
        path = self._store.blobs.path(actual)
        with store_errors(path), path.open("wb") as file:
            file.write(head.kept)
            file.truncate(size)
            seal(file.fileno(), path.name)
        return actual


class _Head:
    def __init__(self, throttle: Throttle, keep: int) -> None:
        self.kept = b""
        self._keep = keep
        self._throttle = throttle

    def write(self, piece: memoryview) -> None:
        self.kept += bytes(piece[: self._keep - len(self.kept)])
        self._throttle.took(len(piece))
