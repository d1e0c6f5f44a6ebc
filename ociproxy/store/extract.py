"""The Extractor: content of an image layout, in whatever order it comes, verified into the store.

Blobs are hashed and committed as they come, so that an interrupted run need not read them again.
What may be a manifest is set aside in a scratch file without a name, which ends with the process.
An image is examined before it is published: all it reaches must be here or in the store already.
Then its manifests are committed, children first, and the tag last: nobody sees half an image.
"""

from __future__ import annotations

import io
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from ociproxy.clock import SystemClock
from ociproxy.errors import DigestMismatch, IntegrityError, LayoutInvalid
from ociproxy.oci.descriptor import Descriptor, MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import (
    MANIFEST_MAX_SIZE,
    ImageManifest,
    Index,
    ManifestHolder,
    OtherManifest,
    guess_media_type,
)
from ociproxy.oci.platform import is_attestation
from ociproxy.store.manifests import with_media_type
from ociproxy.store.reader import PeekableReader

if TYPE_CHECKING:
    from io import FileIO
    from types import TracebackType

    from ociproxy.clock import Clock
    from ociproxy.oci.reference import Repository
    from ociproxy.store.reader import Reader
    from ociproxy.store.store import Store

_MAX_DEPTH: Final = 8
"""Indexes within indexes; nobody nests more than two."""
_MAX_MANIFESTS: Final = 20_000
"""Of one image: a guard against hostile documents."""


_ABSENT: Final = "neither here nor in the store"
_Key = tuple[Digest, str, int]
"""A descriptor's digest, media type and size."""


_HEAD: Final = 8
"""Bytes that tell one compression from another."""
_PEEK: Final = 512
"""Bytes that tell what may be a manifest or a config from a layer."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What an image lacks and why; `damaged` where it is there, but not what it has to be."""

    descriptor: Descriptor
    what: str
    reason: str
    damaged: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.descriptor.digest}: {self.reason}"


@dataclass(slots=True, eq=False)
class Examined:
    """What an image consists of, as far as it is here or in the store."""

    top: Descriptor
    manifests: dict[Digest, Descriptor] = field(default_factory=dict)
    """Children before their parents."""
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    left_out: list[Descriptor] = field(default_factory=list)
    """Children of indexes that are not here: their platforms were not carried."""

    @property
    def complete(self) -> bool:
        return not self.problems


class BlobFolder(Protocol):
    """Where blobs can be had one by one."""

    def open_blob(self, digest: Digest) -> FileIO | None: ...


