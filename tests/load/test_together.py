"""How images that load side by side share the disk."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from ociproxy.cli.backends import backends
from ociproxy.config.settings import Config, Upstream
from ociproxy.fetch.engine import Engine
from ociproxy.load.imagelist import Wanted
from ociproxy.load.loader import Loader
from ociproxy.load.progress import Summary, Watcher
from ociproxy.oci.reference import Reference
from ociproxy.store import group_commit
from ociproxy.store.store import Store
from tests.images import image
from tests.upstream import FakeUpstream


def load(store: Store, upstream: FakeUpstream, tags: list[str], *, jobs: int) -> Summary:
    entry = Upstream(name=upstream.registry, scheme="http")
    config = Config(upstreams={entry.name: entry})
    config = replace(config, load=replace(config.load, jobs=jobs))
    wanted = [Wanted(Reference.parse(f"{upstream.registry}/app:{tag}")) for tag in tags]

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
