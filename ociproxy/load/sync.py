"""`sync`: chosen images are revalidated and completed, those first that were not for the longest.

A run is a load. It begins no image whose upstream is left alone, throttles, or has little left of
its quota, and none once its window has closed: these wait for the next run.
Tests: tests/serve/test_sync.py.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.clock import SystemClock
from ociproxy.config.units import utc_time
from ociproxy.errors import UpstreamError, UpstreamRateLimited, UpstreamUnavailable
from ociproxy.load.imagelist import Wanted
from ociproxy.load.progress import Watcher
from ociproxy.load.ready import ReadyCheck
from ociproxy.oci.image import platforms_of
from ociproxy.oci.reference import Reference
from ociproxy.store.files import store_errors
from ociproxy.store.image import read_contents
from ociproxy.store.inventory import is_only_named
from ociproxy.store.look import Look
from ociproxy.store.staging import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ociproxy.clock import Clock
    from ociproxy.config.schedule import Sync
    from ociproxy.config.settings import Config
    from ociproxy.errors import OciProxyError
    from ociproxy.fetch.upstreams.upstreams import UpstreamState
    from ociproxy.load.progress import Result, Summary
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.platform import Platform
    from ociproxy.store.store import Store

_ASKABLE: Final = ("available", "probing")
"""Conditions of an upstream in which a request is sent: the second one finds out whether it is
back."""


def last_run(store: Store, sync: Sync) -> float | None:
    """When the last run that came to its end began, in seconds since the epoch; None before the
    first. Raises StoreError."""
    path = _record(store, sync)
    with store_errors(path), suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        return datetime.fromisoformat(json.loads(path.read_bytes())["began"]).timestamp()
    return None


def _record(store: Store, sync: Sync) -> Path:
    return store.root / "sync" / f"{sync.key}.json"


def matching(
    store: Store, patterns: Sequence[str], platforms: tuple[Platform, ...]
) -> Iterator[Wanted]:
    """The tags of the store that a glob matches. Without `platforms` those of each that are stored:
    a tag of which the store has nothing but the name is not wanted. Raises StoreError."""
    look = Look(store)
    for repository in store.refs.repositories():
        for tag in store.refs.tags(repository):
            reference = Reference(repository, tag)
            if not any(reference.matches(each) for each in patterns):
                continue
            top = store.refs.find(reference)
            if top is None or is_only_named(store, repository, top):
                continue
            chosen = platforms
            if not chosen:
                contents = read_contents(store, repository, top, look=look)
                chosen = platforms_of(each.platform for each in contents.images)
            yield Wanted(reference, chosen, "the store")


class SyncRun(Watcher):
    """One run, as the loader's watcher. It logs what it hears. Belongs to one event loop."""

    def __init__(
        self, store: Store, config: Config, sync: Sync, *, clock: Clock | None = None
    ) -> None:
        self._store = store
        self._sync = sync
        self._clock = clock or SystemClock()
        self._began = self._clock.now()
        self._config = config
        self._before: dict[Reference, Digest] = {}
        """What the tags meant that are being asked about."""
        self._away: dict[str, str] = {}
        """Upstreams that this run asks no more, and why."""
        self._closed = False
        self._moved = self._current = 0

    def ordered(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        """Those first whose tag was not resolved for the longest: what this run does not come to
        has its turn in the next one. Blocks. Raises StoreError."""

        def age(each: Wanted) -> float:
            record = self._store.refs.find_tag(each.reference.repository, each.reference.tag or "")
            return -math.inf if record is None else record.resolved

        found = sorted(wanted, key=age)
        log.event(logging.INFO, "sync began", sync=self._sync, images=len(found))
        return found

    def admits(self, wanted: Wanted, state: UpstreamState) -> bool:
        """Whether to begin an image. Raises StoreError."""
        if self._closed or not self._sync.is_open(self._clock.now()):
            if not self._closed:
                log.event(logging.INFO, "sync window closed", sync=self._sync)
            self._closed = True
            return False
        if state.registry in self._away:
            return False
        quota = state.quota
        if state.condition not in _ASKABLE:
            self._postpone(state.registry, f"left alone: {state.condition}")
            return False
        if quota is not None and quota.is_low:
            self._postpone(state.registry, f"{quota.remaining} pulls left of {quota.limit}")
            return False
        known = self._store.refs.find(wanted.reference)
        if known is not None:
            self._before[wanted.reference] = known.digest
        return True

    def loaded(self, result: Result) -> None:
        reference, digest = result.image.reference, result.image.top.descriptor.digest
        before = self._before.pop(reference, None)
        if before == digest and not result.fetched:
            self._current += 1
            return
        moved = before not in (None, digest)
        self._moved += moved
        log.event(
            logging.INFO,
            "tag moved" if moved else "image completed",
            reference=reference,
            digest=digest,
            previous=before if moved else None,
            bytes=result.fetched,
            seconds=result.seconds,
        )

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        self._before.pop(wanted.reference, None)
        kept = ReadyCheck(self._store, self._config, referrers=False).check(wanted).ready
        log.event(
            logging.INFO if kept else logging.WARNING,
            "image not synced",
            reference=wanted.reference,
            kept="yes" if kept else "no",
            reason=error,
        )
        if isinstance(error, UpstreamError) and _is_away(error):
            self._postpone(error.upstream, error.reason)

    def _postpone(self, registry: str, reason: str) -> None:
        if self._away.setdefault(registry, reason) is reason:
            log.event(logging.WARNING, "sync postponed", upstream=registry, reason=reason)

    def end(self, summary: Summary) -> None:
        """The run came to its end: say so, and write it down. Raises StoreError."""
        now = self._clock.now()
        following = self._sync.next_run(self._began, now)
        outcome = {
            "images": summary.loaded + summary.failed + summary.untried,
            "current": self._current,
            "moved": self._moved,
            "completed": summary.loaded - self._current - self._moved,
            "failed": summary.failed,
            "postponed": summary.untried,
            "bytes": summary.fetched,
        }
        record = {
            "sync": str(self._sync),
            "began": utc_time(self._began),
            "ended": utc_time(now),
            **outcome,
            "window_closed": self._closed,
            "upstreams_postponed": self._away,
        }
        data = json.dumps(record, indent=1).encode() + b"\n"
        write_atomically(_record(self._store, self._sync), data, staging=self._store.staging.root)
        seconds = now - self._began
        fields = {**outcome, "seconds": seconds, "next": utc_time(following)}
        log.event(logging.INFO, "sync ended", sync=self._sync, **fields)


def _is_away(error: UpstreamError) -> bool:
    """Whether an upstream throttles or cannot be reached, so that other images fare no better."""
    return isinstance(error, UpstreamRateLimited) or (
        isinstance(error, UpstreamUnavailable) and error.unreachable
    )
