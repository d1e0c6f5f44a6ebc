"""Lists, passed on: the tags of a repository and the referrers of a manifest.

The upstream's answer is passed on as it comes; where the upstream fails, the list is made of what
the store has. Referrers follow the distribution-spec (listing referrers): where the upstream lacks
that API, whatever it answers there, its fallback tag is read, and the answer is never a 404.

Tests: tests/serve/test_lists.py.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode

from ociproxy import log
from ociproxy.errors import (
    ManifestUnknown,
    NameUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamInvalid,
)
from ociproxy.fetch.backend import NO_SUCH_LISTING, Listing
from ociproxy.fetch.cache_status import HIT, PASSED_ON, CacheStatus, stale_because
from ociproxy.fetch.tags import TagsQuery, page_of_tags
from ociproxy.oci.descriptor import INDEX_MEDIA_TYPES, OCI_INDEX, Descriptor, MalformedManifest
from ociproxy.oci.manifest import json_object, media_type_of
from ociproxy.oci.reference import Reference, referrers_tag

if TYPE_CHECKING:
    from ociproxy.fetch.manifests import ManifestPuller
    from ociproxy.fetch.upstreams.requests import Requests
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.fetch.upstreams.upstreams import Upstreams
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_FILTER = "artifactType"


class ListingPuller:
    """Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        upstreams: Upstreams,
        requests: Requests,
        manifests: ManifestPuller,
        threads: StoreThreads,
    ) -> None:
        self._store = store
        self._upstreams = upstreams
        self._requests = requests
        self._manifests = manifests
        self._threads = threads

    async def tags(self, repository: Repository, query: str) -> tuple[Listing, CacheStatus]:
        """The query is passed on as it is. Raises NameUnknown, UpstreamError kinds, StoreError, or
        Busy where as many requests wait as may."""
        async with self._upstreams.answer_time(repository.registry):
            return await self._tags(repository, query)

    async def referrers(
        self, repository: Repository, subject: Digest, artifact_type: str, query: str
    ) -> tuple[Listing, CacheStatus]:
        """An index of what refers to the subject, empty where no referrer is known. The query, of
        which `artifact_type` is a part, is passed on as it is.

        Raises StoreError, or UpstreamUnavailable where the answer takes too long.
        """
        async with self._upstreams.answer_time(repository.registry):
            return await self._referrers(repository, subject, artifact_type, query)

    async def _tags(self, repository: Repository, query: str) -> tuple[Listing, CacheStatus]:
        page = TagsQuery.parse(query)
        if self._upstreams.offline:
            if not self._store.refs.has_repository(repository):
                self._upstreams.check_online(NameUnknown, str(repository))
            return page_of_tags(repository, await self._cached_tags(repository), page), HIT
        try:
            return await self._ask(repository, "tags/list", query), PASSED_ON
        except (NameUnknown, UpstreamDenied, UpstreamInvalid):
            raise  # the upstream was asked, and the cached tags may be few of those that it has
        except OciProxyError as exc:
            cached = await self._cached_tags(repository) if page.is_whole else []
            if not cached:
                raise
            log.event(logging.WARNING, "serving stale", reference=repository, reason=exc)
            return page_of_tags(repository, cached, page), stale_because(exc)

    async def _cached_tags(self, repository: Repository) -> list[str]:
        return await self._threads.run(lambda: self._store.refs.tags(repository))

    async def _referrers(
        self, repository: Repository, subject: Digest, artifact_type: str, query: str
    ) -> tuple[Listing, CacheStatus]:
        if self._upstreams.offline:
            return await self._cached(repository, subject, artifact_type), HIT
        try:
            listing = await self._ask(repository, f"referrers/{subject}", query)
        except NO_SUCH_LISTING as exc:
            return await self._fallback(repository, subject, artifact_type, exc)
        except OciProxyError as exc:
            return await self._stale(repository, subject, artifact_type, exc)
        following = listing.next_query
        if artifact_type and following and _FILTER not in parse_qs(following):
            following += f"&{urlencode({_FILTER: artifact_type})}"
            listing = replace(listing, next_query=following)
        if artifact_type and _FILTER not in listing.filters_applied:
            return _filtered(listing, artifact_type), PASSED_ON
        return listing, PASSED_ON

    async def _cached(self, repository: Repository, subject: Digest, artifact_type: str) -> Listing:
        """What the store has recorded; where that is nothing, what the stored fallback tag lists,
        so that a client hears of referrers that are not stored. In a thread: there may be many
        records, and each is a file."""

        def read() -> Listing:
            found = self._store.refs.referrers(repository, subject)
            if not found:
                tagged = self._manifests.find_stored(Reference(repository, referrers_tag(subject)))
                found = (_listed(tagged.raw) if tagged else None) or []
            return _index(found, artifact_type)

        return await self._threads.run(read)

    async def _ask(self, repository: Repository, path: str, query: str) -> Listing:
        return await self._requests.call(
            repository,
            ("listing", repository, path, query),
            lambda backend: backend.fetch_listing(repository, path, query),
        )

    async def _stale(
        self, repository: Repository, subject: Digest, artifact_type: str, error: OciProxyError
    ) -> tuple[Listing, CacheStatus]:
        reference = f"{repository}@{subject}"
        log.event(logging.WARNING, "serving stale", reference=reference, reason=error)
        return await self._cached(repository, subject, artifact_type), stale_because(error)

    async def _fallback(
        self, repository: Repository, subject: Digest, artifact_type: str, error: OciProxyError
    ) -> tuple[Listing, CacheStatus]:
        """`error` is what the referrers API was answered with."""
        try:
            reference = Reference(repository, referrers_tag(subject))
            answer = await self._manifests.pull(reference, body=True)
        except (ManifestUnknown, NameUnknown):
            if isinstance(error, NameUnknown):
                return _index([], artifact_type), PASSED_ON
            # Neither says that there are none.
            return await self._stale(repository, subject, artifact_type, error)
        except OciProxyError as exc:
            return await self._stale(repository, subject, artifact_type, exc)
        listing = Listing(answer.raw or b"", answer.descriptor.media_type)
        return _filtered(listing, artifact_type), answer.status


def _filtered(listing: Listing, artifact_type: str) -> Listing:
    """The index without entries of other artifact types; an empty one for what is no index."""
    listed = _listed(listing.raw)
    if listed is not None and not artifact_type:
        return listing
    return _index(listed or [], artifact_type, listing.next_query)


def _listed(raw: bytes) -> list[Descriptor] | None:
    """The entries of an index that can be read; None for what is no index."""
    try:
        document = json_object(raw)
    except MalformedManifest:
        return None
    values = document.get("manifests")
    if media_type_of(document) not in INDEX_MEDIA_TYPES or not isinstance(values, list):
        return None
    found = []
    for value in values:
        with suppress(MalformedManifest):
            found.append(Descriptor.from_json(value))
    return found


def _index(descriptors: list[Descriptor], artifact_type: str, next_query: str = "") -> Listing:
    chosen = [d for d in descriptors if not artifact_type or d.artifact_type == artifact_type]
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [descriptor.to_json() for descriptor in chosen],
    }
    return Listing(
        json.dumps(document).encode(),
        OCI_INDEX,
        next_query=next_query,
        filters_applied=_FILTER if artifact_type else "",
    )
