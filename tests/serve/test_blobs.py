"""Blobs beyond the plain GET: heads, conditions, ranges, redirects, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.images import image
from tests.serve.multipart import parts_of
from tests.serve.scene import MIB, Scene
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth, TokenAuth
from tests.upstream_faults import HTML, Fault, too_many_requests

ZEROS = "sha256:" + "0" * 64


def test_a_head_of_a_cold_blob_asks_and_fetches_nothing(scene: Scene) -> None:
    blob = scene.blob(MIB)
    scene.start()
    answer = scene.server.head(scene.path("blobs", blob.digest))
    assert answer.status == 200
    assert answer.headers["content-length"] == str(blob.size)
    assert answer.headers["docker-content-digest"] == blob.digest
    assert answer.headers["accept-ranges"] == "bytes"
    assert scene.upstream.count("/blobs/", "GET") == 0
    unknown = scene.server.head(scene.path("blobs", ZEROS))
    assert (unknown.status, unknown.body) == (404, b"")


@pytest.mark.parametrize("status", [403, 503])
def test_a_blob_whose_heads_the_upstream_refuses_is_served_and_its_upstream_not_paused(
    scene: Scene, status: int
) -> None:
    """A registry is left alone after three failures in a row."""
    blobs = [scene.blob(1000 + each) for each in range(4)]
    scene.upstream.fault("/blobs/", Fault(status=status), method="HEAD")
    scene.start()
    for blob in blobs:
        answer = scene.server.head(scene.path("blobs", blob.digest))
        assert (answer.status, answer.headers["content-length"]) == (200, str(blob.size))
    for blob in blobs:
        assert scene.get(blob).body == blob.data


def test_a_head_of_an_arriving_and_of_a_stored_blob_asks_nobody(scene: Scene) -> None:
    blob = scene.blob(4 * MIB, Fault(stall_after=MIB))
    scene.start()
    path = scene.path("blobs", blob.digest)
    with scene.open(blob) as response:
        response.read(1)
        arriving = scene.server.head(path)
        scene.upstream.heal()
        response.read()
    scene.server.wait_for_file(f"blobs/{blob.encoded}")
    stored = scene.server.head(path)
    for answer in (arriving, stored):
        assert answer.headers["content-length"] == str(blob.size)
    assert "collapsed" in arriving.cache_status
    assert "hit" in stored.cache_status
    assert scene.upstream.count("/blobs/", "HEAD") == 0


def test_a_client_that_has_the_blob_gets_304(scene: Scene) -> None:
    blob = scene.blob(1000)
    scene.start()
    scene.get(blob)
    for tag in (f'"{blob.digest}"', f'W/"{blob.digest}", "x"', "*"):
        answer = scene.get(blob, {"If-None-Match": tag})
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["etag"] == f'"{blob.digest}"'
    assert scene.get(blob, {"If-None-Match": '"another"'}).status == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Range": "bytes=10-19", "If-Range": '"{digest}"'}, slice(10, 20)),
        ({"Range": "bytes=10-19", "If-Range": '"another"'}, None),
        ({"Range": "Bytes=10-19"}, slice(10, 20)),
        ({"Range": "bytes=990-2000"}, slice(990, 1000)),
        ({"Range": "bytes=-10"}, slice(990, 1000)),
        ({"Range": "bytes=-2000"}, slice(0, 1000)),
        ({"Range": f"bytes=0-{'9' * 5000}"}, slice(0, 1000)),
        ({"Range": "bytes=0-1,"}, slice(0, 2)),
        ({"Range": "bytes=0-1,5000-6000"}, slice(0, 2)),
        ({"Range": "bytes=0-1,x"}, None),
        ({"Range": "bytes=0-1,6-5"}, None),
        ({"Range": "bytes=0-,0-"}, None),
        ({"Range": "bytes=," + ",".join(f"{n}-{n}" for n in range(17))}, None),
        ({"Range": "lines=1-2"}, None),
        ({"Range": "bytes=19-10"}, None),
        ({"Range": "bytes=ten-"}, None),
        ({"Range": "bytes=-"}, None),
        ({"Range": "bytes=+1-+5"}, None),
        ({"Range": "bytes"}, None),
        ({"Range": "bytes=1000-"}, 416),
        ({"Range": "bytes=-0"}, 416),
        ({"Range": "bytes=1000-,2000-2001"}, 416),
        ({"Range": f"bytes={'9' * 5000}-"}, 416),
    ],
)
def test_a_range_gets_its_bytes_and_what_is_no_range_the_whole_blob(
    scene: Scene, headers: dict[str, str], expected: slice | int | None
) -> None:
    """RFC 9110: an invalid Range is ignored (14.1.1, 14.2); one behind the end is a 416."""
    blob = scene.blob(1000)
    scene.start()
    headers = {name: value.format(digest=blob.digest) for name, value in headers.items()}
    answer = scene.get(blob, headers)
    if expected == 416:
        assert answer.status == 416
        [error] = json.loads(answer.body)["errors"]
        assert error["code"] == "RANGE_INVALID"
        assert answer.headers["content-range"] == "bytes */1000"
    elif isinstance(expected, slice):
        assert answer.status == 206
        assert answer.body == blob.data[expected]
        assert answer.headers["content-range"] == f"bytes {expected.start}-{expected.stop - 1}/1000"
    else:
        assert (answer.status, answer.body) == (200, blob.data)


@pytest.mark.parametrize("cold", [True, False])
def test_several_ranges_come_in_one_answer(scene: Scene, cold: bool) -> None:
    """As readers of eStargz and zstd:chunked ask."""
    blob = scene.blob(20 * MIB)
    scene.start()
    if not cold:
        assert scene.get(blob).body == blob.data
    end = blob.size - 1
    for asked, wanted in (
        ("0-9,100-109", [(0, 9), (100, 109)]),
        # In the order that is asked, long and short ones, and the tail first.
        (
            f"-10, 5000000-{5 * MIB + 10}, 0-{4 * MIB}",
            [(end - 9, end), (5_000_000, 5 * MIB + 10), (0, 4 * MIB)],
        ),
        (
            ",".join(f"{n * MIB}-{n * MIB}" for n in range(16)),
            [(n * MIB, n * MIB) for n in range(16)],
        ),
    ):
        answer = scene.get(blob, {"Range": f"bytes={asked}"})
        assert parts_of(answer) == [(a, b, blob.data[a : b + 1]) for a, b in wanted]
        assert answer.headers["etag"] == f'"{blob.digest}"'
    assert scene.upstream.bytes_sent("/blobs/") < 2 * blob.size


def test_a_range_of_an_empty_blob_is_the_blob_or_behind_its_end(scene: Scene) -> None:
    blob = scene.blob(0)
    scene.start()
    answers = [scene.get(blob, {"Range": f"bytes={wanted}"}) for wanted in ("-5", "-0", "0-")]
    assert [answer.status for answer in answers] == [200, 416, 416]


@pytest.mark.parametrize("auth", [BasicAuth("ann", "secret"), TokenAuth()])
def test_no_credentials_follow_a_redirect_to_another_host(
    scene: Scene, make_upstream: Callable[..., FakeUpstream], auth: BasicAuth | TokenAuth
) -> None:
    storage = make_upstream(host="127.0.0.2")
    blob = scene.blob(3 * MIB, Fault(redirect=storage.url))
    storage.add_content(scene.repository, blob)
    scene.upstream.protect(scene.repository, auth)
    scene.start(entry={"auth": {"user": "ann", "password": "secret"}}, segment="1MiB")
    assert scene.get(blob).body == blob.data
    asked = scene.upstream.seen("/blobs/", "GET")
    assert asked
    assert "Authorization" in asked[-1].headers
    assert storage.bytes_sent("/blobs/") == blob.size
    assert all("Authorization" not in request.headers for request in storage.requests)


def test_an_image_in_another_registry_that_gives_out_tokens_is_pulled(
    scene: Scene, make_upstream: Callable[..., FakeUpstream]
) -> None:
    storage = make_upstream(host="127.0.0.2", auth=TokenAuth())
    app = storage.add(scene.repository, image("app", layer_size=3 * MIB), tag="v1")
    scene.upstream.fault(f"/v2/{scene.repository}/", Fault(redirect=storage.url))
    scene.upstream.protect(scene.repository, BasicAuth("ann", "secret"))
    scene.start(entry={"auth": {"user": "ann", "password": "secret"}}, segment="1MiB")
    assert scene.manifest("v1").body == app.top.data
    for blob in app.blobs:
        assert scene.get(blob).body == blob.data
    assert scene.server.get(scene.path("tags", "list")).json()["tags"] == ["v1"]
    assert not any(
        "Basic" in request.headers.get("Authorization", "") for request in storage.requests
    )


@pytest.mark.parametrize("where", ["http://169.254.169.254", "file:///etc", "gopher://127.0.0.1"])
def test_a_redirect_to_where_nobody_may_go_is_refused(scene: Scene, where: str) -> None:
    blob = scene.blob(1000, Fault(redirect=where))
    scene.start()
    answer = scene.get(blob)
    assert answer.status in (403, 502)
    assert not scene.is_stored(blob)
    assert "Traceback" not in scene.server.log()


def test_a_redirect_in_circles_is_the_upstreams_fault(scene: Scene) -> None:
    blob = scene.blob(1000, Fault(redirect=scene.upstream.url))
    scene.start(retries=1)
    answer = scene.get(blob)
    assert answer.status == 502
    assert b"circles" in answer.body


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault(status=401), 403, "DENIED"),
        (Fault(status=403), 403, "DENIED"),
        (Fault(status=404), 404, "BLOB_UNKNOWN"),
        (Fault(status=500), 502, "UNAVAILABLE"),
        (Fault(drop=True), 502, "UNAVAILABLE"),
        (too_many_requests(), 429, "TOOMANYREQUESTS"),
    ],
)
def test_a_miss_says_what_the_upstream_did(
    scene: Scene, fault: Fault, status: int, code: str
) -> None:
    blob = scene.blob(1000, fault)
    scene.start(retries=1)
    answer = scene.get(blob)
    [error] = json.loads(answer.body)["errors"]
    assert (answer.status, error["code"]) == (status, code)
    assert not scene.is_stored(blob)
    assert list((scene.server.store / "pulls").iterdir()) == []


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "aws-chunked", "utf-8"])
def test_an_image_is_what_its_digests_say_whatever_encoding_is_named(
    scene: Scene, encoding: str
) -> None:
    """Storage keeps the header of an upload, and repeats it with the bytes as they are."""
    app = scene.upstream.add(scene.repository, image("app", layer_size=2 * MIB), tag="v1")
    scene.upstream.fault("", Fault(headers={"Content-Encoding": encoding}))
    scene.start(background_fills=0)
    assert scene.manifest("v1").body == app.top.data
    assert scene.server.get(scene.path("tags", "list")).json()["tags"] == ["v1"]
    for blob in app.blobs:
        answer = scene.get(blob)
        assert (answer.status, answer.body) == (200, blob.data)
        assert "content-encoding" not in answer.headers
        assert scene.get(blob, {"Range": "bytes=5-9"}).body == blob.data[5:10]


@pytest.mark.parametrize("size", [1000, 3 * MIB])
def test_a_layer_that_was_packed_on_its_way_is_refused_before_the_headers(
    scene: Scene, size: int
) -> None:
    """Where a manifest tells its size, or the blob is small."""
    app = scene.upstream.add(scene.repository, image("app", layer_size=size), tag="v1")
    scene.upstream.fault("/blobs/", Fault(compress="always"))
    scene.start(background_fills=0)
    assert scene.manifest("v1").status == 200
    answer = scene.get(app.layers[0])
    assert answer.status == 502
    assert b"gzip" in answer.body
    assert not scene.is_stored(app.layers[0])


def test_a_page_in_place_of_a_blob_is_not_kept(scene: Scene) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    scene.upstream.fault("/blobs/", HTML)
    scene.start(background_fills=0)
    assert scene.manifest("v1").status == 200
    # The manifest says how large it is, so this is known before anything is sent.
    answer = scene.get(app.layers[0])
    assert answer.status == 502
    assert not scene.is_stored(app.layers[0])


def test_nothing_in_place_of_a_blob_is_refused_before_the_headers(scene: Scene) -> None:
    blob = scene.blob(1000, Fault(body=b""))
    scene.start()
    assert scene.server.head(scene.path("blobs", blob.digest)).status == 502
    assert scene.get(blob).status == 502
    assert not scene.is_stored(blob)


def test_a_blob_of_no_bytes_is_served(scene: Scene) -> None:
    blob = scene.blob(0)
    scene.start()
    answer = scene.get(blob)
    assert (answer.status, answer.body) == (200, b"")
    assert scene.server.head(scene.path("blobs", blob.digest)).headers["content-length"] == "0"


def test_what_another_repository_may_not_have_is_fetched_from_one_that_may(scene: Scene) -> None:
    blob = scene.blob(1000)
    scene.upstream.protect("secret", BasicAuth("ann", "secret"))
    server = scene.start()
    path = f"/v2/secret/blobs/{blob.digest}?ns={scene.upstream.registry}"
    assert server.get(path).status == 403
    assert scene.get(blob).body == blob.data


def test_a_rate_limited_upstream_is_left_alone_and_what_is_cached_served(scene: Scene) -> None:
    app = scene.upstream.add(scene.repository, image("app"), tag="v1")
    cold = scene.blob(1000)
    scene.start(ttl="0")
    scene.manifest("v1")
    for blob in app.blobs:
        scene.server.wait_for_file(f"blobs/{blob.encoded}")
    scene.upstream.fault("/v2/", too_many_requests("2"))
    refused = scene.get(cold)
    assert (refused.status, refused.headers["retry-after"]) == (429, "2")
    asked = len(scene.upstream.requests)
    again = scene.server.get(scene.path("manifests", "v2"))
    assert again.status == 429
    assert int(again.headers["retry-after"]) in (1, 2)
    assert scene.manifest("v1").body == app.top.data
    assert all(scene.get(blob).body == blob.data for blob in app.blobs)
    assert len(scene.upstream.requests) == asked
    scene.upstream.heal()
    scene.server.wait_for(lambda: scene.get(cold).status == 200)
