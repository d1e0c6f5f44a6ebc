"""Clients name registries that stall, until no other client gets a turn."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator

from tests.attack.conftest import PUBLIC, Network, wait_until
from tests.images import image, random_blob
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]
MakeUpstream = Callable[..., FakeUpstream]
THREADS = 4


@contextlib.contextmanager
def asked_for(server: Mirror, paths: list[str]) -> Iterator[None]:
    """Each by a client of its own, which takes what comes."""

    def ask(path: str) -> None:
        with contextlib.suppress(http.client.HTTPException, OSError):
            server.get(path)

    clients = [threading.Thread(target=ask, args=(path,)) for path in paths]
    for each in clients:
        each.start()
    try:
        yield
    finally:
        for each in clients:
            each.join(60)


def test_stalling_registries_leave_threads_to_listed_upstreams(
    mirror: MakeMirror, make_upstream: MakeUpstream, draw: Callable[..., Network]
) -> None:
    evil, good = make_upstream(), make_upstream()
    app = good.add("app", image("app"), tag="v1")
    blobs = [evil.add_content("app", random_blob(5000, seed=seed)) for seed in range(3 * THREADS)]
    evil.fault("/manifests/", Fault(delay=30))
    evil.fault("/blobs/", Fault(stall_after=100))
    port = evil.registry.partition(":")[2]
    names = [f"evil-{number}.example" for number in range(2)]
    network = draw({name: [[PUBLIC]] for name in names})
    config = {
        "fetch": {
            "unlisted": {"scheme": "auto"},
            "requests": THREADS,
            "fills": THREADS,
            "background_fills": 0,
        },
        "upstreams": [upstream_entry(good.url)],
    }
    server = mirror(config, env=network.environment)
    paths = [
        path
        for number, blob in enumerate(blobs)
        for name in names
        for path in (
            f"/v2/app/manifests/v{number}?ns={name}:{port}",
            f"/v2/app/blobs/{blob.digest}?ns={name}:{port}",
        )
    ]
    with asked_for(server, paths):
        try:
            wait_until(lambda: evil.count("/manifests/") >= THREADS - 1)
            wait_until(lambda: evil.count("/blobs/") >= THREADS - 1)
            path = f"/v2/app/manifests/v1?ns={good.registry}"
            assert server.request("GET", path, timeout=6).body == app.top.data
            for blob in app.blobs:
                path = f"/v2/app/blobs/{blob.digest}?ns={good.registry}"
                assert server.request("GET", path, timeout=6).body == blob.data
        finally:
            evil.heal()
