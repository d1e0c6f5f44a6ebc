"""What the operator's rules, and an upstream's limits, make of a request."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.fetch.tls import Authority
from tests.images import image, random_blob
from tests.server import Answer, Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth, TokenAuth
from tests.upstream_faults import Fault, too_many_requests

MakeMirror = Callable[..., Mirror]


@pytest.fixture
def black_hole() -> Iterator[str]:
    """host:port of a listener whose backlog is full: the kernel drops further handshakes."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        time.sleep(0.1)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def code(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json()["errors"][0]["code"]


def test_repositories_are_refused_by_rule_cached_or_not(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    held = {name: upstream.add(name, image(name), tag="v1") for name in ("team/app", "team/x/y")}
    entry = upstream_entry(upstream.url)
    server = mirror({"upstreams": [entry]})
    for name in held:
        assert server.manifest(upstream.registry, name, "v1").status == 200
    for blob in held["team/x/y"].blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")
    asked = len(upstream.requests)
    rules = {"allow": ["team/*"], "deny": ["team/x/*"]}
    server.write_config({"upstreams": [{**entry, "repositories": rules}]})
    server.restart()
    assert server.manifest(upstream.registry, "team/app", "v1").status == 200
    for path in (
        "team/x/y/manifests/v1",
        f"team/x/y/manifests/{held['team/x/y'].digest}",
        f"team/x/y/blobs/{held['team/x/y'].blobs[0].digest}",
        "team/x/y/tags/list",
        f"team/x/y/referrers/{held['team/x/y'].digest}",
    ):
        answer = server.get(f"/v2/{path}?ns={upstream.registry}")
        assert code(answer) == (403, "DENIED"), path
        assert "repositories.deny has 'team/x/*'" in answer.body.decode()
        assert server.head(f"/v2/{path}?ns={upstream.registry}").status == 403
    answer = server.manifest(upstream.registry, "other/app", "v1")
    assert code(answer) == (403, "DENIED")
    assert b"no pattern of repositories.allow matches it" in answer.body
    assert len(upstream.requests) == asked


def test_rules_for_unlisted_registries_name_them(mirror: MakeMirror) -> None:
    rules = {"allow": ["quay.example/podman/*"]}
    server = mirror({"fetch": {"unlisted": {"repositories": rules}}})
    answer = server.manifest("quay.example", "other/app", "v1")
    assert code(answer) == (403, "DENIED")
    assert b"fetch.unlisted: no pattern of repositories.allow matches it" in answer.body
    assert server.manifest("quay.example", "podman/app", "v1").status == 502  # does not resolve


@pytest.mark.parametrize("as_date", [False, True])
def test_a_429_pauses_the_upstream_and_what_is_cached_is_served(
    mirror: MakeMirror, upstream: FakeUpstream, as_date: bool
) -> None:
    app = upstream.add("app", image("app"), tag="v1")
    upstream.add("app", image("other"), tag="v2")
    server = mirror({"upstreams": [upstream_entry(upstream.url)], "fetch": {"tag_ttl": 0}})
    assert server.manifest(upstream.registry, "app", "v1").status == 200
    for blob in app.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")
    when = formatdate(time.time() + 100, usegmt=True) if as_date else "100"
    upstream.fault("/v2/", too_many_requests(when))
    assert code(server.manifest(upstream.registry, "app", "v2")) == (429, "TOOMANYREQUESTS")
    asked = len(upstream.requests)
    miss = server.manifest(upstream.registry, "app", "v2")
    assert code(miss) == (429, "TOOMANYREQUESTS")
    assert 90 <= int(miss.headers["retry-after"]) <= 100
    unknown = server.blob(upstream.registry, "app", "sha256:" + "0" * 64)
    assert code(unknown) == (429, "TOOMANYREQUESTS")
    stale = server.manifest(upstream.registry, "app", "v1")
    assert (stale.status, stale.digest) == (200, app.digest)
    assert "rate-limited" in stale.cache_status
    assert server.blob(upstream.registry, "app", app.blobs[0].digest).status == 200
    assert len(upstream.requests) == asked


def test_what_is_left_of_a_rate_limit_is_logged(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    for number, left in enumerate((100, 50, 9, 8)):
        upstream.add("app", image(str(number)), tag=f"v{number}")
        said = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": f"{left};w=21600"}
        upstream.fault("/manifests/", Fault(headers=said), times=1)
        server.manifest(upstream.registry, "app", f"v{number}")
    told = [line for line in server.log().splitlines() if "upstream quota" in line]
    assert [" INFO " in line for line in told] == [True, False]
    assert "limit=100 remaining=9 window=21600" in told[1]


def test_an_upstream_that_is_down_fails_misses_fast_and_its_return_is_noticed(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    app = upstream.add("app", image("app"), tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstream.url)], "fetch": {"pause": "2s"}})
    upstream.stop_listening()
    assert server.manifest(upstream.registry, "app", "v1").status == 502
    end = time.monotonic() + 3
    while time.monotonic() < end:
        for path in (f"manifests/{app.digest}", f"blobs/{app.blobs[0].digest}"):
            began = time.monotonic()
            answer = server.get(f"/v2/app/{path}?ns={upstream.registry}")
            assert answer.status in (502, 504)
            assert time.monotonic() - began < 1.4  # a second, and a busy machine
        time.sleep(0.1)
    upstream.listen_again()
    end = time.monotonic() + 5
    while (answer := server.manifest(upstream.registry, "app", "v1")).status != 200:
        assert time.monotonic() < end, answer.body
        time.sleep(0.1)
    server.wait_for_log("upstream is back")


