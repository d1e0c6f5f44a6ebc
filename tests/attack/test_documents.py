"""Bombs: answers of an upstream that are small to send and large to take."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable

import pytest

from tests.attack.conftest import assert_quiet, refusal
from tests.images import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Content,
    content,
    image,
    image_of,
    layer,
    random_blob,
    random_bytes,
)
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]
MIB = 1024 * 1024
GROWTH = 128 * MIB
"""What one hostile document may cost at its worst, above an idle server."""


def manifest_of(layers: str, media_type: str = OCI_MANIFEST) -> Content:
    config = json.dumps({"mediaType": OCI_CONFIG, "digest": "sha256:" + "0" * 64, "size": 2})
    text = f'{{"schemaVersion":2,"mediaType":"{media_type}","config":{config},"layers":[{layers}]}}'
    return content(text.encode(), media_type)


def bombs() -> dict[str, bytes]:
    room = 4 * MIB - 1000
    shapes = {
        "numbers": "7" + ",7" * (room // 2 - 1),
        "objects": "{}" + ",{}" * (room // 3 - 1),
        "lists": "[]" + ",[]" * (room // 3 - 1),
        "nested": "[" * (room // 2) + "]" * (room // 2),
        "strings": '"aa"' + ',"ab"' * (room // 5 - 1),
        "keys": "{" + ",".join(f'"{number:x}":0' for number in range(room // 10)) + "}",
        "digits": "9" * room,
    }
    return {name: manifest_of(shape).data for name, shape in shapes.items()}


def test_a_blob_without_an_end_does_not_fill_the_disk(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    limit = 2 * MIB
    blobs = {size: random_blob(size, seed=size) for size in (limit, limit + 1, 64 * MIB)}
    for blob in blobs.values():
        upstream.add_content("app", blob)
    claimed = image_of([layer({"large": random_bytes(limit + 2)})])
    upstream.add("app", claimed, tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)], "fetch": {"blob_limit": limit}})
    # Without a stated size, and with one.
    for fault in (Fault(chunked=True), Fault()):
        upstream.fault("/blobs/", fault)
        for size in (limit + 1, 64 * MIB):
            answer = server.blob(upstream.registry, "app", blobs[size].digest)
            assert refusal(answer) == (502, "UNKNOWN")
            assert "fetch.blob_limit" in answer.body.decode()
        assert list((server.store / "pulls").glob("[0-9a-f]*")) == []
        server.restart()  # what was refused a moment ago is not asked for again
    assert upstream.bytes_sent(blobs[64 * MIB].digest) < 32 * MIB
    # A size that a manifest claims: it is a hint, so the upstream is asked all the same.
    assert server.manifest(upstream.registry, "app", "v1").status == 200
    (large,) = claimed.layers
    assert refusal(server.blob(upstream.registry, "app", large.digest)) == (502, "UNKNOWN")
    # The image's config may just be on its way from there, in the background.
    server.wait_for(lambda: not list((server.store / "pulls").glob("[0-9a-f]*")))
    answer = server.blob(upstream.registry, "app", blobs[limit].digest)
    assert answer.body == blobs[limit].data
    assert_quiet(server)


def test_a_million_layers_are_refused_before_they_are_read(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    layer = json.dumps({"mediaType": "a/b", "digest": "sha256:" + "1" * 64, "size": 1})
    huge = manifest_of(",".join([layer] * 10**6))
    assert huge.size > 100 * MIB
    upstream.add_content("app", huge)
    many = manifest_of(",".join([layer] * 30_000))
    assert many.size < 4 * MIB
    upstream.add_content("app", many)
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    idle = server.peak_rss()
    for fault in (Fault(), Fault(chunked=True)):
        upstream.fault(huge.digest, fault, times=1)
        answer = server.manifest(upstream.registry, "app", huge.digest)
        assert refusal(answer) == (502, "MANIFEST_INVALID")
        server.restart()
    assert upstream.bytes_sent(huge.digest) < 40 * MIB
    answer = server.manifest(upstream.registry, "app", many.digest)
    assert refusal(answer) == (502, "MANIFEST_INVALID")
    assert server.peak_rss() - idle < GROWTH
    assert upstream.count("/blobs/") == 0
    assert_quiet(server)


@pytest.mark.parametrize("name", bombs())
def test_a_document_that_swells_when_parsed(
    mirror: MakeMirror, upstream: FakeUpstream, name: str
) -> None:
    bomb = content(bombs()[name], OCI_MANIFEST)
    upstream.add_content("app", bomb)
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    idle = server.peak_rss()
    answer = server.manifest(upstream.registry, "app", bomb.digest)
    if name == "keys":
        # One odd descriptor: it is passed on as it is, and costs no more memory than the others.
        assert (answer.status, answer.body) == (200, bomb.data)
        assert server.manifest(upstream.registry, "app", bomb.digest).body == bomb.data
    else:
        assert refusal(answer) == (502, "MANIFEST_INVALID")
    assert server.peak_rss() - idle < GROWTH
    assert server.get("/healthz").status == 200
    assert_quiet(server)


def test_gzip_bombs_are_not_unpacked(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    bomb = gzip.compress(b" " * (256 * MIB), mtime=0)
    assert len(bomb) < MIB
    fault = Fault(headers={"Content-Encoding": "gzip"}, body=bomb, content_type=OCI_INDEX)
    held = upstream.add("app", image("app"), tag="v1")
    upstream.fault("/v2/app/", fault)
    server = mirror({"upstreams": [upstream_entry(upstream.url)], "fetch": {"retries": 0}})
    idle = server.peak_rss()
    answers = [
        server.manifest(upstream.registry, "app", "v1"),
        server.blob(upstream.registry, "app", held.blobs[0].digest),
    ]
    assert [answer.status for answer in answers] == [502, 502]
    assert server.peak_rss() - idle < 64 * MIB
    for seen in upstream.requests:
        assert seen.headers["Accept-Encoding"] == "identity"
    assert_quiet(server)


def test_a_compressed_layer_is_passed_on_as_it_is(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    """A layer that is a bomb is the client's to unpack or not: the mirror never does."""
    layer = upstream.add_content("app", content(gzip.compress(b"\0" * (64 * MIB), mtime=0)))
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    idle = server.peak_rss()
    assert server.blob(upstream.registry, "app", layer.digest).body == layer.data
    assert server.peak_rss() - idle < 32 * MIB


def test_the_urls_of_a_layer_are_never_asked(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream]
) -> None:
    upstream, elsewhere = make_upstream(), make_upstream()
    app = image("app", layers=2)
    document = app.top.json()
    foreign = document["layers"][1]
    foreign["urls"] = [
        f"{elsewhere.url}/layer",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
    ]
    manifest = content(json.dumps(document).encode(), OCI_MANIFEST)
    upstream.add("app", app)
    upstream.add_content("app", manifest)
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    answer = server.manifest(upstream.registry, "app", manifest.digest)
    assert answer.body == manifest.data
    for digest in (document["config"]["digest"], *(each["digest"] for each in document["layers"])):
        server.wait_for_file(f"blobs/{digest.partition(':')[2]}")
    assert elsewhere.requests == []
    assert server.blob(upstream.registry, "app", foreign["digest"]).status == 200
    assert elsewhere.requests == []
