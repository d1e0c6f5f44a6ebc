"""Scene: one misbehaving upstream, what it holds, and a mirror in front of it.

A test says what is special: `blob = scene.blob(MIB, Fault(flip_at=10)); server = scene.start()`.
"""

from __future__ import annotations

import http.client
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.images import Content, random_blob
from tests.server import Answer, Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MIB = 1024 * 1024


class Scene:
    """Everything is in one repository unless a call names another."""

    repository = "app"

    def __init__(self, upstream: FakeUpstream, mirror: Callable[..., Mirror]) -> None:
        self.upstream = upstream
        self._mirror = mirror
        self._server: Mirror | None = None
        self._seeds = itertools.count(1)

    def blob(
        self,
        size: int,
        fault: Fault | None = None,
        *,
        times: int | None = None,
        algorithm: str = "sha256",
    ) -> Content:
        """Another random blob at the upstream, which does this wrong with blobs."""
        made = random_blob(size, seed=f"scene {next(self._seeds)}", algorithm=algorithm)
        self.upstream.add_content(self.repository, made)
        if fault is not None:
            self.upstream.fault("/blobs/", fault, times=times)
        return made

    def start(
        self,
        *,
        ttl: str = "15m",
        serve: object = None,
        args: Sequence[str] = (),
        entry: dict[str, object] | None = None,
        store: Path | None = None,
        **fetch: object,
    ) -> Mirror:
        """The mirror, with these keys of `fetch`, of `serve`, and of the upstream's entry. The
        scene goes on at the mirror that was started last."""
        self._server = self._mirror(
            {
                "upstreams": [upstream_entry(self.upstream.url, **(entry or {}))],
                "fetch": fetch,
                "serve": serve or {},
                "tags": [{"match": "*", "ttl": ttl}],
            },
            args=args,
            store=store,
        )
        return self._server

    @property
    def server(self) -> Mirror:
        assert self._server is not None, "start() comes first"
        return self._server

    def get(self, blob: Content, headers: dict[str, str] | None = None) -> Answer:
        return self.server.blob(self.upstream.registry, self.repository, blob.digest, headers)

    def manifest(self, reference: str, repository: str | None = None) -> Answer:
        return self.server.manifest(
            self.upstream.registry, repository or self.repository, reference
        )

    def path(self, kind: str, name: str, *, repository: str | None = None) -> str:
        """A request target: `kind` is manifests, blobs, tags or referrers."""
        return f"/v2/{repository or self.repository}/{kind}/{name}?ns={self.upstream.registry}"

    @contextmanager
    def open(
        self, blob: Content, repository: str | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The response to a GET of the blob, its body not read."""
        server = self.server
        connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
        try:
            name = repository or self.repository
            connection.request("GET", f"/v2/{name}/blobs/{blob.digest}?ns={self.upstream.registry}")
            with connection.getresponse() as response:
                yield response
        finally:
            connection.close()

    def is_stored(self, blob: Content) -> bool:
        return (self.server.store / "blobs" / blob.encoded).exists()
