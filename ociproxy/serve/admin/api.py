"""What the admin listener answers: probes, metrics, the state of this server as JSON, the page,
what `why` says, and loads that a client begins.

Nothing here asks a worker or an upstream, and no path of the main port leads here.

Tests: tests/serve/admin/test_listener.py.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from aiohttp import web

from ociproxy import log
from ociproxy.errors import OciProxyError, StoreError
from ociproxy.fetch.upstreams.threads import take_error
from ociproxy.serve.errors import (
    SERVER,
    LoadRefused,
    Unsupported,
    error_response,
    internal_error,
)
from ociproxy.serve.live import alive
from ociproxy.serve.readiness import Readiness

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from prometheus_client.metrics_core import Metric as Family

    from ociproxy.config.settings import Config
    from ociproxy.metrics.tally import Tally
    from ociproxy.serve.admin.loading import Loads
    from ociproxy.serve.admin.page import Page
    from ociproxy.serve.admin.sources import Sources
    from ociproxy.serve.admin.survey import Findings
    from ociproxy.serve.auth import BasicAuth
    from ociproxy.store.store import Store

    Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_PROBES: Final = ("/healthz", "/readyz")
"""Answered without a password: the kubelet has none."""
_DISK_TIME: Final = 3.0
"""Seconds that the disk has to tell its numbers; the others are told without them."""


class AdminApi:
    """Called with each request to the admin listener. With `auth` None every client may ask."""

    def __init__(
        self,
        config: Config,
        sources: Sources,
        loads: Loads,
        auth: BasicAuth | None,
        *,
        loopback: bool,
    ) -> None:
        """`loopback` is whether the listener is reached from this machine only."""
        self._sources = sources
        self._readiness = Readiness(sources.store)
        self._loads = loads
        self._loopback = loopback
        self._disk_thread = ThreadPoolExecutor(1, thread_name_prefix="disk numbers")
        self._asking_disk: asyncio.Future[list[Family]] | None = None
        self._handlers: dict[str, Handler] = {
            "/healthz": self._health,
            "/readyz": self._ready,
            "/metrics": self._metrics,
            "/api/state": self._state,
            "/api/why": self._why,
        }
        self.use(config, auth)

    def use(self, config: Config, auth: BasicAuth | None) -> None:
        """Answer new requests by this configuration."""
        self._offline = config.serve.offline
        self._config = config
        self._auth = auth
        self._page: Page | None = None
        self._sources.explainer.use(config)

    def close(self) -> None:
        self._readiness.close()
        self._disk_thread.shutdown(wait=False, cancel_futures=True)
        self._sources.explainer.close()
        if self._auth is not None:
            self._auth.close()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            if self._auth is not None and request.path not in _PROBES:
                await self._auth.check(request)
            elif self._loopback and not _names_this_machine(request.host):
                # A page of the web that has its own name resolve to 127.0.0.1 could read all this.
                raise Unsupported("ask by address: this host name is not known here", status=404)
            if request.path == "/api/load":
                return await self._load(request)
            if request.method not in ("GET", "HEAD"):
                raise Unsupported("only GET and HEAD", status=405)
            handler = self._handlers.get(request.path) or (await self._pages()).answer
            return await handler(request)
        except OciProxyError as exc:
            return error_response(exc)
        except Exception as exc:  # noqa: BLE001 a bug ends neither the connection nor the server
            log.failure("request failed", exc, path=request.path)
            return internal_error()

    async def _pages(self) -> Page:
        if self._page is None:
            read = asyncio.get_running_loop().run_in_executor(None, _page_class)
            self._page = (await read)(self._config, self._sources)
        return self._page

    async def _health(self, _: web.BaseRequest) -> web.Response:
        """Whether a worker lives: the kubelet restarts the server where none does."""
        if not alive(self._sources.tally):
            return _text(503, "no worker has been heard of\n")
        return _text(200, "ok\n")

    async def _ready(self, request: web.BaseRequest) -> web.Response:
        try:
            if not self._offline:
                await self._readiness.check()
        except StoreError as exc:
            return _text(503, f"{exc}\n")
        return await self._health(request)

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        # In a thread: its library is read with the first scrape.
        disk, accept = await self._of_disk(), request.headers.get("Accept", "")
        body, content_type = await asyncio.get_running_loop().run_in_executor(
            None, _exposition, self._sources.tally, disk, self._sources.surveyor.held, accept
        )
        return web.Response(body=body, headers={"Content-Type": content_type, "Server": SERVER})

    async def _of_disk(self) -> Sequence[Family]:
        """Nothing where the disk hangs: one look at it does then, however many scrapes come."""
        looking = self._asking_disk
        if looking is None or looking.done():
            loop = asyncio.get_running_loop()
            looking = loop.run_in_executor(
                self._disk_thread, _disk, self._config, self._sources.store
            )
            looking.add_done_callback(take_error)
            self._asking_disk = looking
        done, _ = await asyncio.wait({looking}, timeout=_DISK_TIME)
        return looking.result() if done else ()

    async def _load(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method != "POST":
            response = error_response(Unsupported("only POST", status=405))
            response.headers["Allow"] = "POST"
            return response
        if self._auth is None and not self._loopback:
            raise LoadRefused(
                "serve.admin.auth is not set: beyond this machine a load needs a password"
            )
        return await self._loads.answer(request)

    async def _why(self, request: web.BaseRequest) -> web.Response:
        reference = request.rel_url.query.get("reference", "")
        return _json((await self._sources.explainer.explain(reference)).document)

    async def _state(self, _: web.BaseRequest) -> web.Response:
        return _json(
            {
                "store": str(self._sources.store.root.absolute()),
                "workers": alive(self._sources.tally),
            }
        )


def _exposition(
    tally: Tally, disk: Sequence[Family], survey: Findings | None, accept: str
) -> tuple[bytes, str]:
    # Its library takes a while to be imported, and is not needed where no Prometheus asks.
    from ociproxy.serve.admin.exposition import expose

    return expose(tally, disk, survey, accept)


def _disk(config: Config, store: Store) -> list[Family]:
    # As above.
    from ociproxy.serve.admin.exposition import of_disk

    return of_disk(config, store)


def _page_class() -> type[Page]:
    # As above; and its templates are read.
    from ociproxy.serve.admin import render
    from ociproxy.serve.admin.page import Page

    render.read_all()
    return Page


def _names_this_machine(host: str) -> bool:
    """Whether a Host header has an address or `localhost`, and no name that others may own."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _text(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text, headers={"Server": SERVER})


def _json(document: Any) -> web.Response:
    body = json.dumps(document, indent=1).encode() + b"\n"
    headers = {"Content-Type": "application/json", "Server": SERVER, "Cache-Control": "no-store"}
    return web.Response(body=body, headers=headers)
