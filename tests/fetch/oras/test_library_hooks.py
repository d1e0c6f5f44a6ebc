"""Parts of oras, requests, urllib3 and http.client that we hook into and that no release promises.

Each hook that no test of its effect covers is asserted here.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import inspect
import io
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3
from oras.auth.base import AuthBackend
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from ociproxy.config.settings import Auth, Secret, Upstream
from ociproxy.errors import UpstreamDenied
from ociproxy.fetch.oras.provider import Registry
from ociproxy.fetch.oras.session import Session, open_session
from ociproxy.oci.reference import Reference
from tests.fetch.conftest import TIMEOUTS, OpenBackend
from tests.fetch.contract import reference
from tests.fetch.peers import raw_server
from tests.images import image
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth


@pytest.fixture
def session() -> Session:
    return open_session(Upstream(name="registry.invalid", timeouts=TIMEOUTS), connections=1)


def test_oras_still_has_jsonschema_where_it_validates() -> None:
    """And so have other modules of the program, whichever is imported first."""
    code = """
import sys
from ociproxy.fetch.oras.provider import Registry
assert "jsonschema" not in sys.modules
import jsonschema, oras.oci
try:
    oras.oci.jsonschema.validate({}, schema={"type": "array"})
except jsonschema.ValidationError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


def test_requests_does_without_a_guess_at_encodings() -> None:
    """In silence; a text without an encoding is UTF-8. The program's other modules may guess."""
    code = """
import ociproxy.fetch.oras.client, requests
answer = requests.Response()
answer._content = "\u00e4".encode()
print(ascii(answer.text), requests.compat.chardet)
import charset_normalizer
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("'\\xe4' None\n", "")


def test_importlib_metadata_is_there_where_it_is_called() -> None:
    code = """
