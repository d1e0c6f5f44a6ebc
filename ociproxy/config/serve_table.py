"""The part of the table of configuration keys that says what the server is.

`ociproxy.config.table` has the rest. Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import ipaddress
from typing import Any, Final

from ociproxy.config import tls_files
from ociproxy.config.htpasswd import read_htpasswd
from ociproxy.config.kinds import Duration, FilePath, Flag, Number, Place, Size, Text
from ociproxy.config.local_settings import Admin, Network, Serve, ServerAuth, ServerTls
from ociproxy.config.sections import Items, Key, Section, line_of
from ociproxy.config.settings import Tls
from ociproxy.config.units import MIB
from ociproxy.config.upstream_table import registry
from ociproxy.config.yaml import MappingNode
from ociproxy.errors import ConfigError


def _default_upstream(text: str) -> str:
    return registry(text) if text else ""


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
    """A network, or one address. An IPv4 network written as ::ffff:a.b.c.d is taken as IPv4."""
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


_TLS: Final = Section(
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

_AUTH: Final = Section(
    ServerAuth,
    {
        "htpasswd": Key(
            FilePath(), "File of users as htpasswd -B writes it (bcrypt only).", required=True
        )
    },
    rules=(_users,),
)


def _admin(values: dict[str, Any]) -> Admin:
    return Admin(**values, chosen="port" in values)


_ADMIN: Final = Section(
    Admin,
    {
        "host": Key(Text(), "Address of the admin listener."),
        "port": Key(Number(0, 65535), "Its port; 0 turns it off."),
        "auth": Key(_AUTH, "Who may use it; without it every client that reaches it."),
        "connections": Key(
            Number(1, 10_000), "Connections to it at once; a newer one ends an older one."
        ),
        "survey_every": Key(
            Duration(at_least=10.0, at_most=30 * 86400.0),
            "How often what the store holds is counted for it, by a child process.",
        ),
    },
    build=_admin,
)

_NETWORKS: Final = Items(Text(parse=_network))

SERVE: Final = Section(
    Serve,
    {
        "host": Key(Text(), "Address to listen on; :: for IPv6."),
        "port": Key(Number(0, 65535), "Port to listen on; 0 lets the system choose."),
        "default_upstream": Key(
            Text(parse=_default_upstream, empty=True),
            "Upstream of a path that names no registry; empty refuses such paths.",
        ),
        "offline": Key(Flag(), "Never contact an upstream."),
        "workers": Key(Number(1, 64), "Server processes."),
        "preload_images": Key(
            FilePath(), "Image list: its images are loaded while the server serves."
        ),
        "bundles": Key(Items(FilePath()), "Archives to serve from as they are, under the store."),
        "shutdown_grace": Key(
            Duration(at_most=3600.0), "How long running responses may take to finish at shutdown."
        ),
        "reload_grace": Key(
            Duration(at_most=86400.0),
            "How long requests and downloads of before a SIGHUP may go on after it.",
        ),
        "keepalive": Key(
            Duration(at_least=1.0, at_most=3600.0),
            "How long an idle client connection is kept open.",
        ),
        "client_stall": Key(
            Duration(at_least=1.0, at_most=86400.0),
            "How long a client may take no data before its connection is dropped.",
        ),
        "tls": Key(_TLS, "HTTPS on the port; without it plain HTTP."),
        "auth": Key(_AUTH, "Who may pull; without it every client."),
        "admin": Key(_ADMIN, "A second listener, with metrics and the state of this server."),
        "networks": Key(_NETWORKS, "Networks that clients may connect from; empty is all."),
        "connections": Key(
            Number(1, 1_000_000), "Client connections of one process; more are answered 503."
        ),
        "header_limit": Key(Size(1024, MIB), "Largest header line of a request."),
        "line_limit": Key(Size(1024, MIB), "Largest request line."),
        "headers": Key(Number(8, 1000), "Most header lines of a request."),
        "head_limit": Key(
            Size(4096, 16 * MIB), "Largest size of a request's line and headers together."
        ),
        "head_timeout": Key(
            Duration(at_least=1.0, at_most=600.0),
            "How long a client may take to send a request's line and headers.",
        ),
        "handshake_timeout": Key(
            Duration(at_least=0.5, at_most=600.0), "How long a TLS handshake may take."
        ),
    },
)
