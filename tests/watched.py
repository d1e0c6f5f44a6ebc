"""The product as a program, in which a blocking call inside the event loop is an error.

`python -m tests.watched serve ...` is `ociproxy serve ...`: where a handler blocks, the request
ends with 500 and the log has the traceback. What may block is listed here, with the reason.
"""

from __future__ import annotations

import io
import os
from typing import Final

from blockbuster import BlockBuster
from blockbuster.blockbuster import BlockBusterFunction

from ociproxy.cli.main import main

# Small files of the store, which the page cache has: a hop to a thread and back costs more than
# the read. Whatever writes, reads a blob or asks the network is not among them.
SMALL_READS: Final = [
    ("ociproxy/store/blobs.py", {"find", "find_size"}),
    ("ociproxy/store/manifests.py", {"find"}),
    ("ociproxy/store/refs.py", {"_find", "_names", "has_repository", "manifests_state"}),
]
# Held for a few instructions by whoever has it.
SHORT_LOCKS: Final = [
    ("ociproxy/bounded.py", {"put", "drop"}),
    (
        "ociproxy/fetch/download/assembly.py",
        {"available", "want", "unwant", "duplicate_file", "close"},
    ),
]
READS: Final = (
    *("os.stat", "os.scandir", "os.listdir", "os.read", "os.pread"),
    "io.BufferedReader.read",
)
LOCKS: Final = ("threading.Lock.acquire", "threading.Lock.acquire_lock")
MORE: Final = (
    (None, "os.fsync"),
    (None, "os.pread"),
    (None, "os.pwrite"),
    (None, "os.ftruncate"),
    (io.FileIO, "readinto"),
)
"""What blockbuster does not watch by itself."""


def watcher(*modules: str) -> BlockBuster:
    """Finds blocking calls that come, directly or not, from code of these modules."""
    blockbuster = BlockBuster(modules)
    functions = blockbuster.functions
    for module, name in MORE:
        functions[name] = BlockBusterFunction(module, name, scanned_modules=modules)
    for names, places in ((READS, SMALL_READS), (LOCKS, SHORT_LOCKS)):
        for name in names:
            for file, allowed in places:
                functions[name].can_block_in(file, allowed)
    return blockbuster


def watch() -> None:
    """All of the product, from here on, in this process and those it forks."""
    watcher("ociproxy").activate()


if __name__ == "__main__":
    # What measures coverage takes locks, and reads the product's files, wherever it is.
    if "COVERAGE_PROCESS_CONFIG" not in os.environ:
        watch()
    main()
