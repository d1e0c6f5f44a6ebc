"""The scrub beside the server: when its next turn is due, and what it found, in the log.

A child process does the work, one for a store (`housekeeping`). A pass is spread over
`store.scrub`; each turn reads what has become due of it. An offline mirror scrubs, too: no client
may get what is damaged.
Tests: tests/serve/test_scrub.py.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from ociproxy import log
from ociproxy.store.passes import SCRUB, PassFile, turn_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.config.settings import Config
    from ociproxy.store.store import Store

_START: Final = 60.0
"""Seconds that a server runs before its first turn: clients go first after a start."""
_LOOK: Final = 60.0
"""Seconds between two looks at the file: another server may have had the turn."""
_SHOWN: Final = 10
"""Images that a line of the log names."""


class Scrub:
    name = "scrub"

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._config = config
        self._passes = PassFile(store, SCRUB)
        length = config.store.scrub
        self._not_before = time.monotonic() + (min(_START, turn_of(length)) if length else 0.0)

    def use(self, config: Config) -> None:
        self._config = config
        self._not_before = min(self._not_before, time.monotonic() + _LOOK)

    def due(self) -> Sequence[str] | None:
        length, now = self._config.store.scrub, time.monotonic()
        if length is None or now < self._not_before:
            return None
        found = self._passes.read()
        turn = turn_of(length)
        since = turn if found is None else abs(time.time() - found.saved)
        if since < turn:
            self._not_before = now + min(_LOOK, turn - since)
            return None
        level = ["--log-level", self._config.log.level]
        return ["check", "--scrub", *level, *(["--offline"] if self._config.serve.offline else [])]

    def heard(self, event: dict[str, Any]) -> None:
        match event:
            case {"event": "damaged", "file": file, "digest": digest, "reason": reason}:
                images = event["images"] or ()
                named = ", ".join(images[:_SHOWN])
                log.event(
                    logging.ERROR,
                    "damage found",
                    file=file,
                    digest=digest,
                    reason=reason,
                    images=len(images),
                    first=named,
                )
            case {"event": "repaired", "reference": image}:
                log.event(logging.WARNING, "damage repaired", image=image)
            case {"event": "failed", "reference": image, "reason": reason}:
                log.event(logging.ERROR, "damage not repaired", image=image, reason=reason)
            case {"event": "scrub", "part": 1.0, "began": began}:
                log.event(logging.INFO, "scrub pass ended", seconds=time.time() - began)
            case _:
                pass

    def ended(self, code: int) -> None:
        """The log has what was found. The pass remembers how far the turn came."""
