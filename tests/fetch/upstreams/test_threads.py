"""Pools: what hangs under one name holds up nothing under another."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ociproxy.errors import Busy
from ociproxy.fetch.upstreams.threads import UpstreamThreads


async def test_a_name_that_hangs_leaves_the_others_alone() -> None:
    pools = UpstreamThreads("fills", size=2, queue=1)
    release = threading.Event()
    hanging = [pools.submit("slow", release.wait) for _ in range(3)]
    try:
        assert await asyncio.wait_for(pools.submit("quick", lambda: 7), 10) == 7
        assert not any(task.done() for task in hanging)
        pools.check_room("quick")
        with pytest.raises(Busy, match="3 fills"):
            pools.check_room("slow")
    finally:
        release.set()
        await asyncio.gather(*hanging)
        pools.shutdown()
    pools.check_room("slow")
