"""GET /v2/<name>/tags/list and /v2/<name>/referrers/<digest>."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web
from yarl import URL

from ociproxy.fetch.tags import TagsQuery
from ociproxy.serve.errors import QueryInvalid
from ociproxy.serve.exchange import Answer

if TYPE_CHECKING:
    from ociproxy.fetch.backend import Listing
    from ociproxy.fetch.cache_status import CacheStatus
    from ociproxy.fetch.engine import Engine
    from ociproxy.serve.exchange import DistributionPath, ReferrersPath, TagsPath


async def tags(engine: Engine, request: web.BaseRequest, target: TagsPath) -> Answer:
    count = target.query.get("n")
    if count is not None and not (count.isascii() and count.isdecimal() and len(count) < 10):
        raise QueryInvalid(f"n={count[:50]!r} is not a count of tags")
    query = TagsQuery(None if count is None else int(count), target.query.get("last", ""))
    return _answer(request, target, *await engine.listings.tags(target.repository, query))


async def referrers(engine: Engine, request: web.BaseRequest, target: ReferrersPath) -> Answer:
    artifact_type = target.query.get("artifactType", "")
    found = await engine.listings.referrers(target.repository, target.subject, artifact_type)
    return _answer(request, target, *found)


def _answer(
    request: web.BaseRequest, target: DistributionPath, listing: Listing, status: CacheStatus
) -> Answer:
    headers = {"Content-Type": listing.media_type}
    if listing.next_query:
        # The client asks this server for the next page, under the path and `ns` of this one.
        following = URL(request.path).with_query(listing.next_query)
        if target.namespace is not None:
            following = following.update_query(ns=target.namespace)
        headers["Link"] = f'<{following}>; rel="next"'
    if listing.filters_applied:
        headers["OCI-Filters-Applied"] = listing.filters_applied
    return Answer(web.Response(body=listing.raw, headers=headers), status)
