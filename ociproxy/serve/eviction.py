"""Keeping the store within `store.max_size` and `store.min_free`: when `prune --to-limits` is due,
and what it removed, in the log.

It is due where the number that all processes keep (`store/usage.py`) or the free disk says so, and
from time to time to count anew. An offline mirror removes nothing, for it could not come back.
"""

from __future__ import annotations

import logging
import time
from math import inf
from typing import TYPE_CHECKING, Any, Final

from ociproxy import log
from ociproxy.store.limits import Limits
from ociproxy.store.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.config.settings import Config
    from ociproxy.store.store import Store

_DUTY: Final = 5
"""Where next to nothing may go, it is tried again after so many times as long as a try takes."""
_PAUSE: Final = 5.0
"""Seconds until then at least. Also after a run that freed disk: the kernel frees what a response
still reads when that ends."""
_SAY_AGAIN: Final = 3600.0
"""Seconds between two warnings of the same state."""


class Eviction:
    name = "evict"

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._config = config
        self._began = 0.0
        self._not_before = -inf
        self._pinned: list[str] = []
        self._done: dict[str, Any] = {}
        self._warned: dict[str, float] = {}

    def use(self, config: Config) -> None:
        self._config = config
        self._not_before = -inf

    def due(self) -> Sequence[str] | None:
        config, now = self._config, time.monotonic()
        if config.serve.offline or now < self._not_before:
            return None
        limits = Limits.of(config.store, self._store.root)
        usage = self._store.usage.read() or Usage()
        counts = limits.max_size is not None or bool(config.store.pins)
        is_old = abs(time.time() - usage.counted) > config.store.evict_every
        if limits.cause(usage.stored, usage.wanted) is None and not (counts and is_old):
            return None
        self._began, self._done, self._pinned = now, {}, []
        preload = config.serve.preload_images
        return ["prune", "--to-limits", *(["--pinned", str(preload)] if preload else [])]

    def heard(self, event: dict[str, Any]) -> None:
        match event:
            case {"event": "image", "status": "removed"}:
                log.event(
                    logging.INFO,
                    "evicted",
                    image=event["reference"],
                    digest=event["digest"],
                    size=event["size"],
                    last_used=event["lastUsed"],
                    reason=event["cause"],
                )
            case {"event": "pinned"}:
                self._pinned.append(f"{event['reference']} ({event['status']})")
            case {"event": "done"}:
                self._done = event
            case _:
                pass

    def ended(self, code: int) -> None:
        now, done = time.monotonic(), self._done
        if not done:
            return  # it failed, and the log says so
        if done["freed"]:
            log.event(
                logging.INFO,
                "eviction",
                images=done["images"],
                blobs=done["blobs"],
                manifests=done["manifests"],
                freed=done["freed"],
                size=done["size"],
                seconds=now - self._began,
            )
        usage = self._store.usage.read()
        if usage is not None and usage.stuck:
            self._not_before = now + max(_PAUSE, _DUTY * (now - self._began))
            self._warn(
                "store limit exceeded",
                now,
                reason=done["cause"],
                size=done["size"],
                pinned=done["kept"]["pinned"],
                recent=done["kept"]["recent"],
            )
        elif done["freed"]:
            self._not_before = now + _PAUSE if done["cause"] == "store.min_free" else now
        if self._pinned:
            images, first = len(self._pinned), self._pinned[0]
            self._warn("pinned images incomplete", now, images=images, first=first)

    def _warn(self, name: str, now: float, **fields: object) -> None:
        if now - self._warned.get(name, -inf) > _SAY_AGAIN:
            self._warned[name] = now
            log.event(logging.WARNING, name, **fields)
