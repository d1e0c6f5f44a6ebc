"""Which addresses an upstream, its redirects and its token realm may be at.

An IPv6 address that carries an IPv4 address, by a mapping or a tunnel, is judged by both: a
translator on the way may deliver to the IPv4 address.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_THIS_NETWORK: Final = ipaddress.ip_network("0.0.0.0/8")
_RESERVED: Final = ipaddress.ip_network("240.0.0.0/4")
_PRIVATE: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",  # carrier-grade NAT (RFC 6598)
        "192.0.0.0/24",  # protocol assignments (RFC 6890)
        "198.18.0.0/15",  # benchmarks (RFC 2544)
        "fc00::/7",  # unique local (RFC 4193)
        "fec0::/10",  # site-local, deprecated
        "64:ff9b:1::/48",  # a local translator's (RFC 8215), which may lead anywhere
    )
)
_METADATA: Final = frozenset(
    ipaddress.ip_address(text)
    for text in ("fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16")
)
"""Services outside the link-local range where a cloud hands out the machine's credentials."""
# Prefixes that carry an IPv4 address, and how many bits follow that address.
_TRANSLATED: Final = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (ipaddress.IPv6Network("::/96"), 0),  # IPv4-compatible
    (ipaddress.IPv6Network("::ffff:0:0:0/96"), 0),  # translated (RFC 2765)
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64 (RFC 6052)
    (ipaddress.IPv6Network("64:ff9b:1::/48"), 0),  # NAT64, local prefixes of 96 bits
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4 (RFC 3056)
)


def refused_kind(address: str, *, listed: bool, deny_private: bool = False) -> str | None:
    """The kind of an address that an upstream must not lead to; None for a permitted address.
    `address` is a resolver's, with or without a zone. A link-local address is mostly a cloud's
    metadata service. Through the others, a client that names an unlisted upstream would reach
    services that only this host, or with `deny_private` only its network, may reach."""
    for ip in _meanings(ipaddress.ip_address(address)):
        if ip.is_link_local or ip in _METADATA:
            return "a link-local address" if ip.is_link_local else "a cloud's metadata service"
        if listed:
            continue
        kind = _local_kind(ip)
        if kind is None and deny_private and any(ip in network for network in _PRIVATE):
            kind = "a private address"
        if kind is not None:
            return kind
    return None


def literal_addresses(host: str) -> list[str]:
    """The address that the C library reads from a host such as `127.1`, `0x7f000001` or `[::1]`
    without a resolver. Empty for a name."""
    host = host.strip("[]").removesuffix(".")
    with suppress(OSError):
        return [socket.inet_ntoa(socket.inet_aton(host))]
    with suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    if host == "localhost" or host.endswith(".localhost"):
        return ["127.0.0.1"]
    return []


def _local_kind(ip: Address) -> str | None:
    kinds = {
        "a loopback address": ip.is_loopback,
        "a multicast address": ip.is_multicast,
        "an unspecified address": ip.is_unspecified or ip in _THIS_NETWORK,
        "a reserved address": ip in _RESERVED,
    }
    return next((kind for kind, refused in kinds.items() if refused), None)


def _meanings(ip: Address) -> Iterator[Address]:
    """The address, and each IPv4 address that a translator may make of it."""
    yield ip
    if not isinstance(ip, ipaddress.IPv6Address):
        return
    if ip.is_loopback or ip.is_unspecified:
        return
    number = int(ip)
    for network, shift in _TRANSLATED:
        if ip in network:
            yield ipaddress.IPv4Address(number >> shift & 0xFFFFFFFF)
    if ip.teredo is not None:
        yield from ip.teredo
