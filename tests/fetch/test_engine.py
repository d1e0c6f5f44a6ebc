"""The engine keeps house while it runs."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from ociproxy.cli.backends import backends
from ociproxy.config.settings import Config
from ociproxy.fetch.engine import Engine
from ociproxy.store.store import Store


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
