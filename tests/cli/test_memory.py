"""Memory for pieces of downloads is used again."""

from __future__ import annotations

import subprocess
import sys

import pytest

PIECES = 500
"""Of 1 MiB, which has 256 pages."""
PROGRAM = f"""
import resource, sys
from threading import Thread

from ociproxy.cli.memory import keep_pieces

if sys.argv[1] == "kept":
    keep_pieces()

def bring():
    for _ in range({PIECES // 4}):
        waiting = [b"x" * (1 << 20) for _ in range(4)]  # to be hashed
        del waiting

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = Thread(target=bring)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_a_download_does_not_ask_the_kernel_for_each_piece_anew() -> None:
    faults = {
        case: int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, case],
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            ).stdout
        )
        for case in ("kept", "as glibc does it")
    }
    assert faults["kept"] < 20 * 256 < faults["as glibc does it"]