class Extractor:
    """One import into one store. Use as a context manager; not to be shared between threads."""

    def __init__(self, store: Store, *, clock: Clock | None = None) -> None:
        self.damaged: dict[Digest, str] = {}
        """What came and was not what its name says."""
        self._store = store
        self._clock = clock or SystemClock()
        self._stack = ExitStack()

    def __enter__(self) -> Extractor:
        self._spool = self._stack.enter_context(self._store.document_spool())
        self._writer = self._stack.enter_context(self._store.blob_writer())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    # Taking in

    def take(self, digest: Digest, size: int, source: Reader) -> bool:
        """Take in what is said to have this digest; False where it is here already, unread.

        Wrong content is noted in `damaged` and not kept. Raises StoreError.
        """
        if self.holds(digest):
            return False
        try:
            peeked = PeekableReader(source)
            if size <= MANIFEST_MAX_SIZE and peeked.peek(min(size, _PEEK)).lstrip()[:1] == b"{":
                self.take_document(peeked.read(size, digest), digest)
            else:
                self._writer.write(peeked, size, digest)
        except IntegrityError as exc:
            self.damaged[digest] = f"expected {exc.quantity} {exc.expected}, got {exc.actual}"
        else:
            self.damaged.pop(digest, None)
        return True

    def take_unnamed(self, size: int, source: Reader) -> Digest:
        """Take in a blob that no digest was stated for. Raises SizeMismatch where it ends early."""
        return self._writer.write(source, size)

    def take_document(self, raw: bytes, digest: Digest) -> None:
        """Take in a manifest or a config. Raises DigestMismatch."""
        actual = Digest.of(raw, digest.algorithm)
        if actual != digest:
            raise DigestMismatch("document", digest, actual)
        self._spool.put(digest, raw)

    def take_layout(self, folder: BlobFolder, top: Descriptor) -> None:
        """Take in what an image in a folder reaches, and nothing else that is there."""
        seen: set[Digest] = set()
        waiting = [(top, 0)]
        while waiting and len(seen) < _MAX_MANIFESTS:
            descriptor, depth = waiting.pop()
            if descriptor.digest in seen or depth > _MAX_DEPTH:
                continue
            seen.add(descriptor.digest)
            self._take_from(folder, descriptor)
            try:
                manifest = self._holder(descriptor).manifest
            except (_Unusable, MalformedManifest):
                continue  # whoever examines the image says so
            if isinstance(manifest, Index):
                waiting.extend((child, depth + 1) for child in manifest.manifests)
            elif isinstance(manifest, ImageManifest):
                for blob in manifest.blobs:
                    self._take_from(folder, blob)

    def find_document(self, digest: Digest) -> bytes | None:
        """A manifest or config that was taken in, or that the store has."""
        raw = self._spool.find(digest)
        if raw is not None:
            return raw
        stored = self._store.manifests.find(digest, use=False)
        if stored is not None:
            return stored.raw
        return self._stored_document(digest)

    def find_blob(self, digest: Digest) -> tuple[bytes, int] | None:
        """The first bytes and the size of what was taken in or is stored; call `drain` first."""
        raw = self._spool.find(digest)
        if raw is not None:
            return raw[:_HEAD], len(raw)
        if not self._is_stored_blob(digest):
            return None
        found = self._store.blobs.find(digest)
        if found is None:
            return None
        with found.file:
            return found.file.read(_HEAD) or b"", found.size

    def holds(self, digest: Digest) -> bool:
        """Whether this was taken in, or is in the store and right."""
        return digest in self._spool or self._is_stored(digest)

    def drain(self) -> None:
        """Wait until every blob that was taken in is in the store. Raises StoreError."""
        self._writer.drain()

    # Examining

    def examine(self, top: Descriptor, *, sparse: bool = True) -> Examined:
        """What an image consists of; call `drain` first.

        `sparse` lets an index lack children as long as one is whole: right where everything that
        was sent has come, wrong where the end was cut off.
        """
        return self._walk(top, sparse, 0, {})

    def _walk(
        self, descriptor: Descriptor, sparse: bool, depth: int, walked: dict[_Key, Examined]
    ) -> Examined:
        key = (descriptor.digest, descriptor.media_type, descriptor.size)
        examined = walked.get(key)
        if examined is not None:
            return examined
        examined = walked[key] = Examined(descriptor)
        try:
            if depth > _MAX_DEPTH or len(walked) > _MAX_MANIFESTS:
                raise _Unusable("nested too deep, or one of too many", damaged=True)
            holder = self._holder(descriptor)
            manifest = holder.manifest
        except _Unusable as exc:
            examined.problems.append(Problem(descriptor, "manifest", str(exc), exc.damaged))
            return examined
        except MalformedManifest as exc:
            examined.problems.append(Problem(descriptor, "manifest", str(exc), damaged=True))
            return examined
        if isinstance(manifest, Index):
            children = {child.digest: child for child in manifest.manifests}
            below = [self._walk(each, sparse, depth + 1, walked) for each in children.values()]
            _join(examined, below, sparse)
        elif isinstance(manifest, ImageManifest):
            for blob in manifest.blobs:
                self._check_blob(blob, "config" if blob == manifest.config else "layer", examined)
        examined.manifests[descriptor.digest] = holder.descriptor
        return examined

    def _check_blob(self, blob: Descriptor, what: str, examined: Examined) -> None:
        size = self._size(blob.digest)
        damage = self.damaged.get(blob.digest)
        if size == blob.size:
            examined.blobs[blob.digest] = blob
        elif size is not None:
            reason = f"the manifest says {blob.size} bytes, it has {size}"
            examined.problems.append(Problem(blob, what, reason, damaged=True))
        else:
            reason = damage or _ABSENT
            examined.problems.append(Problem(blob, what, reason, damaged=damage is not None))

    # Publishing

    def publish(self, repository: Repository, examined: Examined, tag: str | None = None) -> None:
        """Make a complete image visible. Raises StoreError."""
        self.prepare(examined)
        self.drain()
        self.reveal(repository, examined, tag)

    def prepare(self, examined: Examined) -> None:
        """The first step of `publish`: commit blobs that might have been manifests."""
        for digest in examined.blobs:
            if self._store.blobs.find_size(digest) is None:
                raw = self.find_document(digest) or b""
                self._writer.write(io.BytesIO(raw), len(raw), digest)

    def reveal(self, repository: Repository, examined: Examined, tag: str | None = None) -> None:
        """The last step, after `drain`: commit the manifests, then the tag. Any thread."""
        assert examined.complete, "an incomplete image is not published"  # noqa: S101 a bug in us
        for descriptor in examined.manifests.values():
            self._store.commit_manifest(repository, self._holder(descriptor))
        if tag is not None:
            top = examined.manifests[examined.top.digest]
            self._store.record_tag(repository, tag, top, now=self._clock.now())

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
            except OSError as exc:  # the store's are StoreError by now
                self.damaged[descriptor.digest] = f"cannot be read: {exc.strerror or exc}".lower()

    def _holder(self, descriptor: Descriptor) -> ManifestHolder:
        digest = descriptor.digest
        raw = self.find_document(digest)
        if raw is None:
            damage = self.damaged.get(digest)
            raise _Unusable(damage or _ABSENT, damaged=damage is not None)
        try:
            own = Descriptor(guess_media_type(raw), digest, descriptor.size)
            verified = ManifestHolder.verified(raw, own)
            holder = with_media_type(verified, descriptor)
        except IntegrityError as exc:
            reason = f"expected {exc.quantity} {exc.expected}, got {exc.actual}"
            raise _Unusable(reason, damaged=True) from exc
        except MalformedManifest as exc:
            raise _Unusable(str(exc), damaged=True) from exc
        if _is_misnamed(holder, verified):
            reason = f"is {own.media_type}, but described as {descriptor.media_type}"
            raise _Unusable(reason, damaged=True)
        return holder

    def _size(self, digest: Digest) -> int | None:
        """Bytes of a blob that is here, or in the store and right."""
        if self._is_stored_blob(digest):
            return self._store.blobs.find_size(digest)
        raw = self.find_document(digest)
        return None if raw is None else len(raw)

    def _is_stored(self, digest: Digest) -> bool:
        return self._is_stored_blob(digest) or (
            self._store.manifests.find(digest, use=False) is not None
        )

    def _is_stored_blob(self, digest: Digest) -> bool:
        """Whether the store has it and it is right; what is not is taken out of service."""
        found = self._store.blobs.find(digest)
        if found is None:
            return False
        found.file.close()
        if found.sealed:
            return True
        with suppress(DigestMismatch):
            self._store.blobs.verify(digest, found.content)
        return self._store.blobs.find_size(digest) is not None

    def _stored_document(self, digest: Digest) -> bytes | None:
        """A manifest that was stored as a blob, by whoever took it for one."""
        found = self._store.blobs.find(digest)
        if found is None:
            return None
        with found.file:
            raw = found.file.read(MANIFEST_MAX_SIZE + 1)
        if not raw or len(raw) > MANIFEST_MAX_SIZE:
            return None
        return raw if Digest.of(raw, digest.algorithm) == digest else None


class _Unusable(Exception):
    """A manifest that cannot be published, and whether that is damage or absence."""

    def __init__(self, reason: str, *, damaged: bool) -> None:
        self.damaged = damaged
        super().__init__(reason)


def _join(examined: Examined, children: list[Examined], sparse: bool) -> None:
    """Take the children of an index into it, and leave out those that were not carried."""
    absent: list[Examined] = []
    whole = all(is_attestation(child.top) for child in children)
    for child in children:
        if sparse and child.problems and not any(each.damaged for each in child.problems):
            absent.append(child)
            continue
        whole = whole or not is_attestation(child.top)
        examined.manifests.update(child.manifests)
        examined.blobs.update(child.blobs)
        examined.problems += child.problems
        examined.left_out += child.left_out
    if whole:
        examined.left_out += [child.top for child in absent]
    else:
        examined.problems += [each for child in absent for each in child.problems]


def _is_misnamed(described: ManifestHolder, own: ManifestHolder) -> bool:
    """Whether it is an image in every way, though it does not say so, and is called something that
    nobody knows: as that it would be whole without its layers."""
    try:
        return isinstance(described.manifest, OtherManifest) and not isinstance(
            own.manifest, OtherManifest
        )
    except MalformedManifest:
        return False
