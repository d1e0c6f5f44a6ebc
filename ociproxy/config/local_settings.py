"""What the operator decides about this machine: the store, the server, loads and the log.

Durations are seconds, sizes are bytes. `ociproxy.config.settings` has the rest.
Tests: tests/config/test_config.py, tests/serve/test_limits.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal

from ociproxy.config.units import KIB, MIB
from ociproxy.oci.reference import DOCKER_HUB

LogLevel = Literal["trace", "debug", "info", "warn", "error"]
LogFormat = Literal["text", "json"]
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class PinSource:
    """A file that names what no prune removes: an image list or a lock."""

    list: Path | None = None
    lock: Path | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the file system that the store is on."""

    percent: float

    def of(self, size: int) -> int:
        return int(size * self.percent / 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """`max_size` is None without a cap, `min_free` for the default: 5 % of the file system or 2
    GiB, whichever is less. `scrub` is how long a pass over all files takes, None for no scrub."""

    path: Path = Path("/var/lib/ociproxy")
    hot_manifests: int = 16 * MIB
    max_size: int | Share | None = None
    min_free: int | Share | None = None
    evict_every: float = 3600.0
    keep_recent: float = 3600.0
    pins: tuple[str | PinSource, ...] = ()
    scrub: float | None = 30 * 86400.0
    scrub_rate: int = 10 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """HTTPS on the main port; with `client_ca` only for clients that show a certificate."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAuth:
    """Who may pull: the users of an htpasswd file."""

    htpasswd: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """The second listener, for the operator; 0 as the port is none. `chosen` is whether the
    operator named the port: one that was not may be taken by another program."""

    host: str = "127.0.0.1"
    port: int = 8081
    chosen: bool = False
    auth: ServerAuth | None = None
    connections: int = 64
    survey_every: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """The server. `default_upstream` is empty if a path without a registry is refused.

    `connections` and the limits below it hold for each worker. `head_limit` is the size of a
    request's line and headers together, `head_timeout` how long the client may take to send them.
    """

    host: str = "0.0.0.0"  # noqa: S104 - other machines pull from a mirror
    port: int = 8080
    default_upstream: str = DOCKER_HUB
    offline: bool = False
    workers: int = 1
    preload_images: Path | None = None
    bundles: tuple[Path, ...] = ()
    shutdown_grace: float = 30.0
    reload_grace: float = 3600.0
    keepalive: float = 300.0
    client_stall: float = 300.0
    tls: ServerTls | None = None
    auth: ServerAuth | None = None
    admin: Admin = Admin()
    networks: tuple[Network, ...] = ()
    connections: int = 4096
    header_limit: int = 16 * KIB
    line_limit: int = 16 * KIB
    headers: int = 64
    head_limit: int = 64 * KIB
    head_timeout: float = 20.0
    handshake_timeout: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`jobs` images load at once. An image fails after `pull_timeout` seconds without progress."""

    jobs: int = 8
    pull_timeout: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    level: LogLevel = "info"
    format: LogFormat = "text"
