"""Checks that go on where an earlier one was interrupted: `check --resume`, and the scrub of a
server, which takes a pass over all files in short turns.

Tests: tests/cli/test_check_passes.py, tests/serve/test_scrub.py.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click

from ociproxy.cli.terminal import print_event
from ociproxy.store.check import Findings, check
from ociproxy.store.damage import Damage, FileCheck
from ociproxy.store.files import digest_of
from ociproxy.store.passes import END, SCRUB, Pass, PassFile, position_at, turn_of

if TYPE_CHECKING:
    from ociproxy.cli.check_report import Report
    from ociproxy.cli.screen import Screen
    from ociproxy.config.settings import Config
    from ociproxy.store.store import Store

_SAVE_EVERY: Final = 10.0
"""Seconds of work that a kill costs; a large file is begun anew."""
_IMAGES: Final = 100
"""Images that a scrub names for one damaged file: a server reads events of a bounded length."""


class Progress:
    """A pass, and the file that remembers it."""

    def __init__(self, store: Store, name: str) -> None:
        """Raises StoreError."""
        self._store = store
        self._file = PassFile(store, name)
        now, found = time.time(), self._file.read()
        if found is None:
            found = Pass(now)
        elif found.position == END or found.began > now:
            found = Pass(now, finished=found.ended, damaged=found.damaged)
        self.now = now
        self.found = found
        self._saved = time.monotonic()

    def run(self, files: FileCheck) -> None:
        """Look at the files from the position on. Remembers how far it came, whatever ends it."""

        def progressed() -> None:
            if time.monotonic() - self._saved > _SAVE_EVERY:
                self.save(files)

        try:
            files.run(self.found.damaged, progressed=progressed)
        finally:
            self._add_what_is_gone(files)
            self.save(files)

    def save(self, files: FileCheck) -> None:
        """Raises StoreError."""
        damaged = {each.file: each.reason for each in files.damaged.values()}
        position, now = files.position, time.time()
        self.found = replace(self.found, position=position, saved=now, damaged=damaged)
        self._file.write(self.found)
        self._saved = time.monotonic()

    def repaired(self) -> None:
        """Nothing that was found damaged is left to do. Raises StoreError."""
        self.found = replace(self.found, damaged={})
        self._file.write(self.found)

    def end(self) -> None:
        """Forget the pass. Raises StoreError."""
        self._file.remove()

    def _add_what_is_gone(self, files: FileCheck) -> None:
        """What an interrupted run found and took out of service: no other has come in its place."""
        for file, reason in self.found.damaged.items():
            digest = digest_of(file.rpartition("/")[2])
            path = self._store.root / file
            if digest is not None and file not in files.damaged and not path.exists():
                out = (self._store.quarantine / path.name).exists()
                files.damaged[file] = Damage(file, digest, reason, out)


def scrub(
    store: Store,
    config: Config,
    screen: Screen,
    report: Report,
    *,
    as_json: bool,
) -> bool:
    """One turn: hash what is due, and repair what is damaged. False where it was interrupted.
    Raises StoreError."""
    length = config.store.scrub
    if length is None:
        raise click.UsageError("--scrub: store.scrub is never, so nothing is due")
    progress = Progress(store, SCRUB)
    elapsed = progress.now + turn_of(length) - progress.found.began
    files = FileCheck(
        store,
        jobs=1,
        rate=config.store.scrub_rate,
        take_out=True,
        first=progress.found.position,
        end=max(position_at(elapsed / length), progress.found.position),
    )
    findings: Findings | None = None
    with suppress(KeyboardInterrupt):
        progress.run(files)
        findings = _of_damage(store, files)
        report.store(str(store.root), files, findings)
        if findings.broken:
            _repair(store, config, findings, screen, as_json=as_json)
        if files.damaged:
            progress.repaired()
    found = progress.found
    if as_json:
        print_event("scrub", part=found.part, began=found.began, finished=found.finished)
    else:
        screen.line(f"the pass has done {100 * found.part:.1f} % of all files")
    return findings is not None and not progress.found.damaged


def _of_damage(store: Store, files: FileCheck) -> Findings:
    """The images that need what is damaged. What others lack is not a scrub's to fetch."""
    if not files.damaged:
        return Findings()
    found = check(store, files.damaged)
    hit = {file: images[:_IMAGES] for file, images in found.hit.items()}
    return Findings(found.images, broken=[e for e in found.broken if e.damaged], hit=hit)


def _repair(
    store: Store, config: Config, findings: Findings, screen: Screen, *, as_json: bool
) -> None:
    # Imported only for a repair: what fetches takes much that a check needs not.
    from ociproxy.cli.backends import backends
    from ociproxy.cli.check_repair import repair

    make_backend = backends(store, config)
    asyncio.run(repair(store, config, make_backend, findings, screen, as_json=as_json))
