"""HTTPS on the main port: blobs through it, client certificates, renewal, and what is refused."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.images import image, random_blob
from tests.parts.certificates import Authority
from tests.serve.multipart import parts_of
from tests.serve.wire import Wire
from tests.server import ROOT, Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]
MIB = 1 << 20


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One that no test trusts."""
    return Authority(tmp_path_factory.mktemp("other"))


def tls_of(authority: Authority, *, clients: Authority | None = None) -> dict[str, str]:
    tls = {"cert": str(authority.cert), "key": str(authority.key)}
    return tls if clients is None else {**tls, "client_ca": str(clients.ca)}


def serving(
    mirror: MakeMirror, authority: Authority, upstream: FakeUpstream | None = None, **serve: object
) -> Mirror:
    config: dict[str, object] = {"serve": {"tls": tls_of(authority), **serve}}
    if upstream is not None:
        config["upstreams"] = [upstream_entry(upstream.url)]
    return mirror(config, tls=authority.client_context())


def test_images_through_https(
    mirror: MakeMirror, authority: Authority, upstream: FakeUpstream
) -> None:
    app = upstream.add("app", image("app", layers=2, layer_size=3 * MIB), tag="v1")
    server = serving(mirror, authority, upstream)
    assert "listening scheme=https" in server.log()
    for _ in range(2):
        assert server.manifest(upstream.registry, "app", "v1").body == app.top.data
        for blob in app.blobs:
            assert server.blob(upstream.registry, "app", blob.digest).body == blob.data


def test_clients_that_never_shake_hands_keep_no_other_out(
    mirror: MakeMirror, authority: Authority
) -> None:
    server = serving(mirror, authority, connections=4, handshake_timeout="1m")
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(socket.create_connection((server.host, server.port)))
        client = http.client.HTTPSConnection(
            server.host,
            server.port,
            timeout=20,
            source_address=("127.0.0.2", 0),
            context=authority.client_context(),
        )
        stack.callback(client.close)
        client.request("GET", "/v2/")
        assert client.getresponse().status == 200
    assert "Traceback" not in server.log()


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=1000000-", 1_000_000, 3 * MIB), ("bytes=5-9", 5, 10), ("bytes=-7", 3 * MIB - 7, None)],
)
def test_ranges_through_https(
    mirror: MakeMirror,
    authority: Authority,
    upstream: FakeUpstream,
    asked: str,
    start: int,
    stop: int | None,
) -> None:
    blob = upstream.add_content("app", random_blob(3 * MIB))
    server = serving(mirror, authority, upstream)
    for _ in range(2):
        answer = server.blob(upstream.registry, "app", blob.digest, {"Range": asked})
        assert answer.status == 206
        assert answer.body == blob.data[start:stop]


def test_several_ranges_through_https(
    mirror: MakeMirror, authority: Authority, upstream: FakeUpstream
) -> None:
    blob = upstream.add_content("app", random_blob(3 * MIB))
    server = serving(mirror, authority, upstream)
    for _ in range(2):
        asked = {"Range": f"bytes=0-99,{MIB}-{2 * MIB}"}
        answer = server.blob(upstream.registry, "app", blob.digest, asked)
        assert parts_of(answer) == [
            (0, 99, blob.data[:100]),
            (MIB, 2 * MIB, blob.data[MIB : 2 * MIB + 1]),
        ]


def test_many_readers_of_one_arriving_blob_get_its_bytes(
    mirror: MakeMirror, authority: Authority, upstream: FakeUpstream
) -> None:
    # They share one description of the file, and with it one position.
    blob = upstream.add_content("app", random_blob(24 * MIB))
    upstream.fault("/blobs/", Fault(rate=16 * MIB))
    server = serving(mirror, authority, upstream)

    def pull(number: int) -> bool:
        time.sleep(number * 0.1)
        return server.blob(upstream.registry, "app", blob.digest).body == blob.data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(pull, range(8)))
    assert upstream.count("/blobs/") == 1


