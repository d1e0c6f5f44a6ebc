"""What this worker is doing now, told once a second to the memory that all processes share.

The admin listener reads it there, whichever process that is in: so it says the same with one worker
as with many, and asks no worker anything.

Tests: tests/serve/admin/test_metrics.py.
"""

from __future__ import annotations

import asyncio
import os
import time
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from ociproxy.bounded import BoundedCache

if TYPE_CHECKING:
    from ociproxy.fetch.backend import Quota
    from ociproxy.fetch.download.fill import Fill
    from ociproxy.fetch.upstreams.upstreams import UpstreamState
    from ociproxy.metrics.tally import Tally
    from ociproxy.serve.api import RegistryApi
    from ociproxy.serve.blobs import BlobResponse
    from ociproxy.serve.listener import Listener

INTERVAL: Final = 1.0
"""Seconds between two accounts of what a worker does."""
SILENT: Final = 10.0
"""Seconds after which a worker that gives no account is taken for one that hangs or has died."""
_UPSTREAMS: Final = 128
"""Upstreams told of, listed ones first."""
_PULLS: Final = 64
"""Blobs being sent, and downloads, told of."""
_LONGEST: Final = 300
"""Characters of a name that are told."""


class Live:
    """Belongs to one event loop; `run` is a task of the server, which cancels it."""

    def __init__(self, tally: Tally, api: RegistryApi, main_port: Listener) -> None:
        self._tally = tally
        self._api = api
        self._main_port = main_port
        self._port = main_port.port
        self._quotas: BoundedCache[str, tuple[Quota, float]] = BoundedCache(_UPSTREAMS)

    async def run(self) -> None:
        while True:
            self.tell()
            await asyncio.sleep(INTERVAL)

    def tell(self) -> None:
        engine = self._api.engine
        fills = engine.fills.under_way()
        states = sorted(engine.upstreams.states(), key=lambda each: not each.listed)
        state: dict[str, Any] = {
            "pid": os.getpid(),
            "at": time.monotonic(),
            "port": self._port,
            "connections": self._main_port.count,
            "fills": {"running": len(fills), "queued": len(engine.ahead.queued)},
            "upstreams": [self._upstream(each) for each in states[:_UPSTREAMS]],
            "sending": [
                _sending(response, *told)
                for response, told in islice(self._api.sending.items(), _PULLS)
            ],
            "filling": [_filling(each) for each in fills[:_PULLS]],
            "recent": [(*each[:2], each.name[:_LONGEST], *each[3:]) for each in self._api.recent],
        }
        if not self._tally.set_state(state):
            # Names of hundreds of characters each: the numbers matter more.
            self._tally.set_state({**state, "sending": [], "filling": [], "recent": []})

    def _upstream(self, state: UpstreamState) -> dict[str, Any]:
        found: dict[str, Any] = {
            "registry": state.registry,
            "listed": state.listed,
            "condition": state.condition,
            "seconds": round(max(0.0, state.seconds), 1),
        }
        quota = state.quota
        if quota is not None:
            before = self._quotas.get(state.registry)
            if before is None or before[0] != quota:
                before = (quota, time.monotonic())
                self._quotas.put(state.registry, before)
            # Of several workers the one that heard of the quota last knows it.
            found["quota"] = {
                "limit": quota.limit,
                "remaining": quota.remaining,
                "window": quota.window,
                "at": before[1],
            }
        return found


def _sending(response: BlobResponse, name: str, client: str | None) -> dict[str, Any]:
    return {
        "id": id(response),
        "name": name[:_LONGEST],
        "client": client,
        "sent": response.sent,
        "size": response.content_length,
        "cache": response.headers.get("Cache-Status", ""),
    }


def _filling(fill: Fill) -> dict[str, Any]:
    download = fill.download
    return {
        "repository": str(fill.repository)[:_LONGEST],
        "digest": str(fill.digest),
        "here": download.bytes_resumed + download.bytes_fetched,
        "size": download.size,
    }


def alive(tally: Tally) -> list[dict[str, Any]]:
    """What the workers said last, without those that have been silent for long."""
    since = time.monotonic() - SILENT
    return [state for state in tally.states() if state["at"] >= since]
