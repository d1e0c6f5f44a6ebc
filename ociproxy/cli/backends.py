"""Which backends there are, and which one an upstream gets."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

from ociproxy.config.skopeo import MISSING, PROGRAM
from ociproxy.errors import ConfigError
from ociproxy.fetch.oras.backend import OrasBackend
from ociproxy.fetch.skopeo.backend import SkopeoBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ociproxy.config.settings import BackendName, Config, Fetch, Upstream
    from ociproxy.fetch.backend import Backend
    from ociproxy.fetch.upstreams.upstreams import MakeBackend
    from ociproxy.store.store import Store

BACKENDS: Final[Mapping[str, Callable[[Upstream, Fetch, Store], Backend]]] = {
    "oras": lambda upstream, fetch, _: OrasBackend(upstream, fetch),
    "skopeo": SkopeoBackend,
}


def backends(store: Store, config: Config, *, everywhere: BackendName | None = None) -> MakeBackend:
    """What makes an upstream's backend: the one it is configured for, or one for all, those
    without an entry included.

    Raises ConfigError where the one for all needs a program that is not there.
    """
    if everywhere == "skopeo" and shutil.which(PROGRAM) is None:
        raise ConfigError(MISSING)
    return lambda upstream: BACKENDS[everywhere or upstream.backend](upstream, config.fetch, store)
