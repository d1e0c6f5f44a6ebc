"""Which backends there are, and which one an upstream gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ociproxy.fetch.oras.backend import OrasBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ociproxy.config.settings import BackendName, Config, Fetch, Upstream
    from ociproxy.fetch.upstream import Backend
    from ociproxy.fetch.upstreams import MakeBackend

BACKENDS: Final[Mapping[str, Callable[[Upstream, Fetch], Backend]]] = {"oras": OrasBackend}


def backends(config: Config, *, everywhere: BackendName | None = None) -> MakeBackend:
    """What makes an upstream's backend: the one it is configured for, or one for all."""
    return lambda upstream: BACKENDS[everywhere or upstream.backend](upstream, config.fetch)
