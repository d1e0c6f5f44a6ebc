"""GET and HEAD /v2/<name>/manifests/<tag or digest>."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from ociproxy.serve.exchange import Answer, client_has

if TYPE_CHECKING:
    from ociproxy.fetch.engine import Engine
    from ociproxy.serve.exchange import ManifestPath


async def manifest(engine: Engine, request: web.BaseRequest, target: ManifestPath) -> Answer:
    """The upstream's exact bytes under its media type. A fresh stored manifest is answered without
    a task switch: most requests are for one."""
    found = await engine.manifests.pull(target.reference, body=request.method == "GET")
    descriptor = found.descriptor
    digest = str(descriptor.digest)
    headers = {"Docker-Content-Digest": digest, "ETag": f'"{digest}"'}
    if client_has(request, descriptor.digest):
        return Answer(web.Response(status=304, headers=headers), found.status, descriptor.digest)
    headers["Content-Type"] = descriptor.media_type
    if found.raw is None and descriptor.size:
        headers["Content-Length"] = str(descriptor.size)
    response = web.Response(body=found.raw, headers=headers)
    return Answer(response, found.status, descriptor.digest)
