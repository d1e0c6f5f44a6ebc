"""What the operator decides, as frozen values with their defaults.

`ociproxy.config.file` makes a `Config` out of YAML, the command line replaces what its options say,
and everything below is given the part it needs. Durations are seconds, sizes are bytes, registry
names are normalised: nobody below parses again. A secret cannot be printed by accident.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from ociproxy.oci.reference import DOCKER_HUB, Reference, Repository, parse_registry

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# Docker Hub's API does not live under its name; an `endpoint` in the config still wins.
_DOCKER_HUB_ENDPOINT: Final = "registry-1.docker.io"
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

Scheme = Literal["https", "http", "auto"]
Isolation = Literal["none", "repository"]
BackendName = Literal["oras", "skopeo"]
LogLevel = Literal["trace", "debug", "info", "warn", "error"]
LogFormat = Literal["text", "json"]
Network = IPv4Network | IPv6Network


class Secret:
    """A string that no repr, log line or traceback shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "********"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long one upstream may take, in seconds."""

    connect: float = 5.0
    headers: float = 15.0
    stall: float = 20.0
    revalidate: float = 2.0
    # containerd gives up on a mirror after 30 s without response headers; 20 s is the contract.
    answer: float = 18.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How an upstream is verified, and the certificate shown to it.

    Without `ca` the operating system's trust store is used. `insecure_skip_verify` verifies
    nothing, `ca` or not.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    insecure_skip_verify: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth:
    """Where an upstream's credentials come from: exactly one source is set.

    `password`, `password_env` and `password_file` go with `user`. `docker_config` is True for
    Docker's own place of the file. `ociproxy.fetch.credentials` reads them. `lifetime` is how
    many seconds a helper's answer is used.
    """

    user: str | None = None
    password: Secret | None = None
    password_env: str | None = None
    password_file: Path | None = None
    helper: str | None = None
    docker_config: Path | bool = False
    lifetime: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Globs on names: what `allow` lists, or everything where it is empty, less what `deny`
    lists."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()

    def refusal(self, name: str) -> str | None:
        """Which rule refuses the name, in words, or None."""
        for pattern in self.deny:
            if fnmatchcase(name, pattern):
                return f"repositories.deny has {pattern!r}"
        if self.allow and not any(fnmatchcase(name, pattern) for pattern in self.allow):
            return "no pattern of repositories.allow matches it"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One of several places that an upstream is asked at. Without `auth` and `tls` it has those of
    its upstream only if it is at the upstream's own host. `ns` is whether `?ns=` goes along."""

    url: str
    auth: Auth | None = None
    tls: Tls | None = None
    ns: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """A registry that may be asked; `name` is its normalised name, `host[:port]`."""

    name: str
    description: str = ""
    scheme: Scheme = "https"
    endpoint: str | None = None
    endpoints: tuple[Endpoint, ...] = ()
    auth: Auth | None = None
    tls: Tls = Tls()
    timeouts: Timeouts = Timeouts()
    connections: int = 4
    backend: BackendName = "oras"
    repositories: Rules = Rules()
    isolation: Isolation = "none"
    listed: bool = True
    deny_private: bool = False
    ns: bool | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """The base URLs to try in this order, without a slash at the end."""
        if self.endpoint is not None:
            return (self.endpoint,)
        if self.scheme == "auto":
            return (f"https://{self._host}", f"http://{self._host}")
        return (f"{self.scheme}://{self._host}",)

    @property
    def each_endpoint(self) -> tuple[Upstream, ...]:
        """This upstream as it is at each of its `endpoints`, or just itself.

        Credentials go where they were written: those of the entry to the upstream's own host, and
        there not over plain HTTP if it is an endpoint over HTTPS too.
        """
        if not self.endpoints:
            return (self,)
        secure = any(self.is_own(e.url) and e.url.startswith("https:") for e in self.endpoints)
        found = []
        for each in self.endpoints:
            own = self.is_own(each.url)
            auth, tls = each.auth, each.tls
            if own and auth is None and (each.url.startswith("https:") or not secure):
                auth = self.auth
            if tls is None:
                tls = self.tls if own else Tls()
            found.append(
                replace(self, endpoint=each.url, endpoints=(), auth=auth, tls=tls, ns=each.ns)
            )
        return tuple(found)

    def is_own(self, url: str) -> bool:
        """Whether this URL is at the host that the upstream's name is of."""
        own, other = urlsplit(f"//{self._host}"), urlsplit(url)
        ports = {
            own.port or _DEFAULT_PORTS[other.scheme],
            other.port or _DEFAULT_PORTS[other.scheme],
        }
        return own.hostname == other.hostname and len(ports) == 1

    @property
    def server(self) -> str:
        """The registry that credentials are looked up for: where they are sent."""
        if self.endpoint is None or self.is_own(self.endpoint):
            return self.name
        return parse_registry(urlsplit(self.endpoint).netloc)

    @property
    def namespace(self) -> str | None:
        """The `ns` that goes along: a mirror of many registries has to be told which. Not to the
        registry itself, and not where a path says it, unless `ns` does."""
        if self.endpoint is None:
            return None
        asked = not self.is_own(self.endpoint) and urlsplit(self.endpoint).path in ("", "/v2")
        return self.name if (asked if self.ns is None else self.ns) else None

    @property
    def _host(self) -> str:
        return _DOCKER_HUB_ENDPOINT if self.name == DOCKER_HUB else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class TagRule:
    """How long a matching tag is fresh: `ttl` None is for ever, 0 asks the upstream every time."""

    match: str
    ttl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    path: Path = Path("/var/lib/ociproxy")
    hot_manifests: int = 16 * MIB


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
class Serve:
    """`default_upstream` is empty when a path without a registry is refused.

    `connections`, and all limits below it, are those of one process. `head_limit` is the size of
    a request line and its headers together, `head_timeout` how long they may take.
    """

    host: str = "0.0.0.0"  # noqa: S104 - a mirror is there for other machines
    port: int = 8080
    default_upstream: str = DOCKER_HUB
    offline: bool = False
    workers: int = 1
    preload_images: Path | None = None
    bundles: tuple[Path, ...] = ()
    shutdown_grace: float = 30.0
    keepalive: float = 300.0
    client_stall: float = 300.0
    tls: ServerTls | None = None
    auth: ServerAuth | None = None
    networks: tuple[Network, ...] = ()
    connections: int = 4096
    header_limit: int = 16 * KIB
    line_limit: int = 16 * KIB
    headers: int = 64
    head_limit: int = 64 * KIB
    head_timeout: float = 20.0
    handshake_timeout: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlisted:
    """What becomes of a registry that has no entry in `upstreams`; its `repositories` are matched
    with the registry's name before them."""

    policy: Literal["allow", "deny"] = "allow"
    scheme: Literal["https", "auto"] = "https"
    deny_private: bool = False
    repositories: Rules = Rules()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Bounds of the pull engine.

    `segment` is the size above which a blob is large: only large ones use several `connections`.
    `blob_limit` is the size of the largest blob that is fetched.
    `queue` is how many fills, and how many requests, may wait for their turn.
    `background_fills` 0 fetches a blob only when a client asks for it. `retries` counts tries in a
    row that brought nothing. `pause` is how long an upstream is left alone after it failed.
    """

    timeouts: Timeouts = Timeouts()
    fills: int = 32
    background_fills: int = 4
    requests: int = 16
    queue: int = 256
    segment: int = 32 * MIB
    blob_limit: int = 64 * GIB
    connections: int = 4
    retries: int = 4
    retry_wait_max: float = 5.0
    tag_ttl: float | None = 900.0
    negative_ttl: float = 10.0
    pause: float = 30.0
    unlisted: Unlisted = Unlisted()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`jobs` images at once; `pull_timeout` is how long an image may go without progress."""

    jobs: int = 8
    pull_timeout: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    level: LogLevel = "info"
    format: LogFormat = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the operator decides. `upstreams` is by normalised registry name."""

    store: Store = Store()
    serve: Serve = Serve()
    fetch: Fetch = Fetch()
    load: Load = Load()
    tags: tuple[TagRule, ...] = ()
    upstreams: Mapping[str, Upstream] = field(default_factory=dict)
    log: Log = Log()

    @property
    def default_ttl(self) -> float | None:
        return self.fetch.tag_ttl

    def tag_ttl(self, reference: Reference) -> float | None:
        """Seconds that the reference's tag is fresh, None for ever. The first match wins."""
        name = f"{reference.repository}:{reference.tag}"
        for rule in self.tags:
            if fnmatchcase(name, rule.match):
                return rule.ttl
        return self.default_ttl

    @property
    def isolated(self) -> bool:
        """Whether what is stored has to be looked at for whose it is, at every upstream."""
        return any(each.isolation == "repository" for each in self.upstreams.values())

    def repository_refusal(self, repository: Repository) -> str | None:
        """Which rule forbids to serve this repository, stored or not; None where none does."""
        upstream = self.upstreams.get(repository.registry)
        if upstream is not None:
            return upstream.repositories.refusal(repository.name)
        rules = self.fetch.unlisted.repositories
        if not (rules.allow or rules.deny):
            return None
        rule = rules.refusal(str(repository))
        return None if rule is None else f"fetch.unlisted: {rule}"

    def partition(self, registry: str) -> str:
        """Among whom bytes of a blob are shared before they are verified, and what is said of it
        believed: "" is that of all listed upstreams, for the operator chose them; an unlisted one,
        whose name came from a client, has a partition to itself."""
        return "" if registry in self.upstreams else registry

    def unlisted_upstream(self, registry: str) -> Upstream:
        """An anonymous upstream for a registry without an entry; callers obey `unlisted.policy`."""
        return Upstream(
            name=registry,
            scheme=self.fetch.unlisted.scheme,
            timeouts=self.fetch.timeouts,
            connections=self.fetch.connections,
            listed=False,
            deny_private=self.fetch.unlisted.deny_private,
        )
