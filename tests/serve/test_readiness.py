"""`/readyz` tells a probe what the store does, whatever else the server does."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ociproxy.errors import StoreError
from ociproxy.serve import readiness
from ociproxy.serve.readiness import Readiness
from ociproxy.store.store import Store
from tests.serve.scene import Scene
from tests.server import Mirror

BLOBS = 18


def test_readyz_answers_while_many_stored_blobs_are_hashed(scene: Scene) -> None:
    """Each is large, and was put there by an operator, so the server hashes it first."""
    server = scene.start(requests=1)
    for n in range(BLOBS):
        path = server.store / "blobs" / f"{n:064x}"
        path.touch()
        os.truncate(path, 16 << 30)  # sparse
    with ThreadPoolExecutor(BLOBS) as pool:
        for n in range(BLOBS):
            target = scene.path("blobs", f"sha256:{n:064x}")
            pool.submit(server.request, "GET", target, timeout=60)
        server.wait_for(lambda: is_hashing(server), "hashing")
        assert server.request("GET", "/readyz", timeout=10).status == 200
        server.kill()


def is_hashing(server: Mirror) -> bool:
    assert server.process is not None
    files = list(Path(f"/proc/{server.process.pid}/fd").iterdir())
    return any("/blobs/" in str(file.readlink()) for file in files if file.is_symlink())


class SlowStore(Store):
    """Its disk hangs until `release`."""

    release = threading.Event()

    def check_room(self) -> None:
        self.release.wait(30)


async def test_a_store_that_hangs_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "_TIME", 0.2)
    store = SlowStore(tmp_path)
    ready = Readiness(store)
    for _ in range(2):
        with pytest.raises(StoreError, match="takes no block"):
            await ready.check()
    store.release.set()
    await asyncio.sleep(0)
    monkeypatch.setattr(readiness, "_TIME", 10.0)
    await ready.check()
    ready.close()


class BrokenStore(SlowStore):
    """Its disk hangs until `release`, and fails then."""

    release = threading.Event()

    def check_room(self) -> None:
        super().check_room()
        raise StoreError(self.root, "broken")


async def test_a_store_that_fails_when_the_probe_has_left_is_no_bug(tmp_path: Path) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))
    store = BrokenStore(tmp_path)
    ready = Readiness(store)
    probe = asyncio.create_task(ready.check())
    await asyncio.wait([probe], timeout=0.2)
    probe.cancel()
    await asyncio.wait([probe])
    store.release.set()
    await asyncio.sleep(0.2)
    with pytest.raises(StoreError, match="broken"):
        await ready.check()  # a second look, which forgets the first
    ready.close()
    del ready, probe
    gc.collect()
    assert complaints == []


def test_the_version_check_says_where_its_answer_is_from(scene: Scene) -> None:
    server = scene.start()
    assert server.get("/v2/").cache_status == "ociproxy; hit"
