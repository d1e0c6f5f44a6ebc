"""The store under `--image-path`: the files are the truth, and every process on the host may use
them.

    blobs/<hex>                                       configs and layers
    fat/<hex>                                         indexes
    img/<hex>                                         all other manifests
    refs/<registry>/<repository>/_tags/<tag>          what a tag resolved to
    refs/<registry>/<repository>/_manifests/<digest>  that a repository has a manifest
    referrers/<subject>/<digest>                      what refers to a subject
    pulls/                                            what is arriving
    quarantine/                                       what was taken out of service
    store.json                                        the format version

Opening it creates what is missing and scans nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from ociproxy.clock import SystemClock
from ociproxy.errors import StoreError
from ociproxy.oci.manifest import referrer_descriptor
from ociproxy.store.blobs import Blobs
from ociproxy.store.document_spool import DocumentSpool
from ociproxy.store.files import store_errors
from ociproxy.store.manifests import Manifests, check_manifest
from ociproxy.store.read_only import TagRecord
from ociproxy.store.refs import Refs
from ociproxy.store.staging import Staging, write_atomically
from ociproxy.store.writer import BlobWriter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ociproxy.clock import Clock
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Repository
    from ociproxy.store.read_only import ReadOnlyContent

FORMAT_VERSION: Final = 1
_HOT_MANIFEST_BYTES: Final = 16 * 1024 * 1024
_FORMAT: Final = "store.json"
_INDEXES: Final = "fat"
_IMAGES: Final = "img"

_BLOCK: Final = b"\xff" * 4096
"""What a file has to hold to take room; of zeros some file systems make a hole."""


class Store:
    """Raises StoreError, naming the path, where the store cannot be used.

    Content that its own files lack is looked for `below`, which is only read.
    """

    def __init__(
        self,
        root: Path,
        *,
        clock: Clock | None = None,
        hot_manifests: int = _HOT_MANIFEST_BYTES,
        below: Sequence[ReadOnlyContent] = (),
    ) -> None:
        self.root = root
        clock = clock or SystemClock()
        staging = root / "pulls"
        for name in ("blobs", _INDEXES, _IMAGES, "refs", "referrers", "pulls"):
            with store_errors(root / name):
                (root / name).mkdir(parents=True, exist_ok=True)
        _check_format(root)
        self.staging = Staging(staging)
        self.blobs = Blobs(root / "blobs", root / "quarantine", clock, below)
        self.manifests = Manifests(
            root / _INDEXES,
            root / _IMAGES,
            staging=staging,
            hot_bytes=hot_manifests,
            clock=clock,
            below=below,
        )
        self.refs = Refs(root / "refs", root / "referrers", staging=staging, below=below)

    def check_writable(self) -> None:
        """Raises StoreError where nothing can be staged. A full disk will do: what is stored can be
        served from it."""
        self._probe(b"")

    def check_room(self) -> None:
        """The same, and StoreFull where there is no room for anything."""
        self._probe(_BLOCK)

    def _probe(self, data: bytes) -> None:
        probe = self.staging.root / ".writable"
        write_atomically(probe, data, staging=self.staging.root)
        with store_errors(probe):
            probe.unlink(missing_ok=True)

    def blob_writer(self) -> BlobWriter:
        """For blobs that come from front to end, as out of an archive."""
        return BlobWriter(self.staging.root, self.blobs)

    def record_tag(
        self, repository: Repository, tag: str, descriptor: Descriptor, *, now: float
    ) -> None:
        """The one way a tag is recorded; its manifest is stored, or was only resolved. `now` is
        seconds since the epoch."""
        self.refs.put_tag(repository, tag, TagRecord(descriptor, now, repository.registry))

    def document_spool(self) -> DocumentSpool:
        """For documents of which it is not known yet whether they belong here."""
        return DocumentSpool(self.staging.root)

    def commit_manifest(self, repository: Repository, holder: ManifestHolder) -> None:
        """Publish a verified manifest: its bytes first, then whom it refers to and that the
        repository has it. A manifest whose last step is missing counts as absent,
        so it is committed again.

        The one way a manifest enters the store. Raises ManifestInvalid for what is not a manifest.
        """
        check_manifest(holder, repository.registry)
        self.manifests.commit(holder)
        subject = holder.manifest.subject
        if subject is not None:
            self.refs.put_referrer(subject.digest, referrer_descriptor(holder))
        self.refs.put_manifest(repository, holder.descriptor)


def open_existing(root: Path) -> Store:
    """A store to read from: nothing becomes one by being looked at. Raises StoreError."""
    with store_errors(root):
        if not root.is_dir():
            raise StoreError(root, "no such folder; say with --image-path where the store is")
        if not (root / _FORMAT).exists():
            raise StoreError(root, f"has no {_FORMAT}, so it is no store")
    return Store(root)


def _check_format(root: Path) -> None:
    path = root / _FORMAT
    with store_errors(path):
        try:
            text = path.read_text()
        except FileNotFoundError:
            data = json.dumps({"version": FORMAT_VERSION}).encode() + b"\n"
            write_atomically(path, data, staging=root / "pulls")
            return
    try:
        version = json.loads(text)["version"]
    except (ValueError, KeyError, TypeError) as exc:
        raise StoreError(
            path, "is not a format version; restore it or use an empty folder"
        ) from exc
    if version != FORMAT_VERSION:
        raise StoreError(path, f"format version {version!r}, this program reads {FORMAT_VERSION}")
