"""The end of a process that was told to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Final, NoReturn

INTERRUPTED: Final = 130
"""The exit code."""
_GRACE: Final = 2.0
"""Seconds for threads that tidy up."""


def leave(code: int) -> NoReturn:
    """End now. Threads that wait for an upstream which does not answer would hold the interpreter
    for as long as its time-outs; nothing that they could still bring is of use."""
    # Whoever interrupts once more means at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    limit = time.monotonic() + _GRACE
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, limit - time.monotonic()))
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
