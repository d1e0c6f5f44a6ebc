"""Which images of a store an archive is made of, and what each of them reaches."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from ociproxy.errors import ConfigError, DigestMismatch, Incomplete, ManifestUnknown, NothingMatches
from ociproxy.oci.reference import Reference
from ociproxy.store.image import read_contents
from ociproxy.store.inventory import references

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ociproxy.archive.lock import Lock
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.platform import Platform
    from ociproxy.store.image import ImageContents, ReachedImage
    from ociproxy.store.store import Store

_TAG_OF_SUBJECT: Final = re.compile(r"(?P<algorithm>sha256|sha512)-(?P<hex>[a-f0-9]{64,128})")
"""How tags begin that stand for the referrers API, or that cosign puts signatures under
(distribution-spec, referrers tag schema)."""

_REMEDY: Final = (
    "load them again, leave them out, or export with --allow-partial, which records the gaps"
)


@dataclass(frozen=True, slots=True)
class Wish:
    """An image to take, and the platforms to take of it: all that is stored where it names none."""

    reference: Reference
    descriptor: Descriptor
    platforms: tuple[Platform, ...] = ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """An image that goes into the archive; the reference has a tag, or else a digest.

    `flattened_from` is the index that its one platform was taken from.
    """

    reference: Reference
    contents: ImageContents
    flattened_from: Digest | None = None


def by_patterns(
    store: Store, patterns: Sequence[str], platforms: tuple[Platform, ...]
) -> Iterator[Wish]:
    """What is cached and matches a glob on the reference; everything without one.

    Raises NothingMatches, also where nothing is stored.
    """
    unused = set(patterns)
    found = False
    for reference, descriptor, _ in references(store):
        matching = [pattern for pattern in patterns if fnmatchcase(str(reference), pattern)]
        if matching or not patterns:
            found = True
            unused.difference_update(matching)
            yield Wish(reference, descriptor, platforms)
    if unused:
        raise NothingMatches(min(unused))
    if not found:
        raise NothingMatches(None)


def by_references(
    store: Store, wanted: Iterable[tuple[Reference, tuple[Platform, ...]]]
) -> Iterator[Wish]:
    """Raises ManifestUnknown for what the store does not have, DigestMismatch for a tag that has
    another digest than the reference says."""
    for reference, platforms in wanted:
        repository, tag, digest = reference.repository, reference.tag, reference.digest
        descriptor: Descriptor | None = None
        if tag is not None:
            record = store.refs.find_tag(repository, tag)
            descriptor = None if record is None else record.descriptor
        elif digest is not None:
            descriptor = store.refs.find_manifest(repository, digest)
        if descriptor is None:
            raise ManifestUnknown(reference, "not stored; load it first")
        if digest not in (None, descriptor.digest):
            raise DigestMismatch(f"stored {repository}:{tag}", digest, descriptor.digest)
        name = replace(reference, digest=None) if tag is not None else reference
        yield Wish(name, descriptor, platforms)


def by_lock(lock: Lock, platforms: tuple[Platform, ...]) -> Iterator[Wish]:
    """The locked digests, whatever their tags stand for by now."""
    for image in lock.images:
        reference = image.reference
        name = replace(reference, digest=None) if reference.tag is not None else reference
        yield Wish(name, image.descriptor, platforms or image.platforms)


def reach(
    store: Store, wishes: Iterable[Wish], *, referrers: bool, allow_partial: bool
) -> list[Chosen]:
    """The images with all they consist of, in order. `referrers` takes in what refers to them,
    also by the tags that older tools use. Raises Incomplete unless `allow_partial`."""
    chosen: dict[Reference, Chosen] = {}
    waiting = list(wishes)
    while waiting:
        wish = waiting.pop()
        if wish.reference in chosen:
            continue
        repository = wish.reference.repository
        found = read_contents(
            store, repository, wish.descriptor, wish.platforms, referrers=referrers
        )
        chosen[wish.reference] = Chosen(wish.reference, found)
        if referrers:
            waiting.extend(_tagged_referrers(store, wish.reference, found))
    ordered = sorted(chosen.values(), key=lambda each: str(each.reference))
    gaps = {
        str(each.reference): [str(missing) for missing in each.contents.missing.values()]
        for each in ordered
        if not each.contents.complete
    }
    if gaps and not allow_partial:
        raise Incomplete(gaps, _REMEDY)
    return ordered


def flatten(store: Store, chosen: Iterable[Chosen], *, referrers: bool) -> Iterator[Chosen]:
    """Images of one platform in place of indexes, for tools that want no index.

    Raises ConfigError for an index of which several platforms were chosen. An index of anything
    but images stays.
    """
    for each in chosen:
        top = each.contents.top
        images = [image for image in each.contents.images if _is_for_a_machine(image)]
        if top.digest in {image.digest for image in images} or not images:
            yield each
            continue
        if len(images) > 1:
            names = " and ".join(str(image.platform) for image in images)
            raise ConfigError(
                f"{each.reference} has {names}: an archive of this format has one platform of "
                "each image, so choose one",
                key="--platform",
            )
        [image] = images
        child = replace(each.contents.manifests[image.digest], platform=image.platform)
        repository, tag = each.reference.repository, each.reference.tag
        yield Chosen(
            Reference(repository, tag) if tag else Reference(repository, digest=child.digest),
            read_contents(store, repository, child, referrers=referrers),
            flattened_from=top.digest,
        )


def _is_for_a_machine(image: ReachedImage) -> bool:
    platform = image.platform
    return platform is not None and platform.os != "unknown"


def _tagged_referrers(store: Store, reference: Reference, found: ImageContents) -> Iterator[Wish]:
    repository = reference.repository
    for tag in store.refs.tags(repository):
        match = _TAG_OF_SUBJECT.match(tag)
        if match is None or not _names(match, found.manifests):
            continue
        record = store.refs.find_tag(repository, tag)
        if record is not None:
            yield Wish(Reference(repository, tag), record.descriptor)


def _names(match: re.Match[str], manifests: Iterable[Digest]) -> bool:
    # A sha512's hex does not fit a tag and is cut.
    return any(
        digest.algorithm == match["algorithm"] and digest.encoded.startswith(match["hex"])
        for digest in manifests
    )
