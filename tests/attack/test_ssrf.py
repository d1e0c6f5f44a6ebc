"""A client names an address that only this host may reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.attack.conftest import PUBLIC, Network, assert_quiet, refusal
from tests.images import image
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_auth import TokenAuth
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]
Draw = Callable[..., Network]
DENIED = (403, "DENIED")
OPEN_WORLD = {"fetch": {"unlisted": {"scheme": "auto"}}}

LITERALS = [
    "127.0.0.1",
    "127.1",
    "127.255.255.254",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "0x7f.0.0.1",
    "0x7f000001",
    "0",
    "0.0.0.0",
    "localhost",
    "LOCALHOST",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "169.254.169.254",
    "0xa9fea9fe",
    "[::ffff:169.254.169.254]",
    "[fe80::1]",
    "224.0.0.1",
    "[ff02::1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::1]",
    "[::127.0.0.1]",
    "[64:ff9b::169.254.169.254]",
    "[2002:a9fe:a9fe::1]",
    "255.255.255.255",
    "100.100.100.200",  # where some clouds keep credentials, beside 169.254.169.254
    "168.63.129.16",
    "[fd00:ec2::254]",
]
# Some resolvers take these, others do not.
UNRESOLVED = ["127.0.0.1.", "localhost."]
NO_REGISTRY = [
    "127.0.0.1%00.example.com",
    "user@127.0.0.1",
    "127.0.0.1%23.example.com",
    "127.0.0.1%2f..",
    "127.0.0.1%5c.example.com",
    "%E2%91%A0%E2%91%A1%E2%91%A6.0.0.1",  # circled digits, which a resolver takes for 127
    "[fe80::1%25lo]",
    "127.0.0.1%0d%0aHost:%20example.com",
    "http://127.0.0.1",
    "[::1",
    "unix:///run/docker.sock",
]


def test_every_notation_of_an_address_is_refused(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    server = mirror(OPEN_WORLD)
    port = upstream.registry.partition(":")[2]
    for literal in LITERALS:
        answer = server.get(f"/v2/app/manifests/v1?ns={literal}:{port}")
        assert refusal(answer) == DENIED, literal
    for literal in UNRESOLVED:
        answer = server.get(f"/v2/app/manifests/v1?ns={literal}:{port}")
        assert answer.status in (403, 502), literal
    for literal in NO_REGISTRY:
        answer = server.get(f"/v2/app/manifests/v1?ns={literal}:{port}")
        assert refusal(answer) == (400, "NAME_INVALID"), literal
    in_path = server.get(f"/v2/127.0.0.1:{port}/app/manifests/v1")
    assert refusal(in_path) == DENIED
    assert upstream.requests == []
    assert_quiet(server)


def test_every_kind_of_request_is_refused(mirror: MakeMirror, upstream: FakeUpstream) -> None:
    held = upstream.add("app", image("app"), tag="v1")
    server = mirror(OPEN_WORLD)
    for path in (
        f"manifests/{held.digest}",
        f"blobs/{held.blobs[0].digest}",
        "tags/list",
    ):
        answer = server.get(f"/v2/app/{path}?ns={upstream.registry}")
        assert refusal(answer) == DENIED, path
    # The specification forbids 404 here, and the mirror answers with what it holds: nothing.
    referrers = server.get(f"/v2/app/referrers/{held.digest}?ns={upstream.registry}")
    assert referrers.json()["manifests"] == []
    head = server.head(f"/v2/app/blobs/{held.blobs[0].digest}?ns={upstream.registry}")
    assert head.status == 403
    assert upstream.requests == []


def test_a_name_that_resolves_to_loopback_is_refused(
    mirror: MakeMirror, upstream: FakeUpstream, draw: Draw
) -> None:
    port = upstream.registry.partition(":")[2]
    network = draw({"inside.example": [["127.0.0.1"]], "metadata.example": [["169.254.169.254"]]})
    server = mirror(OPEN_WORLD, env=network.environment)
    for name in ("inside.example", "metadata.example"):
        answer = server.get(f"/v2/app/manifests/v1?ns={name}:{port}")
        assert refusal(answer) == DENIED
    assert network.connected() == set()
    assert upstream.requests == []


def test_a_name_that_resolves_twice_differently_gets_nowhere(
    mirror: MakeMirror, upstream: FakeUpstream, draw: Draw
) -> None:
    upstream.add("app", image("app"), tag="v1")
    upstream.fault("", Fault(headers={"Connection": "close"}))
    port = upstream.registry.partition(":")[2]
    name = f"rebound.example:{port}"
    network = draw({"rebound.example": [[PUBLIC], [PUBLIC], [PUBLIC], ["127.0.0.1"]]})
    server = mirror({**OPEN_WORLD, "tags": [{"match": "*", "ttl": 0}]}, env=network.environment)
    first = server.manifest(name, "app", "v1")
    assert first.status == 200, server.log()
    upstream.fault("", Fault(status=404, headers={"Connection": "close"}))
    answers = [refusal(server.manifest(name, "app", f"new{number}")) for number in range(10)]
    assert answers[-1] == DENIED
    assert network.connected() == {PUBLIC}


def test_a_name_with_a_good_and_a_bad_address_is_asked_at_the_good_one(
    mirror: MakeMirror, upstream: FakeUpstream, draw: Draw
) -> None:
    upstream.add("app", image("app"), tag="v1")
    port = upstream.registry.partition(":")[2]
    network = draw({"mixed.example": [["127.0.0.1", "169.254.169.254", PUBLIC]]})
    server = mirror(OPEN_WORLD, env=network.environment)
    assert server.manifest(f"mixed.example:{port}", "app", "v1").status == 200, server.log()
    assert network.connected() == {PUBLIC}


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.1:{port}", "http://0x7f.1:{port}", "http://[::ffff:127.0.0.1]:{port}"],
)
def test_a_redirect_to_a_refused_address_is_not_followed(
    mirror: MakeMirror,
    make_upstream: Callable[..., FakeUpstream],
    draw: Draw,
    target: str,
) -> None:
    inside, outside = make_upstream(), make_upstream()
    port = outside.registry.partition(":")[2]
    held = inside.add("app", image("app"), tag="v1")
    location = target.format(port=inside.registry.partition(":")[2])
    outside.fault("/v2/app/", Fault(redirect=location))
    network = draw({"outside.example": [[PUBLIC]]})
    server = mirror(OPEN_WORLD, env=network.environment)
    name = f"outside.example:{port}"
    assert refusal(server.manifest(name, "app", "v1")) == DENIED, server.log()
    assert refusal(server.blob(name, "app", held.blobs[0].digest)) == DENIED
    assert inside.requests == []
    assert outside.count("/v2/app/") >= 2


def test_a_listed_upstream_does_not_lead_to_the_metadata_service(
    mirror: MakeMirror, upstream: FakeUpstream
) -> None:
    upstream.fault("/v2/app/", Fault(redirect="http://169.254.169.254"))
    server = mirror({"upstreams": [upstream_entry(upstream.url)]})
    answer = server.manifest(upstream.registry, "app", "v1")
    assert refusal(answer) == DENIED
    assert "link-local" in answer.json()["errors"][0]["message"]


def test_a_token_realm_at_a_refused_address_is_not_asked(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream], draw: Draw
) -> None:
    inside = make_upstream(auth=TokenAuth())
    outside = make_upstream(auth=TokenAuth(realm=f"{inside.url}/token"))
    port = outside.registry.partition(":")[2]
    network = draw({"outside.example": [[PUBLIC]]})
    server = mirror(OPEN_WORLD, env=network.environment)
    answer = server.manifest(f"outside.example:{port}", "app", "v1")
    assert refusal(answer) == DENIED
    assert inside.requests == []
    assert outside.count("/v2/app/") == 1


@pytest.mark.parametrize("way", ["name", "redirect", "realm"])
def test_private_addresses_are_refused_where_the_operator_says_so(
    mirror: MakeMirror, make_upstream: Callable[..., FakeUpstream], draw: Draw, way: str
) -> None:
    private = "http://10.255.255.1:5000"
    outside = make_upstream(auth=TokenAuth(realm=f"{private}/token") if way == "realm" else None)
    if way == "redirect":
        outside.fault("/v2/app/", Fault(redirect=private))
    address = "10.255.255.1" if way == "name" else PUBLIC
    network = draw({"outside.example": [[address]]})
    unlisted = {"scheme": "auto", "deny_private": True}
    server = mirror({"fetch": {"unlisted": unlisted}}, env=network.environment)
    name = f"outside.example:{outside.registry.partition(':')[2]}"
    answer = server.manifest(name, "app", "v1")
    assert refusal(answer) == DENIED
    assert "a private address" in answer.json()["errors"][0]["message"]
    assert network.connected() == ({PUBLIC} if way != "name" else set())
