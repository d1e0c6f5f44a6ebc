"""Which images of a store go into an archive, and everything that each of them consists of.

Tests: tests/archive/export/test_export.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ociproxy.errors import ConfigError, DigestMismatch, Incomplete, ManifestUnknown, NothingMatches
from ociproxy.oci.image import choose
from ociproxy.oci.manifest import Index
from ociproxy.oci.reference import Reference, subject_prefix
from ociproxy.store.image import read_contents
from ociproxy.store.inventory import is_only_named, references
from ociproxy.store.look import Look

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ociproxy.archive.lock import Lock
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.platform import Platform
    from ociproxy.oci.reference import Repository
    from ociproxy.store.image import ImageContents, ReachedImage
    from ociproxy.store.store import Store

_REMEDY: Final = (
    "load them again, leave them out, or export with --allow-partial, which records the gaps"
)


@dataclass(frozen=True, slots=True)
class Selected:
    """An image to take and its platforms; without platforms, all that are stored."""

    reference: Reference
    descriptor: Descriptor
    platforms: tuple[Platform, ...] = ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """An image that goes into the archive; its reference has a tag or a digest, never both.

    `wanted` are the platforms that were asked for. `flattened_from` is the digest of the index that
    its one platform was taken from.
    """

    reference: Reference
    contents: ImageContents
    wanted: tuple[Platform, ...] = ()
    flattened_from: Digest | None = None


def by_patterns(
    store: Store,
    patterns: Sequence[str],
    platforms: tuple[Platform, ...],
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[Selected]:
    """Cached images whose reference matches one of the globs; all of them without globs. A tag of
    which nothing was ever stored is passed over and noted, unless a pattern is its very name; so is
    an image that a moved tag left behind, unless a pattern with `@` matches it. What cannot be read
    is noted.

    Raises NothingMatches for a glob without an image, and for an empty store.
    """
    unused = set(patterns)
    found = False
    left: dict[Repository, set[Digest]] = {}
    look = Look(store)
    for reference, descriptor, _ in references(store, look):
        matching = [pattern for pattern in patterns if reference.matches(pattern)]
        if matching or not patterns:
            if str(reference) not in matching and is_only_named(
                store, reference.repository, descriptor
            ):
                note(f"{reference} is left out: clients asked what it means, and pulled nothing")
                continue
            if reference.digest is not None and not any("@" in each for each in matching):
                if reference.repository not in left:
                    left[reference.repository] = store.refs.left_behind(reference.repository)
                if reference.digest in left[reference.repository]:
                    note(f"{reference} is left out: its tag has moved. '*@*' matches such images")
                    continue
            found = True
            unused.difference_update(matching)
            yield Selected(reference, descriptor, platforms)
    for path, reason in look.unreadable.items():
        note(f"{path} cannot be read: {reason}")
    if unused:
        raise NothingMatches(min(unused))
    if not found:
        raise NothingMatches(None)


def by_references(
    store: Store, wanted: Iterable[tuple[Reference, tuple[Platform, ...]]]
) -> Iterator[Selected]:
    """Raises ManifestUnknown for an image that is not stored, DigestMismatch for a tag that the
    store has with another digest than the reference."""
    for reference, platforms in wanted:
        descriptor, digest = store.refs.find(reference), reference.digest
        if descriptor is None:
            raise ManifestUnknown(reference, "not stored; load it first")
        if digest not in (None, descriptor.digest):
            what = f"stored {reference.repository}:{reference.tag}"
            raise DigestMismatch(what, digest, descriptor.digest)
        yield Selected(_by_tag(reference), descriptor, platforms)


def by_lock(lock: Lock, platforms: tuple[Platform, ...]) -> Iterator[Selected]:
    """The digests of the lock, though their tags may have moved in the store since."""
    for image in lock.images:
        yield Selected(_by_tag(image.reference), image.descriptor, platforms or image.platforms)


def _by_tag(reference: Reference) -> Reference:
    return reference if reference.tag is None else replace(reference, digest=None)


def reach(
    store: Store, selected: Iterable[Selected], *, referrers: bool, allow_partial: bool
) -> list[Chosen]:
    """The images with all they consist of, in the order of their references. `referrers` adds
    stored signatures and the like, found by the referrers API or by the tags of older tools;
    without it such tags are left out, selected or not.

    Raises Incomplete, naming the gaps of all images, unless `allow_partial`.
    """
    chosen: dict[Reference, Chosen] = {}
    waiting = list(selected)
    while waiting:
        image = waiting.pop()
        reference = image.reference
        if reference in chosen or (not referrers and subject_prefix(reference.tag or "")):
            continue
        found = read_contents(
            store, reference.repository, image.descriptor, image.platforms, referrers=referrers
        )
        chosen[reference] = Chosen(reference, found, image.platforms)
        if referrers:
            waiting.extend(_tagged_referrers(store, reference.repository, found))
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
    """For tools that want no index: the one image of each index in its place. An index of other
    things than images stays.

    Raises ConfigError for an index of which several platforms were chosen.
    """
    for each in chosen:
        top = each.contents.top
        images = [image for image in each.contents.images if _is_runnable(image)]
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
        child = each.contents.manifests[image.digest]._replace(platform=image.platform)
        repository, tag = each.reference.repository, each.reference.tag
        yield Chosen(
            Reference(repository, tag) if tag else Reference(repository, digest=child.digest),
            read_contents(store, repository, child, referrers=referrers),
            flattened_from=top.digest,
        )


def is_of_another_platform(chosen: Chosen) -> bool:
    """Whether this is an image without an index that no wanted platform can run."""
    top, places = chosen.contents.top, chosen.contents.platforms
    if not (chosen.wanted and places) or top.digest not in {
        i.digest for i in chosen.contents.images
    }:
        return False
    itself = Index(tuple(top._replace(platform=place) for place in places))
    return not choose(itself, chosen.wanted)


def _is_runnable(image: ReachedImage) -> bool:
    """False for attestations, whose platform is `unknown/unknown`, and for unknown platforms."""
    platform = image.platform
    return platform is not None and platform.os != "unknown"


def _tagged_referrers(
    store: Store, repository: Repository, found: ImageContents
) -> Iterator[Selected]:
    for tag in store.refs.tags(repository):
        algorithm, digits = subject_prefix(tag) or ("", "")
        if not any(
            digest.algorithm == algorithm and digest.encoded.startswith(digits)
            for digest in found.manifests
        ):
            continue
        record = store.refs.find_tag(repository, tag)
        if record is not None and not is_only_named(store, repository, record.descriptor):
            yield Selected(Reference(repository, tag), record.descriptor)
