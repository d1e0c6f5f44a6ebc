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
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

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
from ociproxy.serve.errors import SERVER, Unsupported

if TYPE_CHECKING:
    from aiohttp import web
    from multidict import MultiMapping

    from ociproxy.fetch.cache_status import CacheStatus

RECENT: Final = 200
"""Requests that are kept for the operator to look at."""
_CACHED_LENGTH: Final = 1024
"""Characters: longer request targets are parsed each time, which bounds the cache to 4 MiB."""
_BYTE_RANGES: Final = re.compile(r"[ \t]*bytes[ \t]*=(?P<ranges>.*)", re.IGNORECASE)
_BYTE_RANGE: Final = re.compile(r"(?P<first>[0-9]*)-(?P<last>[0-9]*)")
_MOST_RANGES: Final = 16
"""Ranges of one request that are honoured: readers of eStargz and zstd:chunked ask for a few."""


@dataclass(frozen=True, slots=True)
class DistributionPath:
    """`name` is what the log calls it, `namespace` the `ns` parameter."""

    repository: Repository
    name: str
    namespace: str | None
    query: MultiMapping[str]
    kind: ClassVar[str]
    """What metrics call it."""


@dataclass(frozen=True, slots=True)
class ManifestPath(DistributionPath):
    kind = "manifest"
    reference: Reference


@dataclass(frozen=True, slots=True)
class BlobPath(DistributionPath):
    kind = "blob"
    digest: Digest


@dataclass(frozen=True, slots=True)
class TagsPath(DistributionPath):
    kind = "tags"


@dataclass(frozen=True, slots=True)
class ReferrersPath(DistributionPath):
    kind = "referrers"
    subject: Digest


Target = ManifestPath | BlobPath | TagsPath | ReferrersPath


class Recent(NamedTuple):
    """A request that has ended. `at` is epoch seconds, `name` what was asked for."""

    at: float
    method: str
    name: str
    status: int
    outcome: str
    bytes: int
    seconds: float
    client: str | None


class Answer(NamedTuple):
    """A response, and what `Cache-Status` and the log say about it."""

    response: web.StreamResponse
    status: CacheStatus
    digest: Digest | None = None


def add_headers(response: web.StreamResponse, cache_status: str, namespace: str | None) -> None:
    """The headers that every answer under `/v2/` has."""
    headers = response.headers
    headers["Server"] = SERVER
    headers["Docker-Distribution-Api-Version"] = "registry/2.0"
    headers["Cache-Status"] = cache_status
    if namespace is not None:
        headers["OCI-Namespace"] = namespace


def client_has(request: web.BaseRequest, digest: Digest) -> bool:
    """Whether If-None-Match names this content: its digest is its ETag. As with Docker's registry,
    clients may leave the quotes out."""
    condition = request.headers.get("If-None-Match")
    if condition is None:
        return False
    tags = request.if_none_match or ()
    return condition == str(digest) or any(tag.value in ("*", str(digest)) for tag in tags)


def namespace_of(request: web.BaseRequest) -> str | None:
    """The `ns` parameter of a request that has no target, such as one that is refused. None also
    where it can be no registry, for then it may be no header either."""
    namespace = request.query.get("ns")
    if namespace is None:
        return None
    try:
        parse_registry(namespace)
    except NameInvalid:
        return None
    return namespace


def requested_ranges(request: web.BaseRequest, size: int) -> list[tuple[int, int]] | None:
    """The ranges to send as [start, stop), in the order they are asked in; [] is the whole blob,
    and None is 416.

    Other units, a header that is no range, an If-Range with another ETag, more than `_MOST_RANGES`
    ranges, and ranges that overlap to more than the blob get the whole blob, as RFC 9110 sections
    14.1.2 and 14.2 say. Of several ranges those behind the end are left out.
    """
    condition = request.headers.get("If-Range")
    found = _BYTE_RANGES.fullmatch(",".join(request.headers.getall("Range", ())))
    if found is None:
        return []
    if condition is not None and condition.strip('"') != request.rel_url.path.rpartition("/")[2]:
        return []
    asked = [each for part in found["ranges"].split(",") if (each := part.strip(" \t"))]
    if not asked or len(asked) > _MOST_RANGES:
        return []
    ranges = [_one_range(each, size) for each in asked]
    if None in ranges:
        return []
    inside = [each for each in ranges if each is not None and each[0] < each[1]]
    if len(inside) > 1 and sum(stop - start for start, stop in inside) > size:
        return []
    return inside or None


def _one_range(text: str, size: int) -> tuple[int, int] | None:
    """[start, stop) of one range, empty where it is behind the end; None for what is no range."""
    found = _BYTE_RANGE.fullmatch(text)
    if found is None:
        return None
    first, last = _position(found["first"]), _position(found["last"])
    if first is None:
        if last is None or (last and not size):
            # No number is no range; and no range of an empty blob can be told in a header.
            return None
        return max(0, size - last), size
    if last is not None and last < first:
        return None
    return first, size if last is None else min(size, last + 1)


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
