"""Fills that compete for threads."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ociproxy.config.settings import Fetch
from ociproxy.digest import Digest
from ociproxy.fetch.fill import Fill, Fills
from ociproxy.reference import Repository
from ociproxy.store.store import Store
from tests.fetch.conftest import OpenBackend
from tests.images import random_blob
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MIB = 1024 * 1024


async def test_a_fill_does_not_wait_for_help_that_finds_no_thread(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    """As many fills as may run in both pools hash with all threads that there are for helpers."""
    blobs = [random_blob(3 * MIB, seed=f"help {n}") for n in range(2)]
    for blob in blobs:
        upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(stall_after=MIB // 2))
    store = Store(tmp_path / "store")
    fills = Fills(store, Fetch(fills=1, segment=MIB))
    backend = open_backend(upstream)

    def start(number: int) -> Fill:
        return fills.start(
            Repository(upstream.registry, "app"),
            Digest.parse(blobs[number].digest),
            partition="somebody" * number,
            backend=backend,
            connections=4,
            size=None,
            ended=lambda _: None,
        )

    async with asyncio.timeout(15):
        running = [start(0), start(1)]
        for fill in running:
            await fill.available(MIB // 4)
        ahead = [asyncio.create_task(fill.available(2 * MIB)) for fill in running]
        await asyncio.sleep(0.1)
        upstream.heal()
        for fill in running:
            await fill.finished()
        await asyncio.gather(*ahead)
    await fills.close()
    for blob in blobs:
        assert store.blobs.path(Digest.parse(blob.digest)).read_bytes() == blob.data
