"""The Extractor verifies the content of image layouts, in any order, and puts it into the store.

Blobs are hashed and committed as they come: an interrupted import need not read them again.
Documents that may be manifests wait in a `DocumentSpool`. An image is examined before it is
published: all that it reaches must have come, or be in the store; where repositories are isolated,
its repository must have it. Then the Extractor commits the manifests, children first, and the tag
last: no client sees half an image.
"""

from __future__ import annotations

import io
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final

from ociproxy.clock import SystemClock
from ociproxy.errors import DigestMismatch, IntegrityError, LayoutInvalid, NoRoom
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.image import BEYOND_LIMITS, ImageWalk, key_of, lost_layers
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, ImageManifest, Index, parse_manifest
from ociproxy.store.document_spool import DocumentSpool
from ociproxy.store.examined import Examined, Problem, Unusable, check_document, join
from ociproxy.store.membership import Membership, named_blobs
from ociproxy.store.reader import PeekableReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.oci.image import Key
    from ociproxy.oci.manifest import Manifest, ManifestHolder
    from ociproxy.oci.reference import Repository
    from ociproxy.store.group_commit import Commit
    from ociproxy.store.reader import BlobFolder, Reader
    from ociproxy.store.store import Store
    from ociproxy.store.writer import BlobWriter

_ABSENT: Final = "neither here nor in the store"
_REMOVED: Final = "another process removed it from the store: import again"
_HEAD: Final = 8
"""Bytes at the start of a layer that tell how it is compressed. Gzip needs two, zstd four."""
_PEEK: Final = 512
"""Bytes of which the first that is no space is `{` in a manifest or a config, not in a layer."""


