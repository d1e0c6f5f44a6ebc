"""What is cached, reference by reference: for `list`, and for commands that choose images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ociproxy.oci.descriptor import MalformedManifest, is_generic
from ociproxy.oci.image import ImageWalk
from ociproxy.oci.manifest import Index
from ociproxy.oci.reference import Reference
from ociproxy.store.image import read_contents
from ociproxy.store.look import Look

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.image import Missing, ReachedImage
    from ociproxy.store.look import SeenManifest
    from ociproxy.store.store import Store


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached tag, or an image that no tag reaches: its reference has the digest, and `resolved`
    is None. `unstored_attestations` are those that clients may ask for with the stored images,
    which are complete without them. `size` is the stored bytes, each blob counted once; times are
    epoch seconds."""

    reference: Reference
    digest: Digest
    images: tuple[ReachedImage, ...]
    missing: tuple[Missing, ...]
    unstored_attestations: tuple[Digest, ...]
    size: int
    contents: dict[Digest, int]
    """Bytes of each stored manifest and blob."""
    resolved: float | None
    last_used: float | None

    @property
    def complete(self) -> bool:
        """Whether at least one platform is stored, and each stored one is whole."""
        return not self.missing


def inventory(store: Store, look: Look | None = None) -> Iterator[Entry]:
    """All that is cached, in order. Reads the store on the way, and records no use."""
    look = look or Look(store)
    for reference, descriptor, resolved in references(store, look):
        repository = reference.repository
        found = read_contents(store, repository, descriptor, look=look)
        used = found.used
        if any(look.referrers(repository, each) for each in found.manifests):
            # What refers to an image is no part of it here, but is used and pruned with it.
            used = read_contents(store, repository, descriptor, referrers=True, look=look).used
        yield Entry(
            reference,
            descriptor.digest,
            tuple(found.images),
            tuple(found.missing.values()),
            tuple(each.digest for each in found.unstored_attestations),
            found.size,
            found.sizes,
            resolved,
            used or None,
        )


def references(
    store: Store, look: Look | None = None
) -> Iterator[tuple[Reference, Descriptor, float | None]]:
    """Each repository's tags, with the time of their last resolution (epoch seconds), then its
    images that no tag reaches, by digest. Raises StoreError; without a `look`, which says what
    cannot be read, also for that."""
    look = look or Look(store, strict=True)
    for repository in store.refs.repositories():
        yield from references_in(store, repository, look)


def references_in(
    store: Store, repository: Repository, look: Look
) -> Iterator[tuple[Reference, Descriptor, float | None]]:
    """The same of one repository."""
    tops: list[Descriptor] = []
    for tag in store.refs.tags(repository):
        record = look.ask(store.refs.find_tag, repository, tag)
        if record is not None:
            tops.append(record.descriptor)
            yield Reference(repository, tag), record.descriptor, record.resolved
    for descriptor in _roots(store, repository, tops, look):
        yield Reference(repository, digest=descriptor.digest), descriptor, None


def is_only_named(store: Store, repository: Repository, top: Descriptor) -> bool:
    """Whether nothing came of an image but its tag, by a HEAD. A manifest that was stored and is
    gone or damaged has left its record. Raises StoreError."""
    return (
        store.refs.find_manifest(repository, top.digest) is None
        and store.manifests.find(top.digest, use=False) is None
    )


def _roots(
    store: Store, repository: Repository, tops: Sequence[Descriptor], look: Look
) -> Iterator[Descriptor]:
    """Stored manifests of a repository that neither the tops of its tags nor its other manifests
    reach.

    A client asked for such an image by digest, or its tag has moved. A referrer is a root only
    where its subject is not stored. Raises StoreError.
    """
    reachable: set[Digest] = set()
    for top in tops:
        reachable.add(top.digest)
        reachable.update(_below(look, top))
    loose: dict[Digest, Descriptor] = {}
    for digest in store.refs.manifests(repository):
        if digest in reachable:
            continue
        described = look.ask(store.refs.find_manifest, repository, digest)
        found = None if described is None else look.manifest(described)
        if described is None or found is None:
            continue
        reachable.update(_below(look, described))
        if not _is_referrer(look, found):
            loose[digest] = described
    yield from (each for digest, each in loose.items() if digest not in reachable)


def _below(look: Look, top: Descriptor) -> set[Digest]:
    """The digests that an index reaches, stored or not."""

    def children(descriptor: Descriptor) -> Sequence[Descriptor]:
        # No document of another media type is taken for an index: a look-up is saved.
        if not (descriptor.is_index or is_generic(descriptor.media_type)):
            return ()
        found = look.manifest(descriptor)
        manifest = None if found is None else found.parsed
        return manifest.children if isinstance(manifest, Index) else ()

    walk = ImageWalk(top)
    while walk.level:
        walk.advance([children(each) for each in walk.level])
    return {each.digest for each in walk.reached.values()} - {top.digest}


def _is_referrer(look: Look, seen: SeenManifest) -> bool:
    if isinstance(seen.parsed, MalformedManifest):
        return False
    subject = seen.parsed.subject
    return subject is not None and look.manifest(subject) is not None
