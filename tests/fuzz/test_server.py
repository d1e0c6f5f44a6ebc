"""Whatever a client sends to a server, and an upstream answers it: no 500, no bug in its log."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fetch.peers import raw_server
from tests.fuzz.counting import TRIED, inputs
from tests.fuzz.test_parsers import DIGESTS, JSON, NAMES, TEXT
from tests.images import OCI_INDEX, OCI_MANIFEST, image
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream

APP = image("app")
GOOD_STATUSES = {200, 206, 304, 400, 401, 403, 404, 405, 408, 413, 414, 416, 429, 431}
GATEWAY_STATUSES = {502, 503, 504}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mirror, str]]:
    """A mirror and the name of its good upstream."""
    with FakeUpstream() as upstream:
        upstream.add("app", APP, tag="v1")
        config = {
            "upstreams": [upstream_entry(upstream.url)],
            "fetch": {"unlisted": "deny"},
        }
        made = Mirror(tmp_path_factory.mktemp("fuzz"), config)
        made.start()
        try:
            yield made, upstream.registry
            made.stop()
            assert "Traceback" not in made.log(), made.log()
        finally:
            made.kill()


def exchange(server: Mirror, sent: bytes, *, end: bool = True) -> bytes:
    """With `end` no more is to come, and the server may leave without an answer."""
    with socket.create_connection((server.host, server.port), timeout=20) as client:
        client.sendall(sent)
        if end:
            client.shutdown(socket.SHUT_WR)
        received = b""
        while data := client.recv(65536):
            received += data
        return received


def latin(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


VALUES = st.one_of(
    TEXT, DIGESTS.map('"{}"'.format), st.sampled_from(["bytes=0-", "*", "\0", "gzip"])
)


@inputs(1500)
@given(
    st.one_of(
        st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "TRACE", "get"]), TEXT
    ),
    st.sampled_from(["/v2/", "/", "", "//v2/", "/v2", "http://x/v2/", "*"]),
    NAMES,
    st.sampled_from(["/manifests/", "/blobs/", "/tags/list", "/referrers/", ""]),
    st.one_of(DIGESTS, TEXT, st.just(APP.digest)),
    st.one_of(st.just("?ns={name}"), st.just(""), TEXT.map("?ns={name}&{}".__add__), TEXT),
    st.dictionaries(
        st.one_of(
            st.sampled_from(
                [
                    "Range",
                    "If-None-Match",
                    "If-Range",
                    "Accept",
                    "Content-Length",
                    "Expect",
                    "Upgrade",
                ]
            ),
            TEXT,
        ),
        VALUES,
        max_size=4,
    ),
    st.binary(max_size=50),
)
def test_requests(
    server: tuple[Mirror, str],
    method: str,
    start: str,
    repository: str,
    kind: str,
    last: str,
    query: str,
    headers: dict[str, str],
    body: bytes,
) -> None:
    TRIED["request to a server"] += 1
    mirror, name = server
    line = f"{method} {start}{repository}{kind}{last}{query.replace('{name}', name)} HTTP/1.1"
    lines = [line, "Host: x", "Connection: close", *(f"{k}: {v}" for k, v in headers.items())]
    answer = exchange(mirror, latin("\r\n".join(lines)) + b"\r\n\r\n" + body)
    for status in statuses(answer):
        assert status in GOOD_STATUSES | GATEWAY_STATUSES, mirror.log()


def statuses(answer: bytes) -> list[int]:
    lines = answer.split(b"\r\n")
    return [int(line.split()[1]) for line in lines if line.startswith(b"HTTP/1.")]


LINES = st.one_of(
    st.builds(
        "{}: {}".format,
        st.sampled_from(
            [
                "Content-Type",
                "Content-Length",
                "Docker-Content-Digest",
                "Link",
                "Location",
                "Www-Authenticate",
                "Retry-After",
                "Content-Range",
                "Content-Encoding",
                "Transfer-Encoding",
                "OCI-Filters-Applied",
                "RateLimit-Remaining",
                "Set-Cookie",
            ]
        ),
        st.one_of(
            VALUES,
            st.sampled_from(
                [OCI_MANIFEST, OCI_INDEX, "chunked", "0", "5", "-1", "1e9", "/x", "http://["]
            ),
            st.integers().map(str),
        ),
    ),
    TEXT,
)


class Puppet:
    """An upstream below HTTP that answers everything with `answer`."""

    answer = b""

    def reply(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := client.recv(65536)):
                return
            head += data
        client.sendall(self.answer)


@pytest.fixture(scope="module")
def puppet(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Mirror, str, Puppet]]:
    made = Puppet()
    with raw_server(made.reply) as name:
        config = {
            "upstreams": [
                upstream_entry(
                    f"http://{name}",
                    auth={"user": "ann", "password": "pass-word-of-ann"},
                    timeouts={"headers": 2, "stall": 2},
                )
            ],
            "fetch": {
                "retries": 0,
                "retry_wait_max": 0,
                "pause": 0,
                "negative_ttl": 0,
                "tag_ttl": 0,
            },
        }
        mirror = Mirror(tmp_path_factory.mktemp("puppet"), config)
        mirror.start()
        try:
            yield mirror, name, made
            mirror.stop()
            assert "Traceback" not in mirror.log(), mirror.log()
            assert "pass-word-of-ann" not in mirror.log()
        finally:
            mirror.kill()


@inputs(1000, 25)
@given(
    st.one_of(
        st.sampled_from([200, 206, 301, 307, 401, 403, 404, 405, 416, 429, 500, 503]).map(str), TEXT
    ),
    st.lists(LINES, max_size=5),
    st.one_of(
        JSON.map(lambda found: json.dumps(found).encode()), st.just(APP.top.data), st.binary()
    ),
    st.sampled_from(
        [
            "manifests/v1",
            f"manifests/{APP.digest}",
            f"blobs/{APP.blobs[0].digest}",
            "tags/list",
            f"referrers/{APP.digest}",
        ]
    ),
    st.sampled_from(["GET", "HEAD"]),
)
def test_answers(
    puppet: tuple[Mirror, str, Puppet],
    status: str,
    lines: list[str],
    body: bytes,
    path: str,
    method: str,
) -> None:
    TRIED["answer of an upstream"] += 1
    mirror, name, upstream = puppet
    head = "\r\n".join([f"HTTP/1.1 {status} X", "Connection: close", *lines])
    upstream.answer = latin(head) + b"\r\n\r\n" + body
    request = f"{method} /v2/app/{path}?ns={name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = exchange(mirror, request.encode(), end=False)
    assert statuses(answer)[:1] != [], mirror.log()
    assert statuses(answer)[0] in GOOD_STATUSES | GATEWAY_STATUSES, mirror.log()
    assert b"pass-word-of-ann" not in answer