import sys
import ociproxy.fetch.oras.client
assert "importlib.metadata" not in sys.modules
from urllib3 import http2
print(http2.version("urllib3"))
import importlib.metadata
print(importlib.metadata.version("urllib3"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{importlib.metadata.version('urllib3')}\n" * 2


def test_oras_has_the_undecorated_request() -> None:
    assert Registry.do_request.__wrapped__.__name__ == "do_request"
    parameters = inspect.signature(Registry.do_request.__wrapped__).parameters
    assert list(parameters)[:3] == ["self", "url", "method"]
    assert {"headers", "stream"} <= set(parameters)


@pytest.mark.parametrize(
    ("statuses", "calls"), [((401, 200), [False]), ((403, 403), [False, True])]
)
def test_oras_answers_a_refusal_by_way_of_our_authentication(
    statuses: tuple[int, ...], calls: list[bool]
) -> None:
    sent: list[dict[str, str]] = []
    asked: list[bool] = []

    class Answers(requests.Session):
        def request(self, *_: object, headers: dict[str, str], **__: object) -> requests.Response:  # type: ignore[override]
            response = requests.Response()
            response.status_code = statuses[min(len(sent), 1)]
            sent.append(headers)
            return response

    class Recorder(AuthBackend):  # type: ignore[misc] # oras ships no types
        def authenticate_request(
            self, original: requests.Response, headers: dict[str, str], refresh: bool = False
        ) -> tuple[dict[str, str], bool]:
            asked.append(refresh)
            return {"Authorization": f"number {len(asked)}"}, True

    registry = Registry()
    registry.session, registry.auth = Answers(), Recorder()
    url = "https://registry.invalid/v2/"
    Registry.do_request.__wrapped__(registry, url, "GET", headers={}, stream=True)
    assert asked == calls
    assert sent == [{}, *({"Authorization": f"number {n + 1}"} for n in range(len(calls)))]


def test_oras_reads_no_credentials_file_of_docker(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alice = Auth(user="alice", password=Secret("hunter2"))
    upstream = make_upstream(auth=BasicAuth("alice", "hunter2"))
    upstream.add("team/app", image(), tag="v1")
    entry = {"auth": "YWxpY2U6aHVudGVyMg=="}
    for folder in (tmp_path, tmp_path / ".docker"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"auths": {upstream.registry: entry}}))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(UpstreamDenied):
        open_backend(upstream).fetch_manifest(reference(upstream))
    assert open_backend(upstream, auth=alice).fetch_manifest(reference(upstream)).raw


@pytest.mark.parametrize("proxy", ["", "http://127.0.0.1:9"])
def test_urllib3_makes_connections_of_the_classes_it_is_given(session: Session, proxy: str) -> None:
    adapter = session.get_adapter("https://registry.invalid/")
    assert isinstance(adapter, HTTPAdapter)
    manager = adapter.proxy_manager_for(proxy) if proxy else adapter.poolmanager
    for scheme, base in (("http", HTTPConnection), ("https", HTTPSConnection)):
        pool = manager.connection_from_url(f"{scheme}://registry.invalid/")
        connection = pool._new_conn()
        assert isinstance(connection, base)
        assert connection.policy.upstream == "registry.invalid"  # type: ignore[attr-defined]
        assert type(connection)._new_conn is not base._new_conn
        assert issubclass(connection.response_class, http.client.HTTPResponse)


def test_urllib3_tells_the_name_with_its_final_dot(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def resolve(host: str, *_: object, **__: object) -> object:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(requests.exceptions.ConnectionError):
        session.get("http://registry.invalid./")
    assert asked == ["registry.invalid."]


def test_urllib3_shows_no_url_in_the_log(
    open_backend: OpenBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    raw = image().top.data

    def answer(client: socket.socket) -> None:
        client.recv(65536)
        length = f"Content-Length: {len(raw)}\r\n".encode()
        client.sendall(b"HTTP/1.1 200 OK\r\n" + length + b"no header\r\n\r\n" + raw)

    with raw_server(answer) as name:
        reference = Reference.parse(f"{name}/team/app:v1")
        assert open_backend(name, scheme="http").fetch_manifest(reference).raw == raw
    assert caplog.records == []


def test_urllib3_ends_a_body_that_is_cut(session: Session) -> None:
    def answer(client: socket.socket) -> None:
        client.recv(65536)
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")

    with raw_server(answer) as name:
        raw = session.get(f"http://{name}/", stream=True).raw
        assert raw.read1(100, decode_content=False) == b"12345"
        with pytest.raises(urllib3.exceptions.ProtocolError):
            raw.read1(100, decode_content=False)


def test_requests_takes_tls_from_us_alone(session: Session) -> None:
    adapter = session.get_adapter("https://registry.invalid/")
    assert isinstance(adapter, HTTPAdapter)
    request = requests.Request("GET", "https://registry.invalid/").prepare()
    for verify in (True, False, "/some/bundle.pem"):
        pool = adapter.get_connection_with_tls_context(request, verify)
        assert pool.conn_kw["ssl_context"] is adapter._context()  # type: ignore[attr-defined]
        assert pool.cert_reqs is None  # type: ignore[attr-defined]
        assert pool.ca_certs is None  # type: ignore[attr-defined]


def test_http_client_tells_a_length_and_chunks_by_these_names() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        response = http.client.HTTPResponse(ours)
        response.begin()
        assert (response.length, response.chunked) == (5, False)
        # The file can be taken out and read through another one.
        response.fp = io.BufferedReader(response.fp.detach())
        theirs.sendall(b"12345")
        assert response.read() == b"12345"


def test_http_client_has_headers_read_by_the_function_of_that_name(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of its names: what it itself calls stays as it is."""
    parsed: list[str] = []
    original = http.client.parse_headers

    def counting(*arguments: Any) -> http.client.HTTPMessage:
        parsed.append("by http.client")
        found: http.client.HTTPMessage = original(*arguments)
        return found

    monkeypatch.setattr(http.client, "parse_headers", counting)

    def answer(client: socket.socket) -> None:
        for headers in (b"A: 1\r\n", b"A: 1\r\n B\r\n"):
            client.recv(65536)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + headers + b"\r\n")

    with raw_server(answer) as name:
        assert session.get(f"http://{name}/").headers["a"] == "1"
        assert parsed == []
        assert session.get(f"http://{name}/").headers["a"].split() == ["1", "B"]
        assert parsed == ["by http.client"]
