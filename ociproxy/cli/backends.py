"""The backends that exist, and the one that an upstream gets.

Tests: tests/load/test_loader.py, tests/real/test_skopeo_upstream.py.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

from ociproxy.config.skopeo import MISSING, PROGRAM
from ociproxy.errors import ConfigError
from ociproxy.fetch.oras.backend import OrasBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ociproxy.config.settings import BackendName, Config, Fetch, Upstream
    from ociproxy.fetch.backend import Backend
    from ociproxy.fetch.upstreams.upstreams import MakeBackend
    from ociproxy.store.store import Store


def _skopeo(upstream: Upstream, fetch: Fetch, store: Store) -> Backend:
    from ociproxy.fetch.skopeo.backend import SkopeoBackend  # few use it

    return SkopeoBackend(upstream, fetch, store)


BACKENDS: Final[Mapping[str, Callable[[Upstream, Fetch, Store], Backend]]] = {
    "oras": lambda upstream, fetch, _: OrasBackend(upstream, fetch),
    "skopeo": _skopeo,
}


def backends(store: Store, config: Config, *, everywhere: BackendName | None = None) -> MakeBackend:
    """A function that makes an upstream's backend: `everywhere`, or else the configured one.

    Raises ConfigError if `everywhere` needs a program that is not installed.
    """
    if everywhere == "skopeo" and shutil.which(PROGRAM) is None:
        raise ConfigError(MISSING)
    return lambda upstream: BACKENDS[everywhere or upstream.backend](upstream, config.fetch, store)
