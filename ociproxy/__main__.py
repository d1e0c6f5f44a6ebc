"""The program `ociproxy`, also as `python -m ociproxy`.

Tests: tests/cli/test_start.py, tests/load, tests/serve/test_reload.py.
"""

from __future__ import annotations

import gc
import os
import signal
import sys


def _fill_standard_streams() -> None:
    """Open the null device in place of closed standard streams. Else a file of the store gets such
    a number, and a child process or a library writes its messages into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)


def main() -> None:
    _fill_standard_streams()
    if sys.argv[1:2] == ["serve"]:
        # SIGHUP would end the process. One that comes while the server is still starting waits
        # until the server handles it. Before all imports, which take most of the start.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    # All that is imported stays: looking through it for garbage, now and at the end, takes a third
    # of the start. The collector is turned on when the command is imported.
    gc.disable()
    from ociproxy.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