@pytest.mark.parametrize(
    "fault", [Fault(cut_after=0, reset=True), Fault(drop=True), Fault(status=500)]
)
def test_an_upstream_that_breaks_every_request_costs_no_further_miss_a_connection(
    mirror: MakeMirror, upstream: FakeUpstream, fault: Fault
) -> None:
    upstream.add("app", image("app"), tag="v1")
    upstream.fault("/v2/", fault)
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    for _ in range(3):
        assert server.manifest(upstream.registry, "app", "v1").status == 502
    asked = len(upstream.requests)
    for path in ("manifests/v1", "blobs/sha256:" + "0" * 64, "tags/list"):
        answer = server.get(f"/v2/app/{path}?ns={upstream.registry}")
        assert code(answer) == (502, "UNAVAILABLE")
        assert b"left alone for" in answer.body
    assert len(upstream.requests) == asked
    upstream.heal()
    end = time.monotonic() + 10
    while (answer := server.manifest(upstream.registry, "app", "v1")).status != 200:
        assert time.monotonic() < end, answer.body
        time.sleep(0.1)


def test_an_address_that_swallows_packets_costs_one_client_its_time(
    mirror: MakeMirror, black_hole: str
) -> None:
    entry = {"name": black_hole, "scheme": "http", "timeouts": {"connect": "1500ms"}}
    server = mirror({"upstreams": [entry], "fetch": {"pause": "2s"}})
    digest = "sha256:" + "0" * 64
    began = time.monotonic()
    assert server.blob(black_hole, "app", digest).status == 504
    assert 1.4 < time.monotonic() - began < 5
    end = time.monotonic() + 6
    while time.monotonic() < end:
        for path in ("manifests/v1", f"blobs/{digest}"):
            began = time.monotonic()
            assert server.get(f"/v2/app/{path}?ns={black_hole}").status in (502, 504)
            assert time.monotonic() - began < 1.4  # a second, and a busy machine
        time.sleep(0.05)
    assert server.log().count("upstream paused") > 1


def test_an_upstream_that_denies_access_is_warned_of_once_in_a_while(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream]
) -> None:
    upstream = make_upstream(auth=BasicAuth("ann", "right"))
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    for tag in ("v1", "v2", "v3"):
        assert server.manifest(upstream.registry, "team/app", tag).status == 403
    lines = [line for line in server.log().splitlines() if "upstream denies access" in line]
    assert len(lines) == 1
    assert "WARN" in lines[0]
    assert f"upstream={upstream.registry}" in lines[0]
    assert "outcome=error" in server.log()


def test_an_upstream_whose_certificate_is_not_accepted_is_warned_of(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream], tmp_path: Path
) -> None:
    upstream = make_upstream(tls=Authority(tmp_path).server("registry.invalid"))
    server = mirror({"upstreams": [{"name": upstream.registry}]})
    for tag in ("v1", "v2"):
        assert server.manifest(upstream.registry, "team/app", tag).status == 502
    assert server.log().count("upstream not trusted") == 1


def test_a_token_that_expires_in_the_middle_of_a_blob_is_renewed_inside_it(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream]
) -> None:
    auth = TokenAuth()
    upstream = make_upstream(auth=auth)
    blob = upstream.add_content("app", random_blob(3_000_000))
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    # The first of the two is used up by the request that is answered 401.
    upstream.fault("/blobs/", Fault(stall_after=700_000, cut_after=700_000), times=2)
    done: list[Answer] = []
    client = threading.Thread(
        target=lambda: done.append(server.blob(upstream.registry, "app", blob.digest))
    )
    client.start()
    end = time.monotonic() + 20
    while upstream.bytes_sent("/blobs/") < 700_000:
        assert time.monotonic() < end, server.log()
        time.sleep(0.01)
    auth.expire_all()
    upstream.release()
    client.join(30)
    (answer,) = done
    assert (answer.status, answer.body) == (200, blob.data)
    statuses = [request.status for request in upstream.seen("/blobs/")]
    assert [status == 401 for status in statuses] == [True, False, True, False]
    assert upstream.bytes_sent("/blobs/") == blob.size
    assert len(auth.issued) == 2
