"""The main port: routes, error bodies, headers that every answer has, and the request log.

The distribution API's paths are matched from their end, so they are split in
`ociproxy.serve.path` and not by
a router's patterns; this module is what remains of an application after that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from aiohttp import web

from ociproxy import log
from ociproxy.errors import OciProxyError, StoreError, UpstreamUnavailable
from ociproxy.serve.answer import API_VERSION, Answer
from ociproxy.serve.auth import BasicAuth
from ociproxy.serve.blob_response import BlobResponse
from ociproxy.serve.blobs import blob
from ociproxy.serve.errors import (
    SERVER,
    ResponseCut,
    Unsupported,
    error_response,
    internal_error,
)
from ociproxy.serve.lists import referrers, tags
from ociproxy.serve.manifests import manifest, stored_manifest
from ociproxy.serve.path import API_VERSION_PATH, DistributionPath, Kind, parse_path

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ociproxy.config.settings import Config
    from ociproxy.fetch.engine import Engine
    from ociproxy.serve.sendfile import Senders

    Handler = Callable[[Engine, web.BaseRequest, DistributionPath], Awaitable[Answer]]

_HANDLERS: Final[dict[Kind, Handler]] = {
    Kind.MANIFEST: manifest,
    Kind.BLOB: blob,
    Kind.TAGS: tags,
    Kind.REFERRERS: referrers,
}


class RegistryApi:
    """Called by `web.Server` with each request. `auth` is None where everybody may pull."""

    def __init__(
        self, engine: Engine, config: Config, auth: BasicAuth | None, senders: Senders
    ) -> None:
        self._senders = senders
        self._use(engine, config, auth)

    def _use(self, engine: Engine, config: Config, auth: BasicAuth | None) -> None:
        self._engine = engine
        self._auth = auth
        self._default_upstream = config.serve.default_upstream
        self._answer_limit = config.fetch.timeouts.answer
        self._offline = config.serve.offline

    async def replace(self, engine: Engine, config: Config, auth: BasicAuth | None) -> None:
        """Answer from another engine from now on; returns when the old one has finished its
        work."""
        old = self._engine
        self._use(engine, config, auth)
        await old.retire()

    async def close(self) -> None:
        if self._auth is not None:
            self._auth.close()
        await self._engine.close()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path.startswith(API_VERSION_PATH) or path == "/v2":
            return await self._distribution(request)
        if path == "/healthz":
            return _text(200, "ok\n")
        if path == "/readyz":
            return await self._ready()
        return error_response(Unsupported("nothing here: the API is below /v2/", status=404))

    async def _ready(self) -> web.Response:
        try:
            if not self._offline:
                await self._engine.threads.run(self._engine.store.check_room)
        except StoreError as exc:
            return _text(503, f"{exc}\n")
        return _text(200, "ok\n")

    async def _distribution(self, request: web.BaseRequest) -> web.StreamResponse:
        began = time.perf_counter()
        target: DistributionPath | None = None
        answer: Answer | None = None
        error: OciProxyError | None = None
        try:
            if self._auth is not None:
                await self._auth.check(request.headers.get("Authorization"))
            if request.method not in ("GET", "HEAD"):
                raise Unsupported("this mirror only pulls", status=405)
            if request.path in (API_VERSION_PATH, "/v2"):
                return web.Response(
                    body=b"{}",
                    headers={
                        "Content-Type": "application/json",
                        "Server": SERVER,
                        API_VERSION[0]: API_VERSION[1],
                    },
                )
            target = parse_path(request.raw_path, self._default_upstream)
            self._engine.upstreams.check_allowed(target.repository)
            if target.reference is not None:
                answer = stored_manifest(self._engine, request, target.reference)
            if answer is None:
                answer = await self._ask(request, target)
            response = answer.response
        except OciProxyError as exc:
            error = exc
            response = error_response(exc)
        except Exception as exc:  # noqa: BLE001 a bug must not take the connection, nor show its insides
            log.failure("request failed", exc, path=request.path)
            response = internal_error()
        headers = response.headers
        headers["Server"] = SERVER
        headers[API_VERSION[0]] = API_VERSION[1]
        headers["Cache-Status"] = (
            answer.outcome.cache_status if answer else "ociproxy; detail=error"
        )
        if target is not None and target.namespace is not None:
            headers["OCI-Namespace"] = target.namespace
        if request.body_exists:
            response.force_close()  # nobody reads it, so nothing after it is looked at either
        if type(response) is BlobResponse:
            error = await _send(request, response, self._senders)
        if log.enabled(logging.INFO):
            _log(request, response, target, answer, error, time.perf_counter() - began)
        return response

    async def _ask(self, request: web.BaseRequest, target: DistributionPath) -> Answer:
        try:
            async with asyncio.timeout(self._answer_limit):
                return await _HANDLERS[target.kind](self._engine, request, target)
        except TimeoutError as exc:
            raise UpstreamUnavailable(
                target.repository.registry,
                f"no answer within {self._answer_limit:g} s",
                timed_out=True,
            ) from exc


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text, headers={"Server": SERVER})


async def _send(
    request: web.BaseRequest, response: BlobResponse, senders: Senders
) -> OciProxyError | None:
    """Send a blob here, so that the log knows how it ended: what went wrong with it, if anything
    did and it was not the client who left."""
    error: OciProxyError | None = None
    try:
        await response.send(request, senders)
        return None
    except OciProxyError as exc:
        error = exc
    except (ConnectionError, TimeoutError, RuntimeError):
        pass  # It left, took nothing for `client_stall`, or is just leaving, says asyncio.
    except OSError as exc:
        error = ResponseCut((exc.strerror or str(exc)).lower())
    # The headers are out: the one way left to say that this is not the blob is to cut it short.
    if request.transport is not None:
        request.transport.abort()
    return error


def _log(
    request: web.BaseRequest,
    response: web.StreamResponse,
    target: DistributionPath | None,
    answer: Answer | None,
    error: OciProxyError | None,
    seconds: float,
) -> None:
    if type(response) is BlobResponse:
        size: int | None = response.sent
    else:
        size = response.content_length
    log.event(
        logging.INFO,
        "request",
        method=request.method,
        status=response.status,
        reference=target.name if target else None,
        digest=answer.digest if answer else None,
        upstream=target.repository.registry if target else None,
        outcome=answer.outcome.word if answer else "error",
        bytes=size if request.method == "GET" else 0,
        seconds=seconds,
        client=request.remote,
        path=None if target else request.path[:200],
        reason=error,
    )
