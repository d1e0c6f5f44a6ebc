"""A mirror behind a mirror: what the inner one knows reaches the clients of the outer one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.images import artifact, image, multi_platform, random_blob
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]


@pytest.fixture(params=["ns", "path"])
def chain(
    request: pytest.FixtureRequest, mirror: MakeMirror, upstream: FakeUpstream
) -> tuple[Mirror, Mirror]:
    """Outer and inner, which is told the registry by `ns` or in the path."""
    inner = mirror({"upstreams": [upstream_entry(upstream.url)]})
    url = inner.url if request.param == "ns" else f"{inner.url}/{upstream.registry}"
    entry = {"name": upstream.registry, "endpoints": [url]}
    return mirror({"upstreams": [entry]}), inner


def test_an_image_goes_through_both(chain: tuple[Mirror, Mirror], upstream: FakeUpstream) -> None:
    outer, inner = chain
    app = upstream.add("team/app", multi_platform(), tag="v1")
    answer = outer.manifest(upstream.registry, "team/app", "v1")
    assert (answer.status, answer.body) == (200, app.top.data)
    for child in app.all_content():
        kind = "blobs" if child in app.blobs else "manifests"
        path = f"/v2/team/app/{kind}/{child.digest}?ns={upstream.registry}"
        assert outer.get(path).body == child.data
    upstream.stop_listening()
    for each in chain:
        assert each.manifest(upstream.registry, "team/app", "v1").body == app.top.data
    for blob in app.blobs:
        assert inner.blob(upstream.registry, "team/app", blob.digest).body == blob.data


def test_head_of_a_blob_that_is_missing_and_of_one_that_nobody_has(
    chain: tuple[Mirror, Mirror], upstream: FakeUpstream
) -> None:
    outer, _ = chain
    blob = upstream.add_content("team/app", random_blob(1000))
    head = outer.head(f"/v2/team/app/blobs/{blob.digest}?ns={upstream.registry}")
    assert (head.status, head.headers["content-length"]) == (200, "1000")
    unknown = random_blob(10, seed="other").digest
    assert outer.head(f"/v2/team/app/blobs/{unknown}?ns={upstream.registry}").status == 404
    assert outer.blob(upstream.registry, "team/app", unknown).status == 404
    assert upstream.count("/blobs/", "GET") == 0
    ranged = outer.blob(upstream.registry, "team/app", blob.digest, {"Range": "bytes=10-19"})
    assert (ranged.status, ranged.body) == (206, blob.data[10:20])


def test_tags_in_pages_and_referrers(chain: tuple[Mirror, Mirror], upstream: FakeUpstream) -> None:
    outer, _ = chain
    app = image("app")
    for tag in ("a", "b", "c"):
        upstream.add("team/app", app, tag=tag)
    sbom = upstream.add("team/app", artifact(app.top))
    for path in (
        f"/v2/team/app/tags/list?n=2&ns={upstream.registry}",
        f"/v2/{upstream.registry}/team/app/tags/list?n=2",
    ):
        first = outer.get(path)
        assert first.json()["tags"] == ["a", "b"]
        following = first.headers["link"].partition(">")[0].removeprefix("<")
        assert outer.get(following).json()["tags"] == ["c"], following
    listing = outer.get(f"/v2/team/app/referrers/{app.digest}?ns={upstream.registry}").json()
    assert [each["digest"] for each in listing["manifests"]] == [sbom.digest]


@pytest.mark.parametrize(("status", "expected"), [(403, 403), (404, 404), (429, 429), (500, 502)])
def test_what_the_registry_says_comes_through(
    mirror: MakeMirror, upstream: FakeUpstream, status: int, expected: int
) -> None:
    upstream.fault("/v2/", Fault(status=status, retry_after="9"))
    inner = mirror({"upstreams": [upstream_entry(upstream.url)]})
    outer = mirror({"upstreams": [{"name": upstream.registry, "endpoints": [inner.url]}]})
    answer = outer.manifest(upstream.registry, "app", "v1")
    assert answer.status == expected, outer.log()
    assert (answer.headers.get("retry-after") in ("8", "9")) is (status == 429)


def test_the_registry_itself_is_asked_while_the_mirror_is_down(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = upstream.add("app", image("app", layer_size=300_000), tag="v1")
    inner = mirror({"upstreams": [upstream_entry(upstream.url)]})
    entry = {"name": upstream.registry, "endpoints": [inner.url, upstream.url]}
    outer = mirror({"upstreams": [entry]})
    inner.stop()
    assert outer.manifest(upstream.registry, "app", "v1").body == app.top.data
    for blob in app.blobs:
        assert outer.blob(upstream.registry, "app", blob.digest).body == blob.data
    assert "endpoint paused" in outer.log()
    inner.start()
