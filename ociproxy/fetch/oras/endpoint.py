"""Where an upstream's API is: the base URLs of its entry made into URLs of the distribution API."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from requests.exceptions import ConnectionError

from ociproxy.errors import OciProxyError, UpstreamUnavailable, UpstreamUntrusted
from ociproxy.fetch.oras.errors import FOREIGN, translate
from ociproxy.fetch.oras.session import discard

if TYPE_CHECKING:
    from ociproxy.config.settings import Timeouts, Upstream
    from ociproxy.fetch.oras.session import Session


class Endpoint:
    """The first of the upstream's base URLs that speaks HTTP, found once, with a request that
    carries no credentials: with scheme `auto`, HTTPS and then plain HTTP."""

    def __init__(self, upstream: Upstream, session: Session) -> None:
        self._name = upstream.name
        self._timeouts: Timeouts = upstream.timeouts
        self._session = session
        self._bases = tuple(api_base(url) for url in upstream.urls)
        self._found: str | None = self._bases[0] if len(self._bases) == 1 else None
        self._lock = threading.Lock()

    def base(self) -> str:
        """What a repository's name follows, ending with a slash. Raises UpstreamError kinds."""
        if self._found is not None:
            return self._found
        timeouts = self._timeouts
        if not self._lock.acquire(timeout=timeouts.connect + timeouts.headers):
            raise UpstreamUnavailable(self._name, "timed out finding its scheme", timed_out=True)
        try:
            if self._found is None:
                self._found = self._probe()
            return self._found
        finally:
            self._lock.release()

    def _probe(self) -> str:
        error: OciProxyError | None = None
        for base in self._bases:
            try:
                discard(self._session.get(base, stream=True))
            except FOREIGN as exc:
                failed = translate(exc, self._name, self._timeouts)
                if not isinstance(exc, ConnectionError) or isinstance(failed, UpstreamUntrusted):
                    # It speaks TLS: a certificate that is not accepted, or a late answer, is no
                    # reason to do without.
                    raise failed from exc
                error = error or failed
            else:
                return base
        raise error or UpstreamUnavailable(self._name, "has no URL")


def api_base(url: str) -> str:
    """`https://host` is asked at `/v2/`, and a path is where a proxying registry keeps the
    upstream: `https://host/hub` is asked at `/v2/hub/`. A path that starts with `/v2` is taken as
    it stands."""
    parts = urlsplit(url)
    path = parts.path.strip("/")
    if path != "v2" and not path.startswith("v2/"):
        path = f"v2/{path}".rstrip("/")
    return f"{parts.scheme}://{parts.netloc}/{path}/"
