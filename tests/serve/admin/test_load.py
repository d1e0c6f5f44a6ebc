"""Loads that a client begins at the admin listener, and `load --server`, which is one."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from click.testing import CliRunner

from ociproxy.cli.main import main
from ociproxy.store.inventory import inventory
from ociproxy.store.store import Store
from tests.images import image, multi_platform
from tests.load.loading import Done, Load
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

LIMIT = 60.0
"""Seconds for what a child process does: it yields to all others, of a busy machine too."""
JSON = {"Content-Type": "application/json"}
TEXT = {"Content-Type": "text/plain", "X-Requested-With": "curl"}


@contextlib.contextmanager
def posted(
    server: Mirror, body: bytes, headers: Mapping[str, str] = JSON, *, query: str = ""
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(server.host, server.admin_port, timeout=LIMIT)
    with contextlib.closing(connection):
        connection.request("POST", f"/api/load{query}", body, dict(headers))
        yield connection.getresponse()


def refusal(
    server: Mirror, body: bytes, headers: Mapping[str, str] = JSON, *, query: str = ""
) -> tuple[int, str]:
    with posted(server, body, headers, query=query) as response:
        return response.status, json.loads(response.read())["errors"][0]["message"]


def events(response: http.client.HTTPResponse) -> list[dict[str, Any]]:
    assert response.status == 200, response.read()
    told = [json.loads(line) for line in response]
    # On a slow machine the server says in between that the load runs.
    return [each for each in told if each["event"] != "running"]


def whole(server: Mirror) -> set[str]:
    return {str(each.reference) for each in inventory(Store(server.store)) if each.complete}


def by_server(load: Load, server: Mirror, *args: str) -> Done:
    """`load` as a user at another machine runs it: with no store and no configuration."""
    command = load.command("--server", f"http://127.0.0.1:{server.admin_port}", *args)
    where = command.index("--image-path")
    load_words = command[:where] + command[where + 4 :]
    return load.run_command(load_words)


def spoken(text: str) -> list[str]:
    """Lines without how long it took, in the order of their text: images end in any order."""
    return sorted(re.sub(r"\d+\.\d s", "_ s", line) for line in text.splitlines())


def test_lists_are_loaded_by_a_running_server(
    upstream: FakeUpstream, mirror: Callable[..., Mirror], load: Load
) -> None:
    server = mirror({"upstreams": [upstream_entry(upstream.url)]}, admin=True)
    for name in ("app", "web"):
        upstream.add(f"team/{name}", image(name), tag="v1")
    many = upstream.add("team/many", multi_platform("many"), tag="v1")
    app, web, lost = (f"{upstream.registry}/team/{name}:v1" for name in ("app", "web", "lost"))

    # A list as `load` reads it, larger than the head of a request may be.
    text = f"# {'x' * 100_000}\n{app}\n{lost}  # a comment\n"
    with posted(server, text.encode(), TEXT) as response:
        assert response.headers["Content-Type"] == "application/x-ndjson"
        heard = events(response)
    assert [each["event"] for each in heard][-2:] == ["done", "exit"]
    assert {each.get("reference") for each in heard[:2]} == {app, lost}
    (failed,) = heard[-2]["failures"]
    assert (failed["reference"], failed["place"]) == (lost, "standard input:3")
    assert heard[-1] == {"event": "exit", "exitCode": 3}
    assert whole(server) == {app}
    server.wait_for_log("load ended code=3", LIMIT)

    # Options are in the query.
    body = json.dumps([f"{upstream.registry}/team/many:v1"]).encode()
    with posted(server, body, query="?platform=linux/arm64&platform=linux/amd64&pin") as response:
        (loaded, *_) = events(response)
    assert loaded["platforms"] == ["linux/amd64", "linux/arm64"]
    assert loaded["digest"] == many.digest
    assert [pin.pattern for pin in Store(server.store).pins] == [
        f"{upstream.registry}/team/many:v1"
    ]

    # What `load` says is the same, whether it or a server loads.
    listed = load.write("# two images", web, f"{lost} platform=linux/amd64")
    failures = load.folder / "failed.txt"
    there = by_server(load, server, listed, "--failures", str(failures))
    left = failures.read_text()
    here = load.run(listed, "--failures", str(failures))
    assert (there.code, spoken(there.stderr)) == (here.code, spoken(here.stderr))
    assert (there.code, left) == (3, failures.read_text())
    assert whole(server) >= {app, web}


def test_what_is_no_list_is_refused(
    upstream: FakeUpstream, mirror: Callable[..., Mirror], load: Load
) -> None:
    server = mirror({"upstreams": [upstream_entry(upstream.url)]}, admin=True)
    one = json.dumps(["quay.io/team/app:v1"]).encode()
    status, said = refusal(server, b"good:v1\n-bad:v1\nworse:\n", TEXT)
    assert (status, len(said.splitlines())) == (400, 2)
    assert [line.partition(": ")[0] for line in said.splitlines()] == ["list:2", "list:3"]
    for body, reason in (
        (b"{}", "not an array of lines"),
        (b'["a\\nb"]', "list:1: not an array of lines"),
        (b"[" * 100_000, "not JSON"),
        (b'["app:v1 # \\u0000"]', "a zero byte"),
        (b"[]", "names no image"),
        (b"", "not JSON"),
        (b"\xff", "not UTF-8"),
    ):
        status, said = refusal(server, body)
        assert status == 400
        assert reason in said
    for query in ("?jobs=9", "?pin=no", "?platform=-", "?platform=all&platform=linux/arm64"):
        assert refusal(server, one, query=query)[0] == 400
    assert refusal(server, b" " * (1024 * 1024 + 1))[0] == 413
    # A list that is larger than the head of a request may be, and comes in small pieces.
    with contextlib.closing(socket.create_connection((server.host, server.admin_port))) as slow:
        head = "Content-Type: text/plain\r\nX-Requested-With: x\r\nContent-Length: 200004\r\n"
        slow.sendall(f"POST /api/load HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode())
        for _ in range(25):
            slow.sendall(b"# " + b"x" * 7997 + b"\n")
            time.sleep(0.01)
        slow.sendall(b"bad:")
        slow.settimeout(10)
        assert b"list:26: " in slow.recv(65536)

    # A page of another site makes a browser post, and sends what a form or a script may send.
    assert refusal(server, one, {"Content-Type": "application/x-www-form-urlencoded"})[0] == 415
    assert refusal(server, b"app:v1", {"Content-Type": "text/plain"})[0] == 400
    for sent in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert refusal(server, one, {**JSON, **sent})[0] == 403
    assert refusal(server, one, {**JSON, "Host": "rebound.example"})[0] == 404
    assert server.admin("/api/load").headers["allow"] == "POST"
    assert upstream.requests == []
    assert "load began" not in server.log()

    # What `load --server` makes of it.
    listed = load.write("quay.io/team/app:v1")
    for args, reason in (
        ([listed, "--jobs", "3"], "--jobs is up to the server"),
        ([listed, "--plan"], "--plan excludes --server: run it without --server, beside"),
        ([listed, "--lock", "lock.json", "--locked"], "a line NAME:TAG@sha256:... loads just"),
        ([listed, "--server", "http://op:pass@127.0.0.1:1"], "use --server-auth"),
        ([listed, "--server", "127.0.0.1:8081"], "write it as http://HOST:PORT"),
        ([listed, "--server", f"{server.url}/"], "is it the admin listener"),
        ([load.write("-bad:v1", name="bad.txt")], "bad.txt:1"),
    ):
        done = by_server(load, server, *args)
        assert (done.code, reason in done.stderr) == (2, True), done.stderr
    server.stop()
    done = by_server(load, server, listed)
    assert (done.code, "connection refused" in done.stderr) == (75, True)


def test_a_load_goes_on_without_its_client_and_ends_with_the_server(
    upstream: FakeUpstream, mirror: Callable[..., Mirror], load: Load
) -> None:
    server = mirror({"upstreams": [upstream_entry(upstream.url)]}, admin=True)
    big = upstream.add("team/big", image("big", layer_size=400_000), tag="v1")
    blob = f"/blobs/{big.layers[0].digest}"
    upstream.fault(blob, Fault(stall_after=100_000))
    name = f"{upstream.registry}/team/big:v1"
    body = json.dumps([name]).encode()
    with posted(server, body) as first:
        assert first.status == 200
        server.wait_for(lambda: upstream.count(blob) > 0, "asked for", LIMIT)
    # The first client has left, and its load runs; so there is room for one more.
    with posted(server, body) as second:
        assert second.status == 200
        status, said = refusal(server, body)
        assert (status, "2 loads run" in said) == (503, True)
        done = by_server(load, server, load.write(name))
        assert (done.code, "answers 503" in done.stderr) == (75, True)
        upstream.heal()
        assert events(second)[-1] == {"event": "exit", "exitCode": 0}
    server.wait_for(lambda: server.log().count("load ended code=0") == 2, "both", LIMIT)
    assert whole(server) == {name}

    slow = upstream.add("team/slow", image("slow", layer_size=400_000), tag="v1")
    blob = f"/blobs/{slow.layers[0].digest}"
    upstream.fault(blob, Fault(stall_after=100_000))
    with posted(server, json.dumps([f"{upstream.registry}/team/slow:v1"]).encode()) as response:
        server.wait_for(lambda: upstream.count(blob) > 0, "asked for", LIMIT)
        began = time.monotonic()
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        assert events(response)[-1] == {"event": "exit", "exitCode": 75}
        server.stop()
    assert time.monotonic() - began < 15
    assert "stopped" in server.log()


def test_beyond_this_machine_a_load_needs_a_password(
    upstream: FakeUpstream, mirror: Callable[..., Mirror], load: Load, tmp_path: Path
) -> None:
    config: dict[str, Any] = {
        "upstreams": [upstream_entry(upstream.url)],
        "serve": {"admin": {"host": "0.0.0.0"}},
    }
    server = mirror(config, args=["--workers", "2"], admin=True)
    upstream.add("team/app", image(), tag="v1")
    name = f"{upstream.registry}/team/app:v1"
    server.wait_for_log("admin listener url")
    status, said = refusal(server, json.dumps([name]).encode())
    assert (status, "serve.admin.auth is not set" in said) == (403, True)

    users = tmp_path / "users"
    users.write_bytes(b"op:" + bcrypt.hashpw(b"pa:ss", bcrypt.gensalt(4)))
    config["serve"]["admin"]["auth"] = {"htpasswd": str(users)}
    server.write_config(config)
    server.reload()
    server.wait_for(lambda: server.admin("/metrics").status == 401, "a password asked for")
    password = tmp_path / "password"
    listed = load.write(name)
    for text, code, reason in (
        ("op:wrong\n", 2, "answers 401"),
        ("op\n", 2, "not one line with USER:PASSWORD"),
        ("op:pa:ss\n", 0, "1 loaded"),
    ):
        password.write_text(text)
        done = by_server(load, server, listed, "--server-auth", str(password))
        assert (done.code, reason in done.stderr) == (code, True), done.stderr
        assert "wrong\n" not in done.stderr
    assert whole(server) == {name}
    header = {"Authorization": "Basic " + base64.b64encode(b"op:pa:ss").decode()}
    runs = server.admin("/metrics", header).body
    assert b'ociproxy_child_runs_total{result="ok",task="load"} 1.0' in runs


@contextlib.contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that answers each POST so; gives its URL."""

    class Odd(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as odd:
        thread = threading.Thread(target=odd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{odd.server_port}"
        finally:
            odd.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "code", "said"),
    [
        (200, b'{"event": "note", "text": "hello"}\n', 75, "cut off"),
        (
            200,
            b'{"event": "surprise"}\n{"event": "exit", "exitCode": 0}\n',
            2,
            "no event of a load",
        ),
        (200, b'{"event": "done", "loaded": 1}\n', 2, "no event of a load"),
        (200, b"<html>\n", 2, "no event of a load"),
        (307, b"", 2, "answers 307"),
        (502, b"<html>\n", 75, "answers 502: Bad Gateway"),
        (
            200,
            b'{"event": "error", "reason": "store full", "exitCode": 4}\n'
            b'{"event": "exit", "exitCode": 4}\n',
            4,
            "Error: store full",
        ),
    ],
)
def test_an_answer_that_is_no_load_is_said_so(
    tmp_path: Path, status: int, body: bytes, code: int, said: str
) -> None:
    listed = tmp_path / "images.txt"
    listed.write_text("quay.io/team/app:v1\n")
    with answering(status, body) as url:
        done = CliRunner().invoke(main, ["load", str(listed), "--server", url])
    assert (done.exit_code, said in done.stderr) == (code, True), done.stderr


def test_a_failure_is_placed_in_the_lists_of_the_user(tmp_path: Path) -> None:
    listed = tmp_path / "images.txt"
    listed.write_text("# one image\n\nquay.io/team/app:v1\n")
    failed = {
        "reference": "quay.io/team/app:v1",
        "place": "standard input:1",
        "error": "ManifestUnknown",
        "reason": "unknown",
        "transient": False,
    }
    numbers = {"loaded": 0, "failed": 1, "untried": 0, "fetched": 0, "seconds": 0.1}
    done = {**numbers, "interrupted": False, "failures": [failed]}
    sent: list[dict[str, object]] = [
        {"event": "running"},
        {"event": "failed", **failed},
        {"event": "done", **done},
        {"event": "exit", "exitCode": 3},
    ]
    body = b"".join(json.dumps(each).encode() + b"\n" for each in sent)
    with answering(200, body) as url:
        ended = CliRunner().invoke(main, ["load", str(listed), "--server", url, "--json"])
    assert ended.exit_code == 3
    one, last = [json.loads(line) for line in ended.stdout.splitlines()]
    placed = {**failed, "place": f"{listed}:3"}
    assert one == {"event": "failed", **placed}
    assert last == {"event": "done", **done, "failures": [placed]}
