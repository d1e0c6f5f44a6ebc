"""The admin listener: beside the main port, closed to strangers, there whichever process dies."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import bcrypt
import pytest

from ociproxy.config.file import read_config
from ociproxy.config.local_settings import Admin, Serve
from ociproxy.config.settings import Config
from ociproxy.errors import AddressInUse
from ociproxy.serve.admin.server import admin_socket
from tests.server import Mirror


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def with_port(port: int, *, chosen: bool) -> Config:
    return Config(serve=Serve(admin=Admin(port=port, chosen=chosen)))


def test_the_default_port_may_be_taken(taken: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert admin_socket(with_port(taken, chosen=False)) is None
    assert "no admin listener" in capfd.readouterr().err


def test_a_port_that_the_operator_chose_must_be_free(taken: int) -> None:
    with pytest.raises(AddressInUse):
        admin_socket(with_port(taken, chosen=True))


def test_port_0_turns_it_off() -> None:
    assert admin_socket(with_port(0, chosen=True)) is None


@pytest.mark.parametrize(
    ("text", "chosen"), [("port: 8081", True), ("host: 127.0.0.1", False), ("", False)]
)
def test_a_port_in_the_file_is_chosen(tmp_path: Path, text: str, chosen: bool) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"serve: {{admin: {{{text}}}}}")
    assert read_config(path).serve.admin == Admin(chosen=chosen)


def test_it_answers_beside_the_workers_and_survives_a_kill(
    mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    server = mirror({}, args=["--workers", "2"], admin=True)
    server.wait_for(lambda: len(server.admin("/api/state").json()["workers"]) == 2, "two workers")
    for path in ("/healthz", "/readyz"):
        assert (server.admin(path).status, server.admin(path).body) == (200, b"ok\n")
    # None of it is on the main port, and nothing of the main port is here.
    for path in ("/metrics", "/api/state", "/"):
        assert server.get(path).status == 404
    assert server.admin("/v2/").status == 404
    assert server.admin("/metrics", {"Host": "rebound.example"}).status == 404
    assert server.admin("/metrics", {"Host": "localhost:1"}).status == 200

    workers = {each["pid"] for each in server.admin("/api/state").json()["workers"]}
    assert server.process is not None
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    (admin,) = {int(pid) for pid in children.split()} - workers
    os.kill(admin, signal.SIGKILL)
    server.wait_for_log("worker died")
    server.wait_for(lambda: server.log().count("admin listener url") == 2, "another one")
    assert server.metrics()["ociproxy_workers"] == 2

    users = tmp_path / "users"
    users.write_bytes(b"op:" + bcrypt.hashpw(b"pass", bcrypt.gensalt(4)))
    server.write_config({"serve": {"admin": {"auth": {"htpasswd": str(users)}}}})
    server.reload()
    server.wait_for(lambda: server.admin("/metrics").status == 401, "a password asked for")
    password = {"Authorization": "Basic " + base64.b64encode(b"op:pass").decode()}
    assert server.admin("/metrics", password).status == 200
    assert server.admin("/healthz").status == 200


def test_without_a_password_beyond_this_machine_the_log_says_so(
    mirror: Callable[..., Mirror],
) -> None:
    server = mirror({"serve": {"admin": {"host": "0.0.0.0"}}}, admin=True)
    server.wait_for_log("admin listener beyond this machine")
    assert server.admin("/metrics", {"Host": "mirror.example"}).status == 200


def test_connections_that_strangers_hold_open_keep_no_probe_out(
    mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    users = tmp_path / "users"
    users.write_bytes(b"op:" + bcrypt.hashpw(b"pass", bcrypt.gensalt(4)))
    server = mirror({"serve": {"admin": {"auth": {"htpasswd": str(users)}}}}, admin=True)
    password = {"Authorization": "Basic " + base64.b64encode(b"op:pass").decode()}
    assert server.admin("/healthz").status == 200
    with contextlib.ExitStack() as stack:
        watching = http.client.HTTPConnection(server.host, server.admin_port, timeout=10)
        stack.callback(watching.close)
        watching.request("GET", "/events?view=now", headers=password)
        seen = watching.getresponse()
        for number in range(100):
            held = stack.enter_context(socket.create_connection((server.host, server.admin_port)))
            if number % 3 == 0:
                held.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
            elif number % 3 == 1:  # an answer, and then nothing
                held.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for path, headers, status in (
            ("/healthz", {}, 200),
            ("/readyz", {}, 200),
            ("/metrics", password, 200),
            ("/metrics", {}, 401),
        ):
            assert server.admin(path, headers).status == status
        # What is being answered stays: those that wait for a request went.
        while seen.readline() != b"\n":  # the first event
            pass
        assert seen.readline() != b""
    server.wait_for_log("too many connections")
    assert server.log().count("too many connections") == 1
