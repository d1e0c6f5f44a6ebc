"""docs/openapi.yaml says what the server does: routes, errors, headers, and whatever schemathesis
makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi import checks

from ociproxy.serve.errors import RANGE_INVALID, STATUS
from ociproxy.serve.exchange import (
    BlobPath,
    ManifestPath,
    ReferrersPath,
    TagsPath,
    Target,
    parse_path,
)
from tests.images import artifact, image
from tests.server import Answer, Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.yaml"
API: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text(encoding="utf-8"))
APP = image("app")
SIGNATURE = artifact(APP.top)
DIGEST = APP.digest
BLOB = APP.blobs[0].digest
TRANSPORT = {"content-type", "content-length", "date", "server", "connection", "keep-alive"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mirror, FakeUpstream]]:
    with FakeUpstream() as upstream:
        upstream.add("app", APP, tag="v1")
        upstream.add("app", SIGNATURE, tag="v2")
        config = {
            "upstreams": [upstream_entry(upstream.url)],
            "fetch": {"unlisted": "deny", "negative_ttl": 0},
        }
        server = Mirror(tmp_path_factory.mktemp("api"), config)
        server.start()
        try:
            yield server, upstream
            server.stop()
            assert "Traceback" not in server.log()
        finally:
            server.kill()


def resolved(value: Any) -> Any:
    while isinstance(value, dict) and "$ref" in value:
        found: Any = API
        for key in value["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        value = found
    return value


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in API["paths"].items():
        for method in ("get", "head"):
            if method in item:
                yield path, method, item[method]


def test_every_route_is_described_and_nothing_else() -> None:
    described = set(API["paths"])
    expected = {"/v2/", "/v2/_catalog", "/healthz", "/readyz"}
    endpoints: dict[type[Target], str] = {
        ManifestPath: "manifests/{reference}",
        BlobPath: "blobs/{digest}",
        TagsPath: "tags/list",
        ReferrersPath: "referrers/{digest}",
    }
    assert set(endpoints) == set(get_args(Target))
    for kind, rest in endpoints.items():
        path = f"/v2/{{name}}/{rest}"
        expected.add(path)
        filled = path.format(name="a/b", reference="v1", digest=DIGEST)
        assert type(parse_path(filled, "docker.io")) is kind
    assert described == expected


def test_every_code_and_status_is_described_and_nothing_else() -> None:
    codes = {code for _, code in STATUS.values()} | {RANGE_INVALID}
    assert set(API["components"]["schemas"]["Code"]["enum"]) == codes
    statuses = {
        int(status)
        for _, _, operation in operations()
        for status in operation["responses"]
        if int(status) >= 400
    }
    # A write is no operation of this API, so its answer stands beside them.
    assert statuses | {405} == {status for status, _ in STATUS.values()} | {416, 504}
    for name, response in API["components"]["responses"].items():
        for code in re.findall(r"\b[A-Z_]{6,}\b", response["description"]):
            assert code in codes, name


def documented(path: str, method: str, status: int) -> dict[str, bool]:
    """The headers of this answer, in lower case, and whether each is always there."""
    response = resolved(API["paths"][path][method]["responses"][str(status)])
    headers = response.get("headers", {})
    return {
        name.lower(): bool(resolved(header).get("required")) for name, header in headers.items()
    }


def assert_described(path: str, method: str, answer: Answer) -> None:
    known = documented(path, method, answer.status)
    sent = set(answer.headers) - TRANSPORT - {"accept-ranges"}
    assert sent <= set(known), (path, method, answer.status)
    assert {name for name, always in known.items() if always} <= sent
    response = resolved(API["paths"][path][method]["responses"][str(answer.status)])
    if answer.body:
        media_type = answer.headers["content-type"].partition(";")[0]
        assert {media_type, "*/*"} & set(response["content"])


@pytest.mark.parametrize("method", ["get", "head"])
def test_answers_have_the_described_headers(
    world: tuple[Mirror, FakeUpstream], method: str
) -> None:
    server, upstream = world
    name = upstream.registry
    blobs, manifests = "/v2/{name}/blobs/{digest}", "/v2/{name}/manifests/{reference}"
    tags, referrers = "/v2/{name}/tags/list", "/v2/{name}/referrers/{digest}"
    cases = [
        ("/v2/", "/v2/", {}, 200),
        ("/v2/_catalog", "/v2/_catalog", {}, 404),
        ("/healthz", "/healthz", {}, 200),
        ("/readyz", "/readyz", {}, 200),
        (manifests, f"/v2/app/manifests/v1?ns={name}", {}, 200),
        (manifests, f"/v2/{name}/app/manifests/v1", {"If-None-Match": f'"{DIGEST}"'}, 304),
        (manifests, f"/v2/!/manifests/v1?ns={name}", {}, 400),
        (manifests, "/v2/app/manifests/v1?ns=quay.example", {}, 403),
        (manifests, f"/v2/app/manifests/v9?ns={name}", {}, 404),
        (blobs, f"/v2/app/blobs/{BLOB}?ns={name}", {}, 200),
        (blobs, f"/v2/app/blobs/{BLOB}?ns={name}", {"If-None-Match": f'"{BLOB}"'}, 304),
        (blobs, f"/v2/app/blobs/{BLOB}?ns={name}", {"Range": "bytes=0-1"}, 206),
        (blobs, f"/v2/app/blobs/{BLOB}?ns={name}", {"Range": "bytes=9999999-"}, 416),
        (tags, f"/v2/app/tags/list?n=1&ns={name}", {}, 200),
        (tags, f"/v2/app/tags/list?n=x&ns={name}", {}, 400),
        (referrers, f"/v2/app/referrers/{DIGEST}?artifactType=a&ns={name}", {}, 200),
    ]
    for path, target, headers, status in cases:
        if method not in API["paths"][path]:
            continue
        answer = server.request(method.upper(), target, headers)
        ranged = "Range" in headers and method == "head"
        assert ranged or answer.status == status, (target, answer)
        assert_described(path, method, answer)


def test_writes_are_answered_as_described(world: tuple[Mirror, FakeUpstream]) -> None:
    server, _ = world
    described = API["components"]["responses"]["NotAllowed"]
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        answer = server.request(method, "/v2/app/blobs/uploads/")
        assert answer.status == 405
        sent = set(answer.headers) - TRANSPORT
        assert sent <= {header.lower() for header in described["headers"]}
        assert answer.headers["allow"] == described["headers"]["Allow"]["schema"]["const"]


# schemathesis

SCHEMA = schemathesis.openapi.from_path(DOCUMENT)
HELD = {
    "name": ["app", "app", "missing"],
    "reference": ["v1", "v2", DIGEST, "v9"],
    "digest": [BLOB, DIGEST, APP.blobs[1].digest],
}


@SCHEMA.parametrize()
@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_nothing_that_the_description_allows_or_forbids_is_a_server_error(
    case: schemathesis.Case[Any], world: tuple[Mirror, FakeUpstream]
) -> None:
    server, upstream = world
    # Two of three ask the upstream that there is, for what it has.
    kind = len(json.dumps(case.query or {}, default=str)) % 3
    if kind:
        case.query = {**(case.query or {}), "ns": upstream.registry}
        for key, values in HELD.items():
            if key in (case.path_parameters or {}):
                case.path_parameters[key] = values[(kind + len(str(case.headers))) % len(values)]
    response = case.call(base_url=server.url, timeout=20)
    assert response.status_code < 500, (response.status_code, response.text)
    case.validate_response(
        response,
        checks=[
            checks.status_code_conformance,
            checks.content_type_conformance,
            checks.response_headers_conformance,
            checks.response_schema_conformance,
        ],
    )


def test_a_throttled_upstream_is_answered_as_described(world: tuple[Mirror, FakeUpstream]) -> None:
    server, upstream = world
    upstream.fault("/throttled/", Fault(status=429, retry_after="3"))
    answer = server.manifest(upstream.registry, "throttled", "v1")
    assert answer.status == 429
    assert_described("/v2/{name}/manifests/{reference}", "get", answer)
