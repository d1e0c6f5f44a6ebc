"""Which file systems ask a server or a program for each look: a name that the kernel knows by heart
can hang there, too, so the event loop never looks.

Tests: tests/store/test_mounts.py, tests/serve/test_hung_disk.py.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

_REMOTE: Final = ("fuse", "nfs", "cifs", "smb", "ceph", "9p", "virtiofs", "lustre", "afs", "gfs2")
"""How the names of their types begin."""


def is_remote(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether the folder is on such a file system; False where the kernel does not tell.
    proc_pid_mountinfo(5) has the form of `mounts`."""
    with suppress(OSError, ValueError):
        device = folder.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
            mount, _, rest = line.partition(" - ")
            if mount.split(" ")[2] == wanted:
                return rest.startswith(_REMOTE)
    return False
