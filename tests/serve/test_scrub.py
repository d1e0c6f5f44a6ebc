"""A server that finds what has rotted on the disk before a client needs it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ociproxy.config.local_settings import Store as Settings
from ociproxy.config.settings import Config
from ociproxy.serve import scrubbing
from ociproxy.serve.scrubbing import Scrub
from ociproxy.store.passes import Pass, PassFile
from ociproxy.store.store import Store
from tests.images import image
from tests.server import Mirror, upstream_entry
from tests.stores import damage, put, stored
from tests.upstream import FakeUpstream

MADE = image("scrubbed", layers=30, layer_size=1000)


def test_what_has_rotted_is_found_logged_and_fetched_again(
    mirror: Callable[..., Mirror], upstream: FakeUpstream, tmp_path: Path
) -> None:
    upstream.add("app", MADE, tag="1")
    reference = f"{upstream.registry}/app:1"
    store = Store(tmp_path / "store")
    put(store, reference, MADE)
    rotten = min(MADE.blobs, key=lambda each: each.encoded)
    file = stored(store, rotten)
    state = file.stat()
    damage(file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # no stat shows it
    settings = {"scrub": "10s"}
    server = mirror(
        {"store": settings, "upstreams": [upstream_entry(upstream.url)]}, store=store.root
    )
    server.wait_for_log("damage repaired")
    log = server.log()
    assert f"damage found file=blobs/{rotten.encoded}" in log
    assert f"images=1 first={reference}" in log
    assert f"damage repaired image={reference}" in log
    assert server.blob(upstream.registry, "app", rotten.digest).body == rotten.data
    assert file.read_bytes() == rotten.data


def test_a_turn_is_due_once_an_hour_over_all_servers_and_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrubbing, "_START", 0.0)
    monkeypatch.setattr(scrubbing, "_LOOK", 0.0)
    store, now = Store(tmp_path), time.time()
    passes = PassFile(store, "scrub")

    def due(scrub: float | None = 30 * 86400.0) -> object:
        return Scrub(store, Config(store=Settings(scrub=scrub))).due()

    assert due() == ["check", "--scrub", "--log-level", "info"]
    passes.write(Pass(now - 86400, "4" * 16, saved=now - 60))
    assert due() is None
    passes.write(Pass(now - 86400, "4" * 16, saved=now - 3700))
    assert due() is not None
    assert due(scrub=None) is None


def test_a_server_that_has_just_started_scrubs_nothing(tmp_path: Path) -> None:
    assert Scrub(Store(tmp_path), Config()).due() is None
