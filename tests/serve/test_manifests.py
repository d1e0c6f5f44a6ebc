"""Tags and manifests: freshness, revalidation, staleness, negative answers, restarts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from ociproxy.store.inventory import inventory
from ociproxy.store.store import Store
from tests.images import OCI_INDEX, OCI_MANIFEST, Image, content, image, multi_platform
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import HTML, Fault, too_many_requests

MakeMirror = Callable[..., Mirror]


def mirror_of(
    mirror: MakeMirror, upstream: FakeUpstream, *, ttl: str = "15m", **fetch: object
) -> Mirror:
    return mirror(
        {
            "upstreams": [upstream_entry(upstream.url)],
            "fetch": fetch,
            "tags": [{"match": "*", "ttl": ttl}],
        }
    )


def test_exact_bytes_headers_and_a_conditional_request(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = image("app")
    upstream.add("team/app", app, tag="v1")
    server = mirror_of(mirror, upstream)
    answer = server.manifest(upstream.registry, "team/app", "v1")
    assert answer.body == app.top.data
    assert answer.headers["content-type"] == app.top.media_type
    assert answer.headers["docker-content-digest"] == app.digest
    assert answer.headers["oci-namespace"] == upstream.registry
    assert answer.headers["etag"] == f'"{app.digest}"'
    path = f"/v2/team/app/manifests/v1?ns={upstream.registry}"
    assert server.get(path, {"If-None-Match": f'"{app.digest}"'}).status == 304
    assert server.get(path, {"If-None-Match": app.digest}).status == 304  # Docker's allows it
    assert server.get(path).cache_status == "ociproxy; hit"


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_a_tag_moves_at_an_upstream_that_refuses_each_head(
    mirror: MakeMirror, upstream: FakeUpstream, status: int
) -> None:
    upstream.add("app", image("old"), tag="v1")
    upstream.fault("/manifests/", Fault(status=status), method="HEAD")
    server = mirror_of(mirror, upstream, ttl="0")
    server.manifest(upstream.registry, "app", "v1")
    moved = upstream.add("app", image("new"), tag="v1")
    answer = server.manifest(upstream.registry, "app", "v1")
    assert (answer.body, answer.digest) == (moved.top.data, moved.digest)
    assert server.head(f"/v2/app/manifests/v1?ns={upstream.registry}").digest == moved.digest


def test_an_image_manifest_completes_the_image_in_the_background(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = image("app", layers=3)
    upstream.add("app", app, tag="v1")
    server = mirror_of(mirror, upstream)
    server.manifest(upstream.registry, "app", "v1")
    for blob in app.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")


def test_a_blob_that_could_not_be_fetched_ahead_is_fetched_with_the_next_pull(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = upstream.add("app", image("app", layers=3), tag="v1")
    late = app.blobs[-1]
    upstream.fault(late.digest, Fault(status=404))
    server = mirror_of(mirror, upstream, negative_ttl=0)
    server.manifest(upstream.registry, "app", "v1")
    for blob in app.blobs[:-1]:
        server.wait_for_file(f"blobs/{blob.encoded}")
    server.wait_for(lambda: upstream.count(late.digest) > 0, "asked for the blob")
    upstream.heal()
    server.manifest(upstream.registry, "app", "v1")
    server.wait_for_file(f"blobs/{late.encoded}")


def test_without_background_fills_a_manifest_brings_no_blob(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    upstream.add("app", image("app"), tag="v1")
    server = mirror_of(mirror, upstream, background_fills=0)
    server.manifest(upstream.registry, "app", "v1")
    time.sleep(0.5)
    assert upstream.count("/blobs/") == 0


def test_a_head_fetches_nothing_and_the_tag_survives_offline(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = image("app")
    upstream.add("app", app, tag="v1")
    server = mirror_of(mirror, upstream)
    head = server.head(f"/v2/app/manifests/v1?ns={upstream.registry}")
    assert head.headers["docker-content-digest"] == app.digest
    assert head.headers["content-length"] == str(app.top.size)
    assert upstream.count("/manifests/", "GET") == 0
    server.manifest(upstream.registry, "app", app.digest)
    server.restart(args=["--offline"])
    assert server.manifest(upstream.registry, "app", "v1").body == app.top.data


def test_a_tag_of_which_only_a_head_was_seen_is_absent_offline_for_head_and_get(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    upstream.add("app", image("app"), tag="v1")
    server = mirror_of(mirror, upstream)
    path = f"/v2/app/manifests/v1?ns={upstream.registry}"
    assert server.head(path).status == 200
    server.restart(args=["--offline"])
    assert (server.head(path).status, server.get(path).status) == (404, 404)


@pytest.mark.parametrize("named", ["application/json", "application/octet-stream", "no type"])
def test_a_head_that_names_no_media_type_does_not_rename_the_manifest(
    mirror: MakeMirror, upstream: FakeUpstream, named: str
) -> None:
    app = image("app")
    upstream.add("app", app, tag="v1")
    upstream.fault("/manifests/", Fault(content_type=named), method="HEAD")
    server = mirror_of(mirror, upstream)
    head = server.head(f"/v2/app/manifests/v1?ns={upstream.registry}")
    assert head.headers["content-type"] == app.top.media_type
    assert head.digest == app.digest
    record = server.wait_for_file(f"refs/{upstream.registry}/app/_tags/v1")
    assert json.loads(record.read_bytes())["descriptor"]["mediaType"] == app.top.media_type
    server.manifest(upstream.registry, "app", app.digest)
    answer = server.manifest(upstream.registry, "app", "v1")
    assert answer.headers["content-type"] == app.top.media_type


def odd_manifests() -> dict[str, tuple[dict[str, object], str]]:
    """What some registries hold and clients pull: by what is odd a document and its media type."""
    made = image("odd")
    config, layer = (blob.descriptor() for blob in made.blobs)
    whole = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": [layer]}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX}
    child = made.top.descriptor()

    def without(descriptor: dict[str, object], key: str) -> dict[str, object]:
        return {name: value for name, value in descriptor.items() if name != key}

    return {
        "a layer without size": ({**whole, "layers": [without(layer, "size")]}, OCI_MANIFEST),
        "a layer without mediaType": (
            {**whole, "layers": [without(layer, "mediaType")]},
            OCI_MANIFEST,
        ),
        "a size that is a text": ({**whole, "layers": [{**layer, "size": "9"}]}, OCI_MANIFEST),
        "a layer that is null": ({**whole, "layers": [layer, None]}, OCI_MANIFEST),
        "no config": (without(whole, "config"), OCI_MANIFEST),
        "a config without size": ({**whole, "config": without(config, "size")}, OCI_MANIFEST),
        "an odd subject": ({**whole, "subject": {"digest": "x"}}, OCI_MANIFEST),
        "a child without size": ({**index, "manifests": [without(child, "size")]}, OCI_INDEX),
    }


@pytest.mark.parametrize("odd", odd_manifests())
def test_an_odd_manifest_is_passed_on_byte_for_byte(
    mirror: MakeMirror, upstream: FakeUpstream, odd: str
) -> None:
    document, media_type = odd_manifests()[odd]
    made = image("odd")
    top = content(json.dumps(document).encode(), media_type)
    upstream.add("app", Image(top, (made.top,), made.blobs), tag="v1")
    server = mirror_of(mirror, upstream)
    for _ in ("cold", "warm", "offline"):
        for named in ("v1", top.digest):
            answer = server.manifest(upstream.registry, "app", named)
            assert (answer.status, answer.body, answer.digest) == (200, top.data, top.digest)
            assert answer.headers["content-type"] == media_type
        for blob in made.blobs:
            assert server.blob(upstream.registry, "app", blob.digest).body == blob.data
        upstream.stop_listening()
        server.restart(args=["--offline"])
    [entry] = [each for each in inventory(Store(server.store)) if each.reference.tag == "v1"]
    assert not entry.complete
    assert "cannot be told" in entry.missing[0].reason


def test_an_odd_manifest_of_another_digest_is_refused(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    document, media_type = odd_manifests()["no config"]
    top = content(json.dumps(document).encode(), media_type)
    upstream.add("app", Image(top), tag="v1")
    upstream.fault("/manifests/", Fault(body=top.data + b" "))
    server = mirror_of(mirror, upstream)
    for named in ("v1", top.digest):
        assert server.manifest(upstream.registry, "app", named).status == 502


def test_a_head_that_calls_an_index_an_image_is_survived(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    many = multi_platform("many")
    upstream.add("app", many, tag="v1")
    wrong = Fault(content_type="application/vnd.oci.image.manifest.v1+json")
    upstream.fault("/manifests/", wrong, method="HEAD")
    server = mirror_of(mirror, upstream)
    server.head(f"/v2/app/manifests/v1?ns={upstream.registry}")
    server.manifest(upstream.registry, "app", many.digest)
    answer = server.manifest(upstream.registry, "app", "v1")
    assert (answer.status, answer.body) == (200, many.top.data)


@pytest.mark.parametrize("wrong", ["sha256:" + "0" * 64, "nonsense", ""])
def test_a_head_that_names_a_wrong_digest_does_not_spoil_the_tag(
    mirror: MakeMirror, upstream: FakeUpstream, wrong: str
) -> None:
    app = image("app")
    upstream.add("app", app, tag="v1")
    upstream.fault("/manifests/", Fault(digest_header=wrong), method="HEAD")
    server = mirror_of(mirror, upstream)
    head = server.head(f"/v2/app/manifests/v1?ns={upstream.registry}")
    assert head.status == 200
    for _ in range(2):
        answer = server.manifest(upstream.registry, "app", "v1")
        assert (answer.status, answer.body, answer.digest) == (200, app.top.data, app.digest)


def test_a_tag_that_moved_after_its_head_is_fetched(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    one, two = image("one"), image("two")
    upstream.add("app", one, tag="v1")
    server = mirror_of(mirror, upstream)
    server.head(f"/v2/app/manifests/v1?ns={upstream.registry}")
    upstream.add("app", two, tag="v1")
    upstream.remove("app", one.digest)
    assert server.manifest(upstream.registry, "app", "v1").body == two.top.data


def test_a_media_type_that_is_no_header_does_not_reach_one(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    hostile = b'{"schemaVersion": 2, "mediaType": "a/b\\r\\nX-Evil: 1", "manifests": []}'
    upstream.add("app", image("app"), tag="v1")
    upstream.fault("/manifests/", Fault(body=hostile, content_type="text/plain", digest_header=""))
    server = mirror_of(mirror, upstream)
    answer = server.manifest(upstream.registry, "app", "v1")
    assert answer.status in (200, 502)
    assert "x-evil" not in answer.headers
    assert "Traceback" not in server.log()


def test_an_expired_tag_costs_one_head_and_no_get(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    upstream.add("app", image("app"), tag="v1")
    server = mirror_of(mirror, upstream, ttl="0")
    server.manifest(upstream.registry, "app", "v1")
    answer = server.manifest(upstream.registry, "app", "v1")
    assert "revalidated" in answer.cache_status
    assert upstream.count("/manifests/", "GET") == 1
    assert upstream.count("/manifests/", "HEAD") == 1


def test_a_moved_tag_is_fetched(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    upstream.add("app", image("one"), tag="v1")
    server = mirror_of(mirror, upstream, ttl="0")
    server.manifest(upstream.registry, "app", "v1")
    two = image("two")
    upstream.add("app", two, tag="v1")
    assert server.manifest(upstream.registry, "app", "v1").body == two.top.data


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (Fault(status=500), "fwd=stale"),
        (Fault(status=403), "fwd-status=403"),
        (Fault(status=404), "fwd-status=404"),
        (too_many_requests(), "fwd-status=429"),
        (Fault(drop=True), "fwd=stale"),
        (Fault(delay=30), "upstream-slow"),
    ],
)
def test_what_is_stored_outlives_a_failing_upstream(
    mirror: MakeMirror, upstream: FakeUpstream, fault: Fault, word: str
) -> None:
    app = image("app")
    upstream.add("app", app, tag="v1")
    server = mirror_of(mirror, upstream, ttl="0", timeouts={"revalidate": "500ms"})
    server.manifest(upstream.registry, "app", "v1")
    upstream.fault("/manifests/", fault)
    answer = server.manifest(upstream.registry, "app", "v1")
    assert (answer.status, answer.body) == (200, app.top.data)
    assert word in answer.cache_status
    asked = upstream.count("/manifests/")
    # A pause follows: the next request does not ask.
    assert server.manifest(upstream.registry, "app", "v1").status == 200
    assert upstream.count("/manifests/") == asked
    upstream.release()


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault(status=401), 403, "DENIED"),
        (Fault(status=403), 403, "DENIED"),
        (Fault(status=404), 404, "MANIFEST_UNKNOWN"),
        (Fault(status=500), 502, "UNAVAILABLE"),
        (too_many_requests(), 429, "TOOMANYREQUESTS"),
        (HTML, 502, "MANIFEST_INVALID"),
        (Fault(digest_header="sha256:" + "0" * 64), 502, "UNKNOWN"),
        (Fault(delay=30), 504, "UNAVAILABLE"),
        (Fault(drop=True), 502, "UNAVAILABLE"),
    ],
)
def test_a_miss_says_what_the_upstream_did(
    mirror: MakeMirror, upstream: FakeUpstream, fault: Fault, status: int, code: str
) -> None:
    upstream.add("app", image("app"), tag="v1")
    upstream.fault("/manifests/", fault)
    server = mirror_of(mirror, upstream, retries=2, timeouts={"headers": "1s", "answer": "4s"})
    began = time.monotonic()
    answer = server.manifest(upstream.registry, "app", "v1")
    assert time.monotonic() - began < 20
    assert answer.status == status
    [error] = json.loads(answer.body)["errors"]
    assert error["code"] == code
    if status == 429:
        assert answer.headers["retry-after"] == "7"
    upstream.release()


def test_a_refusal_is_kept_for_a_while(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    server = mirror_of(mirror, upstream)
    assert server.manifest(upstream.registry, "app", "v1").status == 404
    asked = len(upstream.requests)
    assert server.manifest(upstream.registry, "app", "v1").status == 404
    assert len(upstream.requests) == asked


def test_an_unreachable_upstream_is_left_alone(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    server = mirror_of(mirror, upstream)
    upstream.stop_listening()
    assert server.manifest(upstream.registry, "app", "v1").status == 502
    began = time.monotonic()
    answer = server.manifest(upstream.registry, "app", "v2")
    assert answer.status == 502
    assert b"left alone" in answer.body
    assert time.monotonic() - began < 1
    upstream.listen_again()


def test_names_survive_a_restart(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    app, many = image("app"), multi_platform("many")
    big = image("big", pad_to=3_900_000)
    places = [
        ("team/app", "MixedCase-Tag_1.0", app),
        ("team/app", "other", app),
        ("a.b/c-d/e_f/g__h/i/j", "v1", many),
        ("big", "v1", big),
    ]
    for repository, tag, what in places:
        upstream.add(repository, what, tag=tag)
    server = mirror_of(mirror, upstream)
    for repository, tag, what in places:
        assert server.manifest(upstream.registry, repository, tag).body == what.top.data
    server.restart(args=["--offline"])
    for repository, tag, what in places:
        answer = server.manifest(upstream.registry, repository, tag)
        assert answer.body == what.top.data
        assert answer.headers["docker-content-digest"] == what.digest


def test_one_name_on_two_upstreams_is_two_images(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream]
) -> None:
    one, two = make_upstream(), make_upstream()
    here, there = image("here"), image("there")
    one.add("app", here, tag="v1")
    two.add("app", there, tag="v1")
    server = mirror({"upstreams": [upstream_entry(one.url), upstream_entry(two.url)]})
    for _ in range(2):
        assert server.manifest(one.registry, "app", "v1").body == here.top.data
        assert server.manifest(two.registry, "app", "v1").body == there.top.data
        server.restart()


def test_docker_hub_has_one_cache_under_all_its_names(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = image("nginx")
    upstream.add("library/nginx", app, tag="v1")
    server = mirror({"upstreams": [{"name": "docker.io", "endpoint": upstream.url}]})
    paths = [
        "/v2/nginx/manifests/v1",
        "/v2/library/nginx/manifests/v1",
        "/v2/nginx/manifests/v1?ns=index.docker.io",
        "/v2/library/nginx/manifests/v1?ns=registry-1.docker.io",
        "/v2/docker.io/nginx/manifests/v1",
        "/v2/docker.io/library/nginx/manifests/v1",
    ]
    assert all(server.get(path).body == app.top.data for path in paths)
    assert upstream.count("/manifests/", "GET") == 1
    server.restart(args=["--offline"])
    assert all(server.get(path).body == app.top.data for path in paths)
