"""What `import` prints: a line for each image, or JSON events, and a summary at the end.

Tests: tests/archive/importer/test_importer.py.
"""

from __future__ import annotations

import time
from collections import Counter
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from ociproxy.archive.importer.importer import Watcher
from ociproxy.archive.importer.results import EXIT_CODES, PUBLISHED, ImportResult, Status
from ociproxy.cli.terminal import print_event
from ociproxy.store.pruning.pins import Pin

if TYPE_CHECKING:
    from collections.abc import Callable

    from ociproxy.cli.screen import Screen
    from ociproxy.errors import OciProxyError
    from ociproxy.oci.digest import Digest
    from ociproxy.store.store import Store

_SHOWN: Final = 10
"""Problems, or platforms, of one image that are printed; `--json` prints more."""


class Report(Watcher):
    def __init__(self, screen: Screen, *, as_json: bool, verbose: bool = False) -> None:
        self._screen = screen
        self._show: Callable[[Digest], str] = str if verbose else attrgetter("short")
        self._json = as_json
        self._began = time.monotonic()
        self._counts: Counter[Status] = Counter()
        self._failures: list[OciProxyError] = []

    @property
    def exit_code(self) -> int:
        if self._failures:
            return max(failure.exit_code for failure in self._failures)
        codes = (code for status, code in EXIT_CODES.items() if self._counts[status])
        return next(codes, 0)

    def image(self, result: ImportResult) -> None:
        self._counts[result.status] += 1
        if self._json:
            print_event(
                "image",
                source=result.source,
                reference=result.name,
                digest=str(result.digest),
                status=result.status.value,
                previous=str(result.previous) if result.previous else None,
                problems=list(result.problems),
                leftOut=list(result.left_out),
            )
            return
        for line in _lines(result, self._show):
            self._screen.line(line)

    def note(self, source: str, text: str) -> None:
        if self._json:
            print_event("note", source=source, text=text)
        else:
            self._screen.line(f"{source}: {text}")

    def failed(self, source: str, error: OciProxyError) -> None:
        self._failures.append(error)
        if self._json:
            print_event("failed", source=source, error=type(error).__name__, reason=str(error))
        else:
            self._screen.line(f"failed {error}")

    def end(self, *, interrupted: bool) -> None:
        seconds = time.monotonic() - self._began
        counts = {status: self._counts[status] for status in Status if self._counts[status]}
        if self._json:
            print_event(
                "done",
                images={status.value: count for status, count in counts.items()},
                failed=len(self._failures),
                seconds=round(seconds, 3),
                interrupted=interrupted,
            )
            return
        parts = [f"{count} {status.value}" for status, count in counts.items()]
        if self._failures:
            parts.append(f"{len(self._failures)} of the sources failed")
        text = f"{', '.join(parts) or 'nothing imported'} in {seconds:.1f} s"
        if interrupted:
            text += "; interrupted: run it again to go on"
        self._screen.line(text)


class PinImported(Watcher):
    """`import --pin`: pins each image that got into the store, and passes all that it hears to
    `next_watcher`."""

    def __init__(self, store: Store, next_watcher: Watcher) -> None:
        self._store = store
        self._next = next_watcher

    def image(self, result: ImportResult) -> None:
        if result.status in PUBLISHED:
            self._store.pins.add(Pin.parse(result.name, "import"), time.time())
        self._next.image(result)

    def note(self, source: str, text: str) -> None:
        self._next.note(source, text)

    def failed(self, source: str, error: OciProxyError) -> None:
        self._next.failed(source, error)


def _lines(result: ImportResult, show: Callable[[Digest], str]) -> list[str]:
    name = result.name
    shown = name if str(result.digest) in name else f"{name}@{show(result.digest)}"
    head = f"{result.status.value} {shown}"
    if result.previous is not None and result.previous != result.digest:
        verb = "was" if result.status is Status.REPLACED else "is"
        head += f", {verb} {show(result.previous)}"
    if result.left_out and result.status in PUBLISHED:
        head += f", without {', '.join(result.left_out[:_SHOWN])}"
    if not result.problems:
        return [head]
    lines = [f"{head} ({result.source}):"]
    lines += [f"  {problem}" for problem in result.problems[:_SHOWN]]
    if len(result.problems) > _SHOWN:
        lines.append(f"  and {len(result.problems) - _SHOWN} more: see --json")
    return lines
