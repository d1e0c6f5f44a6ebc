"""An upstream with several endpoints: a backend that asks them in order, the first that works.

An endpoint that fails, in whatever way, is left alone for a back-off of its own, and so is one that
throttles. What one endpoint does not have, refuses or gives damaged, the next one is asked for; the
last one has the last word.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from ociproxy import log
from ociproxy.clock import SystemClock
from ociproxy.errors import (
    OciProxyError,
    UpstreamForbidden,
    UpstreamRateLimited,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.upstreams.health import Health

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.clock import Clock
    from ociproxy.config.settings import Upstream
    from ociproxy.fetch.backend import Backend, BlobStream, Listing
    from ociproxy.fetch.upstreams.health import Quota
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import Descriptor, ManifestHolder
    from ociproxy.oci.reference import Reference, Repository

T = TypeVar("T")

_FAILURES: Final = (UpstreamUnavailable, UpstreamUntrusted, UpstreamForbidden)


@dataclass(slots=True)
class _Endpoint:
    url: str
    backend: Backend
    health: Health


class Endpoints:
    """A `Backend`; used from many threads at once, as its parts are."""

    def __init__(
        self,
        upstream: Upstream,
        make_backend: Callable[[Upstream], Backend],
        *,
        pause: float,
        clock: Clock | None = None,
    ) -> None:
        """`pause` is the most seconds that an endpoint is left alone."""
        self._name = upstream.name
        self._clock = clock or SystemClock()
        self._endpoints = [
            _Endpoint(each.endpoint or each.name, make_backend(each), Health(each.name, pause))
            for each in upstream.each_endpoint
        ]

    @property
    def quota(self) -> Quota | None:
        found = (endpoint.backend.quota for endpoint in self._endpoints)
        return next((quota for quota in found if quota is not None), None)

    def resolve(self, reference: Reference) -> Descriptor:
        return self._first(lambda endpoint: endpoint.backend.resolve(reference))

    def fetch_manifest(self, reference: Reference) -> ManifestHolder:
        return self._first(lambda endpoint: endpoint.backend.fetch_manifest(reference))

    def stat_blob(self, repository: Repository, digest: Digest) -> int:
        return self._first(lambda endpoint: endpoint.backend.stat_blob(repository, digest))

    def open_blob(
        self, repository: Repository, digest: Digest, *, start: int = 0, stop: int | None = None
    ) -> BlobStream:
        return self._first(
            lambda endpoint: _Watched(
                endpoint.backend.open_blob(repository, digest, start=start, stop=stop),
                lambda error: self._note(endpoint, error),
            )
        )

    def fetch_listing(self, repository: Repository, path: str, query: str) -> Listing:
        return self._first(lambda endpoint: endpoint.backend.fetch_listing(repository, path, query))

    def close(self) -> None:
        for endpoint in self._endpoints:
            endpoint.backend.close()

    def _first(self, question: Callable[[_Endpoint], T]) -> T:
        """The first answer. Raises what the last endpoint said."""
        error: OciProxyError | None = None
        left_alone = []
        for endpoint in self._endpoints:
            try:
                endpoint.health.admit(self._clock.monotonic())
            except UpstreamRateLimited as exc:
                error = exc
                continue
            except UpstreamUnavailable as exc:
                error = exc
                left_alone.append(endpoint)
                continue
            try:
                return self._ask(endpoint, question)
            except OciProxyError as exc:
                error = exc
        if isinstance(error, UpstreamUnavailable):
            # Nobody is left: whoever lets questions through here has decided that it is time.
            for endpoint in left_alone:
                try:
                    return self._ask(endpoint, question)
                except OciProxyError as exc:
                    error = exc
        raise error or UpstreamUnavailable(self._name, "has no endpoint")

    def _ask(self, endpoint: _Endpoint, question: Callable[[_Endpoint], T]) -> T:
        try:
            answer = question(endpoint)
        except OciProxyError as exc:
            self._note(endpoint, exc)
            raise
        if endpoint.health.answered():
            log.event(logging.INFO, "endpoint is back", upstream=self._name, endpoint=endpoint.url)
        return answer

    def _note(self, endpoint: _Endpoint, error: OciProxyError) -> None:
        if isinstance(error, _FAILURES):
            # There are others: no reason to ask it again at once, whatever may be left of it.
            error = UpstreamUnavailable(error.upstream, error.reason, unreachable=True)
        if endpoint.health.failed(error, self._clock.monotonic()):
            log.event(
                logging.WARNING,
                "endpoint paused",
                upstream=self._name,
                endpoint=endpoint.url,
                reason=error,
            )


class _Watched:
    """A `BlobStream` that tells when it breaks: the rest is fetched from another endpoint then."""

    def __init__(self, stream: BlobStream, broke: Callable[[OciProxyError], None]) -> None:
        self._stream = stream
        self._broke = broke
        self._aborted = False

    @property
    def size(self) -> int | None:
        return self._stream.size

    @property
    def start(self) -> int:
        return self._stream.start

    @property
    def stop(self) -> int | None:
        return self._stream.stop

    def deliver(self) -> bool:
        return self._watch(self._stream.deliver)

    def read(self, limit: int) -> bytes:
        return self._watch(lambda: self._stream.read(limit))

    def abort(self) -> None:
        self._aborted = True
        self._stream.abort()

    def close(self) -> None:
        self._stream.close()

    def _watch(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except UpstreamUnavailable as exc:
            if not self._aborted:
                self._broke(exc)
            raise
