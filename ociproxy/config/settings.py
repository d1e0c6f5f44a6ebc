"""What the operator decides, as frozen values with their defaults.

`ociproxy.config.file` makes a `Config` out of YAML, the command line replaces what its options say,
and the parts below take the whole `Config` or one section of it. Durations are seconds, sizes are
bytes, registry names are normalised: no part below parses a setting again. A secret prints as
asterisks. `ociproxy.config.local_settings` has the sections of this machine.
Tests: tests/config/test_config.py, tests/fetch/upstreams/test_endpoints.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from ociproxy.config.local_settings import Load, Log, Serve, Store
from ociproxy.config.schedule import Sync
from ociproxy.config.units import GIB, MIB
from ociproxy.oci.reference import DOCKER_HUB, Reference, Repository, parse_registry

# The host of Docker Hub's API is not the registry's name; an `endpoint` in the config wins.
_DOCKER_HUB_ENDPOINT: Final = "registry-1.docker.io"
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

Scheme = Literal["https", "http", "auto"]
Isolation = Literal["none", "repository"]
BackendName = Literal["oras", "skopeo"]


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
    """How long one upstream may take, in seconds; docs/configuration.md explains each."""

    connect: float = 5.0
    headers: float = 15.0
    stall: float = 20.0
    revalidate: float = 2.0
    # containerd gives up after 30 s without response headers; the mirror promises them in 20 s.
    answer: float = 18.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How an upstream is verified, and the client certificate that it gets. Without `ca` the
    system's trust store decides; `insecure_skip_verify` verifies nothing, even if `ca` is set."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    insecure_skip_verify: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth:
    """Where an upstream's credentials come from: exactly one source is set.

    `password`, `password_env` and `password_file` need `user`. `docker_config` is a path, or True
    for the place where Docker keeps the file. A credential helper's answer is used for `lifetime`
    seconds. `ociproxy.fetch.credentials` reads all of them.
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
    """Globs on names. A name that `deny` matches is refused; if `allow` is not empty, so is every
    name that `allow` does not match."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()

    def refusal(self, name: str) -> str | None:
        """Why the name is refused, as an error text; None if it is not."""
        for pattern in self.deny:
            if fnmatchcase(name, pattern):
                return f"repositories.deny has {pattern!r}"
        if self.allow and not any(fnmatchcase(name, pattern) for pattern in self.allow):
            return "no pattern of repositories.allow matches it"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One of several URLs of an upstream. `auth` and `tls` that are None are taken from the
    upstream, but only for a URL at the upstream's own host. `ns` is whether `?ns=` is sent."""

    url: str
    auth: Auth | None = None
    tls: Tls | None = None
    ns: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """A registry that may be asked; `listed` is False if the configuration has no entry for it."""

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
    def label(self) -> str:
        """Its name in metrics: clients make up the names of those that are not listed."""
        return self.name if self.listed else "other"

    @property
    def urls(self) -> tuple[str, ...]:
        """The base URLs, in the order in which they are tried; none ends with a slash."""
        if self.endpoint is not None:
            return (self.endpoint,)
        if self.scheme == "auto":
            return (f"https://{self._host}", f"http://{self._host}")
        return (f"{self.scheme}://{self._host}",)

    @property
    def each_endpoint(self) -> tuple[Upstream, ...]:
        """One upstream for each of `endpoints`; without any, only this one.

        The entry's credentials go to the upstream's own host only. If that host has an HTTPS
        endpoint, the credentials do not go to its plain HTTP endpoint.
        """
        if not self.endpoints:
            return (self,)
        secure = any(self.is_own(e.url) and e.url.startswith("https:") for e in self.endpoints)
        found = []
        for each in self.endpoints:
            own = self.is_own(each.url)
            inherited = own and (each.url.startswith("https:") or not secure)
            auth = each.auth or (self.auth if inherited else None)
            tls = each.tls or (self.tls if own else Tls())
            found.append(
                replace(self, endpoint=each.url, endpoints=(), auth=auth, tls=tls, ns=each.ns)
            )
        return tuple(found)

    def is_own(self, url: str) -> bool:
        """Whether this URL has the host and port of the upstream's name."""
        own, other = urlsplit(f"//{self._host}"), urlsplit(url)
        port = _DEFAULT_PORTS[other.scheme]
        return (own.hostname, own.port or port) == (other.hostname, other.port or port)

    @property
    def server(self) -> str:
        """The registry that gets the credentials, and under which they are looked up."""
        if self.endpoint is None or self.is_own(self.endpoint):
            return self.name
        return parse_registry(urlsplit(self.endpoint).netloc)

    @property
    def namespace(self) -> str | None:
        """The value of `?ns=`, by which a mirror of many registries knows the one that is meant.
        Unless `ns` decides, None for the registry itself and for a URL whose path tells it."""
        if self.endpoint is None:
            return None
        asked = not self.is_own(self.endpoint) and urlsplit(self.endpoint).path in ("", "/v2")
        return self.name if (asked if self.ns is None else self.ns) else None

    @property
    def _host(self) -> str:
        return _DOCKER_HUB_ENDPOINT if self.name == DOCKER_HUB else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class TagRule:
    """Seconds that a matching tag is fresh: None is for ever, with 0 each request asks upstream."""

    match: str
    ttl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlisted:
    """How a registry without an entry is treated; `repositories` matches `registry/repository`."""

    policy: Literal["allow", "deny"] = "allow"
    scheme: Literal["https", "auto"] = "https"
    deny_private: bool = False
    repositories: Rules = Rules()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Bounds of the pull engine.

    A blob larger than `segment` is fetched piece by piece. Up to `connections` connections help
    each other where one proves slow, or where a reader waits for bytes that are far off. A blob
    larger than `blob_limit` is refused. Of each upstream up to `queue` fills, and as many short
    requests, wait for their turn. With `background_fills` 0 a blob is fetched only when a client
    asks for it. A fill that no client reads is given up where it brought fewer than `min_rate`
    bytes a second for `unread` seconds. `retries` counts tries in a row that brought no byte;
    connections that break must bring 64 KiB in `crawl` seconds all the same. An upstream that
    failed is left alone for `pause` seconds.
    """

    timeouts: Timeouts = Timeouts()
    fills: int = 32
    background_fills: int = 4
    requests: int = 16
    queue: int = 256
    segment: int = 32 * MIB
    blob_limit: int = 64 * GIB
    min_rate: int = 16 * 1024
    unread: float = 10.0
    connections: int = 4
    retries: int = 4
    retry_wait_max: float = 5.0
    crawl: float = 60.0
    tag_ttl: float | None = 900.0
    negative_ttl: float = 10.0
    pause: float = 30.0
    unlisted: Unlisted = Unlisted()


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the operator decides. `upstreams` is by normalised registry name."""

    store: Store = field(default_factory=Store)
    serve: Serve = field(default_factory=Serve)
    fetch: Fetch = Fetch()
    load: Load = field(default_factory=Load)
    tags: tuple[TagRule, ...] = ()
    upstreams: Mapping[str, Upstream] = field(default_factory=dict)
    sync: tuple[Sync, ...] = ()
    log: Log = field(default_factory=Log)

    def tag_ttl(self, reference: Reference) -> float | None:
        """Seconds that the reference's tag is fresh, None for ever."""
        rule = self.tag_rule(reference)
        return self.fetch.tag_ttl if rule is None else rule.ttl

    def tag_rule(self, reference: Reference) -> TagRule | None:
        """The rule that decides about the reference's tag: the first that matches."""
        name = f"{reference.repository}:{reference.tag}"
        return next((rule for rule in self.tags if fnmatchcase(name, rule.match)), None)

    @property
    def isolated(self) -> bool:
        """Whether any upstream has `isolation: repository`."""
        return any(each.isolation == "repository" for each in self.upstreams.values())

    def repository_refusal(self, repository: Repository) -> str | None:
        """Why this repository is not served, stored or not, as an error text; else None."""
        upstream = self.upstreams.get(repository.registry)
        if upstream is not None:
            return upstream.repositories.refusal(repository.name)
        if self.isolated:
            return "its registry is not listed in the configuration, which isolates repositories"
        rules = self.fetch.unlisted.repositories
        if not (rules.allow or rules.deny):
            return None
        rule = rules.refusal(str(repository))
        return None if rule is None else f"fetch.unlisted: {rule}"

    def partition(self, registry: str) -> str:
        """The group of upstreams that share unverified bytes of a blob: "" for those that the
        operator listed. An unlisted one is a group by itself: a client named it."""
        return "" if registry in self.upstreams else registry

    def unlisted_upstream(self, registry: str) -> Upstream:
        """The upstream of a registry without an entry, asked without credentials. The caller
        checks `fetch.unlisted.policy` before."""
        return Upstream(
            name=registry,
            scheme=self.fetch.unlisted.scheme,
            timeouts=self.fetch.timeouts,
            connections=self.fetch.connections,
            listed=False,
            deny_private=self.fetch.unlisted.deny_private,
        )
