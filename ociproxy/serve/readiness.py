"""`/readyz`: whether the store can be written, found out in a thread that does nothing else.

Tests: tests/serve/test_api.py, tests/serve/test_readiness.py.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from ociproxy.errors import StoreError
from ociproxy.fetch.upstreams.threads import take_error

if TYPE_CHECKING:
    from ociproxy.store.store import Store

_TIME: Final = 5.0
"""Seconds that the store has to take one block; a slower one is not ready."""


class Readiness:
    """Belongs to one event loop; `close` when it ends. Callers at the same time share one look."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="readiness")
        self._looking: asyncio.Future[None] | None = None

    async def check(self) -> None:
        """Raises StoreError where the store cannot be written, or does not answer in time. A look
        that hangs stays the only one: callers hear of it until it ends."""
        if self._looking is None or self._looking.done():
            loop = asyncio.get_running_loop()
            self._looking = loop.run_in_executor(self._thread, self._store.check_room)
            self._looking.add_done_callback(take_error)
        done, _ = await asyncio.wait({self._looking}, timeout=_TIME)
        if not done:
            raise StoreError(self._store.root, f"takes no block within {_TIME:g} s")
        self._looking.result()

    def close(self) -> None:
        """Without waiting for a look that hangs."""
        self._thread.shutdown(wait=False, cancel_futures=True)
