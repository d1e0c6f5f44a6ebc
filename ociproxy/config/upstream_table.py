"""The part of the table of configuration keys that says what an upstream is.

`ociproxy.config.table` has the rest. Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final
from urllib.parse import urlsplit

from ociproxy.config import skopeo, tls_files
from ociproxy.config.kinds import Choice, Duration, FilePath, Flag, Number, Place, Text
from ociproxy.config.sections import Either, Items, Key, Section, is_flag, is_mapping, line_of
from ociproxy.config.settings import Auth, Endpoint, Rules, Secret, Timeouts, Tls, Upstream
from ociproxy.config.yaml import MappingNode
from ociproxy.errors import NameInvalid
from ociproxy.oci.reference import parse_registry


def registry(text: str) -> str:
    """A normalised registry name. Raises ValueError, as the kind `Text` wants it."""
    try:
        return parse_registry(text)
    except NameInvalid as error:
        raise ValueError(f"not a registry name: {error.reason}") from error


def _endpoint(text: str) -> str:
    """A base URL. Its path is kept: a proxy registry has each upstream at a path of its own."""
    wanted = "must be http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH]"
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ValueError(f"{wanted}; credentials go under auth")
    if parts.scheme not in ("http", "https"):
        raise ValueError(wanted)
    if parts.query or parts.fragment or not re.fullmatch(r"[\w./~%:-]*", parts.path, re.ASCII):
        raise ValueError(wanted)
    try:
        parse_registry(parts.netloc)
    except NameInvalid as error:
        raise ValueError(f"{wanted}: {error.reason}") from error
    # parse_registry would make docker.io of registry-1.docker.io: here the host itself is meant.
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def _bare_endpoint(text: str) -> Endpoint:
    return Endpoint(url=_endpoint(text))


def _one_source_of_credentials(values: Any, node: MappingNode, place: Place) -> None:
    sources = [name for name in _SOURCES if values.get(name)]
    if len(sources) != 1:
        which = " and ".join(sources) if sources else "none"
        place.refuse(node.line, f"needs exactly one of {', '.join(_SOURCES)}; has {which}")
    elif sources[0].startswith("password") and "user" not in values:
        place.refuse(node.line, f"{sources[0]} needs a user")
    elif not sources[0].startswith("password") and "user" in values:
        place.child("user").refuse(line_of(node, "user"), f"comes from {sources[0]}: remove it")


_SOURCES: Final = ("password", "password_env", "password_file", "helper", "docker_config")


def _certificates(values: Any, node: MappingNode, place: Place) -> None:
    for name, other in (("cert", "key"), ("key", "cert")):
        if name in values and other not in values:
            place.child(name).refuse(line_of(node, name), f"needs {other}")
            return
    for name, reason in tls_files.find_problems(Tls(**values)):
        place.child(name).refuse(line_of(node, name), reason)


def _how_to_reach(values: Any, node: MappingNode, place: Place) -> None:
    if "endpoint" in values and "scheme" in values:
        place.child("scheme").refuse(line_of(node, "scheme"), "the endpoint has it: remove it")
    plain = values.get("scheme") == "http" or values.get("endpoint", "").startswith("http://")
    if plain and "tls" in values:
        place.child("tls").refuse(line_of(node, "tls"), "has no use with plain http")
    endpoints: tuple[Endpoint, ...] = values.get("endpoints", ())
    if not endpoints:
        return
    for name in ("scheme", "endpoint"):
        if name in values:
            place.child(name).refuse(line_of(node, name), "endpoints has it: remove it")
    upstream = Upstream(name=values["name"])
    for name in ("auth", "tls"):
        if name in values and not any(upstream.is_own(each.url) for each in endpoints):
            reason = f"is {upstream.name}'s own, which no endpoint is: put it into an endpoint"
            place.child(name).refuse(line_of(node, name), reason)


def _backend(values: Any, node: MappingNode, place: Place) -> None:
    for name, reason in skopeo.find_problems(values):
        place.child(name).refuse(line_of(node, name), reason)


def _plain_endpoint(values: Any, node: MappingNode, place: Place) -> None:
    if values["url"].startswith("http://") and "tls" in values:
        place.child("tls").refuse(line_of(node, "tls"), "has no use with plain http")


_MOMENT: Final = Duration(at_least=0.05, at_most=600.0)
CONNECTIONS: Final = Key(Number(1, 16), "Connections that the fill of one large blob may use.")

TIMEOUT_KEYS: Final = {
    "connect": Key(
        _MOMENT, "Until a connection is made, the look-up of the name and TLS included."
    ),
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
    name: dataclasses.replace(key, inherited=True) for name, key in TIMEOUT_KEYS.items()
}

_AUTH: Final = Section(
    Auth,
    {
        "user": Key(
            Text(pattern=r"[^:]+", words="a name without a colon"),
            "User name for basic auth and for the token service.",
        ),
        "password": Key(Text(parse=Secret), "Its password, in the file itself."),
        "password_env": Key(
            Text(pattern=r"[A-Za-z_][A-Za-z0-9_]*", words="the name of an environment variable"),
            "Environment variable that holds the password.",
        ),
        "password_file": Key(
            FilePath(), "File that holds the password; one line end after it is not part of it."
        ),
        "helper": Key(
            Text(
                pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
                words="the NAME of a program docker-credential-NAME",
            ),
            "Credential helper: the program docker-credential-NAME is asked.",
        ),
        "docker_config": Key(
            Either(is_flag, Flag(), FilePath()),
            "Docker's config.json: true for its usual place, or a path.",
        ),
        "lifetime": Key(
            Duration(at_most=7 * 86400.0), "How long a credential helper's answer is used."
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
        "insecure_skip_verify": Key(Flag(), "Verify nothing, even if ca is set."),
    },
    rules=(_certificates,),
    schema_rules={"dependentRequired": {"cert": ["key"], "key": ["cert"]}},
)

RULES: Final = Section(
    Rules,
    {
        "allow": Key(Items(Text()), "Only names that one of these matches; empty is all."),
        "deny": Key(Items(Text()), "No name that one of these matches."),
    },
)

_URL: Final = Text(parse=_endpoint, pattern="https?://.+")

_ENDPOINT: Final = Section(
    Endpoint,
    {
        "url": Key(_URL, "The endpoint; a path in it goes before the repository.", required=True),
        "auth": Key(_AUTH, "Credentials for this endpoint, and for no other."),
        "tls": Key(_TLS, "How this endpoint is verified."),
        "ns": Key(Flag(), "Whether requests have the registry's name as ?ns=."),
    },
    rules=(_plain_endpoint,),
)

_UPSTREAM: Final = Section(
    Upstream,
    {
        "name": Key(Text(parse=registry), "Registry name.", required=True),
        "description": Key(Text(empty=True), "For people."),
        "scheme": Key(
            Choice(("https", "http", "auto")), "How to reach it; auto is HTTPS, then plain HTTP."
        ),
        "endpoint": Key(_URL, "URL that is asked instead of the name."),
        "endpoints": Key(
            Items(Either(is_mapping, _ENDPOINT, Text(parse=_bare_endpoint, pattern="https?://.+"))),
            "URLs of which the first that works is asked instead of the name.",
        ),
        "auth": Key(_AUTH, "Credentials; without it the upstream is asked anonymously."),
        "tls": Key(_TLS, "How the upstream is verified."),
        "timeouts": Key(
            Section(Timeouts, _OWN_TIMEOUT_KEYS, build=dict),
            "Replaces those of fetch.timeouts that it names.",
            inherited=True,
        ),
        "connections": dataclasses.replace(CONNECTIONS, inherited=True),
        "backend": Key(Choice(("oras", "skopeo")), "What fetches from this upstream."),
        "repositories": Key(RULES, "Globs on its repositories: which are served at all."),
        "isolation": Key(
            Choice(("none", "repository")),
            "Whether what is stored is served under a repository only if that repository has it.",
        ),
    },
    build=dict,
    rules=(_how_to_reach, _backend),
)

UPSTREAMS: Final = Items(_UPSTREAM, identity=lambda entry: str(entry["name"]))
