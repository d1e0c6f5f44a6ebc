"""`ociproxy sync KEY`: one run of an entry of `sync`, as a child of the server that found it due.

Tests: tests/serve/test_sync.py.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ociproxy import log
from ociproxy.cli.backends import backends
from ociproxy.cli.capped import capped
from ociproxy.cli.load_run import LoadRun, leave
from ociproxy.cli.options import common, configuration, json_events, pull_timeout
from ociproxy.cli.screen import Screen
from ociproxy.cli.sources import machine_platform, read_wanted
from ociproxy.cli.terminal import INTERRUPTED
from ociproxy.errors import OciProxyError
from ociproxy.load.sync import SyncRun, matching
from ociproxy.store.store import open_existing

if TYPE_CHECKING:
    from ociproxy.config.schedule import Sync
    from ociproxy.load.imagelist import Wanted
    from ociproxy.store.store import Store

_CHANGED: Final = 3
"""Exit code where the entry is not there any more: the server tries it later, and not at once."""


@click.command("sync", hidden=True)
@click.argument("key")
@common
@pull_timeout
@json_events
@click.pass_context
def sync_command(
    ctx: click.Context,
    key: str,
    image_path: Path | None,
    config_path: Path | None,
    log_level: str | None,
    log_format: str | None,
    pull_timeout: float | None,
    as_json: bool,
) -> None:
    """Sync the images of one entry of the configuration now. Says all in the log."""
    config = configuration(
        config_path,
        image_path=image_path,
        log_level=log_level,
        log_format=log_format,
        load={"pull_timeout": pull_timeout},
    )
    log.set_up(config.log.level, config.log.format)
    sync = next((each for each in config.sync if each.key == key), None)
    if sync is None:
        reason = "the configuration file has changed since: reload the server"
        log.event(logging.WARNING, "sync not begun", key=key, reason=reason)
        ctx.exit(_CHANGED)
    try:
        store = open_existing(config.store.path)
        running = SyncRun(store, config, sync)
        run = LoadRun(
            config,
            backends(store, config),
            Screen(),
            running,
            referrers=sync.referrers,
            admits=running.admits,
        )
        wanted = running.ordered(_wanted(store, sync))
        with capped(store, config, config_path):
            asyncio.run(run.run(store, wanted, only_find=False))
        if run.interrupted:
            leave(INTERRUPTED)
        running.end(run.summary)
    except OciProxyError as exc:
        log.event(logging.ERROR, "sync failed", sync=sync, reason=exc)
        ctx.exit(exc.exit_code)


def _wanted(store: Store, sync: Sync) -> list[Wanted]:
    """Raises ImageListInvalid, StoreError."""
    if isinstance(sync.images, Path):
        return read_wanted([str(sync.images)], [], sync.platforms or machine_platform())
    return list(matching(store, sync.images, sync.platforms))
