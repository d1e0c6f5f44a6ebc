"""GET and HEAD /v2/<name>/blobs/<digest>."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from ociproxy.oci.digest import Digest
from ociproxy.serve.answer import Answer, matches
from ociproxy.serve.blob_response import BlobResponse, requested_range
from ociproxy.serve.errors import range_response

if TYPE_CHECKING:
    from ociproxy.fetch.cache_status import CacheStatus
    from ociproxy.fetch.engine import Engine
    from ociproxy.serve.path import DistributionPath


async def blob(engine: Engine, request: web.BaseRequest, target: DistributionPath) -> Answer:
    """Stored or arriving, whole or one range of it."""
    digest = Digest.parse(target.last)
    headers = {
        "Docker-Content-Digest": str(digest),
        "ETag": f'"{digest}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    if request.method == "HEAD":
        size, outcome = await engine.blobs.size(target.repository, digest)
        if matches(request, digest):
            return _not_modified(headers, outcome, digest)
        headers["Content-Length"] = str(size)
        return Answer(web.Response(headers=headers), outcome, digest)
    source, outcome = await engine.blobs.pull(target.repository, digest)
    response = BlobResponse(source, headers)
    if matches(request, digest):
        response.close()
        return _not_modified(headers, outcome, digest)
    wanted = requested_range(request, source.size)
    if wanted is None:
        response.close()
        return Answer(range_response(source.size), outcome, digest)
    response.limit_to(*wanted)
    return Answer(response, outcome, digest)


def _not_modified(headers: dict[str, str], outcome: CacheStatus, digest: Digest) -> Answer:
    del headers["Content-Type"]
    return Answer(web.Response(status=304, headers=headers), outcome, digest)
