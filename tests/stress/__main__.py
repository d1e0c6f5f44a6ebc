"""`python -m tests.stress`: a store far too small for what clients pull, and all that works on it.

Clients pull images from two servers that share a store, which may have a fifth of them, while
`load`, `prune` and `check` run on it again and again. With `--kill-every SECONDS` one of the
commands or servers is killed every so often. The table says what went wrong: nothing may.
`tests.stress.judge` says what is allowed, and why.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.stress.run import Setting, run, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="make stress", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--share", type=int, default=5, help="the store may have one in so many")
    parser.add_argument("--pullers", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--folder", type=Path, help="keep the store and the logs there")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    logging.disable()  # the fake upstream's, of servers that were killed
    setting = Setting(given.seconds, given.images, given.seed)
    setting.share, setting.pullers, setting.kill_every = (
        given.share,
        given.pullers,
        given.kill_every,
    )
    with tempfile.TemporaryDirectory(prefix="stress-") as name:
        found = run(setting, given.folder or Path(name))
        print(table(setting, found))
        for line in found.wrong[:20]:
            print(f"wrong: {line}")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
