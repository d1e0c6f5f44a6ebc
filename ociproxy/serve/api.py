"""The main port: which handler answers, headers that every answer has, and the request log.

The handlers of manifests, tags and referrers are here; that of blobs is in `blobs`.

Tests: tests/serve/test_api.py, tests/serve/test_manifests.py, tests/serve/test_lists.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from aiohttp import web

from ociproxy import log
from ociproxy.clock import Deadline, UpstreamTime
from ociproxy.errors import OciProxyError, StoreError
from ociproxy.fetch.backend import NAMESPACE, passed_on
from ociproxy.fetch.cache_status import HIT
from ociproxy.metrics.counters import RESPONSES_CUT, STALE_ANSWERS, count_answer, count_end
from ociproxy.serve.blobs import BlobResponse, blob
from ociproxy.serve.connection import is_cut
from ociproxy.serve.documents import LARGE, NO_SCRIPTS, DocumentResponse
from ociproxy.serve.errors import (
    SERVER,
    QueryInvalid,
    ResponseCut,
    Unsupported,
    error_response,
    internal_error,
)
from ociproxy.serve.exchange import (
    RECENT,
    Answer,
    BlobPath,
    ManifestPath,
    Recent,
    ReferrersPath,
    TagsPath,
    add_headers,
    client_has,
    namespace_of,
    parse_path,
)
from ociproxy.serve.readiness import Readiness
from ociproxy.serve.reload import Generation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine

    from ociproxy.config.settings import Config
    from ociproxy.fetch.backend import Listing
    from ociproxy.fetch.cache_status import CacheStatus
    from ociproxy.fetch.engine import Engine
    from ociproxy.serve.auth import BasicAuth
    from ociproxy.serve.exchange import DistributionPath, Target
    from ociproxy.serve.sendfile import Senders

_STOPPING: Final = "the server stops"
_ERROR: Final = "ociproxy; detail=error"


class RegistryApi:
    """Called by `web.Server` with each request. With `auth` None every client may pull."""

    def __init__(
        self, engine: Engine, config: Config, auth: BasicAuth | None, senders: Senders
    ) -> None:
        self._senders = senders
        self._current = Generation(engine, config, auth)
        self._readiness = Readiness(engine.store)
        self.sending: dict[BlobResponse, tuple[str, str | None]] = {}
        self.recent: deque[Recent] = deque(maxlen=RECENT)

    @property
    def engine(self) -> Engine:
        """What new requests are answered by."""
        return self._current.engine

    def replace(
        self, engine: Engine, config: Config, auth: BasicAuth | None
    ) -> Coroutine[None, None, None]:
        """Answer new requests with these. The coroutine ends when the requests and downloads of
        before have ended."""
        old, self._current = self._current, Generation(engine, config, auth)
        return old.retire(self._current)

    async def close(self) -> None:
        self._readiness.close()
        await self._current.close()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path.startswith("/v2/") or path == "/v2":
            return await self._distribution(request)
        if path == "/healthz":
            return _text(200, "ok\n")
        if path == "/readyz":
            return await self._ready()
        reason = "nothing here: the API is below /v2/, the page on the admin port"
        return error_response(Unsupported(reason, status=404))

    async def _ready(self) -> web.Response:
        try:
            if not self._current.offline:
                await self._readiness.check()
        except StoreError as exc:
            return _text(503, f"{exc}\n")
        return _text(200, "ok\n")

    async def _distribution(self, request: web.BaseRequest) -> web.StreamResponse:
        generation = self._current
        generation.running += 1
        try:
            return await self._respond(request, generation)
        finally:
            generation.running -= 1
            if not generation.running:
                generation.idle.set()

    async def _respond(
        self, request: web.BaseRequest, generation: Generation
    ) -> web.StreamResponse:
        began = time.perf_counter()
        deadline = Deadline.after(generation.answer_limit)
        upstream_time = UpstreamTime()
        upstream_time.count()
        target: Target | None = None
        answer: Answer | None = None
        error: OciProxyError | None = None
        try:
            with deadline.kept():
                if generation.auth is not None:
                    await generation.auth.check(request)
                if request.method not in ("GET", "HEAD"):
                    raise Unsupported("this mirror only pulls", status=405)
                if request.path in ("/v2/", "/v2"):
                    count_answer("other", HIT.word, 200, 0.0)
                    return _version(request)
                target = parse_path(request.raw_path, generation.default_upstream)
                generation.engine.upstreams.check_allowed(target.repository)
                answer = await _ask(generation.engine, request, target)
            response = answer.response
        except asyncio.CancelledError:
            kind = target.kind if target else "other"
            count_answer(kind, "abandoned", 0, time.perf_counter() - began)
            _log_unanswered(request, target, time.perf_counter() - began)
            raise
        except OciProxyError as exc:
            error = exc
            response = error_response(exc)
        except Exception as exc:  # noqa: BLE001 a bug ends neither the connection nor the server
            log.failure("request failed", exc, path=request.path)
            response = internal_error()
        first_byte = time.perf_counter() - began
        namespace = target.namespace if target else namespace_of(request)
        add_headers(response, answer.status.header if answer else _ERROR, namespace)
        kind = target.kind if target else "other"
        outcome = answer.status.word if answer else "error"
        count_answer(kind, outcome, response.status, first_byte)
        if outcome == "stale" and answer is not None:
            STALE_ANSWERS.add(answer.status.detail)
        if request.body_exists:
            # The body is not read, so no request behind it can be told from it.
            response.force_close()
        name = target.name if target else request.path[:200]
        status, client = response.status, request.remote
        try:
            if isinstance(response, BlobResponse):
                self.sending[response] = name, client
            if isinstance(response, BlobResponse | DocumentResponse):
                error = await _send(request, response, self._senders)
        except asyncio.CancelledError:
            # The client has left; or the server stops.
            error = ResponseCut(_STOPPING) if is_cut(request) else None
            RESPONSES_CUT.add("mirror" if error else "client")
            raise
        finally:
            self.sending.pop(response, None)  # type: ignore[call-overload] # any response may be asked for
            seconds, sent = time.perf_counter() - began, _sent(request, response)
            count_end(kind, outcome, sent, seconds)
            ended = Recent(
                time.time(), request.method, name, status, outcome, sent, seconds, client
            )
            self.recent.append(ended)
            if log.enabled(logging.INFO):
                _log(ended, target, answer, error, first_byte, upstream_time.seconds or None)
        return response


def _ask(engine: Engine, request: web.BaseRequest, target: Target) -> Awaitable[Answer]:
    match target:
        case ManifestPath():
            return manifest(engine, request, target)
        case BlobPath():
            return blob(engine, request, target)
        case TagsPath():
            return tags(engine, request, target)
        case ReferrersPath():
            return referrers(engine, request, target)


def _version(request: web.BaseRequest) -> web.Response:
    """The answer to `GET /v2/`, by which a client finds out that this is a registry. The mirror
    itself answers: no upstream is asked."""
    response = web.Response(body=b"{}", headers={"Content-Type": "application/json"})
    add_headers(response, HIT.header, namespace_of(request))
    return response


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text, headers={"Server": SERVER})


async def _send(
    request: web.BaseRequest, response: BlobResponse | DocumentResponse, senders: Senders
) -> OciProxyError | None:
    """Send a blob or a large document here and not in aiohttp, so that the log line says how it
    ended. Returns what went wrong on this side; None also where the client left."""
    error: OciProxyError | None = None
    try:
        if isinstance(response, BlobResponse):
            await response.send(request, senders)
        else:
            await response.send(request)
        return None
    except OciProxyError as exc:
        error = exc
    except (ConnectionError, TimeoutError, RuntimeError):
        # The client left, took no byte for `serve.client_stall`, or is leaving just now, which
        # asyncio reports as RuntimeError.
        pass
    except OSError as exc:
        error = ResponseCut((exc.strerror or str(exc)).lower())
    RESPONSES_CUT.add("client" if error is None else "mirror")
    # The headers are out: only a response cut short can tell the client that this is not the blob.
    if request.transport is not None:
        request.transport.abort()
    return error


def _sent(request: web.BaseRequest, response: web.StreamResponse) -> int:
    """Bytes of the body. aiohttp sends a short one after the handler has returned."""
    if isinstance(response, BlobResponse | DocumentResponse):
        return response.sent
    return response.content_length or 0 if request.method == "GET" else 0


def _log(
    ended: Recent,
    target: Target | None,
    answer: Answer | None,
    error: OciProxyError | None,
    first_byte: float,
    upstream_seconds: float | None,
) -> None:
    log.event(
        logging.INFO,
        "request",
        method=ended.method,
        status=ended.status,
        reference=target.name if target else None,
        digest=answer.digest if answer else None,
        upstream=target.repository.registry if target else None,
        outcome=ended.outcome,
        bytes=ended.bytes,
        seconds=ended.seconds,
        first_byte=first_byte,
        upstream_seconds=upstream_seconds,
        client=ended.client,
        path=None if target else ended.name,
        reason=error,
    )


def _log_unanswered(request: web.BaseRequest, target: Target | None, seconds: float) -> None:
    cut = is_cut(request)
    log.event(
        logging.WARNING if cut else logging.INFO,
        "request cut" if cut else "request abandoned",
        method=request.method,
        reference=target.name if target else None,
        seconds=seconds,
        client=request.remote,
        path=None if target else request.path[:200],
        reason=_STOPPING if cut else "the client left",
    )


async def manifest(engine: Engine, request: web.BaseRequest, target: ManifestPath) -> Answer:
    """The upstream's exact bytes under its media type. A fresh manifest in memory is answered
    without a task switch, where the store is on this machine: most requests are for one."""
    found = await engine.manifests.pull(target.reference, body=request.method == "GET")
    descriptor, digest = found.descriptor, str(found.descriptor.digest)
    headers = {"Docker-Content-Digest": digest, "ETag": f'"{digest}"'}
    if client_has(request, descriptor.digest):
        return Answer(web.Response(status=304, headers=headers), found.status, descriptor.digest)
    headers["Content-Type"] = descriptor.media_type
    if found.raw is None and descriptor.size:
        headers["Content-Length"] = str(descriptor.size)
    return Answer(_document(request, found.raw, headers), found.status, descriptor.digest)


async def tags(engine: Engine, request: web.BaseRequest, target: TagsPath) -> Answer:
    count = target.query.get("n")
    if count is not None and not (count.isascii() and count.isdecimal() and len(count) < 10):
        raise QueryInvalid(f"n={count[:50]!r} is not a count of tags")
    query = passed_on(request.rel_url.raw_query_string)
    return _answer(request, target, *await engine.listings.tags(target.repository, query))


async def referrers(engine: Engine, request: web.BaseRequest, target: ReferrersPath) -> Answer:
    # A media type has no space: `+` stands for itself, though a form would read a space.
    artifact_type = target.query.get("artifactType", "").replace(" ", "+")
    query = passed_on(request.rel_url.raw_query_string)
    found = await engine.listings.referrers(target.repository, target.subject, artifact_type, query)
    return _answer(request, target, *found)


def _answer(
    request: web.BaseRequest, target: DistributionPath, listing: Listing, status: CacheStatus
) -> Answer:
    headers = {"Content-Type": listing.media_type}
    if listing.next_query:
        # The client asks this server for the next page, under the path and `ns` of this one.
        query = listing.next_query
        if target.namespace is not None:
            query += f"&{NAMESPACE}={quote(target.namespace, safe=':')}"
        headers["Link"] = f'<{request.rel_url.raw_path}?{query}>; rel="next"'
    if listing.filters_applied:
        headers["OCI-Filters-Applied"] = listing.filters_applied
    return Answer(_document(request, listing.raw, headers), status)


def _document(
    request: web.BaseRequest, raw: bytes | None, headers: dict[str, str]
) -> web.StreamResponse:
    headers.update(NO_SCRIPTS)
    if raw is not None and len(raw) > LARGE and request.method == "GET":
        return DocumentResponse(raw, headers)
    return web.Response(body=raw, headers=headers)
