"""An upstream says something in its headers, or a client in its request, that is meant to become
something else on its way."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.attack.conftest import assert_quiet
from tests.fetch.peers import raw_server
from tests.images import OCI_INDEX, image
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]

MANIFEST = image("app").top
LISTING = json.dumps({"name": "app", "tags": ["v1"]}).encode()
HOSTILE_VALUES = [
    b"application/json\r\n Set-Cookie: a=b",  # obsolete line folding: one header of two lines
    b"application/json\r\n\tX: y",
    b"application/json\rX: y",
    b"application/json\x00",
    b"application/json\x0bX",
    b"text/html; charset=\xff\xfe",
    b"\xe2\x80\xa8/json",
    b"a" * 60_000,
    b"application/vnd." + b"x" * 5000 + b"+json",
    b"/",
    b"application/json, text/html",
    b"%0d%0aX: y",
]


HEADERS = {
    b"Content-Type": b"200 OK",
    b"OCI-Filters-Applied": b"200 OK",
    b"Link": b"200 OK",
    b"Docker-Content-Digest": b"200 OK",
    b"Content-Encoding": b"200 OK",
    b"Content-Range": b"206 Partial Content",
    b"Location": b"307 Temporary Redirect",
    b"Www-Authenticate": b"401 Unauthorized",
    b"Retry-After": b"429 Too Many Requests",
}


@contextmanager
def hostile_upstream() -> Iterator[str]:
    """Says in `/v2/<header>/<value>/...` what the numbers of a header and of a value stand for."""

    def answer(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(65536)
        method, path = head.split(b" ", 2)[:2]
        if not path.startswith(b"/v2/"):
            return  # where a redirect of ours led
        _, _, name, value, rest = path.split(b"/", 4)
        header, status = list(HEADERS.items())[int(name)]
        body = LISTING if rest.startswith(b"tags") else MANIFEST.data
        lines = [
            b"HTTP/1.1 " + status,
            b"Content-Length: %d" % len(body),
            b"Connection: close",
            header + b": " + HOSTILE_VALUES[int(value)],
        ]
        client.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + (body if method == b"GET" else b""))

    with raw_server(answer) as name:
        yield name


def test_an_upstream_s_headers_stay_one_line_and_no_bug(mirror: MakeMirror) -> None:
    with hostile_upstream() as name:
        server = mirror(
            {
                "fetch": {"retry_wait_max": 0, "pause": 0, "retries": 0},
                "upstreams": [upstream_entry(f"http://{name}")],
            }
        )
        for repository in itertools.product(range(len(HEADERS)), range(len(HOSTILE_VALUES))):
            base = "/v2/{}/{}".format(*repository)
            for method, path in (
                ("HEAD", "manifests/v1"),
                ("GET", "manifests/v2"),
                ("GET", f"manifests/{MANIFEST.digest}"),
                ("GET", f"blobs/{MANIFEST.digest}"),
                ("GET", "tags/list"),
                ("GET", f"referrers/{MANIFEST.digest}?artifactType=x&"),
            ):
                path = f"{base}/{path}{'&' if '?' in path else '?'}ns={name}"
                answer = server.request(method, path)
                assert answer.status in (200, 403, 404, 429, 502, 503, 504), (path, server.log())
                assert "set-cookie" not in answer.headers
                assert "x" not in answer.headers
        assert_quiet(server)


def test_a_document_that_is_a_page_runs_no_script(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    """A link to it would run with the rights of the user of the browser, who may have logged in."""
    script = "<script>fetch('/v2/private/manifests/v1')</script>"
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    manifest = {"schemaVersion": 2, "mediaType": "text/html"}
    for path, document in (("/manifests/", manifest), ("/referrers/", index)):
        body = json.dumps({**document, "annotations": {"page": script}}).encode()
        page = Fault(body=body, content_type="text/html", digest_header="")
        upstream.fault(path, page)
    upstream.add("app", image("app"), tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    for path in ("manifests/v1", "tags/list", f"referrers/{MANIFEST.digest}"):
        answer = server.get(f"/v2/app/{path}?ns={upstream.registry}")
        assert answer.status == 200
        assert answer.headers["content-security-policy"] == "sandbox", path
    # Once more, now that it is stored.
    answer = server.manifest(upstream.registry, "app", "v1")
    assert script.encode() in answer.body
    assert answer.headers["content-security-policy"] == "sandbox"
    assert_quiet(server)


HOSTILE_URLS = [
    "http://[",
    "//[",
    "https://h:99999/x",
    "https://h:port/x",
    "http://:80/x",
    "http://[::1%25a]:x/",
    "http://a\u2100b/",
    "http://" + "a" * 300 + "/",
    "http://a..b/",
]


@pytest.mark.parametrize("url", HOSTILE_URLS)
def test_a_url_of_an_upstream_that_is_none_is_its_fault(mirror: MakeMirror, url: str) -> None:
    """As the target of a redirect, as the token service, as the link to the next page."""
    value = url.encode()

    def answer(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(65536)
        path = head.split(b" ", 2)[1]
        status, header = {
            b"moved": (b"307 Temporary Redirect", b"Location: " + value),
            b"login": (b"401 Unauthorized", b'Www-Authenticate: Bearer realm="' + value + b'"'),
            b"pages": (b"200 OK", b"Link: <" + value + b'>; rel="next"'),
        }[path.split(b"/")[2]]
        lines = [b"HTTP/1.1 " + status, header, b"Content-Length: %d" % len(LISTING)]
        client.sendall(b"\r\n".join(lines) + b"\r\nConnection: close\r\n\r\n" + LISTING)

    with raw_server(answer) as name:
        entry = upstream_entry(f"http://{name}", auth={"user": "ann", "password": "secret"})
        fetch = {"retry_wait_max": 0, "pause": 0, "retries": 0}
        server = mirror({"fetch": fetch, "upstreams": [entry]})
        for path in (
            "moved/manifests/v1",
            f"moved/blobs/{MANIFEST.digest}",
            "moved/tags/list",
            "login/manifests/v1",
            f"login/blobs/{MANIFEST.digest}",
            "login/tags/list",
        ):
            answered = server.get(f"/v2/{path}?ns={name}")
            assert answered.status == 502, (path, answered.body)
        # Of a link that can be parsed only the query is used.
        assert server.get(f"/v2/pages/tags/list?ns={name}").status in (200, 502)
        assert_quiet(server)


# What a client sends


@pytest.mark.parametrize(
    "target",
    [
        "/v2/app/manifests/v1?ns=127.0.0.1%0d%0aX:%20y",
        "/v2/app/manifests/v1%0d%0aX:%20y?ns={name}",
        "/v2/app%0d%0aX:%20y/manifests/v1?ns={name}",
        "/v2/app/tags/list?ns={name}&last=a%0d%0aX:%20y",
        "/v2/app/tags/list?ns={name}&n=1%0d%0aX:%20y",
        "/v2/app/tags/list?ns={name}&last=%00%ff",
        "/v2/app/referrers/{digest}?artifactType=a%0d%0aX:%20y&ns={name}",
    ],
)
def test_a_client_s_line_breaks_go_no_further(
    mirror: MakeMirror, upstream: FakeUpstream, target: str
) -> None:
    app = upstream.add("app", image("app"), tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    answer = server.get(target.format(name=upstream.registry, digest=app.digest))
    assert answer.status in (200, 400, 404)
    assert "x" not in answer.headers
    for seen in upstream.requests:
        assert "X" not in seen.headers
    assert "\nX: y" not in server.log()
    assert_quiet(server)


def test_a_client_s_headers_do_not_reach_the_upstream(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    upstream.add("app", image("app"), tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    sent = {
        "Authorization": "Basic Y2xpZW50OnNlY3JldA==",
        "Cookie": "client=secret",
        "X-Forwarded-For": "10.0.0.1",
        "Host": "169.254.169.254",
        "Accept-Encoding": "gzip",
    }
    path = f"/v2/app/manifests/v1?ns={upstream.registry}"
    assert server.get(path, sent).status == 200
    for seen in upstream.requests:
        assert seen.headers["Host"] == upstream.registry
        assert {"Authorization", "Cookie", "X-Forwarded-For"}.isdisjoint(seen.headers)
    assert "secret" not in server.log()
    assert "Y2xpZW50" not in server.log()
