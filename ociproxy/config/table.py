"""The one table of the configuration file's keys: kind, meaning and the rules between them.

Defaults are those of the dataclasses in `ociproxy.config.settings`. The reader, the JSON Schema and
the test of the documentation all go by this table.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from ociproxy.config.kinds import Choice, Duration, FilePath, Flag, Number, Size, Text
from ociproxy.config.listener import NETWORKS, SERVER_AUTH, SERVER_TLS
from ociproxy.config.sections import Either, Items, Key, Section, is_mapping
from ociproxy.config.settings import (
    MIB,
    Config,
    Fetch,
    Load,
    Log,
    Serve,
    Store,
    TagRule,
    Timeouts,
    Unlisted,
    Upstream,
)
from ociproxy.config.upstream_table import CONNECTIONS, RULES, TIMEOUT_KEYS, UPSTREAMS, registry


def build_config(values: dict[str, Any]) -> Config:
    """An upstream without time-outs or connections of its own has those of `fetch`."""
    fetch: Fetch = values.get("fetch", Fetch())
    upstreams: dict[str, Upstream] = {}
    for entry in values.pop("upstreams", ()):
        timeouts = dataclasses.replace(fetch.timeouts, **entry.get("timeouts", {}))
        own = {"connections": fetch.connections, **entry, "timeouts": timeouts}
        upstreams[entry["name"]] = Upstream(**own)
    return Config(**values, upstreams=upstreams)


def _default_upstream(text: str) -> str:
    return registry(text) if text else ""


def _pattern(text: str) -> str:
    if "/" not in text and not any(character in text for character in "*?["):
        raise ValueError("matches nothing: it is compared with registry/repository:tag")
    return text


_TTL: Final = Duration(never=True)
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
        "preload_images": Key(FilePath(), "Image list: these are loaded while the server serves."),
        "bundles": Key(Items(FilePath()), "Archives to serve from as they are, under the store."),
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
        "repositories": Key(RULES, "Globs on registry/repository: which are served at all."),
    },
)

_FETCH: Final = Section(
    Fetch,
    {
        "timeouts": Key(Section(Timeouts, TIMEOUT_KEYS), "Time-outs towards upstreams."),
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
        "blob_limit": Key(Size(1, 16 * 1024**4), "Largest blob that is fetched."),
        "connections": CONNECTIONS,
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
