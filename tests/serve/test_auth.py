"""Clients that have to log in: who gets in, what the others hear, what a flood of them costs."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bcrypt
import pytest

from tests.images import image
from tests.parts.tools import require_tool, run
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream

MakeMirror = Callable[..., Mirror]
COST = 5


def hashed(password: str, cost: int = COST) -> str:
    return bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(cost)).decode()


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    path.write_text(f"# who may pull\nalice:{hashed('s3cret')}\nbob:{hashed('b:ü')}\n")
    return path


@pytest.fixture
def server(mirror: MakeMirror, upstream: FakeUpstream, users: Path) -> Mirror:
    upstream.add("app", image("app"), tag="v1")
    auth = {"htpasswd": str(users)}
    return mirror({"upstreams": [upstream_entry(upstream.url)], "serve": {"auth": auth}})


def status(server: Mirror, headers: dict[str, str] | None = None, path: str = "/v2/") -> int:
    return server.get(path, headers).status


def test_who_has_the_password_may_pull(server: Mirror, upstream: FakeUpstream) -> None:
    path = f"/v2/app/manifests/v1?ns={upstream.registry}"
    assert status(server, path=path) == 401
    assert upstream.requests == []
    assert status(server, basic("alice", "s3cret"), path) == 200
    assert status(server, path=path) == 401, "stored content needs a password, too"
    assert status(server, basic("bob", "b:ü")) == 200
    assert "s3cret" not in server.log()


def test_credentials_meant_for_docker_hub_go_nowhere_and_cost_one_check(
    mirror: MakeMirror, upstream: FakeUpstream, tmp_path: Path
) -> None:
    """Docker may send a user's password for Docker Hub to the mirror in its place."""
    upstream.add("app", image("app"), tag="v1")
    path = f"/v2/app/manifests/v1?ns={upstream.registry}"
    hub = basic("hub-user", "hub-secret")
    entry = upstream_entry(upstream.url)
    open_server = mirror({"upstreams": [entry]}, args=["--log-level", "trace"])
    assert status(open_server, hub, path) == 200
    assert upstream.requests
    assert all("Authorization" not in request.headers for request in upstream.requests)
    users = tmp_path / "slow-users"
    users.write_text(f"alice:{hashed('s3cret', cost=13)}\n")
    closed = mirror(
        {"upstreams": [entry], "serve": {"auth": {"htpasswd": str(users)}}},
        args=["--log-level", "trace"],
    )
    began = time.monotonic()
    assert status(closed, hub, path) == 401
    once = time.monotonic() - began
    began = time.monotonic()
    for _ in range(50):
        assert status(closed, hub, path) == 401
    # A check for each would take fifty times as long.
    assert time.monotonic() - began < 10 * once + 2
    for server in (open_server, closed):
        for text in ("hub-secret", hub["Authorization"].split()[1]):
            assert text not in server.log()


def test_the_challenge(server: Mirror) -> None:
    answer = server.get("/v2/")
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == 'Basic realm="ociproxy", charset="UTF-8"'
    assert answer.headers["docker-distribution-api-version"] == "registry/2.0"
    [error] = json.loads(answer.body)["errors"]
    assert error["code"] == "UNAUTHORIZED"
    head = server.head("/v2/app/manifests/v1")
    assert (head.status, head.body) == (401, b"")


@pytest.mark.parametrize(
    "headers",
    [
        basic("alice", "S3cret"),
        basic("alice", ""),
        basic("Alice", "s3cret"),
        basic("carol", "s3cret"),
        basic("", ""),
        basic("alice", "s3cret\0"),
        basic("alice", "s3cret" + "x" * 200),
        {"Authorization": "Basic"},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic " + base64.b64encode(b"alice").decode()},
        {"Authorization": "Bearer s3cret"},
        {"Authorization": ""},
        {"Proxy-Authorization": basic("alice", "s3cret")["Authorization"]},
    ],
)
def test_anything_else_is_refused(server: Mirror, headers: dict[str, str]) -> None:
    assert status(server, headers) == 401
    assert status(server, headers) == 401
    assert "Traceback" not in server.log()


def test_a_write_has_to_log_in_first(server: Mirror) -> None:
    assert server.request("POST", "/v2/app/blobs/uploads/").status == 401


def test_probes_need_no_password(server: Mirror) -> None:
    assert status(server, path="/healthz") == 200
    assert status(server, path="/readyz") == 200


def test_a_password_longer_than_bcrypt_reads(mirror: MakeMirror, tmp_path: Path) -> None:
    long = "x" * 100
    (tmp_path / "users").write_text(f"alice:{hashed(long)}\n")
    server = mirror({"serve": {"auth": {"htpasswd": str(tmp_path / "users")}}})
    assert status(server, basic("alice", long)) == 200


