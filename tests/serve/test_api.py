"""The rest of the API: routes, errors, lists, health, reload, shutdown."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable

import pytest

from ociproxy.serve.exchange import parse_path
from tests.images import artifact, image
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream

MakeMirror = Callable[..., Mirror]
ZEROS = "sha256:" + "0" * 64


def mirror_of(mirror: MakeMirror, upstream: FakeUpstream) -> Mirror:
    return mirror({"upstreams": [upstream_entry(upstream.url)]})


def code_of(body: bytes) -> str:
    [error] = json.loads(body)["errors"]
    assert set(error) == {"code", "message", "detail"}
    return str(error["code"])


def test_the_base_and_the_health_endpoints(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    server = mirror_of(mirror, upstream)
    base = server.get("/v2/")
    assert base.status == 200
    assert base.headers["docker-distribution-api-version"] == "registry/2.0"
    assert server.get("/healthz").status == 200
    assert server.get("/readyz").status == 200


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v2/_catalog", 404, "UNSUPPORTED"),
        ("/nothing", 404, "UNSUPPORTED"),
        ("/v2/app", 404, "UNSUPPORTED"),
        # The conformance tests of the distribution-spec ask for a manifest that cannot be.
        ("/v2/app/manifests/.INVALID_MANIFEST_NAME", 404, "MANIFEST_UNKNOWN"),
        ("/v2/app/manifests/!bad", 404, "MANIFEST_UNKNOWN"),
        ("/v2/app/manifests/" + "a" * 129, 404, "MANIFEST_UNKNOWN"),
        ("/v2/!bad/manifests/.INVALID", 400, "NAME_INVALID"),
        ("/v2/app//x/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/../../etc/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/%2e%2e/%2e%2e/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/_tags/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/" + "a/" * 300 + "manifests/v1", 400, "NAME_INVALID"),
        ("/v2/app/blobs/sha256:abc", 400, "DIGEST_INVALID"),
        ("/v2/app/blobs/md5:d41d8cd98f00b204e9800998ecf8427e", 400, "DIGEST_INVALID"),
        ("/v2/app/manifests/sha256:" + "G" * 64, 400, "DIGEST_INVALID"),
        ("/v2/app/manifests/v1?ns=", 400, "NAME_INVALID"),
        ("/v2/app/manifests/v1?ns=a%2Fb", 400, "NAME_INVALID"),
        ("/v2/app/tags/list?n=-1", 400, "PAGINATION_NUMBER_INVALID"),
    ],
)
def test_what_is_malformed_gets_its_code(
    mirror: MakeMirror, upstream: FakeUpstream, path: str, status: int, code: str
) -> None:
    server = mirror_of(mirror, upstream)
    answer = server.get(path)
    assert (answer.status, code_of(answer.body)) == (status, code)
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_writes_are_refused(mirror: MakeMirror, upstream: FakeUpstream, method: str) -> None:
    server = mirror_of(mirror, upstream)
    answer = server.request(method, "/v2/app/blobs/uploads/")
    assert (answer.status, code_of(answer.body)) == (405, "UNSUPPORTED")


def test_a_closed_world_and_no_default(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    server = mirror(
        {
            "upstreams": [upstream_entry(upstream.url)],
            "fetch": {"unlisted": "deny"},
            "serve": {"default_upstream": ""},
        }
    )
    answer = server.get("/v2/app/manifests/v1?ns=quay.example")
    assert (answer.status, code_of(answer.body)) == (403, "DENIED")
    answer = server.get("/v2/app/manifests/v1")
    assert (answer.status, code_of(answer.body)) == (404, "NAME_UNKNOWN")


def test_every_answer_to_a_request_with_ns_says_the_namespace(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    """The base and refusals too, but for a name that can be no registry."""
    server = mirror_of(mirror, upstream)
    for method, path, status in (
        ("GET", "/v2/", 200),
        ("HEAD", "/v2/", 200),
        ("GET", "/v2/_catalog", 404),
        ("GET", "/v2/app/manifests/sha256:abc", 400),
        ("PUT", "/v2/app/manifests/v1", 405),
    ):
        answer = server.request(method, f"{path}?ns=quay.example:443")
        assert (answer.status, answer.headers["oci-namespace"]) == (status, "quay.example:443")
        answer = server.request(method, f"{path}?ns=quay.example%0d%0aX-Odd:1")
        assert "oci-namespace" not in answer.headers
        assert "x-odd" not in answer.headers


def test_an_unlisted_upstream_on_loopback_is_refused(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    server = mirror({"fetch": {"unlisted": {"scheme": "auto"}}})
    answer = server.manifest(upstream.registry, "app", "v1")
    assert (answer.status, code_of(answer.body)) == (403, "DENIED")
    assert upstream.requests == []


def test_a_registry_that_is_said_twice_is_taken_once(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    """As BuildKit asks a mirror: the registry in the path, and in `ns`."""
    app = upstream.add("team/app", image("app"), tag="v1")
    server = mirror_of(mirror, upstream)
    name = upstream.registry
    for kind, last, body in (
        ("manifests", "v1", app.top.data),
        ("blobs", app.blobs[0].digest, app.blobs[0].data),
    ):
        answer = server.get(f"/v2/{name}/team/app/{kind}/{last}?ns={name}")
        assert (answer.status, answer.body) == (200, body)
        assert answer.headers["oci-namespace"] == name
    assert server.get(f"/v2/{name}/team/app/tags/list?ns={name}").json()["tags"] == ["v1"]
    folder = server.store / "refs"
    server.wait_for(lambda: any(folder.glob("*/team/app")), "recorded")
    assert len(list(folder.glob("*/team/app"))) == 1


@pytest.mark.parametrize(
    ("path", "repository"),
    [
        ("docker.io/library/nginx", "docker.io/library/nginx"),
        ("registry-1.docker.io/library/nginx", "docker.io/library/nginx"),
        ("docker.io/nginx", "docker.io/library/nginx"),
        # A repository may be called like another registry, or have dots.
        ("quay.io/library/nginx", "docker.io/quay.io/library/nginx"),
        ("docker.io", "docker.io/library/docker.io"),
    ],
)
def test_only_the_registry_of_ns_is_taken_off_the_path(path: str, repository: str) -> None:
    target = parse_path(f"/v2/{path}/manifests/1?ns=docker.io", "")
    assert str(target.repository) == repository


def test_tags_are_paged_and_cached_ones_are_listed_offline(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = image("app")
    for tag in ("a", "b", "c"):
        upstream.add("app", app, tag=tag)
    server = mirror_of(mirror, upstream)
    first = server.get(f"/v2/app/tags/list?n=2&ns={upstream.registry}")
    assert first.json()["tags"] == ["a", "b"]
    following = first.headers["link"].partition(">")[0].removeprefix("<")
    assert urllib.parse.parse_qs(urllib.parse.urlsplit(following).query)["ns"] == [
        upstream.registry
    ]
    assert server.get(following).json()["tags"] == ["c"]
    server.manifest(upstream.registry, "app", "b")
    server.restart(args=["--offline"])
    assert server.get(f"/v2/app/tags/list?ns={upstream.registry}").json()["tags"] == ["b"]


@pytest.mark.parametrize("api", [True, False])
def test_referrers_never_answer_404(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream], api: bool
) -> None:
    upstream = make_upstream(referrers=api)
    app = image("app")
    signature = artifact(app.top)
    upstream.add("app", app, tag="v1")
    upstream.add("app", signature)
    server = mirror_of(mirror, upstream)
    path = f"/v2/app/referrers/{app.digest}?ns={upstream.registry}"
    answer = server.get(path)
    assert answer.status == 200
    listed = [entry["digest"] for entry in answer.json()["manifests"]]
    assert listed == ([signature.digest] if api else [])
    server.manifest(upstream.registry, "app", signature.digest)
    nothing = server.get(f"/v2/app/referrers/{ZEROS}?ns={upstream.registry}")
    assert (nothing.status, nothing.json()["manifests"]) == (200, [])
    server.restart(args=["--offline"])
    offline = server.get(path).json()["manifests"]
    assert [entry["digest"] for entry in offline] == [signature.digest]


def test_a_broken_config_on_sighup_keeps_the_running_one(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream]
) -> None:
    one, two = make_upstream(), make_upstream()
    one.add("app", image("one"), tag="v1")
    two.add("app", image("two"), tag="v1")
    server = mirror({"upstreams": [upstream_entry(one.url)], "fetch": {"unlisted": "deny"}})
    server.write_config({"unknown": True})
    server.reload()
    server.wait_for_log("configuration not reloaded")
    assert server.manifest(one.registry, "app", "v1").status == 200
    assert server.manifest(two.registry, "app", "v1").status == 403
    both = [upstream_entry(one.url), upstream_entry(two.url)]
    server.write_config({"upstreams": both, "fetch": {"unlisted": "deny"}})
    server.reload()
    server.wait_for_log("configuration reloaded")
    assert server.manifest(two.registry, "app", "v1").status == 200


def test_every_request_has_its_line(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    app = image("app")
    upstream.add("app", app, tag="v1")
    server = mirror_of(mirror, upstream)
    server.manifest(upstream.registry, "app", "v1")
    server.manifest(upstream.registry, "app", "v1")
    server.wait_for_log("outcome=hit")
    log = server.log()
    assert "outcome=miss" in log
    assert f"reference={upstream.registry}/app:v1 digest={app.digest}" in log
