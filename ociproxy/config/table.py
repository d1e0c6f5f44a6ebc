"""The one table of the configuration file's keys: kind, meaning and the rules between them.

Defaults are those of the dataclasses in `ociproxy.config.settings`. The reader, the JSON Schema and
the test of the documentation all go by this table.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final
from urllib.parse import urlsplit

from ociproxy.config import skopeo, tls_files
from ociproxy.config.door import NETWORKS, SERVER_AUTH, SERVER_TLS
from ociproxy.config.kinds import Choice, Duration, FilePath, Flag, Number, Place, Size, Text
from ociproxy.config.sections import Either, Items, Key, Section, is_flag, is_mapping
from ociproxy.config.settings import (
    MIB,
    Auth,
    Config,
    Fetch,
    Load,
    Log,
    Rules,
    Secret,
    Serve,
    Store,
    TagRule,
    Timeouts,
    Tls,
    Unlisted,
    Upstream,
)
from ociproxy.config.yaml import MappingNode
from ociproxy.errors import NameInvalid
from ociproxy.reference import parse_registry


def build_config(values: dict[str, Any]) -> Config:
    """An upstream without time-outs or connections of its own has those of `fetch`."""
    fetch: Fetch = values.get("fetch", Fetch())
    upstreams: dict[str, Upstream] = {}
    for entry in values.pop("upstreams", ()):
        timeouts = dataclasses.replace(fetch.timeouts, **entry.get("timeouts", {}))
        own = {"connections": fetch.connections, **entry, "timeouts": timeouts}
        upstreams[entry["name"]] = Upstream(**own)
    return Config(**values, upstreams=upstreams)


def _registry(text: str) -> str:
    try:
        return parse_registry(text)
    except NameInvalid as error:
        raise ValueError(f"not a registry name, host[:port]: {error.reason}") from error


def _default_upstream(text: str) -> str:
    return _registry(text) if text else ""


def _endpoint(text: str) -> str:
    """A base URL. A path is kept: a registry that proxies others has each at a path of its own."""
    wanted = "must be http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH]"
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ValueError(f"{wanted}; credentials go under auth")
    if parts.scheme not in ("http", "https"):
        raise ValueError(wanted)
    if parts.query or parts.fragment or not re.fullmatch(r"[\w./~%-]*", parts.path, re.ASCII):
        raise ValueError(wanted)
    try:
        parse_registry(parts.netloc)
    except NameInvalid as error:
        raise ValueError(f"{wanted}: {error.reason}") from error
    # Not parse_registry's result: registry-1.docker.io is a host here, not a name of docker.io.
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def _pattern(text: str) -> str:
    if "/" not in text and not any(character in text for character in "*?["):
        raise ValueError("matches nothing: it is compared with registry/repository:tag")
    return text


def _one_source_of_credentials(values: Any, node: MappingNode, place: Place) -> None:
    sources = [name for name in _SOURCES if values.get(name)]
    if len(sources) != 1:
        which = " and ".join(sources) if sources else "none"
        place.refuse(node.line, f"needs exactly one of {', '.join(_SOURCES)}; has {which}")
    elif sources[0].startswith("password") and "user" not in values:
        place.refuse(node.line, f"{sources[0]} needs a user")
    elif not sources[0].startswith("password") and "user" in values:
        place.child("user").refuse(_line(node, "user"), f"comes from {sources[0]}: remove it")


_SOURCES: Final = ("password", "password_env", "password_file", "helper", "docker_config")


def _certificates(values: Any, node: MappingNode, place: Place) -> None:
    for name, other in (("cert", "key"), ("key", "cert")):
        if name in values and other not in values:
            place.child(name).refuse(_line(node, name), f"needs {other}")
            return
    for name, reason in tls_files.find_problems(Tls(**values)):
        place.child(name).refuse(_line(node, name), reason)


def _how_to_reach(values: Any, node: MappingNode, place: Place) -> None:
    if "endpoint" in values and "scheme" in values:
        place.child("scheme").refuse(_line(node, "scheme"), "the endpoint has it: remove it")
    plain = values.get("scheme") == "http" or values.get("endpoint", "").startswith("http://")
    if plain and "tls" in values:
        place.child("tls").refuse(_line(node, "tls"), "has no use with plain http")


def _backend(values: Any, node: MappingNode, place: Place) -> None:
    for name, reason in skopeo.find_problems(values):
        place.child(name).refuse(_line(node, name), reason)


def _line(node: MappingNode, key: str) -> int:
    return next((pair.line for pair in node.pairs if pair.key == key), node.line)


_MOMENT: Final = Duration(at_least=0.05, at_most=600.0)
_TTL: Final = Duration(never=True)
_CONNECTIONS: Final = Key(Number(1, 16), "Connections that the fill of one large blob may use.")

_TIMEOUT_KEYS: Final = {
    "connect": Key(_MOMENT, "Until a connection is made, TLS included."),
    "headers": Key(_MOMENT, "Until the upstream's response headers are there."),
    "stall": Key(_MOMENT, "Without a byte, after which a connection is given up and resumed."),
    "revalidate": Key(
        _MOMENT, "How long a client waits for the check of an expired tag before the stale answer."
    ),
    "answer": Key(
        Duration(at_least=0.05, at_most=20.0),
        "Until a client has response headers or an error, whatever the upstream does.",
    ),
}

_OWN_TIMEOUT_KEYS: Final = {
    name: dataclasses.replace(key, inherited=True) for name, key in _TIMEOUT_KEYS.items()
}

_AUTH: Final = Section(
    Auth,
    {
        "user": Key(Text(pattern=r"[^:]+"), "User name for basic auth and for the token service."),
        "password": Key(
            Text(parse=Secret, label="string, secret"), "Its password, in the file itself."
        ),
        "password_env": Key(
            Text(pattern=r"[A-Za-z_][A-Za-z0-9_]*", label="variable name"),
            "Environment variable that holds the password.",
        ),
        "password_file": Key(
            FilePath(), "File that holds the password; one line end after it is not part of it."
        ),
        "helper": Key(
            Text(pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", label="program name"),
            "Credential helper: the program docker-credential-NAME is asked.",
        ),
        "docker_config": Key(
            Either(is_flag, Flag(), FilePath()),
            "Docker's config.json: true for its usual place, or a path.",
        ),
    },
    rules=(_one_source_of_credentials,),
)

_TLS: Final = Section(
    Tls,
    {
        "ca": Key(
            FilePath(),
            "PEM bundle to verify the upstream with, instead of the system's trust store.",
        ),
        "cert": Key(FilePath(), "PEM client certificate (mTLS), with its chain; needs key."),
        "key": Key(FilePath(), "PEM private key of cert, without a passphrase."),
        "insecure_skip_verify": Key(Flag(), "Verify nothing, ca or not."),
    },
    rules=(_certificates,),
    schema_rules={"dependentRequired": {"cert": ["key"], "key": ["cert"]}},
)

_RULES: Final = Section(
    Rules,
    {
        "allow": Key(
            Items(Text(label="pattern")), "Only what one of these matches; all where it is empty."
        ),
        "deny": Key(Items(Text(label="pattern")), "Nothing that one of these matches."),
    },
)

_UPSTREAM: Final = Section(
    Upstream,
    {
        "name": Key(Text(parse=_registry, label="host[:port]"), "Registry name.", required=True),
        "description": Key(Text(empty=True), "For people."),
        "scheme": Key(
            Choice(("https", "http", "auto")), "How to reach it; auto is HTTPS, then plain HTTP."
        ),
        "endpoint": Key(
            Text(parse=_endpoint, pattern="https?://.+", label="URL"),
            "URL that is asked instead of the name.",
        ),
        "auth": Key(_AUTH, "Credentials; without it the upstream is asked anonymously."),
        "tls": Key(_TLS, "How the upstream is verified."),
        "timeouts": Key(
            Section(Timeouts, _OWN_TIMEOUT_KEYS, build=dict),
            "Replaces those of fetch.timeouts that it names.",
            inherited=True,
        ),
        "connections": dataclasses.replace(_CONNECTIONS, inherited=True),
        "backend": Key(Choice(("oras", "skopeo")), "What fetches from this upstream."),
        "repositories": Key(_RULES, "Globs on its repositories: which are served at all."),
    },
    build=dict,
    rules=(_how_to_reach, _backend),
)

UPSTREAMS: Final = Items(_UPSTREAM, identity=lambda entry: str(entry["name"]))

_TAG_RULE: Final = Section(
    TagRule,
    {
        "match": Key(
            Text(parse=_pattern, label="pattern"),
            "Glob on registry/repository:tag; * crosses slashes. The first rule that matches wins.",
            required=True,
        ),
        "ttl": Key(_TTL, "How long such a tag is fresh.", required=True),
    },
)

_STORE: Final = Section(
    Store,
    {
        "path": Key(FilePath(exists=False), "Where the store is."),
        "hot_manifests": Key(Size(0, 1024 * MIB), "Memory for manifests that are asked for often."),
    },
)

_SERVE: Final = Section(
    Serve,
    {
        "host": Key(Text(label="address"), "Address to listen on; :: for IPv6."),
        "port": Key(Number(0, 65535), "Port to listen on; 0 lets the system choose."),
        "default_upstream": Key(
            Text(parse=_default_upstream, empty=True, label="host[:port] or empty"),
            "Upstream of a path that names no registry; empty refuses such paths.",
        ),
        "offline": Key(Flag(), "Never contact an upstream."),
        "workers": Key(Number(1, 64), "Server processes."),
        "shutdown_grace": Key(
            Duration(at_most=3600.0), "How long running responses may take to finish at shutdown."
        ),
        "keepalive": Key(
            Duration(at_least=1.0, at_most=3600.0),
            "How long an idle client connection is kept open.",
        ),
        "client_stall": Key(
            Duration(at_least=1.0, at_most=86400.0),
            "How long a client may take no data before its connection is dropped.",
        ),
        "tls": Key(SERVER_TLS, "HTTPS on the port; without it plain HTTP."),
        "auth": Key(SERVER_AUTH, "Who may pull; without it everybody."),
        "networks": Key(NETWORKS, "Networks that clients may connect from; empty is all."),
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

_UNLISTED: Final = Section(
    Unlisted,
    {
        "policy": Key(
            Choice(("allow", "deny")), "Whether a registry without an entry may be asked."
        ),
        "scheme": Key(Choice(("https", "auto")), "How; auto is HTTPS, then plain HTTP."),
        "deny_private": Key(
            Flag(),
            "Whether such a registry may not be at a private address (RFC 1918, ULA, CGNAT).",
        ),
        "repositories": Key(_RULES, "Globs on registry/repository: which are served at all."),
    },
)

_FETCH: Final = Section(
    Fetch,
    {
        "timeouts": Key(Section(Timeouts, _TIMEOUT_KEYS), "Time-outs towards upstreams."),
        "fills": Key(Number(1, 1024), "Blobs that may be arriving at once."),
        "background_fills": Key(
            Number(0, 1024),
            "Blobs of a manifest that may be fetched at once before a client asks; 0 fetches none.",
        ),
        "requests": Key(Number(1, 256), "Short requests to upstreams that may be running at once."),
        "queue": Key(
            Number(0, 100_000),
            "Fills, and short requests, that may wait for their turn; more are answered 503.",
        ),
        "segment": Key(
            Size(MIB, 1024**4), "A blob above this size is fetched over several connections."
        ),
        "connections": _CONNECTIONS,
        "retries": Key(Number(0, 100), "Tries in a row without progress before a fetch fails."),
        "retry_wait_max": Key(Duration(at_most=60.0), "Longest wait between two tries."),
        "tag_ttl": Key(_TTL, "How long a tag is fresh that no rule of tags matches."),
        "negative_ttl": Key(Duration(at_most=3600.0), 'How long "not found" is remembered.'),
        "pause": Key(
            Duration(at_most=86400.0),
            "How long an upstream is left alone after it failed to answer.",
        ),
        "unlisted": Key(
            Either(is_mapping, _UNLISTED, Choice(("allow", "deny"))),
            "What becomes of a registry that has no entry in upstreams.",
        ),
    },
    build=lambda values: Fetch(**{**values, "unlisted": _unlisted(values.get("unlisted"))}),
)


def _unlisted(value: Any) -> Unlisted:
    """`unlisted: deny` is short for `unlisted: {policy: deny}`."""
    if value is None or isinstance(value, Unlisted):
        return value or Unlisted()
    return Unlisted(policy=value)


_LOAD: Final = Section(
    Load,
    {
        "jobs": Key(Number(1, 256), "Images that may be loading at once."),
        "pull_timeout": Key(
            Duration(at_least=0.05, at_most=86400.0),
            "How long an image may go without progress; until then failures that may pass are "
            "tried again.",
        ),
    },
)

ROOT: Final = Section(
    Config,
    {
        "store": Key(_STORE, "The store."),
        "serve": Key(_SERVE, "The server."),
        "fetch": Key(_FETCH, "The pull engine."),
        "load": Key(_LOAD, "Loading whole images."),
        "tags": Key(Items(_TAG_RULE), "How long tags are fresh."),
        "upstreams": Key(UPSTREAMS, "Registries with settings of their own."),
        "log": Key(
            Section(
                Log,
                {
                    "level": Key(
                        Choice(("trace", "debug", "info", "warn", "error")),
                        "Least level that is logged.",
                    ),
                    "format": Key(Choice(("text", "json")), "Form of a log line."),
                },
            ),
            "The log.",
        ),
    },
    build=build_config,
)
