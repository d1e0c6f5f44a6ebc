"""What a client asks of the distribution API, and what a handler answers.

The endpoints are those of the distribution-spec's pull and discovery categories. Their paths are
split from the end, because a repository may have components of any name, `manifests` included.
Names, tags and digests are parsed here; handlers get them typed.

Tests: tests/serve/test_api.py, tests/serve/test_blobs.py, tests/fuzz/test_parsers.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from yarl import URL

from ociproxy.errors import ManifestUnknown, NameInvalid, NameUnknown, shorten
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import (
    NO_TAG,
    Reference,
    Repository,
    is_registry,
    is_tag,
    parse_registry,
)
from ociproxy.serve.errors import Unsupported

if TYPE_CHECKING:
    from aiohttp import web
    from multidict import MultiMapping

    from ociproxy.fetch.cache_status import CacheStatus

_CACHED_LENGTH: Final = 1024
"""Characters: longer request targets are parsed each time, which bounds the cache to 4 MiB."""
_BYTE_RANGE: Final = re.compile(
    r"[ \t]*bytes[ \t]*=[ \t]*(?P<first>[0-9]*)-(?P<last>[0-9]*)[ \t]*", re.IGNORECASE
)
"""The value of a Range header that has one range of bytes."""


@dataclass(frozen=True, slots=True)
class DistributionPath:
    """`name` is what the log calls it, `namespace` the `ns` parameter."""

    repository: Repository
    name: str
    namespace: str | None
    query: MultiMapping[str]


@dataclass(frozen=True, slots=True)
class ManifestPath(DistributionPath):
    reference: Reference


@dataclass(frozen=True, slots=True)
class BlobPath(DistributionPath):
    digest: Digest


@dataclass(frozen=True, slots=True)
class TagsPath(DistributionPath):
    pass


@dataclass(frozen=True, slots=True)
class ReferrersPath(DistributionPath):
    subject: Digest


Target = ManifestPath | BlobPath | TagsPath | ReferrersPath


class Answer(NamedTuple):
    """A response, and what `Cache-Status` and the log say about it."""

    response: web.StreamResponse
    status: CacheStatus
    digest: Digest | None = None


def client_has(request: web.BaseRequest, digest: Digest) -> bool:
    """Whether If-None-Match names this content: its digest is its ETag."""
    if "If-None-Match" not in request.headers:
        return False
    tags = request.if_none_match or ()
    return any(tag.value in ("*", str(digest)) for tag in tags)


def requested_range(request: web.BaseRequest, size: int) -> tuple[int, int, bool] | None:
    """The bytes to send as [start, stop), and whether that is a part; None is 416.

    One range is honoured. Several ranges, other units, a header that is no range, and an If-Range
    with another ETag get the whole blob, as RFC 9110 sections 14.1.2 and 14.2 say.
    """
    condition = request.headers.get("If-Range")
    found = _BYTE_RANGE.fullmatch(",".join(request.headers.getall("Range", ())))
    if found is None:
        return 0, size, False
    if condition is not None and condition.strip('"') != request.rel_url.path.rpartition("/")[2]:
        return 0, size, False
    first, last = _position(found["first"]), _position(found["last"])
    if first is None:
        if last is None or (last and not size):
            # No number is no range; and no range of an empty blob can be told in a header.
            return 0, size, False
        start, stop = max(0, size - last), size
    else:
        if last is not None and last < first:
            return 0, size, False
        start, stop = first, size if last is None else min(size, last + 1)
    return (start, stop, True) if start < stop else None


def _position(digits: str) -> int | None:
    """None for no digits. 19 digits name a byte behind the end of any blob; Python refuses to read
    thousands of them."""
    return int(digits.lstrip("0")[:19] or "0") if digits else None


def parse_path(raw: str, default_upstream: str) -> Target:
    """Parse a request target below `/v2/`.

    Raises NameInvalid, DigestInvalid, NameUnknown or Unsupported; ManifestUnknown for what no tag
    can be, as the conformance tests of the distribution-spec ask.
    """
    parse = _parse_cached if len(raw) <= _CACHED_LENGTH else _parse
    return parse(raw, default_upstream)


def _parse(raw: str, default_upstream: str) -> Target:
    try:
        url = URL(raw, encoded=True)
        path, query = url.path, url.query
    except ValueError as exc:
        raise NameInvalid(raw, "not a request target") from exc
    name, endpoint, last = _split(path)
    namespace = query.get("ns")
    repository = _repository(name, namespace, default_upstream)
    called = f"{repository}{'@' if ':' in last else ':'}{last}"
    common = (repository, called, namespace, query)
    match endpoint:
        case "manifests":
            if ":" not in last and not is_tag(last):
                raise ManifestUnknown(shorten(last), NO_TAG)
            return ManifestPath(*common, Reference.of(repository, last))
        case "blobs":
            return BlobPath(*common, Digest.parse(last))
        case "referrers":
            return ReferrersPath(*common, Digest.parse(last))
        case _:
            return TagsPath(*common)


_parse_cached = lru_cache(maxsize=4096)(_parse)


def _split(path: str) -> tuple[str, str, str]:
    """The repository's name, the endpoint and the last component: a tag, a digest or `list`."""
    if path == "/v2/_catalog":
        raise Unsupported("a pull-through mirror has no catalog", status=404)
    name, _, last = path.removeprefix("/v2/").rpartition("/")
    name, _, endpoint = name.rpartition("/")
    known = endpoint in ("manifests", "blobs", "referrers") or (endpoint, last) == ("tags", "list")
    if known and name and last:
        return name, endpoint, last
    raise Unsupported(
        "not part of the pull API: expected /v2/<name>/manifests|blobs|referrers/... or tags/list",
        status=404,
    )


def _repository(name: str, namespace: str | None, default_upstream: str) -> Repository:
    """Which upstream: `ns`, else a registry as the first component, else the default."""
    first, slash, rest = name.partition("/")
    if namespace is not None:
        if slash and is_registry(first) and _is_same_registry(first, namespace):
            name = rest  # BuildKit says the registry twice
        return Repository.parse(namespace, name)
    if slash and is_registry(first):
        return Repository.parse(first, rest)
    if not default_upstream:
        raise NameUnknown(
            name, "names no upstream: use ?ns=<registry> or /v2/<registry>/<repository>/..."
        )
    return Repository.parse(default_upstream, name)


def _is_same_registry(component: str, namespace: str) -> bool:
    try:
        return parse_registry(component) == parse_registry(namespace)
    except NameInvalid:
        return False
