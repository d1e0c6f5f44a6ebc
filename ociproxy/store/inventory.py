"""What is cached, reference by reference: for `list`, and for whoever chooses among images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ociproxy.oci.reference import Reference
from ociproxy.store.image import read_contents, roots

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.store.image import Missing, ReachedImage
    from ociproxy.store.store import Store


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached tag, or an image that is there by digest only and so has no `resolved`. `size`
    counts the stored bytes it reaches, each blob once; times are epoch seconds."""

    reference: Reference
    digest: Digest
    images: tuple[ReachedImage, ...]
    missing: tuple[Missing, ...]
    size: int
    resolved: float | None
    last_used: float | None

    @property
    def complete(self) -> bool:
        """Whether at least one platform is there, and each that is there is whole."""
        return not self.missing


def inventory(store: Store) -> Iterator[Entry]:
    """Everything cached, in order; reads the store as it goes and records no use."""
    for reference, descriptor, resolved in references(store):
        found = read_contents(store, reference.repository, descriptor)
        digest = descriptor.digest
        yield Entry(
            reference,
            digest,
            tuple(found.images),
            tuple(found.missing.values()),
            found.size,
            resolved,
            store.manifests.last_used(digest),
        )


def references(store: Store) -> Iterator[tuple[Reference, Descriptor, float | None]]:
    """What there is to name, with when a tag was resolved: of each repository its tags, then the
    images that no tag leads to, by digest."""
    for repository in store.refs.repositories():
        for tag in store.refs.tags(repository):
            record = store.refs.find_tag(repository, tag)
            if record is not None:
                yield Reference(repository, tag), record.descriptor, record.resolved
        for descriptor in roots(store, repository):
            yield Reference(repository, digest=descriptor.digest), descriptor, None
