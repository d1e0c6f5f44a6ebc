"""Which networks clients may come from."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_network

import pytest

from ociproxy.serve.listener import is_within
from tests.serve.wire import Wire, statuses
from tests.server import Mirror

MakeMirror = Callable[..., Mirror]


@pytest.mark.parametrize(
    ("host", "networks", "inside"),
    [
        ("10.1.2.3", ["10.0.0.0/8"], True),
        ("11.1.2.3", ["10.0.0.0/8"], False),
        ("::ffff:10.1.2.3", ["10.0.0.0/8"], True),
        ("::ffff:11.1.2.3", ["10.0.0.0/8", "fd00::/8"], False),
        ("fd00::1", ["10.0.0.0/8", "fd00::/8"], True),
        ("fe80::1%eth0", ["fe80::/10"], True),
        ("2001:db8::1", ["fd00::/8"], False),
        ("10.1.2.3", ["::/0"], False),
        ("::1", ["0.0.0.0/0"], False),
    ],
)
def test_an_address_is_in_a_network(host: str, networks: list[str], inside: bool) -> None:
    assert is_within(host, tuple(ip_network(text) for text in networks)) is inside


def test_a_client_from_elsewhere_is_hung_up_on(mirror: MakeMirror) -> None:
    server = mirror({"serve": {"networks": ["127.0.0.2", "192.0.2.0/24"]}})
    with Wire(server) as wire:
        assert wire.read_to_end() == b""
    server.wait_for_log('client refused client=127.0.0.1 reason="not in serve.networks"')
    with socket.create_connection((server.host, server.port), 10, ("127.0.0.2", 0)) as client:
        client.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert statuses(client.recv(4096)) == [200]


@pytest.mark.parametrize("host", ["::", "[::]"])
def test_ipv4_clients_of_an_ipv6_socket(mirror: MakeMirror, host: str) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = mirror({"serve": {"networks": ["127.0.0.0/8"]}}, args=["--host", host])
    assert server.get("/v2/").status == 200
    with Wire(server, host="::1") as wire:
        assert wire.read_to_end() == b""
    server.wait_for_log("client refused client=::1")


def test_sighup_changes_them(mirror: MakeMirror) -> None:
    server = mirror({"serve": {"networks": ["192.0.2.0/24"]}})
    with Wire(server) as wire:
        assert wire.read_to_end() == b""
    server.write_config({"serve": {"networks": ["192.0.2.0/24", "127.0.0.0/8"]}})
    server.reload()
    server.wait_for_log("configuration reloaded")
    assert server.get("/v2/").status == 200
