"""What the store holds, by the last walk of it: a child process walks, a thread here reads along.

The bytes by kind are counted every now and then. The images are looked for when an operator asks
for them, and kept up to a limit.
"""

from __future__ import annotations

import json
import logging
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ociproxy import log
from ociproxy.metrics.counters import CHILDREN, inherited

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.config.settings import Config
    from ociproxy.metrics.tally import Key, Tally
    from ociproxy.serve.housekeeping import MakeCommand

KEPT: Final = 16 * 1024 * 1024
"""Bytes of memory for the images that are kept, some 30,000; further ones are counted. While they
are looked for again, those of the last walk are kept as well."""
_OVERHEAD: Final = 160
"""Of these for each image, beside its line and its name: objects and places in lists."""
_FRESH: Final = 60.0
"""Seconds for which the images are not looked for again."""
_FIRST: Final = 2.0
"""Seconds until the first walk: the start of the server comes first."""
_LINE: Final = 64 * 1024
"""Bytes of an event: a longer one is left out, and counted."""
_TIME_LIMIT: Final = 3600.0
"""Seconds that a walk may take; then it is ended."""


@dataclass(frozen=True, slots=True)
class Held:
    """Files and bytes of one kind."""

    objects: int
    bytes: int


class Images:
    """Images as the walk told them, in its order. They are kept as lines, which take a tenth of the
    memory of what they say. One thread adds; any thread may look."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._lines: list[bytes] = []
        self.size = 0
        """Bytes of memory."""

    def add(self, reference: str, line: bytes) -> bool:
        """False where there is no room for it."""
        name = reference.lower()
        size = len(name.encode()) + len(line) + _OVERHEAD
        if self.size + size > KEPT:
            return False
        self.size += size
        self._names.append(name)
        self._lines.append(line)
        return True

    def matching(self, text: str) -> Sequence[int]:
        """Which of them have this text in their reference, in lower or upper case."""
        text = text.lower()
        if not text:
            return range(len(self))
        return [number for number, name in enumerate(self._names) if text in name]

    def __getitem__(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._lines[number])
        return found

    def __len__(self) -> int:
        return len(self._lines)


@dataclass(slots=True)
class Findings:
    """Of one walk. `at` is epoch seconds; `images` is None where they were not looked for."""

    at: float
    held: dict[str, Held] = field(default_factory=dict)
    images: Images | None = None
    left_out: int = 0
    stored: dict[Key, list[float]] = field(default_factory=dict)
    """What this server had stored when the walk began."""
    error: str = ""
    whole: bool = False


class Surveyor:
    """Thread-safe. `start` it, then `close` it."""

    def __init__(self, make_command: MakeCommand, config: Config, tally: Tally) -> None:
        self._tally = tally
        self._make_command = make_command
        self._config = config
        self._changed = threading.Condition()
        self._closed = False
        self._wanted = False
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="survey", daemon=True)
        self.held: Findings | None = None
        """The last count by kind."""
        self.contents: Findings | None = None
        """The last walk that looked for images."""

    def start(self) -> None:
        self._thread.start()

    def use(self, config: Config) -> None:
        self._config = config

    def close(self) -> None:
        """The walk only reads: it is killed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._child is not None:
                self._child.kill()

    def ask(self) -> None:
        """Look for the images soon, unless that was done just now. Returns at once."""
        with self._changed:
            last = self.contents
            if last is None or abs(time.time() - last.at) > _FRESH:
                self._wanted = True
                self._changed.notify_all()

    @property
    def is_looking(self) -> bool:
        """Whether images are being looked for, or will be."""
        return self._wanted

    def _run(self) -> None:
        due = time.monotonic() + _FIRST
        while True:
            with self._changed:
                while not (self._closed or self._wanted) and time.monotonic() < due:
                    self._changed.wait(max(0.0, due - time.monotonic()))
                if self._closed:
                    return
                images = self._wanted
            try:
                self._walk(images=images)
            except OSError as exc:
                log.event(logging.WARNING, "survey failed", reason=exc)
            except Exception as exc:  # noqa: BLE001 a thread's loop: the next walk may go well
                log.failure("survey failed", exc)
            with self._changed:
                # Asked for during a walk without images: the next one looks for them.
                self._wanted = self._wanted and not images
            due = time.monotonic() + self._config.serve.admin.survey_every

    def _walk(self, *, images: bool) -> None:
        config = self._config
        words = ["survey", "--images"] if images else ["survey"]
        command = self._make_command(config.store.path, config, words)
        before = self._tally.totals()
        found = Findings(time.time(), images=Images() if images else None, stored=before)
        with self._changed:
            if self._closed:
                return
            self._child = child = subprocess.Popen(  # noqa: S603 no shell; words of this program
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=inherited(),
            )
        limit = threading.Timer(_TIME_LIMIT, child.kill)
        limit.daemon = True
        try:
            limit.start()
            assert child.stdout is not None  # noqa: S101 asked for above
            while line := child.stdout.readline(_LINE):
                _take(found, line)
        finally:
            limit.cancel()
            with self._changed:
                self._child = None
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
            child.wait()
        CHILDREN.add("survey", "ok" if found.whole else "failed")
        if not found.whole:
            if not self._closed:
                reason = found.error or f"exit code {child.returncode}"
                log.event(logging.WARNING, "survey failed", reason=reason)
            return
        self.held = found
        if images:
            self.contents = found


def _take(found: Findings, line: bytes) -> None:
    event: dict[str, Any] = {}
    with suppress(ValueError):
        event = json.loads(line)
    kind = event.get("event")
    if kind == "kind":
        found.held[event["kind"]] = Held(event["objects"], event["bytes"])
    elif kind == "image" and found.images is not None:
        found.left_out += not found.images.add(str(event.get("reference", "")), line)
    elif kind == "end":
        found.whole = True
    elif kind == "error":
        found.error = str(event.get("reason", ""))
    elif not line.endswith(b"\n"):
        found.left_out += 1
