"""The one table of the configuration file's keys: kinds, meanings and the rules between keys.

The dataclasses in `ociproxy.config.settings` have the defaults. The reader, the JSON Schema and the
test of docs/configuration.md all use this table.
Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from ociproxy.config.kinds import (
    Choice,
    Duration,
    FilePath,
    Flag,
    Number,
    Place,
    Size,
    SizeOrShare,
    Text,
)
from ociproxy.config.local_settings import Load, Log, PinSource, Store
from ociproxy.config.schedule import WINDOW, Sync, Window
from ociproxy.config.sections import Either, Items, Key, Section, is_list, is_mapping, line_of
from ociproxy.config.serve_table import SERVE
from ociproxy.config.settings import Config, Fetch, TagRule, Timeouts, Unlisted, Upstream
from ociproxy.config.units import KIB, MIB
from ociproxy.config.upstream_table import CONNECTIONS, RULES, TIMEOUT_KEYS, UPSTREAMS
from ociproxy.config.yaml import MappingNode
from ociproxy.errors import NameInvalid
from ociproxy.oci.platform import Platform
from ociproxy.oci.reference import is_glob


def build_config(values: dict[str, Any]) -> Config:
    """Time-outs and connections that an upstream does not set are those of `fetch`."""
    fetch: Fetch = values.get("fetch", Fetch())
    upstreams: dict[str, Upstream] = {}
    for entry in values.pop("upstreams", ()):
        timeouts = dataclasses.replace(fetch.timeouts, **entry.get("timeouts", {}))
        own = {"connections": fetch.connections, **entry, "timeouts": timeouts}
        upstreams[entry["name"]] = Upstream(**own)
    return Config(**values, upstreams=upstreams)


def _pattern(text: str) -> str:
    if "/" not in text and not is_glob(text):
        raise ValueError("matches nothing: it is compared with registry/repository:tag")
    return text


_TTL: Final = Duration(never=True)
_TAG_RULE: Final = Section(
    TagRule,
    {
        "match": Key(
            Text(parse=_pattern),
            "Glob on registry/repository:tag; * crosses slashes. The first rule that matches wins.",
            required=True,
        ),
        "ttl": Key(_TTL, "How long such a tag is fresh.", required=True),
    },
)


def _one_file(values: Mapping[str, Any], node: MappingNode, place: Place) -> None:
    if len(values) != 1:
        place.refuse(node.line, "must have either list or lock")


_PIN: Final = Section(
    PinSource,
    {
        "list": Key(FilePath(), "An image list, as for `load`."),
        "lock": Key(FilePath(), "A lock, as `load --lock` writes it: its digests are kept."),
    },
    rules=[_one_file],
    schema_rules={"minProperties": 1, "maxProperties": 1},
)

_STORE: Final = Section(
    Store,
    {
        "path": Key(FilePath(exists=False), "Where the store is."),
        "hot_manifests": Key(Size(0, 1024 * MIB), "Memory for manifests that are asked for often."),
        "max_size": Key(
            SizeOrShare(),
            "From 98 % of it on the least recently used images are removed, down to 90 %.",
        ),
        "min_free": Key(
            SizeOrShare(may_be_none=True),
            "Below so much free disk the least recently used images are removed. 0 turns it off.",
        ),
        "evict_every": Key(
            Duration(at_least=60.0),
            "How often a server with a max_size or pins counts what the store has.",
        ),
        "keep_recent": Key(
            Duration(), "What was used or stored within this time is not removed by a prune."
        ),
        "pins": Key(
            Items(Either(is_mapping, _PIN, Text(parse=_pattern))),
            "What no prune removes: references, globs on references, or files that name images.",
        ),
        "scrub": Key(
            Duration(at_least=1.0, never=True),
            "In this time a server hashes every file once. What is damaged is fetched again.",
        ),
        "scrub_rate": Key(Size(64 * KIB, 1024**4), "Bytes that it reads in a second, at most."),
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
        "fills": Key(Number(1, 1024), "Blobs that may be arriving from one upstream at once."),
        "background_fills": Key(
            Number(0, 1024),
            "Blobs of a registry that may be fetched at once before a client asks; 0 fetches none.",
        ),
        "requests": Key(
            Number(1, 256), "Short requests to one upstream that may be running at once."
        ),
        "queue": Key(
            Number(0, 100_000),
            "Fills, and short requests, that may wait for their turn; more are answered 503.",
        ),
        "segment": Key(
            Size(MIB, 1024**4), "A blob above this size is fetched over several connections."
        ),
        "blob_limit": Key(Size(1, 16 * 1024**4), "Largest blob that is fetched."),
        "min_rate": Key(
            Size(0, 1024**3),
            "Bytes a second below which a download that no client reads is given up; 0 for never.",
        ),
        "unread": Key(
            Duration(at_least=0.5, at_most=86400.0),
            "How long such a download may be slower than min_rate.",
        ),
        "connections": CONNECTIONS,
        "retries": Key(Number(0, 100), "Tries in a row without progress before a fetch fails."),
        "retry_wait_max": Key(Duration(at_most=60.0), "Longest wait between two tries."),
        "crawl": Key(
            Duration(at_least=0.05, at_most=86400.0),
            "How long connections that break may bring less than 64 KiB before a fetch fails.",
        ),
        "tag_ttl": Key(_TTL, "How long a tag is fresh that no rule of tags matches."),
        "negative_ttl": Key(Duration(at_most=3600.0), 'How long "not found" is remembered.'),
        "pause": Key(
            Duration(at_most=86400.0),
            "How long an upstream is left alone after it failed to answer.",
        ),
        "unlisted": Key(
            Either(is_mapping, _UNLISTED, Choice(("allow", "deny"))),
            "How a registry without an entry in upstreams is treated.",
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


def _platform(text: str) -> Platform:
    try:
        return Platform.parse(text)
    except NameInvalid as error:
        raise ValueError(str(error)) from error


def _some(values: Mapping[str, Any], node: MappingNode, place: Place) -> None:
    if not values["images"]:
        place.child("images").refuse(line_of(node, "images"), "names no image")


_SYNC: Final = Section(
    Sync,
    {
        "images": Key(
            Either(is_list, Items(Text(parse=_pattern)), FilePath()),
            "An image list as for `load`, or a list of globs on the tags of the store.",
            required=True,
        ),
        "every": Key(
            Duration(at_least=60.0, at_most=366 * 86400.0), "How often these images are synced."
        ),
        "window": Key(
            Text(parse=Window.parse, pattern=WINDOW),
            "When, in local time, such as 01:00-05:00; without it at any time.",
        ),
        "platforms": Key(Items(Text(parse=_platform)), "Platforms that are wanted."),
        "referrers": Key(Flag(), "Whether signatures, SBOMs and attestations are synced too."),
    },
    rules=[_some],
)

ROOT: Final = Section(
    Config,
    {
        "store": Key(_STORE, "The store."),
        "serve": Key(SERVE, "The server."),
        "fetch": Key(_FETCH, "The pull engine."),
        "load": Key(_LOAD, "Loading whole images."),
        "tags": Key(Items(_TAG_RULE), "How long tags are fresh."),
        "sync": Key(Items(_SYNC, identity=str), "Images that are kept up to date."),
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
