"""One load in a process of its own: engine, bars, signals, and how the process ends.

Tests: tests/load/test_interrupted.py, tests/cli/test_progress.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NoReturn

from ociproxy import log
from ociproxy.cli.memory import keep_pieces
from ociproxy.cli.terminal import Step
from ociproxy.fetch.engine import Engine
from ociproxy.load.loader import Loader
from ociproxy.load.progress import LoadProgress, Summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ociproxy.cli.screen import Screen
    from ociproxy.config.settings import Config
    from ociproxy.fetch.upstreams.upstreams import MakeBackend, UpstreamState
    from ociproxy.load.imagelist import Wanted
    from ociproxy.load.progress import Watcher
    from ociproxy.store.store import Store

_GRACE: Final = 2.0
"""Seconds that threads have, once the load is interrupted, to close what they write: that takes
milliseconds, and a user who pressed Ctrl-C is waiting."""


class LoadRun:
    """Runs one loader. `summary` and `interrupted` are true at any moment, also after an error."""

    def __init__(
        self,
        config: Config,
        make_backend: MakeBackend,
        screen: Screen,
        watcher: Watcher,
        *,
        referrers: bool,
        fail_fast: bool = False,
        admits: Callable[[Wanted, UpstreamState], bool] | None = None,
    ) -> None:
        self._config = patient(config)
        self._make_backend = make_backend
        self._screen = screen
        self._watcher = watcher
        self._referrers = referrers
        self._fail_fast = fail_fast
        self._admits = admits
        self.summary = Summary()
        self.interrupted = False

    async def run(
        self, store: Store, wanted: list[Wanted], *, only_find: bool, known: Store | None = None
    ) -> None:
        """Load into the store; or with `only_find` fetch manifests and configs, and only the
        configs are stored. What `known` has counts as here then. Raises StoreError."""
        keep_pieces()
        engine = Engine(store, self._config, self._make_backend)
        loader = Loader(
            engine,
            self._config,
            self._watcher,
            referrers=self._referrers,
            fail_fast=self._fail_fast,
            known=known,
            admits=self._admits,
        )
        self.summary = loader.progress.summary
        work = loader.find(wanted) if only_find else loader.run(wanted)
        working = asyncio.create_task(work)
        _interruptible(working)
        try:
            async with self._screen.watching(
                lambda: _overall(loader.progress, len(wanted), only_find=only_find),
                lambda: _steps(loader.progress),
            ):
                await asyncio.wait([working])
        finally:
            await engine.close()
        self.interrupted = working.cancelled()
        if not self.interrupted:
            working.result()


def patient(config: Config) -> Config:
    """For a command that retries by itself: the breaker must not refuse an upstream for longer than
    the command waits between two tries."""
    pause = min(config.fetch.pause, config.fetch.retry_wait_max)
    return replace(config, fetch=replace(config.fetch, pause=pause))


def leave(code: int) -> NoReturn:
    """End the process now. A thread that waits for a silent upstream would keep the interpreter
    alive until its time-out, and nothing that the thread could bring is of use any more."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
    limit = time.monotonic() + _GRACE
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, limit - time.monotonic()))
    log.flush()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _interruptible(work: asyncio.Task[Summary]) -> None:
    """The first SIGINT or SIGTERM cancels the work; a second one of the same ends the process."""
    loop = asyncio.get_running_loop()

    def interrupt(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)


def _overall(progress: LoadProgress, total: int, *, only_find: bool) -> Step:
    done = progress.summary.loaded + progress.summary.failed
    expected = None if only_find else progress.expected
    return Step("all", f"{done}/{total} images", progress.arrived, expected)


def _steps(progress: LoadProgress) -> Iterator[Step]:
    for active in progress.active:
        size = None if active.image is None else active.size
        yield Step(active, str(active.wanted.reference), progress.arrived_of(active), size)
