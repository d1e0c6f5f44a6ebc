"""`python -m bench.uncounted serve ...`: ociproxy that counts nothing, for the bench to compare.

What a server does so that it can count, such as reading the clock, it does all the same: the log
needs it, too.
"""

from __future__ import annotations

import sys
from typing import Any

from ociproxy.metrics import counters
from ociproxy.metrics.tally import Tally


def nothing(*_: Any, **__: Any) -> None:
    """In the place of what counts. Before anything imports it by name."""


counters.count_answer = nothing
counters.count_end = nothing
Tally.add = nothing  # type: ignore[method-assign]  # this module is for that
Tally.observe = nothing  # type: ignore[method-assign]

if __name__ == "__main__":
    from ociproxy.cli.main import main

    sys.exit(main())
