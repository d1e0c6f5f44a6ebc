"""Fills that compete for threads."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path

import pytest

from ociproxy.config.settings import Config, Fetch
from ociproxy.errors import DigestMismatch, SizeMismatch, UpstreamInvalid
from ociproxy.fetch.backend import Backend
from ociproxy.fetch.download.assembly import Assembly
from ociproxy.fetch.download.fill import Fill
from ociproxy.fetch.download.fills import Fills
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Repository
from ociproxy.store.store import Store
from tests.fetch.conftest import OpenBackend
from tests.images import Content, random_blob
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MIB = 1024 * 1024


async def test_a_fill_does_not_wait_for_help_that_finds_no_thread(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    """As many fills as may run share the threads that there are for helpers."""
    blobs = [random_blob(3 * MIB, seed=f"help {n}") for n in range(2)]
    for blob in blobs:
        upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(stall_after=MIB // 2))
    store = Store(tmp_path / "store")
    fills = Fills(store, Config(fetch=Fetch(fills=2, segment=MIB)))
    backend = open_backend(upstream, connections=4)

    def start(number: int) -> Fill:
        return fills.start(
            Repository(upstream.registry, "app"),
            Digest.parse(blobs[number].digest),
            partition="other" * number,
            backend=backend,
            size=None,
            check=lambda: None,
            ended=lambda *_: None,
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


async def fill(
    fills: Fills,
    upstream: FakeUpstream,
    backend: Backend,
    blob: Content,
    size: int | None = None,
) -> None:
    """Until it is in the store; nobody has said its size, unless it is given."""
    async with asyncio.timeout(15):
        await start(fills, upstream, backend, blob, size).finished()


def start(
    fills: Fills, upstream: FakeUpstream, backend: Backend, blob: Content, size: int | None
) -> Fill:
    return fills.start(
        Repository(upstream.registry, "app"),
        Digest.parse(blob.digest),
        partition="",
        backend=backend,
        size=size,
        check=lambda: None,
        ended=lambda *_: None,
    )


@pytest.mark.parametrize("flip_at", [MIB // 4, 5 * MIB // 2])
async def test_what_has_arrived_is_not_written_again(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend, flip_at: int
) -> None:
    """An upstream without ranges sends it once more: were it other bytes, those that were hashed
    would not be those that are stored."""
    blob = random_blob(4 * MIB, seed="again")
    digest = Digest.parse(blob.digest)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(no_range=True, flip_at=flip_at, rate=8 * MIB))
    store = Store(tmp_path / "store")
    begun = store.staging.lead(digest)
    assert begun is not None
    for start in (0, 2 * MIB):
        begun.write(start, blob.data[start : start + MIB])
        begun.arrived(start, start + MIB)
    begun.close()
    fills = Fills(store, Config(fetch=Fetch(segment=MIB // 2)))
    await fill(fills, upstream, open_backend(upstream, connections=1), blob)
    await fills.close()
    assert store.blobs.path(digest).read_bytes() == blob.data
    assert [each.sent for each in upstream.requests if "/blobs/" in each.path] == [blob.size]


@pytest.mark.parametrize("size", [0, 1000, MIB, MIB + 1, 3 * MIB])
async def test_a_blob_whose_size_nobody_states(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend, size: int
) -> None:
    blob = random_blob(size, seed="unknown")
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(chunked=True, no_range=True))
    store = Store(tmp_path / "store")
    fills = Fills(store, Config(fetch=Fetch(segment=MIB)))
    await fill(fills, upstream, open_backend(upstream, connections=1), blob)
    await fills.close()
    assert store.blobs.path(Digest.parse(blob.digest)).read_bytes() == blob.data
    assert [each.sent for each in upstream.requests if "/blobs/" in each.path] == [size]


@pytest.mark.parametrize("size", [1000, 3 * MIB])
async def test_a_blob_that_ends_before_its_claimed_size_is_kept(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend, size: int
) -> None:
    """A manifest may claim what it likes, also for clients of other repositories."""
    blob = random_blob(size, seed="claimed")
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(chunked=True, no_range=True))
    store = Store(tmp_path / "store")
    fills = Fills(store, Config(fetch=Fetch(segment=MIB)))
    await fill(fills, upstream, open_backend(upstream), blob, size + 5 * MIB)
    await fills.close()
    assert store.blobs.path(Digest.parse(blob.digest)).read_bytes() == blob.data
    assert [each.sent for each in upstream.requests if "/blobs/" in each.path] == [size]


@pytest.mark.parametrize("right", [True, False])
async def test_a_journal_that_claims_too_much_costs_no_blob(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend, right: bool
) -> None:
    """Of a leader that was killed; what it brought may be wrong, too."""
    blob = random_blob(MIB, seed="journal")
    digest = Digest.parse(blob.digest)
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(chunked=True, no_range=True))
    store = Store(tmp_path / "store")
    begun = store.staging.lead(digest)
    assert begun is not None
    begun.set_size(2 * MIB)
    begun.write(0, blob.data if right else bytes(MIB))
    begun.arrived(0, MIB)
    begun.close()
    fills = Fills(store, Config(fetch=Fetch(segment=MIB)))
    with nullcontext() if right else pytest.raises(DigestMismatch):
        await fill(fills, upstream, open_backend(upstream), blob)
    await fills.drain()  # the second try
    await fills.close()
    assert store.blobs.path(digest).read_bytes() == blob.data


async def test_a_reader_who_was_promised_more_than_there_is_hears_of_it(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    """Its response has the length that a manifest claimed."""
    blob = random_blob(2 * MIB, seed="promised")
    upstream.add_content("app", blob)
    upstream.fault("/blobs/", Fault(chunked=True, no_range=True))
    fills = Fills(Store(tmp_path / "store"), Config())
    running = start(fills, upstream, open_backend(upstream), blob, 3 * MIB)
    async with asyncio.timeout(15):
        await running.started()
        assert running.size == 3 * MIB
        offset = 0
        while offset < blob.size:
            offset = await running.available(offset)
        with pytest.raises(SizeMismatch):
            await running.available(offset)
    await fills.close()


@pytest.mark.parametrize("knows", [False, True])
async def test_all_had_arrived_before_anybody_knew(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend, knows: bool
) -> None:
    """A leader that did not know the size was killed, and may have written more than it said."""
    blob = random_blob(MIB, seed="before")
    digest = Digest.parse(blob.digest)
    upstream.add_content("app", blob)
    store = Store(tmp_path / "store")
    begun = store.staging.lead(digest)
    assert begun is not None
    begun.write(0, blob.data + b"more")
    begun.arrived(0, MIB)
    begun.close()
    fills = Fills(store, Config(fetch=Fetch(segment=MIB)))
    await fill(fills, upstream, open_backend(upstream, connections=1), blob, MIB if knows else None)
    await fills.close()
    assert store.blobs.path(digest).read_bytes() == blob.data


async def test_a_range_of_a_blob_without_its_size_is_refused(
    tmp_path: Path, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    """Nobody could tell where it ends."""
    blob = random_blob(3 * MIB, seed="star")
    upstream.add_content("app", blob)
    part = blob.data[:MIB]
    headers = {"Content-Range": f"bytes 0-{MIB - 1}/*"}
    upstream.fault("/blobs/", Fault(status=206, body=part, headers=headers, no_range=True))
    fills = Fills(Store(tmp_path / "store"), Config(fetch=Fetch(segment=MIB)))
    with pytest.raises(UpstreamInvalid, match="without the blob's size"):
        await fill(fills, upstream, open_backend(upstream, connections=1), blob)
    await fills.close()
    assert len([each for each in upstream.requests if "/blobs/" in each.path]) == 1


def test_a_claim_moves_on_from_where_its_connection_is(tmp_path: Path) -> None:
    """What another connection gives up behind that has passed."""
    blob = Digest.of(b"")
    plan = Assembly(blob, "registry.example", size=4 * MIB, segment=MIB)
    led = Store(tmp_path).staging.lead(blob)
    assert led is not None
    plan.adopt(led)
    first, other = plan.take(0), plan.take(0)
    assert first is not None
    assert other is not None
    led.ranges.add(0, MIB)
    first.start = MIB
    plan.release(other)
    assert plan.move(first, 3 * MIB // 2, 4 * MIB)
    assert (first.start, first.stop) == (3 * MIB // 2, 4 * MIB)
    first.start = first.stop
    assert not plan.move(first, 4 * MIB, 4 * MIB)
    plan.close()