def test_clients_that_do_not_read_cost_little_memory(
    mirror: MakeMirror, authority: Authority, upstream: FakeUpstream
) -> None:
    blob = upstream.add_content("app", random_blob(64 * MIB))
    server = serving(mirror, authority, upstream)
    assert server.blob(upstream.registry, "app", blob.digest).body == blob.data
    before = server.peak_rss()
    with ExitStack() as stack:
        for _ in range(40):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.connect((server.host, server.port))
            secure = authority.client_context().wrap_socket(client, server_hostname="127.0.0.1")
            stack.enter_context(secure)
            path = f"/v2/app/blobs/{blob.digest}?ns={upstream.registry}"
            secure.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert secure.recv(100).startswith(b"HTTP/1.1 200")
        time.sleep(1)
        grown = (server.peak_rss() - before) / 40
    # With the buffers that asyncio has by itself it is a megabyte.
    assert grown < 700 * 1024, f"{grown / 1024:.0f} KiB a client"


def test_a_blob_that_turns_out_wrong_is_cut_short(
    mirror: MakeMirror, authority: Authority, upstream: FakeUpstream
) -> None:
    blob = upstream.add_content("app", random_blob(MIB))
    upstream.fault("/blobs/", Fault(flip_at=MIB - 1))
    server = serving(mirror, authority, upstream)
    with pytest.raises((http.client.IncompleteRead, ssl.SSLError, ConnectionError)):
        server.blob(upstream.registry, "app", blob.digest)


