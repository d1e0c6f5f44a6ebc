"""How a request was answered: for the log line and the `Cache-Status` header (RFC 9211).

Tests: tests/serve/test_manifests.py, tests/serve/test_blobs.py.
"""

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
class CacheStatus:
    """`word` is for the log: hit, fill, follow, stale or miss. `header` is the whole header."""

    word: str
    header: str

    @property
    def detail(self) -> str:
        """Why it was answered so, for metrics; "" where the header does not say."""
        return self.header.rpartition("; detail=")[2] if "; detail=" in self.header else ""


HIT: Final = CacheStatus("hit", "ociproxy; hit")
REVALIDATED: Final = CacheStatus("hit", "ociproxy; fwd=stale; fwd-status=200; detail=revalidated")
UPDATED: Final = CacheStatus("miss", "ociproxy; fwd=stale; fwd-status=200; stored")
MISS: Final = CacheStatus("miss", "ociproxy; fwd=miss; stored")
MISS_COLLAPSED: Final = CacheStatus("follow", "ociproxy; fwd=miss; collapsed")
PASSED_ON: Final = CacheStatus("miss", "ociproxy; fwd=miss")
PASSED_THROUGH: Final = CacheStatus("miss", "ociproxy; fwd=miss; detail=not-stored")
"""The store cannot keep it."""
FILL: Final = CacheStatus("fill", "ociproxy; fwd=miss; stored")
FOLLOW: Final = CacheStatus("follow", "ociproxy; fwd=miss; collapsed")
PAUSED: Final = CacheStatus("stale", "ociproxy; hit; detail=stale-upstream-paused")
SLOW: Final = CacheStatus("stale", "ociproxy; fwd=stale; detail=upstream-slow")


def stale_because(error: OciProxyError) -> CacheStatus:
    """Expired content was served, because the upstream failed with this error."""
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
    return CacheStatus("stale", f"ociproxy; fwd=stale; {detail}")
