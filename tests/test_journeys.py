"""How many modules of the product a journey enters: as many as a reader has to open to follow it.

Where a bound is exceeded, the journey has got a detour, or a new module is worth a new bound and
the reason for it. What every module uses (errors, log, clock, bounded, metrics) is not counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Self

import pytest

import ociproxy
from ociproxy.cli.backends import backends
from ociproxy.config.settings import Config, Fetch, Upstream
from ociproxy.fetch.engine import Engine
from ociproxy.load.imagelist import Wanted
from ociproxy.load.loader import Loader
from ociproxy.load.progress import Watcher
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference
from ociproxy.serve.api import RegistryApi
from ociproxy.serve.listener import Listener, listen
from ociproxy.serve.sendfile import Senders
from ociproxy.store.store import Store
from tests.images import image, random_blob
from tests.parts.tools import require_tool
from tests.upstream import FakeUpstream

PACKAGE = Path(ociproxy.__file__).parent
WARM, COLD, LOAD = 12, 38, 35
"""The bounds; docs/internals.md lists the modules of each journey."""
EVERYWHERE = frozenset({"errors", "log", "clock", "bounded", "metrics.counters", "metrics.tally"})


class Tracer:
    """`with Tracer() as tracer:` around all that makes threads, and in it
    `with tracer.journey() as modules:` around what is counted.

    The threads that were there before are not traced, so the test itself and what it pretends to be
    (a client, an upstream) are not counted; `and_here` traces this thread too.
    """

    def __init__(self, *, and_here: bool = False) -> None:
        self._and_here = and_here
        self._modules: set[str] | None = None

    def __enter__(self) -> Self:
        threading.setprofile(self._profile)
        if self._and_here:
            sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    @contextlib.contextmanager
    def journey(self) -> Iterator[set[str]]:
        self._modules = set()
        try:
            yield self._modules
        finally:
            self._modules = None

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        modules, code = self._modules, frame.f_code
        if modules is None or event != "call" or code.co_name == "<module>":
            return
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            if name not in EVERYWHERE:
                modules.add(name)


class Server:
    """The product's server in a thread of this process."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run)
        self._port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)

    def get(self, path: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            return response

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        socket = listen("127.0.0.1", 0, client_stall=self._config.serve.client_stall)
        self._port = socket.getsockname()[1]
        engine = Engine(self._store, self._config, backends(self._store, self._config))
        with contextlib.closing(Senders()) as senders:
            api = RegistryApi(engine, self._config, None, senders)
            listener = Listener(socket, api, self._config.serve, None)
            listener.open()
            self._ready.set()
            await self._stopping.wait()
            listener.stop_accepting()
            await listener.cut()
            await api.close()


def assert_at_most(bound: int, journeys: list[set[str]]) -> None:
    """Of the journeys that were taken, the one that no background work was counted with."""
    modules = min(journeys, key=len)
    print(len(modules), *sorted(modules))
    assert 0 < len(modules) <= bound, sorted(modules)


@pytest.mark.parametrize("size", [1000, 5 << 20], ids=["in chunks", "by sendfile"])
def test_a_blob_from_the_store(tmp_path: Path, size: int) -> None:
    store = Store(tmp_path)
    blob = random_blob(size)
    staged = store.staging.root / "staged"
    staged.write_bytes(blob.data)
    store.blobs.commit(staged, Digest.parse(blob.digest))
    path = f"/v2/app/blobs/{blob.digest}?ns=example.com"
    journeys = []
    with Tracer() as tracer, Server(store, Config()) as server:
        assert server.get(path).status == 200
        for _ in range(3):
            with tracer.journey() as modules:
                assert server.get(path).status == 200
            journeys.append(modules)
    assert_at_most(WARM, journeys)


def test_a_cold_tag_and_its_blobs(tmp_path: Path, upstream: FakeUpstream) -> None:
    """At an upstream that was asked before, so that its backend exists."""
    entry = Upstream(name=upstream.registry, scheme="http")
    config = Config(upstreams={entry.name: entry}, fetch=Fetch(background_fills=0))
    journeys = []
    with Tracer() as tracer, Server(Store(tmp_path), config) as server:
        for tag in ("before", "v1", "v2"):
            made = image(tag, layers=1, layer_size=3 << 20)
            pushed = upstream.add("app", made, tag=tag)
            query = f"?ns={upstream.registry}"
            with tracer.journey() as modules:
                assert server.get(f"/v2/app/manifests/{tag}{query}").status == 200
                for blob in pushed.blobs:
                    assert server.get(f"/v2/app/blobs/{blob.digest}{query}").status == 200
            journeys.append(modules)
    assert_at_most(COLD, journeys)


def test_a_load_of_one_image_by_skopeo(tmp_path: Path, upstream: FakeUpstream) -> None:
    """At an upstream that was asked before, so that its backend exists."""
    require_tool("skopeo")
    entry = Upstream(name=upstream.registry, scheme="http", backend="skopeo")
    config = Config(upstreams={entry.name: entry})
    store = Store(tmp_path)
    journeys = []

    async def load(tracer: Tracer) -> None:
        engine = Engine(store, config, backends(store, config))
        try:
            for tag in ("before", "v1", "v2"):
                upstream.add("app", image(tag), tag=tag)
                wanted = Wanted(Reference.parse(f"{upstream.registry}/app:{tag}"))
                with tracer.journey() as modules:
                    summary = await Loader(engine, config, Watcher()).run([wanted])
                assert (summary.loaded, summary.failed) == (1, 0)
                journeys.append(modules)
        finally:
            await engine.close()

    with Tracer(and_here=True) as tracer:
        asyncio.run(load(tracer))
    assert_at_most(LOAD, journeys)
