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
    """As many fills as may run in both pools share the threads that there are for helpers."""
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


async def test_what_has_arrived_is_not_written_again(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    """An upstream without ranges sends it once more: were it other bytes, those that were hashed
    would not be those that are stored."""
    blob = random_blob(4 * MIB, seed="again")
    digest = Digest.parse(blob.digest)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(no_range=True, flip_at=5 * MIB // 2, rate=8 * MIB))
    store = Store(tmp_path / "store")
    begun = store.staging.lead(digest)
    assert begun is not None
    for start in (0, 2 * MIB):
        begun.write(start, blob.data[start : start + MIB])
        begun.arrived(start, start + MIB)
    begun.close()
    fills = Fills(store, Fetch(segment=MIB // 2))
    async with asyncio.timeout(15):
        await fills.start(
            Repository(upstream.registry, "app"),
            digest,
            partition="",
            backend=open_backend(upstream),
            connections=1,
            size=None,
            ended=lambda _: None,
        ).finished()
    await fills.close()
    assert store.blobs.path(digest).read_bytes() == blob.data
    assert [each.sent for each in upstream.requests if "/blobs/" in each.path] == [blob.size]
