"""`why`: what the store has of a reference, which rules apply, and what the next request would do.

The store and the configuration alone answer. What a running server keeps in memory, such as that an
upstream is left alone just now, is not known here.
Tests: tests/cli/test_why_command.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ociproxy.load.pins import all_pins, listed_images
from ociproxy.load.sync import last_run
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.image import is_attestation, platforms_of
from ociproxy.oci.manifest import Index
from ociproxy.oci.reference import DEFAULT_TAG, Reference
from ociproxy.store.files import file_name
from ociproxy.store.image import read_contents
from ociproxy.store.inventory import is_only_named
from ociproxy.store.membership import Membership
from ociproxy.store.pruning.pins import Pins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.config.schedule import Sync
    from ociproxy.config.settings import Config
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.platform import Platform
    from ociproxy.store.image import ImageContents
    from ociproxy.store.pruning.pins import Pin
    from ociproxy.store.store import Store

State = Literal["whole", "incomplete", "only the tag", "damaged", "withheld", "absent", "blob"]
"""Of a manifest and what it needs. `only the tag` is known from a HEAD; a `damaged` manifest does
not match its digest; a `withheld` one is stored for other repositories only, which are isolated.
A digest may also be that of a stored `blob`."""


@dataclass(slots=True)
class Explanation:
    """Times are seconds since the epoch, sizes are bytes."""

    reference: Reference
    state: State = "absent"
    digest: Digest | None = None
    contents: ImageContents | None = None
    absent_platforms: tuple[Platform, ...] = ()
    """Those that the index offers, and of which the store has nothing."""
    last_used: float | None = None
    """Of any part of the image, as `list` and `prune` have it."""
    resolved: float | None = None
    ttl: float | None = None
    """Seconds that the tag is fresh after it was resolved; None is for ever, as for a digest."""
    ttl_rule: str = ""
    """The key of the configuration that says so; empty for a digest."""
    expired: bool = False
    clock_set_back: bool = False
    """Whether the tag was resolved later than it is now: then it counts as expired, too."""
    refusal: str | None = None
    """Why no request for it is answered, stored or not."""
    upstream: tuple[str, ...] = ()
    """The URLs at which the upstream is asked; none where that is forbidden."""
    unasked: str | None = None
    """Why the upstream is not asked."""
    listed: bool = False
    blob_size: int | None = None
    """Where it is a stored blob."""
    same: list[Reference] = field(default_factory=list)
    """Other tags that mean the same digest."""
    within: list[Digest] = field(default_factory=list)
    """Indexes of the repository that list it."""
    left_out: bool = False
    """Whether `same` and `within` may lack some, for there were too many to look at."""
    next_sync: list[tuple[str, float]] = field(default_factory=list)
    """Entries of `sync` that name the tag, and when the next run of each is due."""
    steps: list[str] = field(default_factory=list)
    """What the next request would do, a sentence each."""

    @property
    def is_served(self) -> bool:
        """Whether the manifest is answered from the store."""
        return self.refusal is None and self.contents is not None


def explain(
    store: Store, config: Config, reference: Reference, *, now: float, most: int | None = None
) -> Explanation:
    """Explain one reference; of a tag with a digest the digest, as clients ask for that. Blocks: it
    reads the records of all tags, and the manifests of the repository, but `most` of each at most.
    Raises StoreError, or ConfigError for a list of `sync` that cannot be read."""
    if reference.digest is not None:
        reference = Reference(reference.repository, digest=reference.digest)
    found = Explanation(reference)
    _add_rules(found, config)
    _add_content(found, store, config, now)
    if found.digest is not None:
        found.same = list(_same(found, store, found.digest, most))
        found.within = list(_within(found, store, found.digest, most))
    for sync in config.sync:
        if _names(sync, reference):
            found.next_sync.append((str(sync), sync.next_run(last_run(store, sync), now)))
    found.steps = list(_steps(found, config))
    return found


def _names(sync: Sync, reference: Reference) -> bool:
    if isinstance(sync.images, tuple):
        return any(map(reference.matches, sync.images))
    listed = (each.reference for each in listed_images(sync.images))
    return any(
        each.repository == reference.repository
        and (each.tag == reference.tag if each.tag else each.digest == reference.digest)
        for each in listed
    )


def pins_of(found: Explanation, store: Store, config: Config) -> list[Pin]:
    """Those that keep it. Blocks. Raises ConfigError for a list of the configuration that cannot be
    read, LockInvalid or StoreError."""
    if found.digest is None:
        return []
    met = (found.reference, found.digest)
    return [pin for pin in all_pins(store, config) if Pins([pin]).match(*met)]


def _add_rules(found: Explanation, config: Config) -> None:
    reference = found.reference
    registry = reference.repository.registry
    found.refusal = config.repository_refusal(reference.repository)
    entry = config.upstreams.get(registry)
    found.listed = entry is not None
    if config.serve.offline:
        found.unasked = "this mirror is offline"
    elif entry is None and config.fetch.unlisted.policy == "deny":
        found.unasked = f"{registry} has no entry in upstreams, and fetch.unlisted is deny"
    else:
        each = (entry or config.unlisted_upstream(registry)).each_endpoint
        found.upstream = tuple(url for endpoint in each for url in endpoint.urls)
    if reference.tag is not None:
        found.ttl = config.tag_ttl(reference)
        rule = config.tag_rule(reference)
        found.ttl_rule = "fetch.tag_ttl" if rule is None else f'tags has "{rule.match}"'


def _add_content(found: Explanation, store: Store, config: Config, now: float) -> None:
    reference, top = found.reference, _top(found, store, now)
    if top is None:
        if reference.digest is not None:
            _add_blob(found, store, config, reference.digest)
        return
    repository, found.digest = reference.repository, top.digest
    if store.manifests.find(top.digest, use=False) is None:
        if any((each / file_name(top.digest)).exists() for each in store.manifests.folders):
            found.state = "damaged"
        elif is_only_named(store, repository, top):
            found.state = "only the tag" if reference.tag else "absent"
        else:
            found.state = "absent"
        return
    if config.isolated and store.refs.find_manifest(repository, top.digest) is None:
        found.state = "withheld"
        return
    contents = found.contents = read_contents(
        store, repository, top, referrers=True, isolated=config.isolated
    )
    found.last_used = contents.used or None
    found.state = "whole" if contents.complete else "incomplete"
    absent = (each for each in contents.unstored.values() if not is_attestation(each))
    found.absent_platforms = platforms_of(each.platform for each in absent)


def _add_blob(found: Explanation, store: Store, config: Config, digest: Digest) -> None:
    size = store.blobs.find_size(digest)
    if size is None:
        return
    members = Membership(store.refs, store.manifests, store.below)
    if config.isolated and not members.read(found.reference.repository, digest):
        found.state = "withheld"
    else:
        found.state, found.blob_size = "blob", size


def _top(found: Explanation, store: Store, now: float) -> Descriptor | None:
    reference = found.reference
    if reference.digest is not None:
        holder = store.manifests.find(reference.digest, use=False)
        own = store.refs.find_manifest(reference.repository, reference.digest)
        return own or (None if holder is None else holder.descriptor)
    record = store.refs.find_tag(reference.repository, reference.tag or DEFAULT_TAG)
    if record is None:
        return None
    found.resolved = record.resolved
    # As the server: a record of the future is one of a clock that was set back.
    found.expired = found.ttl is not None and abs(now - record.resolved) >= found.ttl
    found.clock_set_back = found.expired and record.resolved > now
    return record.descriptor


def _same(
    found: Explanation, store: Store, digest: Digest, most: int | None
) -> Iterator[Reference]:
    repositories = store.refs.repositories()
    tags = ((repository, tag) for repository in repositories for tag in store.refs.tags(repository))
    for number, (repository, tag) in enumerate(tags):
        if number == most:
            found.left_out = True
            return
        record = store.refs.find_tag(repository, tag)
        other = Reference(repository, tag)
        if record is not None and record.descriptor.digest == digest and other != found.reference:
            yield other


def _within(found: Explanation, store: Store, digest: Digest, most: int | None) -> Iterator[Digest]:
    for number, each in enumerate(store.refs.manifests(found.reference.repository)):
        if number == most:
            found.left_out = True
            return
        holder = store.manifests.peek(each)
        try:
            manifest = None if holder is None else holder.manifest
        except MalformedManifest:
            continue
        if isinstance(manifest, Index) and any(e.digest == digest for e in manifest.children):
            yield each


def _steps(found: Explanation, config: Config) -> Iterator[str]:
    """A request for the manifest, then those for what it needs."""
    url = " or ".join(found.upstream)
    if found.refusal is not None:
        yield f"403 DENIED: {found.refusal}."
        return
    if found.state == "blob":
        yield "The blob is answered from the store, and no upstream is asked about it."
        return
    if not found.is_served:
        if found.unasked is not None:
            yield f"{_refused(config)}: the store cannot answer, and {found.unasked}."
        else:
            yield f"The manifest is fetched from {url}, verified, stored and answered."
            yield "What the upstream refuses or does not have is answered 403 or 404."
        return
    if not found.expired or config.serve.offline:
        yield "The manifest is answered from the store, and no upstream is asked about it."
    elif found.unasked is not None:
        yield f"The stored manifest is answered as stale: {found.unasked}."
    else:
        limit, pause = config.fetch.timeouts.revalidate, config.fetch.pause
        yield f"One HEAD asks {url} whether the tag has moved; if so, the new manifest is fetched."
        yield (
            f"Where the upstream fails, refuses or takes longer than {limit:g} s, the stored "
            f"manifest is answered as stale, and the upstream is not asked again for {pause:g} s."
        )
    yield from _parts(found, config, url)


def _parts(found: Explanation, config: Config, url: str) -> Iterator[str]:
    """What becomes of requests for what is not stored of the image."""
    missing = found.contents.missing.values() if found.contents else ()
    blobs = [each.descriptor.size for each in missing if each.is_blob]
    others = ", ".join(map(str, found.absent_platforms))
    if blobs:
        what = f"({len(blobs)}, {sum(blobs)} bytes in all)"
        if found.unasked is not None:
            yield f"A client that needs one of the missing blobs {what} gets {_refused(config)}."
        else:
            when = (
                "for the manifest that needs them" if config.fetch.background_fills else "for them"
            )
            yield f"The missing blobs {what} are fetched from {url} when a client asks {when}."
    if others and found.unasked is not None:
        yield f"A client of {others} gets {_refused(config)}: nothing is stored for it."
    elif others:
        yield f"What a client of {others} needs is fetched from {url} when it asks."


def _refused(config: Config) -> str:
    """The answer where the store lacks something and the upstream is not asked."""
    return "404" if config.serve.offline else "403 DENIED"
