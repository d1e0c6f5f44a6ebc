"""How a request was answered: for the log line and the `Cache-Status` header (RFC 9211)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ociproxy.errors import (
    BlobUnknown,
    Busy,
    ManifestUnknown,
    NameUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamRateLimited,
    UpstreamUnavailable,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`word` is one of hit, fill, follow, stale, miss."""

    word: str
    cache_status: str


HIT: Final = Outcome("hit", "ociproxy; hit")
REVALIDATED: Final = Outcome("hit", "ociproxy; fwd=stale; fwd-status=200; detail=revalidated")
UPDATED: Final = Outcome("miss", "ociproxy; fwd=stale; fwd-status=200; stored")
MISS: Final = Outcome("miss", "ociproxy; fwd=miss; stored")
MISS_COLLAPSED: Final = Outcome("follow", "ociproxy; fwd=miss; collapsed")
PASSED_ON: Final = Outcome("miss", "ociproxy; fwd=miss")
FILL: Final = Outcome("fill", "ociproxy; fwd=miss; stored")
FOLLOW: Final = Outcome("follow", "ociproxy; fwd=miss; collapsed")
PAUSED: Final = Outcome("stale", "ociproxy; hit; detail=stale-upstream-paused")
SLOW: Final = Outcome("stale", "ociproxy; fwd=stale; detail=upstream-slow")


def stale_because(error: OciProxyError) -> Outcome:
    """What is stored was served although it has expired, for the upstream gave this error."""
    match error:
        case UpstreamDenied(status=status):
            detail = f"fwd-status={status}; detail=upstream-denied"
        case ManifestUnknown() | BlobUnknown() | NameUnknown():
            detail = "fwd-status=404; detail=upstream-unknown"
        case UpstreamRateLimited():
            detail = "fwd-status=429; detail=upstream-rate-limited"
        case UpstreamUnavailable(timed_out=True):
            detail = "detail=upstream-timeout"
        case UpstreamUnavailable():
            detail = "detail=upstream-unavailable"
        case Busy():
            detail = "detail=busy"
        case _:
            detail = "detail=upstream-invalid"
    return Outcome("stale", f"ociproxy; fwd=stale; {detail}")
