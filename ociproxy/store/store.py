"""The store under `--image-path`: plain files, which all processes of the host may use at once.

    blobs/<hex>                                       configs and layers
    fat/<hex>                                         indexes
    img/<hex>                                         all other manifests
    refs/<registry>/<repository>/_tags/<tag>          the manifest that a tag means
    refs/<registry>/<repository>/_manifests/<digest>  that a repository has a manifest
    referrers/<subject>/<digest>                      that a manifest refers to a subject
    pulls/                                            what is not published yet
    quarantine/                                       damaged blobs, out of service
    locks/                                            files to lock; `usage` says the store's size
    pins/                                             what no prune removes
    scrub.json check.json                             how far a pass over all files has come
    removed.json                                      the images that prunes removed last
    store.json                                        the format version

Opening a store makes the folders that are missing and reads no content.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Final

from ociproxy.clock import SystemClock
from ociproxy.errors import StoreError
from ociproxy.oci.descriptor import MalformedManifest, OddManifest
from ociproxy.oci.manifest import referrer_descriptor
from ociproxy.store.blobs import Blobs
from ociproxy.store.claim import close_lock_folder
from ociproxy.store.files import file_name, keep, make_folder, store_errors
from ociproxy.store.group_commit import PATIENCE, Commit, GroupCommit
from ociproxy.store.manifests import Manifests, check_manifest
from ociproxy.store.mounts import is_remote
from ociproxy.store.pruning.pins import PinFiles
from ociproxy.store.refs import Refs, TagRecord
from ociproxy.store.removal import Removals
from ociproxy.store.room import Room
from ociproxy.store.staging import Staging, stage, write_atomically
from ociproxy.store.usage import UsageFile
from ociproxy.store.writer import BlobWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ociproxy.clock import Clock
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Reference, Repository
    from ociproxy.store.read_only import ReadOnlyContent

FORMAT_VERSION: Final = 1
_HOT_MANIFEST_BYTES: Final = 16 * 1024 * 1024
"""Bytes of memory for manifests: some thousand, for most have a few KiB."""
_CLAIMS: Final = 64
"""Manifests that are read for the size of a blob. A client asks for the manifest just before."""
_NAMES: Final = 64
"""Names without a file that are looked for in turn: the kernel remembers each for a while."""
_FORMAT: Final = "store.json"
_INDEXES: Final = "fat"
_IMAGES: Final = "img"

_MEMORY: Final = "/dev/shm"  # noqa: S108 a folder of random name is made there
_BLOCK: Final = b"\xff" * 4096
"""Bytes that take room on the disk: of zeros some file systems would make a hole."""


class Store:
    """All parts of one store. Opening it raises StoreError, which names the path.

    The store looks for content that its own files lack in `below`, and never writes there.
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
        self._looks = 0
        self.quarantine = root / "quarantine"
        clock = self._clock = clock or SystemClock()
        staging = root / "pulls"
        for name in ("blobs", _INDEXES, _IMAGES, "refs", "referrers", "pulls"):
            with store_errors(root / name):
                make_folder(root / name)
        _check_format(root)
        self.is_remote = is_remote(root)
        """Whether each look, at a known name too, may wait for a network or a program."""
        self.staging = Staging(staging)
        close_lock_folder(root / "locks")
        self.removals = Removals(root / "locks", staging)
        self.usage = UsageFile(root / "locks" / "usage")
        self.room = Room(root, self.usage)
        """What is asked before a blob is kept. A command that has to keep limits sets another."""
        self.pins = PinFiles(root / "pins", staging)
        self.commits = GroupCommit(staging, root / "blobs", (root / _IMAGES, root / _INDEXES))
        pending = self.commits.pending
        self.blobs = Blobs(
            root / "blobs",
            self.quarantine,
            clock,
            self.usage,
            below,
            keep_names=self.commits.keep_names,
            is_remote=self.is_remote,
        )
        self.manifests = Manifests(
            root / _INDEXES,
            root / _IMAGES,
            pending=pending,
            usage=self.usage,
            hot_bytes=hot_manifests,
            clock=clock,
            below=below,
        )
        self.commits.made = self.manifests.count
        self.below = below
        self.refs = Refs(
            root / "refs",
            root / "referrers",
            staging=staging,
            pending=pending,
            below=[content.records for content in below],
        )

    def remembers(self, reference: Reference) -> bool:
        """Whether the event loop may look for this manifest: but for stats of known names, all of
        it is in memory."""
        if self.is_remote:
            return False
        digest, repository = reference.digest, reference.repository
        if digest is None:
            digest = self.refs.remembered_tag(repository, reference.tag or "")
        elif not self.refs.remembers(repository, digest):
            return False
        return digest is not None and self.manifests.remembers(digest)

    def look(self) -> None:
        """Ask the file system for a name that it does not know by heart. Hangs where the disk
        does."""
        self._looks = (self._looks + 1) % _NAMES
        (self.blobs.folder / f".look-{self._looks}").exists()

    def check_writable(self) -> None:
        """Raises StoreError if no file can be made in `pulls/`. A full disk is fine, for its
        content can be served."""
        self._probe(b"")

    def check_room(self) -> None:
        """The same, and StoreFull if the disk has no room for one block."""
        self._probe(_BLOCK)

    def _probe(self, data: bytes) -> None:
        probe = self.staging.root / ".writable"
        write_atomically(probe, data, staging=self.staging.root)
        with store_errors(probe):
            probe.unlink(missing_ok=True)

    def quarantined(self) -> list[Path]:
        """Damaged files that were taken out of service. Raises StoreError."""
        with store_errors(self.quarantine):
            return sorted(self.quarantine.rglob("*")) if self.quarantine.is_dir() else []

    def is_quarantined(self, digest: Digest) -> bool:
        """Whether damaged content of this digest was taken out of service. Raises StoreError."""
        path = self.quarantine / file_name(digest)
        with store_errors(path):
            return path.exists()

    @contextmanager
    def reading(self) -> Iterator[Callable[[Iterable[Digest], Iterable[Digest]], None]]:
        """Inside, no other process removes the manifests and the blobs that the caller calls this
        function for: it will read them, and that may take long. Raises StoreError."""

        def keep_all(manifests: Iterable[Digest], blobs: Iterable[Digest]) -> None:
            now = self._clock.now()
            with self.removals.kept_off():
                for digest in manifests:
                    self.manifests.keep(digest)
                for digest in blobs:
                    keep(self.blobs.path(digest), now)

        with self.staging.using(self._clock.now()):
            yield keep_all

    def blob_writer(self) -> BlobWriter:
        """A writer for blobs that come from front to end, as out of an archive."""
        return BlobWriter(self.staging.root, self.blobs, self.room)

    def commit_config(self, digest: Digest, raw: bytes) -> None:
        """Publish a blob of a few kilobytes, whose bytes the caller verified. Raises StoreError, or
        NoRoom where a command gets no room for it; a server keeps it all the same."""
        with self.room.held(len(raw), Event()):
            self._commit_config(digest, raw)

    def _commit_config(self, digest: Digest, raw: bytes) -> None:
        with store_errors(self.blobs.path(digest)):
            file, staged = stage(self.staging.root)
        try:
            with store_errors(staged), os.fdopen(file, "wb") as writing:
                writing.write(raw)
                writing.flush()
                # While the file is open and so locked: else the sweep could remove it.
                self.blobs.commit(staged, digest)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise

    @contextmanager
    def publishing(self, *, patience: float = PATIENCE, gathers: bool = False) -> Iterator[Commit]:
        """Inside, nothing is removed, and the caller stages what it publishes together. It is found
        at once by this process, by others soon. `Commit.wait` returns when it is durable. Until a
        caller waits, one that `gathers` may be joined by others. Raises StoreError, also where the
        disk is behind for `patience` seconds."""
        self.commits.wait_for_room(patience)
        with self.removals.kept_off():
            commit = Commit(self.commits, self.removals.prolong)
            commit.gathers = gathers
            try:
                yield commit
            except BaseException:
                commit.discard()
                raise
            if commit.staged:
                commit.hand_over()

    def claimed_size(self, repository: Repository, blob: Digest) -> int | None:
        """The size of a blob in bytes by one of the repository's newest manifests; None where none
        of them names it. Blocks: it reads `_CLAIMS` manifests at most. Raises StoreError."""
        for digest in self.refs.newest_manifests(repository)[:_CLAIMS]:
            holder = self.manifests.peek(digest)
            with suppress(MalformedManifest):
                if holder is not None:
                    for each in holder.manifest.blobs:
                        if each.digest == blob:
                            return each.size or None
        return None

    def put_manifest(self, repository: Repository, holder: ManifestHolder, commit: Commit) -> None:
        """Stage a manifest that the caller verified; no other way leads into the store.

        Its bytes come first, then its entry as a referrer and the record that the repository has
        it. Isolation takes a manifest without that record for absent, until it is committed again.
        Raises StoreError, or ManifestInvalid if the bytes are not of their media type.
        """
        check_manifest(holder, repository.registry)
        self.manifests.put(holder, commit)
        with suppress(OddManifest):
            subject = holder.manifest.subject
            if subject is not None:
                self.refs.put_referrer(subject.digest, referrer_descriptor(holder), commit)
        self.refs.put_manifest(repository, holder.descriptor, commit)

    def put_tag(
        self,
        repository: Repository,
        tag: str,
        descriptor: Descriptor,
        commit: Commit,
        *,
        now: float,
    ) -> None:
        """Record the manifest that a tag means at `now` (seconds since the epoch). The manifest
        need not be stored; one that is counts as used. Raises StoreError."""
        self.manifests.use(descriptor.digest, commit)
        record = TagRecord(descriptor, now, repository.registry)
        self.refs.put_tag(repository, tag, record, commit)

    def commit_manifest(self, repository: Repository, holder: ManifestHolder) -> None:
        """`put_manifest` by itself; it is durable on return."""
        with self.publishing() as commit:
            self.put_manifest(repository, holder, commit)
        commit.wait()

    def record_manifest(self, repository: Repository, descriptor: Descriptor) -> None:
        """Record that a repository has a manifest, if that is stored still: it counts as used.
        Raises StoreError."""
        digest = descriptor.digest
        with self.publishing() as commit:
            if self.manifests.keep(digest) or self.manifests.find(digest, use=False) is not None:
                self.manifests.use(digest, commit)
                self.refs.put_manifest(repository, descriptor, commit)


def open_existing(root: Path) -> Store:
    """Open a store to read from. Raises StoreError if the folder is none, and makes none of it."""
    with store_errors(root):
        if not root.is_dir():
            raise StoreError(root, "no such folder; say with --image-path where the store is")
        if not is_store(root):
            raise StoreError(root, f"has no {_FORMAT}, so it is no store")
    return Store(root)


def is_store(root: Path) -> bool:
    """Whether the folder is a store. Raises StoreError."""
    with store_errors(root):
        return (root / _FORMAT).exists()


@contextmanager
def temporary_store(*, below: Sequence[ReadOnlyContent] = ()) -> Iterator[Store]:
    """An empty store in `TMPDIR`, or in memory where no such folder can be written to; removed in
    the end: for what must not change a store, or has none. Raises StoreError."""
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError:
        place = _MEMORY
    with store_errors(Path(place)):
        folder = tempfile.TemporaryDirectory(
            prefix="ociproxy-", dir=place, ignore_cleanup_errors=True
        )
    with folder as name:
        yield Store(Path(name), below=below)


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
