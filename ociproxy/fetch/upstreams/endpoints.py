"""An upstream with several endpoints: a backend that asks them in order and takes the first answer.

An endpoint that fails or throttles is left alone for a back-off of its own. Where an endpoint does
not have the content, refuses it or sends a damaged manifest, the next one is asked; the last one's
error is raised. A damaged blob ends the download: the caller fetches it once more from zero, and
the endpoints that brought bytes of it are then asked last.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from ociproxy import log
from ociproxy.bounded import BoundedCache
from ociproxy.clock import Deadline, SystemClock, current_deadline, time_left
from ociproxy.errors import (
    BlobTooLarge,
    IntegrityError,
    Interrupted,
    OciProxyError,
    StoreError,
    UpstreamForbidden,
    UpstreamRateLimited,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.retry import Resumption
from ociproxy.fetch.upstreams.health import Health

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ociproxy.clock import Clock
    from ociproxy.config.settings import Fetch, Upstream
    from ociproxy.errors import BlobUnknown
    from ociproxy.fetch.backend import Backend, Listing, Quota
    from ociproxy.fetch.download.download import Download
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Reference, Repository

T = TypeVar("T")

_FAILURES: Final = (UpstreamUnavailable, UpstreamUntrusted, UpstreamForbidden)
"""Errors of an endpoint rather than of one request."""
_DAMAGED: Final = 1024
"""Damaged blobs of each endpoint that are remembered."""


@dataclass(slots=True)
class _Endpoint:
    url: str
    backend: Backend
    health: Health
    damaged: BoundedCache[Digest, int]
    """How often a blob was wrong that this endpoint had brought bytes of."""


class Endpoints:
    """A `Backend` over the backends of its endpoints. Thread-safe."""

    def __init__(
        self,
        upstream: Upstream,
        make_backend: Callable[[Upstream], Backend],
        fetch: Fetch,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._name = upstream.name
        self._fetch = fetch
        self._clock = clock or SystemClock()
        self._endpoints = [
            _Endpoint(
                each.endpoint or each.name,
                make_backend(each),
                Health(each.name, fetch.pause),
                BoundedCache(_DAMAGED),
            )
            for each in upstream.each_endpoint
        ]

    @property
    def quota(self) -> Quota | None:
        found = (endpoint.backend.quota for endpoint in self._endpoints)
        return next((quota for quota in found if quota is not None), None)

    def resolve(self, reference: Reference) -> Descriptor:
        return self._ask(lambda endpoint: endpoint.backend.resolve(reference))

    def fetch_manifest(self, reference: Reference) -> ManifestHolder:
        return self._ask(lambda endpoint: endpoint.backend.fetch_manifest(reference))

    def stat_blob(self, repository: Repository, digest: Digest) -> int:
        return self._ask(lambda endpoint: endpoint.backend.stat_blob(repository, digest))

    def fetch_blob(self, download: Download, *, tries: int, answered: Callable[[], None]) -> None:
        """An endpoint whose connection breaks is left alone; the next one goes on from there."""
        digest = download.digest
        order = sorted(self._endpoints, key=lambda each: each.damaged.get(digest) or 0)
        brought: list[_Endpoint] = []

        def fetch(endpoint: _Endpoint) -> None:
            before = download.bytes_fetched

            def heard() -> None:
                self._record_answer(endpoint)
                answered()

            try:
                endpoint.backend.fetch_blob(download, tries=1, answered=heard)
            finally:
                if download.bytes_fetched > before:
                    brought.append(endpoint)

        resumption = Resumption(tries=tries, limits=self._fetch, sleep=download.stopped.wait)
        while True:
            before = download.bytes_fetched
            try:
                self._first(fetch, order, final=(IntegrityError, StoreError, BlobTooLarge))
                return
            except IntegrityError:
                for endpoint in brought:
                    endpoint.damaged.put(digest, 1 + (endpoint.damaged.get(digest) or 0))
                raise
            except UpstreamUnavailable as exc:
                if download.stopped.is_set():
                    raise
                resumption.brought(download.bytes_fetched - before)
                resumption.wait(exc)

    def fetch_config(self, image: Reference, config: Descriptor) -> bytes:
        return self._ask(lambda endpoint: endpoint.backend.fetch_config(image, config))

    def fetch_listing(self, repository: Repository, path: str, query: str) -> Listing:
        return self._ask(lambda endpoint: endpoint.backend.fetch_listing(repository, path, query))

    def refusals(
        self, repository: Repository, manifests: Iterable[ManifestHolder], blobs: Iterable[Digest]
    ) -> dict[Digest, BlobUnknown]:
        """All endpoints have backends of one kind."""
        return self._endpoints[0].backend.refusals(repository, manifests, blobs)

    def close(self) -> None:
        for endpoint in self._endpoints:
            endpoint.backend.close()

    def _ask(self, request: Callable[[_Endpoint], T]) -> T:
        """The first answer to a short request."""

        def ask(endpoint: _Endpoint) -> T:
            answer = request(endpoint)
            self._record_answer(endpoint)
            return answer

        return self._first(ask, self._endpoints)

    def _first(
        self,
        request: Callable[[_Endpoint], T],
        endpoints: Sequence[_Endpoint],
        *,
        final: tuple[type[OciProxyError], ...] = (),
    ) -> T:
        """The first result, in this order. Raises the last endpoint's error; and at once an error
        of `final`, or the one of a request that this process gave up."""
        final = (*final, Interrupted)
        error: OciProxyError | None = None
        left_alone = []
        for asked, endpoint in enumerate(endpoints):
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
                return self._call(endpoint, request, of=len(endpoints) - asked)
            except final:
                raise
            except OciProxyError as exc:
                error = exc
        if isinstance(error, UpstreamUnavailable):
            # No endpoint answered. The caller has decided that the upstream may be asked, so the
            # endpoints that are left alone are asked too.
            for asked, endpoint in enumerate(left_alone):
                try:
                    return self._call(endpoint, request, of=len(left_alone) - asked)
                except final:
                    raise
                except OciProxyError as exc:
                    error = exc
        raise error or UpstreamUnavailable(self._name, "has no endpoint")

    def _call(self, endpoint: _Endpoint, request: Callable[[_Endpoint], T], *, of: int) -> T:
        """Within its share of the time that the request has left, as the first `of` so many that
        may be asked: a silent endpoint leaves the next one time."""
        limited = current_deadline() is not None  # a download has no deadline to share
        try:
            with Deadline.after(time_left() / of).kept() if limited else nullcontext():
                return request(endpoint)
        except OciProxyError as exc:
            self._record_failure(endpoint, exc)
            raise

    def _record_answer(self, endpoint: _Endpoint) -> None:
        if endpoint.health.answered():
            log.event(logging.INFO, "endpoint is back", upstream=self._name, endpoint=endpoint.url)

    def _record_failure(self, endpoint: _Endpoint, error: OciProxyError) -> None:
        if isinstance(error, _FAILURES) and not isinstance(error, Interrupted):
            # There are other endpoints, so this one is left alone even if it does answer.
            error = UpstreamUnavailable(error.upstream, error.reason, unreachable=True)
        if endpoint.health.failed(error, self._clock.monotonic()):
            log.event(
                logging.WARNING,
                "endpoint paused",
                upstream=self._name,
                endpoint=endpoint.url,
                reason=error,
            )
