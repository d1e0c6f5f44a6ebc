"""How images that load side by side share the disk."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ociproxy.cli.backends import backends
from ociproxy.cli.load_run import LoadRun
from ociproxy.cli.screen import Screen
from ociproxy.config.settings import Config, Upstream
from ociproxy.fetch.engine import Engine
from ociproxy.load.imagelist import Wanted
from ociproxy.load.loader import Loader
from ociproxy.load.progress import Result, Summary, Watcher
from ociproxy.oci.reference import Reference
from ociproxy.store import group_commit
from ociproxy.store.store import Store
from tests.images import image
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault


def config_for(upstream: FakeUpstream, *, jobs: int) -> Config:
    entry = Upstream(name=upstream.registry, scheme="http")
    config = Config(upstreams={entry.name: entry})
    return replace(config, load=replace(config.load, jobs=jobs))


def wanted_of(upstream: FakeUpstream, *tags: str) -> list[Wanted]:
    return [Wanted(Reference.parse(f"{upstream.registry}/app:{tag}")) for tag in tags]


def load(store: Store, upstream: FakeUpstream, tags: list[str], *, jobs: int) -> Summary:
    config, wanted = config_for(upstream, jobs=jobs), wanted_of(upstream, *tags)

    async def run() -> Summary:
        engine = Engine(store, config, backends(store, config))
        try:
            return await Loader(engine, config, Watcher()).run(wanted)
        finally:
            await engine.close()

    return asyncio.run(run())


def test_an_image_loads_while_the_one_before_it_waits_for_the_disk(
    tmp_path: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the last ones wait for no further ones."""
    monkeypatch.setattr(group_commit, "_GATHER", 60.0)
    tags = [f"v{number}" for number in range(5)]
    for tag in tags:
        upstream.add("app", image(tag), tag=tag)
    store = Store(tmp_path)
    made: list[int] = []
    store.commits.made = lambda manifests: made.append(len(manifests))
    assert load(store, upstream, tags, jobs=1).loaded == len(tags)
    assert made == [2, 2, 1]


class _Interrupting(Watcher):
    def loaded(self, _: Result) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_load_leaves_no_thread_that_its_end_would_wait_for(
    tmp_path: Path, upstream: FakeUpstream
) -> None:
    for tag in ("v1", "v2"):
        upstream.add("app", image(tag), tag=tag)
    upstream.fault("/manifests/v2", Fault(delay=30.0))
    others = set(threading.enumerate())
    store, config = Store(tmp_path), config_for(upstream, jobs=1)
    run = LoadRun(config, backends(store, config), Screen(), _Interrupting(), referrers=False)
    asyncio.run(run.run(store, wanted_of(upstream, "v1", "v2"), only_find=False))
    assert run.interrupted
    assert run.summary.loaded == 1
    limit = time.monotonic() + 10.0
    while any(t.name.startswith("group flush") for t in set(threading.enumerate()) - others):
        assert time.monotonic() < limit
        time.sleep(0.01)
    upstream.release()
