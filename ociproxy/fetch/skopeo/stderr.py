"""What skopeo says on its standard error: the little of it that means something to us.

It runs with `--debug`, for only there does it tell a manifest's Content-Type, and that it is asleep
because of a 429. Without these lines the document and the time limit decide.
"""

from __future__ import annotations

import re
from typing import Final

_LINE_LIMIT: Final = 64 * 1024
"""Bytes; of a longer line the beginning is lost."""

_FATAL: Final = re.compile(r'level=(?:fatal|panic) msg="((?:[^"\\]|\\.)*)"')
_CONTENT_TYPE: Final = re.compile(r'Content-Type from manifest GET is \\"([^"\\]*)\\"')
_PING: Final = re.compile(r"Ping \S+ status \d")
_RETRY_AFTER: Final = re.compile(r"Detected 'Retry-After' header \\\"(\d{1,9})\\\"")
_THROTTLED: Final = re.compile(r"Too many requests to .*sleeping for")


class SkopeoStderr:
    """Fed as it comes; one run's. Nothing of it goes into a log but `fatal`, cut to one line."""

    def __init__(self) -> None:
        self.fatal = ""
        self.content_type = ""
        self.answered = False
        """Whether the upstream has answered the first question."""
        self.throttled = False
        self.retry_after: float | None = None
        """Seconds, where the upstream said so."""
        self._rest = b""
        self._other = ""

    def feed(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-_LINE_LIMIT:]
        for line in lines:
            self._take(line.decode("utf-8", "replace"))

    def end(self) -> None:
        self.feed(b"\n")
        if not self.fatal:
            # It did not get as far as its logger: a wrong option, or a crash.
            self.fatal = self._other

    def _take(self, line: str) -> None:
        if found := _FATAL.search(line):
            self.fatal = re.sub(r"\\(.)", r"\1", found[1])
        elif found := _CONTENT_TYPE.search(line):
            self.content_type = found[1]
        elif found := _RETRY_AFTER.search(line):
            self.retry_after = float(found[1])
        elif _THROTTLED.search(line):
            self.throttled = True
        elif _PING.search(line):
            self.answered = True
        elif line.strip() and " level=" not in line and not self._other:
            self._other = line.strip()
