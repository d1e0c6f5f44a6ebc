"""`check --repair`: one repair in an event loop of its own, and what it prints.

Tests: tests/load/test_repair.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ociproxy.cli.load_run import patient
from ociproxy.cli.terminal import Step, print_event
from ociproxy.fetch.engine import Engine
from ociproxy.load.repair import Repair, Watcher

if TYPE_CHECKING:
    from ociproxy.cli.screen import Screen
    from ociproxy.config.settings import Config
    from ociproxy.errors import Busy, UpstreamError
    from ociproxy.fetch.upstreams.upstreams import MakeBackend
    from ociproxy.store.check import BrokenImage, Findings
    from ociproxy.store.records import Record
    from ociproxy.store.store import Store


async def repair(
    store: Store,
    config: Config,
    make_backend: MakeBackend,
    findings: Findings,
    screen: Screen,
    *,
    as_json: bool,
) -> None:
    """Raises StoreError."""
    config = patient(config)
    engine = Engine(store, config, make_backend)
    try:
        watcher = _Report(store, screen, as_json=as_json)
        async with screen.watching(
            lambda: Step("all", "repair", engine.blobs.bytes_fetched, None), lambda: ()
        ):
            await Repair(engine, config, watcher).run(findings)
    finally:
        await engine.close()


class _Report(Watcher):
    def __init__(self, store: Store, screen: Screen, *, as_json: bool) -> None:
        self._root = store.root
        self._screen = screen
        self._json = as_json

    def fetched(self, image: BrokenImage) -> None:
        self._image(image, "repaired", "")

    def failed(self, image: BrokenImage, reason: str) -> None:
        self._image(image, "failed", reason)

    def removed(self, record: Record) -> None:
        self._record(record, "removed", f"led to {record.digest}, which is not stored")

    def set_aside(self, record: Record) -> None:
        self._record(record, "removed", "was no record; it is in quarantine/")

    def busy(self, count: int, error: Busy) -> None:
        reason = f"{count} records stay: {error}; run it again"
        if self._json:
            print_event("busy", reason=reason)
        else:
            self._screen.line(reason)

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        if self._json:
            print_event("waiting", seconds=round(seconds, 3), reason=str(error))
        else:
            self._screen.line(f"waiting {seconds:.0f} s: {error}")

    def _image(self, image: BrokenImage, status: str, reason: str) -> None:
        name, digest = str(image.reference), str(image.top)
        if self._json:
            print_event(status, reference=name, digest=digest, reason=reason)
            return
        shown = name if digest in name else f"{name}@{digest}"
        self._screen.line(f"{status} {shown}{': ' if reason else ''}{reason}")

    def _record(self, record: Record, status: str, reason: str) -> None:
        file = str(record.path.relative_to(self._root))
        if self._json:
            print_event(status, file=file, reason=reason)
        else:
            self._screen.line(f"{status} {file}: {reason}")
