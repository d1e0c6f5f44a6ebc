"""`load --pin`: each image that was loaded is pinned.

Tests: tests/cli/test_pins_command.py.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ociproxy.load.progress import Watcher
from ociproxy.store.pruning.pins import Pin

if TYPE_CHECKING:
    from ociproxy.errors import OciProxyError, UpstreamError
    from ociproxy.load.imagelist import Wanted
    from ociproxy.load.progress import Result
    from ociproxy.store.store import Store


class PinLoaded(Watcher):
    """Passes all that it hears to `next_watcher`."""

    def __init__(self, store: Store, next_watcher: Watcher) -> None:
        self._store = store
        self._next = next_watcher

    def loaded(self, result: Result) -> None:
        self._store.pins.add(Pin.of(result.image.reference, "load"), time.time())
        self._next.loaded(result)

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        self._next.failed(wanted, error)

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        self._next.waiting(error, seconds)
