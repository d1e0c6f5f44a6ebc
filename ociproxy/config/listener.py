"""The keys of the server's own door: its TLS, its users, the networks it is open to."""

from __future__ import annotations

import ipaddress
from typing import Any, Final

from ociproxy.config import tls_files
from ociproxy.config.htpasswd import read_htpasswd
from ociproxy.config.kinds import FilePath, Place, Text
from ociproxy.config.sections import Items, Key, Section, line_of
from ociproxy.config.settings import Network, ServerAuth, ServerTls, Tls
from ociproxy.config.yaml import MappingNode
from ociproxy.errors import ConfigError


def _certificates(values: Any, node: MappingNode, place: Place) -> None:
    files = Tls(ca=values.get("client_ca"), cert=values["cert"], key=values["key"])
    for name, reason in tls_files.find_problems(files):
        key = "client_ca" if name == "ca" else name
        place.child(key).refuse(line_of(node, key), reason)


def _users(values: Any, node: MappingNode, place: Place) -> None:
    try:
        read_htpasswd(values["htpasswd"])
    except ConfigError as error:
        place.child("htpasswd").refuse(line_of(node, "htpasswd"), str(error))


def _network(text: str) -> Network:
    """An address alone is a network of one. IPv4 written as IPv6 is IPv4."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(
            f"not a network such as 10.0.0.0/8 or fd00::/8, or an address: {error}"
        ) from error
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= 96:
        return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


SERVER_TLS: Final = Section(
    ServerTls,
    {
        "cert": Key(FilePath(), "PEM certificate of this server, with its chain.", required=True),
        "key": Key(FilePath(), "PEM private key of cert, without a passphrase.", required=True),
        "client_ca": Key(
            FilePath(), "PEM bundle; only clients with a certificate signed by it may connect."
        ),
    },
    rules=(_certificates,),
)

SERVER_AUTH: Final = Section(
    ServerAuth,
    {
        "htpasswd": Key(
            FilePath(), "File of users as htpasswd -B writes it (bcrypt only).", required=True
        )
    },
    rules=(_users,),
)

NETWORKS: Final = Items(Text(parse=_network, label="network"))
