"""`python -m bench.uncounted serve ...`: ociproxy that counts nothing from SIGUSR1 on, and counts
again from SIGUSR2 on. In one process, for two of the same kind differ by more than counting takes.

What a server does so that it can count, such as reading the clock, it does all the same: the log
needs it, too.
"""

from __future__ import annotations

import gc
import signal
from types import FrameType

gc.disable()  # as the program does before its imports, which it then keeps from the collector

from ociproxy.__main__ import main  # noqa: E402 after that line
from ociproxy.metrics.counters import count_answer, count_end  # noqa: E402
from ociproxy.serve import api  # noqa: E402

COUNTS = {"count_answer": count_answer, "count_end": count_end}
"""All that is counted of a warm manifest, by its name there."""


def nothing(*_: object) -> None:
    """In the place of what counts."""


def turn(number: int, _: FrameType | None) -> None:
    for name, count in COUNTS.items():
        setattr(api, name, nothing if number == signal.SIGUSR1 else count)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, turn)
    signal.signal(signal.SIGUSR2, turn)
    main()
