"""What a request asks for: the path and query of the distribution-spec's pull and discovery
endpoints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from yarl import URL

from ociproxy.errors import NameInvalid, NameUnknown
from ociproxy.oci.reference import Reference, Repository, is_registry
from ociproxy.serve.errors import Unsupported

if TYPE_CHECKING:
    from multidict import MultiMapping

API_VERSION_PATH: Final = "/v2/"
_CACHED_LENGTH: Final = 1024
"""Request targets longer than this are parsed each time: the cache is bounded in bytes, too."""


class Kind(Enum):
    MANIFEST = "manifests"
    BLOB = "blobs"
    TAGS = "tags"
    REFERRERS = "referrers"


@dataclass(frozen=True, slots=True)
class DistributionPath:
    """`last` is the tag or digest as it was sent, `reference` what it says where a manifest is
    asked for; `namespace` the `ns` parameter, or None; `name` what the log calls it."""

    kind: Kind
    repository: Repository
    last: str
    reference: Reference | None
    namespace: str | None
    query: MultiMapping[str]
    name: str


def parse_path(raw: str, default_upstream: str) -> DistributionPath:
    """Parse a request target below `/v2/`. Raises NameInvalid, DigestInvalid,
    NameUnknown or Unsupported."""
    if len(raw) > _CACHED_LENGTH:
        return _parse(raw, default_upstream)
    return _parse_cached(raw, default_upstream)


def _parse(raw: str, default_upstream: str) -> DistributionPath:
    try:
        url = URL(raw, encoded=True)
        path, query = url.path, url.query
    except ValueError as exc:
        raise NameInvalid(raw, "not a request target") from exc
    kind, name, last = _split(path)
    namespace = query.get("ns")
    repository = _repository(name, namespace, default_upstream)
    called = f"{repository}{'@' if ':' in last else ':'}{last}"
    reference = Reference.of(repository, last) if kind is Kind.MANIFEST else None
    return DistributionPath(kind, repository, last, reference, namespace, query, called)


_parse_cached = lru_cache(maxsize=4096)(_parse)


def _split(path: str) -> tuple[Kind, str, str]:
    if path == "/v2/_catalog":
        raise Unsupported("a pull-through mirror has no catalog", status=404)
    # From the end, since a repository may have components of any name, `manifests` included.
    name, _, last = path.removeprefix(API_VERSION_PATH).rpartition("/")
    name, _, kind = name.rpartition("/")
    if name and last:
        if kind == Kind.TAGS.value and last == "list":
            return Kind.TAGS, name, last
        if kind in (Kind.MANIFEST.value, Kind.BLOB.value, Kind.REFERRERS.value):
            return Kind(kind), name, last
    raise Unsupported(
        "not part of the pull API: expected /v2/<name>/manifests|blobs|referrers/... or tags/list",
        status=404,
    )


def _repository(name: str, namespace: str | None, default_upstream: str) -> Repository:
    """Which upstream: `ns`, else a registry as the first component, else the default."""
    if namespace is not None:
        return Repository.parse(namespace, name)
    first, slash, rest = name.partition("/")
    if slash and is_registry(first):
        return Repository.parse(first, rest)
    if not default_upstream:
        raise NameUnknown(
            name, "names no upstream: use ?ns=<registry> or /v2/<registry>/<repository>/..."
        )
    return Repository.parse(default_upstream, name)
