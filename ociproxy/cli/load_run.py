"""One load, from its engine's start to its end: bars, signals, the order of stopping."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

from ociproxy.cli.progress import Step
from ociproxy.fetch.engine import Engine
from ociproxy.load.loader import Loader, Summary, Watcher

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ociproxy.cli.screen import Screen
    from ociproxy.config.settings import Config
    from ociproxy.errors import OciProxyError, UpstreamError
    from ociproxy.fetch.upstreams.upstreams import MakeBackend
    from ociproxy.load.imagelist import Wanted
    from ociproxy.load.loader import Result
    from ociproxy.store.store import Store


class LoadRun:
    """`summary` and `interrupted` say how far it came, however it ended."""

    def __init__(
        self,
        config: Config,
        make_backend: MakeBackend,
        screen: Screen,
        watchers: Sequence[Watcher],
        *,
        referrers: bool,
        fail_fast: bool,
    ) -> None:
        # The loader itself waits out what may pass: an upstream is never left alone for long.
        pause = min(config.fetch.pause, config.fetch.retry_wait_max)
        self._config = replace(config, fetch=replace(config.fetch, pause=pause))
        self._make_backend = make_backend
        self._screen = screen
        self._watchers = watchers
        self._referrers = referrers
        self._fail_fast = fail_fast
        self.summary = Summary()
        self.interrupted = False

    async def run(self, store: Store, wanted: list[Wanted], *, only_find: bool) -> None:
        """Raises StoreError."""
        engine = Engine(store, self._config, self._make_backend)
        loader = Loader(
            engine,
            self._config,
            _Each(self._watchers),
            referrers=self._referrers,
            fail_fast=self._fail_fast,
        )
        self.summary = loader.summary
        work = loader.find(wanted) if only_find else loader.run(wanted)
        working = asyncio.create_task(work)
        _interruptible(working)
        try:
            async with self._screen.watching(
                lambda: _overall(loader, len(wanted), only_find=only_find),
                lambda: _steps(loader),
            ):
                await asyncio.wait([working])
        finally:
            await engine.close()
        self.interrupted = working.cancelled()
        if not self.interrupted:
            working.result()


class _Each(Watcher):
    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def loaded(self, result: Result) -> None:
        for watcher in self._watchers:
            watcher.loaded(result)

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        for watcher in self._watchers:
            watcher.failed(wanted, error)

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        for watcher in self._watchers:
            watcher.waiting(error, seconds)


def _interruptible(work: asyncio.Task[Summary]) -> None:
    """SIGINT and SIGTERM end the work in order; a second one ends everything."""
    loop = asyncio.get_running_loop()

    def interrupt(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)


def _overall(loader: Loader, total: int, *, only_find: bool) -> Step:
    done = loader.summary.loaded + loader.summary.failed
    expected = None if only_find else loader.expected
    return Step("all", f"{done}/{total} images", loader.arrived, expected)


def _steps(loader: Loader) -> Iterator[Step]:
    for active in loader.active:
        size = None if active.image is None else active.size
        yield Step(active, str(active.wanted.reference), loader.arrived_of(active), size)
