"""Keeping the store within `store.max_size` and `store.min_free`: when `prune --to-limits` is due,
and what it removed, in the log.

It is due where the number that all processes keep (`store/usage.py`) or the free disk says so, and
from time to time to count anew. An offline mirror removes nothing, for it could not come back.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Any, Final

from ociproxy import log
from ociproxy.errors import StoreFull
from ociproxy.metrics.counters import EVICTED_BYTES, EVICTED_IMAGES
from ociproxy.store.limits import Limits
from ociproxy.store.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.config.settings import Config
    from ociproxy.store.store import Store

_DUTY: Final = 5
"""Where next to nothing may go, it is tried again after so many times as long as a try takes."""
_LONGEST: Final = 60.0
"""Seconds until then at most, unless a try takes long: each time in a row the pause is doubled."""
_PAUSE: Final = 5.0
"""Seconds until then at least. Also after a run that freed disk: the kernel frees what a response
still reads when that ends."""
_VOID: Final = 3.0
"""Seconds for which what was promised may not change while others wait for it."""
_SAY_AGAIN: Final = 3600.0
"""Seconds between two warnings of the same state."""


class Eviction:
    name = "evict"

    def __init__(self, store: Store, config: Config) -> None:
        self._store = store
        self._config = config
        self._began = 0.0
        self._not_before = -inf
        self._pause = 0.0
        self._settled = -inf
        self._incomplete, self._first = 0, ""
        self._done: dict[str, Any] = {}
        self._cause: str | None = None
        self._wanted = 0
        self._promised: tuple[tuple[int, int], float] = (0, 0), 0.0
        self._warned: dict[str, tuple[object, float]] = {}
        self._is_reloaded = False

    def use(self, config: Config) -> None:
        self._config = config
        self._is_reloaded = True
        self._not_before, self._pause = -inf, 0.0

    def due(self) -> Sequence[str] | None:
        config, now = self._config, time.monotonic()
        if config.serve.offline or now < self._not_before:
            return None
        limits = Limits.of(config.store, self._store.root)
        if self._is_reloaded:
            self._is_reloaded = False
            self._store.usage.forget_pinned()  # the configuration may have other pins
        usage = self._store.usage.read()
        if usage is None:
            with suppress(StoreFull):  # made while there is room: it cannot be on a full disk
                self._store.usage.want(0)
            usage = Usage()
        if now < self._settled and not usage.wanted:
            return None
        counts = limits.max_size is not None or bool(config.store.pins)
        is_old = abs(time.time() - usage.counted) > config.store.evict_every
        self._cause = limits.cause(usage.stored, usage.wanted)
        is_old = is_old or self._is_promise_void(limits, usage, now)
        if self._cause is None and usage.stuck:
            # What was used just now may go by now: the next download asks for room again.
            self._store.usage.retry()
        if self._cause is None and not (counts and is_old):
            return None
        self._began, self._done, self._incomplete = now, {}, 0
        self._wanted = usage.wanted
        preload = config.serve.preload_images
        return ["prune", "--to-limits", *(["--pinned", str(preload)] if preload else [])]

    def _is_promise_void(self, limits: Limits, usage: Usage, now: float) -> bool:
        """Whether downloads wait for room that was promised to others, who do nothing with it. A
        count ends the promises of a process that was killed; for those of others it makes room."""
        seen = usage.reserved, usage.written
        if seen != self._promised[0] or not (usage.reserved and usage.wanted):
            self._promised = seen, now
        needed = usage.stored + usage.reserved + usage.wanted
        is_short = limits.max_size is not None and needed > limits.max_size
        is_void = is_short and now - self._promised[1] > _VOID
        if is_void:  # if it is not, for a process still works, then look again so much later
            self._promised = seen, now
        return is_void

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
                self._incomplete += 1
                if self._incomplete == 1:
                    self._first = f"{event['reference']} ({event['status']})"
            case {"event": "done"}:
                self._done = event
            case _:
                pass

    def ended(self, code: int) -> None:
        now, done = time.monotonic(), self._done
        if not done:
            return  # it failed, and the log says so
        if done["freed"]:
            EVICTED_IMAGES.add(by=done["images"])
            EVICTED_BYTES.add(by=done["freed"])
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
        is_stuck = usage is not None and usage.stuck > 0
        if is_stuck or (done["cause"] and not done["freed"]):
            self._back_off(now, _DUTY * (now - self._began))
            self._warn(
                "store limit exceeded",
                done["cause"],
                now,
                reason=done["cause"],
                limit=self._limit(done["cause"]),
                size=done["size"],
                wanted=self._wanted,
                pinned=done["kept"]["pinned"],
                recent=done["kept"]["recent"],
                reading=done["kept"]["reading"] or None,
            )
        elif self._cause and not done["freed"]:
            # The command reads the file anew: it may know another limit than this server does.
            self._back_off(now)
        else:
            self._pause = 0.0
            if done["freed"] and done["cause"] == "store.min_free":
                self._settled = now + _PAUSE
        if self._incomplete:
            images, first = self._incomplete, self._first
            self._warn("pinned images incomplete", (images, first), now, images=images, first=first)

    def _back_off(self, now: float, at_least: float = 0.0) -> None:
        self._pause = min(max(_PAUSE, 2 * self._pause), _LONGEST)
        self._not_before = now + max(self._pause, at_least)

    def _limit(self, cause: str | None) -> int | None:
        limits = Limits.of(self._config.store, self._store.root)
        return limits.max_size if cause == "store.max_size" else limits.min_free

    def _warn(self, name: str, state: object, now: float, **fields: object) -> None:
        """Once for a state, and again after `_SAY_AGAIN`."""
        before, when = self._warned.get(name, (None, -inf))
        if state != before or now - when > _SAY_AGAIN:
            self._warned[name] = state, now
            log.event(logging.WARNING, name, **fields)
