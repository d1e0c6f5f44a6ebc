"""The end of a process that was told to stop: it comes in time, whatever still runs.

A thread that waits for a silent upstream or a hanging disk can keep the interpreter from ending.
Nothing that it could bring is of use any more, and what it wrote is kept as after a power cut.

Tests: tests/serve/test_shutdown.py.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Final

from ociproxy import log

MARGIN: Final = 1.2
"""Seconds that the end takes at most, once no response is running any more or its grace is over."""


def end_within(seconds: float) -> None:
    """End the process with 0 if it still runs after so many seconds. A second call adds another
    moment: the earlier one counts."""
    threading.Thread(target=_end, args=(seconds,), name="deadline", daemon=True).start()


def _end(seconds: float) -> None:
    time.sleep(seconds)
    left = sorted(t.name for t in threading.enumerate() if not t.daemon)
    log.event(logging.INFO, "ended with threads at work", threads=", ".join(left))
    log.flush()
    os._exit(0)