class Extractor:
    """One import into one store. Use as a context manager, and in one thread.

    With `isolated`, what comes is hashed though the store has it: a name in an archive is no proof.
    """

    def __init__(self, store: Store, *, isolated: bool = False) -> None:
        self.damaged: dict[Digest, str] = {}
        """Why the content that came under a digest was not kept."""
        self._refused: dict[Digest, str] = {}
        """The same of content for which the store has no room."""
        self._store = store
        self._membership = Membership(store.refs, store.manifests) if isolated else None
        self._came: set[Digest] = set()
        """Verified content that came. The spool also has manifests that were only stored."""
        self._clock = SystemClock()
        self._stack = ExitStack()
        self._writer: BlobWriter | None = None
        """None until a blob comes that the store lacks."""

    def __enter__(self) -> Extractor:
        self._stack.enter_context(self._store.staging.using(self._clock.now()))
        self._spool = self._stack.enter_context(DocumentSpool(self._store.staging.root))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # Taking in

    def take(self, digest: Digest, size: int, source: Reader) -> bool:
        """Read `size` bytes that should have this digest. False, and nothing is read, where the
        Extractor or the store has them already; with `isolated`, the Extractor.

        Content with another digest is recorded in `damaged` and not kept. Raises StoreError.
        """
        if (self._membership is None or digest in self._came) and self.holds(digest):
            return False
        try:
            peeked = PeekableReader(source)
            if size <= MANIFEST_MAX_SIZE and peeked.peek(min(size, _PEEK)).lstrip()[:1] == b"{":
                self.take_document(peeked.read(size, digest), digest)
            else:
                self._write(peeked, size, digest)
                self._came.add(digest)
        except IntegrityError as exc:
            self.damaged[digest] = f"expected {exc.quantity} {exc.expected}, got {exc.actual}"
        except NoRoom as exc:
            self._refused[digest] = exc.reason
        else:
            self.damaged.pop(digest, None)
            self._refused.pop(digest, None)
        return True

    def take_unnamed(self, size: int, source: Reader) -> Digest:
        """Take in a blob whose digest is not known. Raises SizeMismatch where it ends early."""
        digest = self._write(source, size)
        self._came.add(digest)
        return digest

    def take_document(self, raw: bytes, digest: Digest) -> None:
        """Take in a manifest or a config. Raises DigestMismatch."""
        actual = Digest.of(raw, digest.algorithm)
        if actual != digest:
            raise DigestMismatch("document", digest, actual)
        self._spool.put(digest, raw)
        self._came.add(digest)

    def take_layout(self, folder: BlobFolder, top: Descriptor) -> None:
        """Take in what this image reaches, and no other blob of the folder. Raises StoreError."""
        walk = ImageWalk(top)
        while walk.level:
            walk.advance([self._take_one(folder, each) for each in walk.level])

    def _take_one(self, folder: BlobFolder, descriptor: Descriptor) -> Sequence[Descriptor]:
        self._take_from(folder, descriptor)
        try:
            manifest = self._holder(descriptor).manifest
        except Unusable:
            return ()  # `examine` says why
        for blob in manifest.blobs:
            self._take_from(folder, blob)
        return manifest.children if isinstance(manifest, Index) else ()

    def find_document(self, digest: Digest) -> bytes | None:
        """The bytes of a manifest or config that came or is stored; they match the digest."""
        raw = self._spool.find(digest)
        if raw is None:
            raw = self._stored_manifest(digest)
        return self._stored_document(digest) if raw is None else raw

    def find_manifest(self, descriptor: Descriptor) -> Manifest | None:
        """The same, parsed; None also where it is not of the described kind."""
        raw = self.find_document(descriptor.digest)
        try:
            return None if raw is None else parse_manifest(raw, descriptor.media_type)
        except MalformedManifest:
            return None

    def find_blob(self, digest: Digest) -> tuple[bytes, int] | None:
        """The first 8 bytes and the size of a blob that came or is stored; call `drain` first."""
        raw = self._spool.find(digest)
        if raw is not None:
            return raw[:_HEAD], len(raw)
        found = self._store.blobs.find(digest) if self._is_stored_blob(digest) else None
        if found is None:
            return None
        with found.file:
            return found.file.read(_HEAD) or b"", found.size

    def holds(self, digest: Digest) -> bool:
        """Whether this content came, or is stored and matches its digest."""
        if digest in self._spool or self._is_stored_blob(digest):
            return True
        return self._stored_manifest(digest) is not None

    def drain(self) -> None:
        """Wait until every blob that came is in the store. Raises StoreError."""
        if self._writer is not None:
            self._writer.drain()

    def _write(self, source: Reader, size: int, digest: Digest | None = None) -> Digest:
        if self._writer is None:
            self._writer = self._stack.enter_context(self._store.blob_writer())
        return self._writer.write(source, size, digest)

    # Examining

    def examine(self, top: Descriptor, repository: Repository, *, sparse: bool = True) -> Examined:
        """What an image of this repository consists of; call `drain` first. Raises StoreError.

        `sparse` lets an index lack children as long as it has one whole image. Say False where the
        end of the archive was cut off: children that were in it may have been lost.
        """
        walk = ImageWalk(top)
        parts: dict[Key, Examined] = {}
        while walk.level:
            walk.advance([self._examine_one(each, repository, parts) for each in walk.level])
        for each in walk.beyond:
            problem = Problem(each, "manifest", BEYOND_LIMITS, damaged=True)
            parts[key_of(each)] = Examined(each, problems=[problem])
        return join(walk, parts, sparse=sparse)

    def _examine_one(
        self, descriptor: Descriptor, repository: Repository, parts: dict[Key, Examined]
    ) -> Sequence[Descriptor]:
        """Put a manifest and its blobs into `parts`. Returns the children to go on with."""
        part = parts[key_of(descriptor)] = Examined(descriptor)
        try:
            holder = self._holder(descriptor)
            self._check_owner(repository, holder)
        except Unusable as exc:
            part.problems.append(Problem(descriptor, "manifest", str(exc), exc.damaged))
            return ()
        manifest = holder.manifest
        part.manifests[descriptor.digest] = holder.descriptor
        config = manifest.config if isinstance(manifest, ImageManifest) else None
        for blob in manifest.blobs:
            what = "config" if blob == config else "layer" if config else "blob"
            self._check_blob(blob, what, part)
        if isinstance(manifest, Index):
            return tuple({child.digest: child for child in manifest.children}.values())
        if isinstance(manifest, ImageManifest):
            lost = self.lost_layers(manifest)
            if lost:
                reason = f"it names no layers, and its config {lost}"
                part.problems.append(Problem(descriptor, "manifest", reason, damaged=True))
        return ()

    def lost_layers(self, manifest: ImageManifest) -> int:
        """Layers that only the config names; 0 where the config is not here. Call `drain` first."""
        if manifest.layers:
            return 0
        return lost_layers(manifest, self.find_document(manifest.config.digest) or b"")

    def _check_blob(self, blob: Descriptor, what: str, part: Examined) -> None:
        size, damage = self._size(blob.digest), self.damaged.get(blob.digest)
        if size == blob.size:
            part.blobs[blob.digest] = blob
        elif size is not None:
            reason = f"the manifest says {blob.size} bytes, it has {size}"
            part.problems.append(Problem(blob, what, reason, damaged=True))
        elif reason := self._refused.get(blob.digest, ""):
            part.problems.append(Problem(blob, what, reason, no_room=True))
        elif damage is None and blob.is_nondistributable:
            part.left_out.append(blob)
        else:
            part.problems.append(Problem(blob, what, damage or _ABSENT, damage is not None))

    def _check_owner(self, repository: Repository, holder: ManifestHolder) -> None:
        """Any manifest may name what another repository has. Raises Unusable where repositories
        are isolated, and one of these digests neither came nor belongs to this one."""
        top = holder.descriptor.digest
        if self._membership is None or self._store.refs.find_manifest(repository, top):
            return
        for digest in (top, *named_blobs(holder.raw)):
            if digest not in self._came and not self._membership.read(repository, digest):
                reason = self.damaged.get(digest, f"{_ABSENT} for {repository}")
                raise Unusable(f"{digest} is {reason}", damaged=digest in self.damaged)

    # Publishing

    def publish(
        self, repository: Repository, examined: Examined, tag: str | None = None
    ) -> list[Problem]:
        """Make a complete image visible, as `reveal` does; it is durable on return. Raises
        StoreError."""
        self.prepare(examined)
        self.drain()
        problems, commit = self.reveal(repository, examined, tag)
        commit.wait()
        return problems

    def prepare(self, examined: Examined) -> None:
        """The first step of `publish`: commit the blobs that waited among the documents."""
        for digest in examined.blobs:
            if self._store.blobs.find_size(digest) is None:
                raw = self.find_document(digest)
                if raw is not None:
                    self._write(io.BytesIO(raw), len(raw), digest)

    def reveal(
        self, repository: Repository, examined: Examined, tag: str | None = None
    ) -> tuple[list[Problem], Commit]:
        """The last step, after `drain`: publish the manifests, then the tag; the caller waits for
        the commit. Or return the blobs that another process has removed since `examine`."""
        assert examined.complete, "an incomplete image is not published"  # noqa: S101 a bug in us
        with self._store.publishing() as commit:
            size = self._store.blobs.find_size
            gone = [blob for blob in examined.blobs.values() if size(blob.digest) is None]
            if gone:
                return [Problem(blob, "blob", _REMOVED) for blob in gone], commit
            for descriptor in examined.manifests.values():
                self._store.put_manifest(repository, self._holder(descriptor), commit)
            if tag is not None:
                top = examined.manifests[examined.top.digest]
                self._store.put_tag(repository, tag, top, commit, now=self._clock.now())
        return [], commit

    # What is here

    def _take_from(self, folder: BlobFolder, descriptor: Descriptor) -> None:
        try:
            file = folder.open_blob(descriptor.digest)
        except LayoutInvalid as exc:
            self.damaged[descriptor.digest] = exc.reason
            return
        if file is None:
            return
        with file:
            try:
                size = file.seek(0, io.SEEK_END)
                file.seek(0)
                self.take(descriptor.digest, size, file)
            except OSError as exc:  # of the folder: an error of the store is a StoreError
                self.damaged[descriptor.digest] = f"cannot be read: {exc.strerror or exc}".lower()

    def _holder(self, descriptor: Descriptor) -> ManifestHolder:
        """A parsed manifest under the media type it is described with. Raises Unusable."""
        digest = descriptor.digest
        raw = self.find_document(digest)
        if raw is None:
            damage = self.damaged.get(digest)
            raise Unusable(damage or _ABSENT, damaged=damage is not None)
        return check_document(raw, descriptor)

    def _size(self, digest: Digest) -> int | None:
        """Bytes of a blob that came, or is stored and matches its digest."""
        if self._is_stored_blob(digest):
            return self._store.blobs.find_size(digest)
        raw = self.find_document(digest)
        return None if raw is None else len(raw)

    def _is_stored_blob(self, digest: Digest) -> bool:
        """Whether a stored blob matches its digest. One that does not is taken out of service."""
        # What is seen here was used, which a process that removes sees before it removes.
        with self._store.removals.kept_off():
            found = self._store.blobs.find(digest)
        if found is None:
            return False
        found.file.close()
        if found.sealed:
            return True
        with suppress(DigestMismatch):
            self._store.blobs.verify(digest, found.content)
        return self._store.blobs.find_size(digest) is not None

    def _stored_manifest(self, digest: Digest) -> bytes | None:
        stored = self._store.manifests.find(digest, use=False)
        if stored is None:
            return None
        self._spool.put(digest, stored.raw)  # it may be removed before it is published
        return stored.raw

    def _stored_document(self, digest: Digest) -> bytes | None:
        """A manifest that is stored as a blob, because a client asked for it as one."""
        found = self._store.blobs.find(digest)
        if found is None:
            return None
        with found.file:
            raw = found.file.read(MANIFEST_MAX_SIZE + 1)
        if not raw or len(raw) > MANIFEST_MAX_SIZE:
            return None
        return raw if Digest.of(raw, digest.algorithm) == digest else None
