"""GET and HEAD /v2/<name>/manifests/<tag or digest>."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from ociproxy.oci.reference import Reference
from ociproxy.serve.answer import Answer, matches

if TYPE_CHECKING:
    from ociproxy.fetch.engine import Engine
    from ociproxy.fetch.manifests import ManifestAnswer
    from ociproxy.serve.path import DistributionPath


def stored_manifest(
    engine: Engine, request: web.BaseRequest, reference: Reference
) -> Answer | None:
    """The answer where it is at hand: most requests, which nothing here may slow down."""
    found = engine.manifests.find(reference, body=request.method == "GET")
    return None if found is None else _respond(request, found)


async def manifest(engine: Engine, request: web.BaseRequest, target: DistributionPath) -> Answer:
    """The upstream's exact bytes under its media type."""
    reference = Reference.of(target.repository, target.last)
    body = request.method == "GET"
    return _respond(request, await engine.manifests.pull(reference, body=body))


def _respond(request: web.BaseRequest, answer: ManifestAnswer) -> Answer:
    descriptor = answer.descriptor
    digest = str(descriptor.digest)
    headers = {"Docker-Content-Digest": digest, "ETag": f'"{digest}"'}
    if matches(request, descriptor.digest):
        return Answer(web.Response(status=304, headers=headers), answer.status, descriptor.digest)
    headers["Content-Type"] = descriptor.media_type
    if answer.raw is None and descriptor.size:
        headers["Content-Length"] = str(descriptor.size)
    response = web.Response(body=answer.raw, headers=headers)
    return Answer(response, answer.status, descriptor.digest)
