"""What a handler hands back: a response, and what the log and the `Cache-Status` header say of
it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from aiohttp import web

    from ociproxy.fetch.cache_status import CacheStatus
    from ociproxy.oci.digest import Digest

API_VERSION: Final = ("Docker-Distribution-Api-Version", "registry/2.0")


class Answer(NamedTuple):
    response: web.StreamResponse
    outcome: CacheStatus
    digest: Digest | None = None


def matches(request: web.BaseRequest, digest: Digest) -> bool:
    """Whether the client already has these bytes (If-None-Match with the digest as its ETag)."""
    if "If-None-Match" not in request.headers:
        return False
    tags = request.if_none_match or ()
    return any(tag.value in ("*", str(digest)) for tag in tags)
