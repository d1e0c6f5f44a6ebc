"""`serve --preload-images`: the images of a list are loaded while the server serves.

One of the processes that share the store loads them, with an engine of its own; clients follow its
downloads. Transient failures are retried for as long as the server runs. An image that is whole in
the store needs no upstream, so the server also starts without a network.
"""

from __future__ import annotations

import asyncio
import logging
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import OciProxyError
from ociproxy.fetch.engine import Engine
from ociproxy.load.loader import Loader
from ociproxy.load.progress import Watcher
from ociproxy.load.ready import ReadyCheck

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.config.settings import Config
    from ociproxy.fetch.upstreams.upstreams import MakeBackend
    from ociproxy.load.imagelist import Wanted
    from ociproxy.load.progress import Result
    from ociproxy.store.store import Store

_AGAIN: Final = 60.0
"""Seconds between two tries of failed images."""
_LOOK: Final = 1.0
"""Seconds between two looks at whether the process that loads them still runs: of a longer pause
`Silence` counts no more than this."""
_HOLD: Final = 5.0
"""Seconds between two looks of the claim's owner, after the load, at whether it still owns it."""


async def preload(
    store: Store, config: Config, make_backend: MakeBackend, wanted: Sequence[Wanted]
) -> None:
    """Runs as long as the server, which cancels it."""
    if not wanted:
        return
    try:
        await _preload(store, config, make_backend, wanted)
    except Exception as exc:  # noqa: BLE001 the task's end: logged; the server goes on
        log.failure("preload failed", exc)


async def _preload(
    store: Store, config: Config, make_backend: MakeBackend, wanted: Sequence[Wanted]
) -> None:
    if config.serve.offline:
        reason = "this mirror is offline"
        await _report(store, config, [(each, reason) for each in wanted])
        return
    # One process for each list. When it ends, its lock is free and another process takes over.
    name = sha256("\n".join(map(str, wanted)).encode()).hexdigest()[:16]
    claim = store.removals.claim(f"preload-{name}")
    loop = asyncio.get_running_loop()
    try:
        # Another process holds it, and does not tell when it ends.
        while not await loop.run_in_executor(None, claim.take):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK)
        with claim.working():
            await _load(store, config, make_backend, wanted)
        while await loop.run_in_executor(None, claim.is_held):  # noqa: ASYNC110 as above
            await asyncio.sleep(_HOLD)
    finally:
        claim.close()


async def _load(
    store: Store, config: Config, make_backend: MakeBackend, wanted: Sequence[Wanted]
) -> None:
    while wanted:
        room = store.room.within(config.store, must_keep=True)
        engine = Engine(store, config, make_backend, room=room)
        watcher = _Log()
        try:
            summary = await Loader(engine, config, watcher).run(wanted)
            await _report(store, config, watcher.failures)
        except OciProxyError as exc:
            # The store is full or unusable; `/readyz` says so, too.
            log.event(logging.ERROR, "preload failed", reason=exc)
        else:
            log.event(
                logging.INFO,
                "preloaded",
                images=summary.loaded,
                failed=summary.failed,
                bytes=summary.fetched,
            )
            wanted = [each for each, error in watcher.failures if error.transient]
        finally:
            await engine.close()
        if wanted:
            await asyncio.sleep(_AGAIN)


class _Log(Watcher):
    def __init__(self) -> None:
        self.failures: list[tuple[Wanted, OciProxyError]] = []

    def loaded(self, result: Result) -> None:
        log.event(
            logging.INFO,
            "image loaded",
            reference=result.image.reference,
            digest=result.image.top.descriptor.digest,
            bytes=result.fetched,
            seconds=result.seconds,
            refused=len(result.image.refused) or None,
        )

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        self.failures.append((wanted, error))


async def _report(
    store: Store, config: Config, failures: Sequence[tuple[Wanted, OciProxyError | str]]
) -> None:
    """Log each image that could not be fetched, and whether the store has it all the same. Raises
    StoreError."""
    check = ReadyCheck(store, config, referrers=False)
    loop = asyncio.get_running_loop()
    for wanted, reason in failures:
        # In a thread: it reads all manifests of the image.
        found = await loop.run_in_executor(None, check.check, wanted)
        event, level = "image not loaded", logging.WARNING
        if found.ready:
            event, level = "image kept", logging.INFO
        log.event(level, event, reference=wanted.reference, reason=reason)
