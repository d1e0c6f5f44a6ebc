"""What a backend must do, and the one retry policy for everything that asks an upstream.

Backends are synchronous: they run in threads of their own pools (`fetch.upstreams.threads`), never
in the event loop. All of them raise the domain errors of `ociproxy.errors` and nothing else,
translated in one place each.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import tenacity

from ociproxy.errors import UpstreamUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.fetch.upstreams.health import Quota
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import Descriptor, ManifestHolder
    from ociproxy.oci.reference import Reference, Repository


class BlobStream(Protocol):
    """The body of one blob request, undecoded bytes, read by one thread; `abort` may come from
    another."""

    @property
    def size(self) -> int | None:
        """Bytes of the whole blob as the upstream states them, or None where it does not."""

    @property
    def start(self) -> int:
        """Offset of the first byte of the body: 0 where the upstream ignored the range."""

    @property
    def stop(self) -> int | None:
        """Offset just past the last byte of the body, or None where the upstream does not say."""

    def deliver(self) -> bool:
        """False at once where the bytes are to be read. True where the backend brings whole blobs
        into the store by itself: returns when this one is there. Raises what `read` does,
        BlobUnknown or IntegrityError kinds."""

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes, as soon as some are there; b"" at the end. Raises
        UpstreamUnavailable when the connection breaks, stalls, or ends before the stated length."""

    def abort(self) -> None:
        """Make a blocked read return soon; safe from any thread, at any time, more than once."""

    def close(self) -> None:
        """Give the connection back if the body was read to its end, else drop it."""


class OpenBlob(Protocol):
    """`Backend.open_blob` for one repository and digest."""

    def __call__(self, *, start: int, stop: int | None) -> BlobStream: ...


@dataclass(frozen=True, slots=True)
class Listing:
    """A tags or referrers answer: JSON bytes as they came, and the `rel="next"` query if there
    is one."""

    raw: bytes
    media_type: str
    next_query: str = ""
    filters_applied: str = ""


class Backend(Protocol):
    """One upstream registry. All methods block; all raise UpstreamError kinds, ManifestUnknown,
    BlobUnknown or NameUnknown."""

    @property
    def quota(self) -> Quota | None:
        """What the upstream last said of its rate limit; None where it says nothing. From any
        thread, at once."""

    def resolve(self, reference: Reference) -> Descriptor:
        """HEAD of a manifest: costs no pull quota. The size is 0 where the upstream does not
        say."""

    def fetch_manifest(self, reference: Reference) -> ManifestHolder:
        """GET of a manifest: exact bytes, at most MANIFEST_MAX_SIZE, verified against the
        reference's digest if it has one, else against the Docker-Content-Digest that the upstream
        sends (DigestMismatch)."""

    def stat_blob(self, repository: Repository, digest: Digest) -> int:
        """HEAD of a blob: its size in bytes."""

    def open_blob(
        self, repository: Repository, digest: Digest, *, start: int = 0, stop: int | None = None
    ) -> BlobStream:
        """GET of a blob, or of its bytes from `start` up to but not including `stop`."""

    def fetch_listing(self, repository: Repository, path: str, query: str) -> Listing:
        """GET of `/v2/<name>/<path>?<query>`: `tags/list` or `referrers/<digest>`, at most
        MANIFEST_MAX_SIZE bytes of JSON. A 404 is NameUnknown."""

    def close(self) -> None:
        """Drop the idle connections."""


def retrying(
    *, tries: int, wait_max: float, sleep: Callable[[float], None] = time.sleep
) -> tenacity.Retrying:
    """Try again what UpstreamUnavailable ended: at most `tries` times in all, jittered waits of
    at most `wait_max` seconds between them, the last error re-raised as it is. An address that
    swallows packets is tried twice. Never around a commit."""

    def stop(state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome is not None else None
        swallowed = isinstance(error, UpstreamUnavailable) and error.unreachable and error.timed_out
        return state.attempt_number >= (min(tries, 2) if swallowed else tries)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UpstreamUnavailable),
        stop=stop,
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=wait_max),
        reraise=True,
        sleep=sleep,
    )
