"""The files are the truth: damage and other hands on the store, seen through the server."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from tests.images import image, random_blob
from tests.parts.tools import read_only, require_root, run
from tests.serve.scene import MIB, Scene
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth, TokenAuth

MakeMirror = Callable[..., Mirror]


def test_a_damaged_blob_is_quarantined_and_fetched_again(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    blob = random_blob(100_000, seed=21)
    upstream.add_content("app", blob)
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    server.blob(upstream.registry, "app", blob.digest)
    path = server.wait_for_file(f"blobs/{blob.encoded}")
    data = bytearray(path.read_bytes())
    data[500] ^= 0xFF
    path.write_bytes(data)
    assert server.blob(upstream.registry, "app", blob.digest).body == blob.data
    assert (server.store / "quarantine" / blob.encoded).read_bytes() == data
    assert upstream.count("/blobs/", "GET") == 2


def test_a_file_that_becomes_shorter_ends_the_connection(scene: Scene) -> None:
    """Nothing may follow in the place of the bytes that are missing."""
    blob = scene.blob(32 * MIB)
    server = scene.start()
    scene.get(blob)
    path = server.wait_for_file(f"blobs/{blob.encoded}")
    head = f"GET {scene.path('blobs', blob.digest)} HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(head.encode())
        received = len(connection.recv(1))
        os.truncate(path, 16 * MIB)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        tail = b""
        with suppress(ConnectionResetError):
            while data := connection.recv(1 << 20):
                received, tail = received + len(data), (tail + data)[-1000:]
    assert received < 17 * MIB
    assert b"HTTP/1.1" not in tail


def test_a_full_disk_is_not_ready(mirror: MakeMirror) -> None:
    require_root()
    server = mirror({})
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", server.store)
    try:
        server.restart()
        assert server.get("/readyz").status == 200
        filler = server.store / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        answer = server.get("/readyz")
        assert (answer.status, b"no space left" in answer.body) == (503, True)
        server.restart()  # what is stored can be served
        assert server.get("/v2/").status == 200
        assert server.get("/readyz").status == 503
        filler.unlink()
        assert server.get("/readyz").status == 200
        server.stop()
    finally:
        run("umount", "-l", server.store)


def test_a_read_only_store_is_served_offline(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    app, blob = image("app"), random_blob(100_000, seed=22)
    upstream.add("app", app, tag="v1")
    upstream.add_content("app", blob)
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    server.manifest(upstream.registry, "app", "v1")
    server.blob(upstream.registry, "app", blob.digest)
    path = server.wait_for_file(f"blobs/{blob.encoded}")
    path.write_bytes(blob.data)  # as a copy that keeps no times leaves it: not sealed
    server.stop()
    server.args = ("--offline",)
    with read_only(server.store):
        server.start()
        assert server.get("/readyz").status == 200
        assert server.manifest(upstream.registry, "app", "v1").body == app.top.data
        for _ in range(2):
            assert server.blob(upstream.registry, "app", blob.digest).body == blob.data
        server.stop()


def test_a_damaged_manifest_is_fetched_again(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    app = image("app")
    upstream.add("app", app, tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    server.manifest(upstream.registry, "app", "v1")
    path = server.wait_for_file(f"img/{app.top.encoded}")
    path.write_bytes(path.read_bytes().replace(b"{", b"[", 1))

    def is_mended() -> bool:
        """The client has the right bytes before the file does."""
        assert server.manifest(upstream.registry, "app", "v1").body == app.top.data
        return path.read_bytes() == app.top.data

    server.wait_for(is_mended, "the manifest stored again")


def test_a_tag_that_another_process_removes_is_gone_at_once(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = image("app")
    upstream.add("app", app, tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    server.manifest(upstream.registry, "app", "v1")
    server.restart(args=["--offline"])
    assert server.manifest(upstream.registry, "app", "v1").status == 200
    (server.store / "refs" / upstream.registry / "app" / "_tags" / "v1").unlink()
    answer = server.manifest(upstream.registry, "app", "v1")
    assert answer.status == 404
    [error] = json.loads(answer.body)["errors"]
    assert error["code"] == "MANIFEST_UNKNOWN"


def test_private_repositories_never_see_each_others_tokens(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream]
) -> None:
    def private(user: str, password: str) -> FakeUpstream:
        return make_upstream(auth=TokenAuth(credentials=BasicAuth(user, password)))

    one, two = private("ann", "secret-one"), private("bob", "secret-two")
    names = {one.url: ("ann/app", "ann/other"), two.url: ("bob/app", "bob/other")}
    for upstream in (one, two):
        for repository in names[upstream.url]:
            upstream.add(repository, image(repository), tag="v1")
    server = mirror(
        {
            "upstreams": [
                upstream_entry(one.url, auth={"user": "ann", "password": "secret-one"}),
                upstream_entry(two.url, auth={"user": "bob", "password": "secret-two"}),
            ]
        }
    )
    for upstream in (one, two, one, two):
        for repository in names[upstream.url]:
            assert server.manifest(upstream.registry, repository, "v1").status == 200
    tokens = [
        {r.headers["Authorization"] for r in upstream.requests if "Authorization" in r.headers}
        for upstream in (one, two)
    ]
    assert tokens[0]
    assert tokens[1]
    assert not tokens[0] & tokens[1]
    assert "secret-one" not in server.log()
    assert "secret-two" not in server.log()


def test_a_blob_that_another_process_verifies_holds_up_nobody_else(scene: Scene) -> None:
    blob, other = scene.blob(100_000), scene.blob(100_000)
    server = scene.start()
    for each in (blob, other):
        scene.get(each)
        os.utime(server.wait_for_file(f"blobs/{each.encoded}"))  # breaks the seal
    with (server.store / "blobs" / blob.encoded).open("rb") as held, ThreadPoolExecutor(24) as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = [pool.submit(scene.get, blob) for _ in range(24)]
        time.sleep(0.5)
        assert scene.get(other).body == other.data
        assert server.get("/readyz").status == 200
        assert not any(each.done() for each in waiting)
        fcntl.flock(held, fcntl.LOCK_UN)
        assert all(each.result().body == blob.data for each in waiting)
