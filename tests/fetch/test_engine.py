"""The engine keeps house while it runs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ociproxy import log
from ociproxy.cli.backends import backends
from ociproxy.config.settings import Config, Fetch, Upstream
from ociproxy.errors import UpstreamUnavailable
from ociproxy.fetch.backend import Backend
from ociproxy.fetch.download.download import Download
from ociproxy.fetch.download.fill import Fill
from ociproxy.fetch.engine import Engine
from ociproxy.oci.digest import Digest
from ociproxy.oci.manifest import ManifestHolder
from ociproxy.oci.reference import Reference, Repository
from ociproxy.store.store import Store
from tests.fetch.conftest import entry
from tests.images import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, content, image, random_blob
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault


async def test_a_download_that_was_abandoned_is_removed_while_the_server_runs(
    tmp_path: Path,
) -> None:
    store, config = Store(tmp_path), Config()
    engine = Engine(store, config, backends(store, config), sweep_interval=0.05)
    await asyncio.sleep(0.2)  # the sweep of the start is over
    partial = store.staging.root / ("a" * 64)
    partial.write_bytes(b"partial")
    old = time.time() - 3 * 86400
    os.utime(partial, (old, old))
    async with asyncio.timeout(20):
        while partial.exists():  # noqa: ASYNC110 a thread removes it
            await asyncio.sleep(0.02)
    await engine.close()


def manifest_of(layers: int) -> bytes:
    """An image manifest whose blobs no store has."""
    named = [content(str(n).encode(), OCI_LAYER).descriptor() for n in range(layers)]
    config = content(b"{}", OCI_CONFIG).descriptor()
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": named}
    return json.dumps(document).encode()


async def test_a_manifest_of_thousands_of_layers_is_looked_through_once_and_beside_the_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = Store(tmp_path), Config(fetch=Fetch(background_fills=0))
    raw = manifest_of(layers=3000)
    repository = Reference.parse("quay.io/team/huge").repository
    holder = ManifestHolder.of(raw, OCI_MANIFEST)
    store.commit_manifest(repository, holder)
    store = Store(tmp_path)  # as after a restart: nothing is in memory
    engine = Engine(store, config, backends(store, config))
    asked = Reference(repository, digest=holder.descriptor.digest)
    stats: Counter[str] = Counter()
    parses: Counter[str] = Counter()
    stat, loads = os.stat, json.loads

    def counted_stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if f"{tmp_path}/blobs/" in str(path):
            stats[threading.current_thread().name] += 1
        return stat(path, *args, **kwargs)

    def counted_loads(text: Any, *args: Any, **kwargs: Any) -> Any:
        if len(text) == len(raw):
            parses[threading.current_thread().name] += 1
        return loads(text, *args, **kwargs)

    monkeypatch.setattr(os, "stat", counted_stat)
    monkeypatch.setattr(json, "loads", counted_loads)
    for _ in range(5):
        answer = await engine.manifests.pull(asked, body=True)
        assert answer.raw == raw
        await engine.drain()
    assert "MainThread" not in stats.keys() | parses.keys()
    # Read from the disk, and looked through; later only the first thousand that were lacking.
    assert parses.total() == 2
    assert stats.total() < 3000 + 4 * 1100
    await engine.close()


async def test_a_download_that_another_process_leads_tells_nothing_of_the_upstream(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    """Two failures, a followed download and one more failure are three in a row."""
    blob = upstream.add_content("app", random_blob(1_000_000))
    repository, digest = Repository(upstream.registry, "app"), Digest.parse(blob.digest)
    config = Config(
        upstreams={upstream.registry: entry(upstream)}, fetch=Fetch(retries=1, negative_ttl=0.0)
    )
    leader, follower = (
        Engine(store, config, backends(store, config))
        for store in (Store(tmp_path), Store(tmp_path))
    )

    async def fails() -> None:
        with pytest.raises(UpstreamUnavailable):
            await follower.manifests.pull(Reference(repository, "v1"), body=True)

    upstream.fault("/manifests/", Fault(status=500))
    upstream.fault("/blobs/", Fault(stall_after=500_000))
    async with asyncio.timeout(20):
        led, _ = await leader.blobs.pull(repository, digest)
        for _ in range(2):
            await fails()
        followed, _ = await follower.blobs.pull(repository, digest)
        assert isinstance(led, Fill)
        assert isinstance(followed, Fill)
        upstream.release()
        await led.finished()
        await followed.finished()
        assert upstream.count("/blobs/") == 1
        assert follower.upstreams.states()[0].condition == "available"
        await fails()
        assert follower.upstreams.states()[0].condition == "unreachable"
        await leader.close()
        await follower.close()


class BrokenLog(io.StringIO):
    def write(self, text: str) -> int:
        raise RuntimeError("another bug")


@pytest.mark.parametrize("log_works", [True, False], ids=["logged", "in the log, too"])
async def test_a_blob_whose_fill_meets_a_bug_keeps_no_other_from_being_fetched_ahead(
    tmp_path: Path,
    upstream: FakeUpstream,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    log_works: bool,
) -> None:
    """There is one fill in the background at a time, and the first layer ends it."""
    monkeypatch.setattr(sys, "stderr", sys.__stderr__ if log_works else BrokenLog())
    monkeypatch.setattr(log, "_queued", True)  # a thread writes, as in a server
    made = upstream.add("app", image("app", layers=3), tag="v1")
    broken, *others = (Digest.parse(layer.digest) for layer in made.layers)
    repository = Repository(upstream.registry, "app")
    config = Config(upstreams={upstream.registry: entry(upstream)}, fetch=Fetch(background_fills=1))
    store = Store(tmp_path)
    make = backends(store, config)

    def make_broken(upstream: Upstream) -> Backend:
        backend = make(upstream)
        fetch = backend.fetch_blob

        def fetch_blob(download: Download, **more: Any) -> None:
            if download.digest == broken:
                raise ZeroDivisionError("a bug")
            fetch(download, **more)

        backend.fetch_blob = fetch_blob  # type: ignore[method-assign]
        return backend

    engine = Engine(store, config, make_broken)
    async with asyncio.timeout(20):
        await engine.manifests.pull(Reference(repository, "v1"), body=True)
        await engine.drain()
    await engine.close()
    assert not store.blobs.path(broken).exists()
    assert all(store.blobs.path(each).exists() for each in others)
    log.flush()
    assert ("ZeroDivisionError: a bug" in capfd.readouterr().err) is log_works
