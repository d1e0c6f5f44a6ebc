"""What is cached, reference by reference: for `list`, and for commands that choose images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ociproxy.oci.reference import Reference
from ociproxy.store.image import read_contents, roots

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.image import Missing, ReachedImage
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


def inventory(store: Store) -> Iterator[Entry]:
    """All that is cached, in order. Reads the store on the way, and records no use."""
    for reference, descriptor, resolved in references(store):
        found = read_contents(store, reference.repository, descriptor)
        digest = descriptor.digest
        yield Entry(
            reference,
            digest,
            tuple(found.images),
            tuple(found.missing.values()),
            tuple(each.digest for each in found.unstored_attestations),
            found.size,
            {each.digest: each.size for each in found.manifests.values()} | found.blobs,
            resolved,
            store.manifests.last_used(digest),
        )


def references(store: Store) -> Iterator[tuple[Reference, Descriptor, float | None]]:
    """Each repository's tags, with the time of their last resolution (epoch seconds), then its
    images that no tag reaches, by digest."""
    for repository in store.refs.repositories():
        yield from references_in(store, repository)


def references_in(
    store: Store, repository: Repository
) -> Iterator[tuple[Reference, Descriptor, float | None]]:
    """The same of one repository."""
    for tag in store.refs.tags(repository):
        record = store.refs.find_tag(repository, tag)
        if record is not None:
            yield Reference(repository, tag), record.descriptor, record.resolved
    for descriptor in roots(store, repository):
        yield Reference(repository, digest=descriptor.digest), descriptor, None