def test_old_protocols_and_plain_http_are_refused(mirror: MakeMirror, authority: Authority) -> None:
    server = serving(mirror, authority)
    old = authority.client_context()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    server.tls = old
    with pytest.raises(ssl.SSLError):
        server.get("/v2/")
    for _ in range(3):  # as a probe does
        with Wire(server) as wire:
            wire.send(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP/1.1 200" not in wire.read_to_end()
    server.tls = ssl.create_default_context()
    with pytest.raises(ssl.SSLCertVerificationError):
        server.get("/v2/")
    server.wait_for_log("the client does not accept this server's certificate")
    assert "_ssl.c" not in server.log()
    told = 'client refused client=127.0.0.1 reason="plain HTTP on a port of HTTPS"'
    assert server.log().count(told) == 1
    server.tls = authority.client_context()
    assert server.get("/v2/").status == 200
    assert "Traceback" not in server.log()


def test_a_client_certificate_is_required_and_verified(
    mirror: MakeMirror, authority: Authority, other: Authority
) -> None:
    server = mirror(
        {"serve": {"tls": tls_of(authority, clients=authority)}},
        tls=authority.client_context(certificate=True),
    )
    assert server.get("/v2/").status == 200
    assert server.get("/healthz").status == 200
    wrong = authority.client_context()
    wrong.load_cert_chain(other.client_cert, other.client_key)
    # With TLS 1.3 the client learns of it when it reads.
    for context in (authority.client_context(), wrong):
        server.tls = context
        with pytest.raises((ssl.SSLError, ConnectionError)):
            server.get("/v2/")
    server.wait_for_log("peer did not return a certificate")
    server.wait_for_log("certificate verify failed")
    server.tls = authority.client_context(certificate=True)
    assert server.get("/v2/").status == 200


def serial(server: Mirror) -> str:
    assert server.tls is not None
    with (
        socket.create_connection((server.host, server.port), 10) as plain,
        server.tls.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        certificate = secure.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


def test_sighup_brings_a_new_certificate_and_drops_no_connection(
    mirror: MakeMirror, authority: Authority, upstream: FakeUpstream, tmp_path: Path
) -> None:
    blob = upstream.add_content("app", random_blob(8 * MIB))
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    shutil.copy(authority.cert, cert)
    shutil.copy(authority.key, key)
    config = {
        "upstreams": [upstream_entry(upstream.url)],
        "serve": {"tls": {"cert": str(cert), "key": str(key)}},
    }
    server = mirror(config, tls=authority.client_context())
    first = serial(server)
    upstream.fault("/blobs/", Fault(stall_after=MIB))
    connection = server.connect()
    connection.request("GET", f"/v2/app/blobs/{blob.digest}?ns={upstream.registry}")
    response = connection.getresponse()
    begun = response.read(MIB // 2)

    # A file that is half written.
    cert.write_text("-----BEGIN CERTIFICATE-----\n")
    server.reload()
    server.wait_for_log("configuration not reloaded")
    assert f"serve.tls.cert: with its key not usable (PEM, no passphrase): {cert}" in server.log()
    assert serial(server) == first

    renewed = Authority(tmp_path / "renewed")
    shutil.copy(renewed.cert, cert)
    shutil.copy(renewed.key, key)
    server.reload()
    server.wait_for_log("configuration reloaded")
    server.tls = renewed.client_context()
    assert serial(server) != first

    upstream.heal()
    upstream.release()
    assert begun + response.read() == blob.data
    connection.request("GET", "/v2/")
    assert connection.getresponse().status == 200
    connection.close()


def test_workers_share_the_port_and_are_all_renewed(
    mirror: MakeMirror, authority: Authority, tmp_path: Path
) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    shutil.copy(authority.cert, cert)
    shutil.copy(authority.key, key)
    tls = {"cert": str(cert), "key": str(key)}
    server = mirror({"serve": {"tls": tls, "workers": 2}}, tls=authority.client_context())
    old = {serial(server) for _ in range(10)}
    renewed = Authority(tmp_path / "renewed")
    shutil.copy(renewed.cert, cert)
    shutil.copy(renewed.key, key)
    server.reload()
    deadline = time.monotonic() + 10
    while server.log().count("configuration reloaded") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.tls = renewed.client_context()
    new = {serial(server) for _ in range(10)}
    assert len(old) == len(new) == 1
    assert old != new

    # One that dies is replaced by one that knows of the renewal.
    assert server.process is not None
    pid = server.process.pid
    for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    server.wait_for_log("worker died")
    assert {serial(server) for _ in range(5)} == new


def test_a_handshake_has_its_time(mirror: MakeMirror, authority: Authority) -> None:
    server = serving(mirror, authority, handshake_timeout="1s")
    with Wire(server) as silent, Wire(server) as slow:
        slow.send(b"\x16\x03\x01\x02\x00\x01")
        began = time.monotonic()
        assert silent.read_to_end() == b""
        slow.read_to_end()
        assert 0.8 < time.monotonic() - began < 5
    assert server.get("/v2/").status == 200


def test_handshakes_count_as_connections(mirror: MakeMirror, authority: Authority) -> None:
    server = serving(mirror, authority, connections=4, handshake_timeout="60s")
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(Wire(server))
        answer = server.get("/v2/")
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    deadline = time.monotonic() + 5
    while server.get("/v2/").status != 200:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "serve.tls.cert: no such file"),
        ("empty", "serve.tls.cert: with its key not usable"),
        ("mismatch", "serve.tls.key: not the key of the certificate"),
        ("no key", "serve.tls.key: is required"),
        ("bad ca", "serve.tls.client_ca: no PEM certificate in it"),
    ],
)
def test_a_bad_file_at_the_start_is_no_plain_http(
    authority: Authority, other: Authority, tmp_path: Path, damage: str, said: str
) -> None:
    (tmp_path / "empty").touch()
    tls = tls_of(authority)
    match damage:
        case "missing":
            tls["cert"] = "/no/such/file"
        case "empty":
            tls["cert"] = str(tmp_path / "empty")
        case "mismatch":
            tls["key"] = str(other.key)
        case "no key":
            del tls["key"]
        case _:
            tls["client_ca"] = str(tmp_path / "empty")
    server = Mirror(tmp_path / "mirror", {"serve": {"tls": tls}})
    command = [sys.executable, "-m", "ociproxy", "serve", "--port", "0", "--host", "127.0.0.1"]
    files = ["--config-path", str(server.config_path), "--image-path", str(server.store)]
    done = subprocess.run(
        [*command, *files], cwd=ROOT, capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 2
    [line] = done.stderr.decode().splitlines()
    assert said in line
