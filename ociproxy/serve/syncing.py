"""`sync` beside the server: which entry of the configuration is due, in its window.

A child process does the work, one for a store (`housekeeping`).
Tests: tests/serve/test_sync.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ociproxy.clock import SystemClock
from ociproxy.load.sync import last_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.clock import Clock
    from ociproxy.config.settings import Config
    from ociproxy.store.store import Store


_FAILED_PAUSE: Final = 600.0
"""Seconds until an entry is tried again whose run ended with an error, such as a list that cannot
be read: the others have their turn meanwhile."""


class SyncJob:
    """A job of the housekeeper."""

    name = "sync"

    def __init__(self, store: Store, config: Config, *, clock: Clock | None = None) -> None:
        self._store = store
        self._config = config
        self._clock = clock or SystemClock()
        self._running = ""
        self._paused: dict[str, float] = {}
        """Until when (monotonic) the entry of a key is not tried."""

    def use(self, config: Config) -> None:
        self._config = config
        self._paused = {}

    def due(self) -> Sequence[str] | None:
        config, now = self._config, self._clock.now()
        if config.serve.offline:
            return None
        for each in config.sync:
            if self._paused.get(each.key, 0.0) > self._clock.monotonic():
                continue
            # A file of a few hundred bytes: another process may have written it.
            if each.next_run(last_run(self._store, each), now) <= now:
                self._running = each.key
                timeout = round(config.load.pull_timeout * 1000)
                level = ["--log-level", config.log.level]
                return ["sync", each.key, *level, "--pull-timeout", str(timeout)]
        return None

    def heard(self, event: dict[str, Any]) -> None:
        """The command says all in the log, which is the server's."""

    def ended(self, code: int) -> None:
        """A run that came to its end wrote down when it began."""
        if code:
            self._paused[self._running] = self._clock.monotonic() + _FAILED_PAUSE