def test_a_changed_file_holds_within_a_second_or_two(server: Mirror, users: Path) -> None:
    assert status(server, basic("alice", "s3cret")) == 200
    assert status(server, basic("carol", "new")) == 401
    replacement = users.with_suffix(".new")
    replacement.write_text(f"carol:{hashed('new')}\n")
    replacement.replace(users)
    time.sleep(1.1)
    assert status(server, basic("carol", "new")) == 200
    assert status(server, basic("alice", "s3cret")) == 401, "what is remembered is forgotten"


@pytest.mark.parametrize("damage", ["plain text", "nothing", "gone"])
def test_a_bad_file_leaves_the_users_as_they_are(server: Mirror, users: Path, damage: str) -> None:
    assert status(server, basic("alice", "s3cret")) == 200
    if damage == "gone":
        users.unlink()
    else:
        users.write_text("carol:plaintext\n" if damage == "plain text" else "")
    time.sleep(1.1)
    assert status(server, basic("alice", "s3cret")) == 200
    assert status(server, basic("carol", "plaintext")) == 401
    server.wait_for_log("users not reloaded")
    assert "plaintext" not in server.log()


def test_sighup_turns_it_on_and_off(mirror: MakeMirror, users: Path) -> None:
    server = mirror()
    assert status(server) == 200
    server.write_config({"serve": {"auth": {"htpasswd": str(users)}}})
    server.reload()
    server.wait_for_log("configuration reloaded")
    assert status(server) == 401
    assert status(server, basic("alice", "s3cret")) == 200
    server.write_config({})
    server.reload()
    deadline = time.monotonic() + 10
    while status(server) != 200:
        assert time.monotonic() < deadline


def test_a_right_password_is_checked_once(mirror: MakeMirror, tmp_path: Path) -> None:
    (tmp_path / "users").write_text(f"alice:{hashed('s3cret', 12)}\n")
    server = mirror({"serve": {"auth": {"htpasswd": str(tmp_path / "users")}}})
    credentials = basic("alice", "s3cret")
    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: status(server, credentials), range(64))) == {200}
    # 64 checks at a quarter of a second and two at a time would take eight.
    assert time.monotonic() - began < 6


def test_a_flood_of_wrong_passwords_is_bounded_and_hinders_nobody_who_is_known(
    mirror: MakeMirror, tmp_path: Path
) -> None:
    lines = f"alice:{hashed('s3cret', 11)}\nnew:{hashed('s3cret')}\n"
    (tmp_path / "users").write_text(lines)
    server = mirror({"serve": {"auth": {"htpasswd": str(tmp_path / "users")}}})
    credentials = basic("alice", "s3cret")
    assert status(server, credentials) == 200
    with ThreadPoolExecutor(100) as pool:
        guesses = [pool.submit(server.get, "/v2/", basic("alice", f"guess{n}")) for n in range(100)]
        began = time.monotonic()
        assert status(server, credentials) == 200
        assert time.monotonic() - began < 3
        # Another client that logs in for the first time has to wait for a few guesses.
        stranger = http.client.HTTPConnection(
            server.host, server.port, timeout=20, source_address=("127.0.0.2", 0)
        )
        with contextlib.closing(stranger):
            stranger.request("GET", "/v2/", headers=basic("new", "s3cret"))
            assert stranger.getresponse().status == 200
        found = [guess.result() for guess in guesses]
    refused = [answer for answer in found if answer.status == 503]
    assert {answer.status for answer in found} == {401, 503}
    assert len(refused) >= 20
    assert all(answer.headers["retry-after"] == "5" for answer in refused)


def test_what_htpasswd_writes_is_read(mirror: MakeMirror, tmp_path: Path) -> None:
    htpasswd = require_tool("htpasswd")
    run(htpasswd, "-cbB", tmp_path / "users", "dora", "pass word")
    server = mirror({"serve": {"auth": {"htpasswd": str(tmp_path / "users")}}})
    assert status(server, basic("dora", "pass word")) == 200


def test_plain_http_with_passwords_is_worth_a_warning(server: Mirror) -> None:
    assert server.log().count("passwords of clients travel unencrypted") == 1


def test_each_worker_asks_for_it(mirror: MakeMirror, users: Path) -> None:
    server = mirror({"serve": {"auth": {"htpasswd": str(users)}, "workers": 2}})
    for _ in range(6):
        assert status(server, basic("alice", "s3cret")) == 200
        assert status(server) == 401
