"""What a process tells the kernel, as strace sees it: which files it flushed, renamed and wrote.

A flush counts when it has ended, all else when it begins: so an order that this shows holds on a
machine that loses its power at any moment between.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parts.tools import require_tool

_CALLS = "trace=/^(rename|mkdir|f(data)?sync|write)"
_LINE = re.compile(r"(?P<pid>\d+) +(?:<\.\.\. )?(?P<name>\w+)(?P<rest>.*)")
_PATH = re.compile(r"\d+<(?P<path>[^>]*)>")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Call:
    """`paths` are one of a flush, two of a rename; `text` is what was written to it."""

    name: str
    paths: tuple[str, ...]
    text: str = ""


def traced(command: Sequence[str], into: Path, *injected: str) -> list[str]:
    """The command under strace, as a child of the caller. `injected` are faults, as
    `fsync:error=EIO`."""
    faults = [word for fault in injected for word in ("-e", f"inject={fault}")]
    strace = [require_tool("strace"), "-D", "-f", "-y", "-s", "200", "-o", str(into), "-e", _CALLS]
    return [*strace, *faults, *command]


def calls(trace: Path) -> Iterator[Call]:
    """Once the process has ended."""
    process = trace.read_text().partition(" ")[0]
    end = time.monotonic() + 10.0
    while not re.search(rf"(?m)^{process} +\+\+\+ exited", trace.read_text(errors="replace")):
        assert time.monotonic() < end, "strace has not seen the end"
        time.sleep(0.02)
    flushing: dict[str, str] = {}
    for line in trace.read_text(errors="replace").splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        pid, name, rest = found["pid"], found["name"], found["rest"]
        if name in ("fsync", "fdatasync"):
            if path := _PATH.search(rest):
                flushing[pid] = path["path"]
            if rest.endswith(("= 0", "= 0 (DELAYED)")):
                yield Call("flush", (flushing[pid],))
        elif rest.startswith(" resumed>"):
            continue
        elif name == "write":
            path = _PATH.search(rest)
            yield Call(name, (path["path"] if path else "",), "".join(_QUOTED.findall(rest)))
        else:
            yield Call(name[:6], tuple(_QUOTED.findall(rest)))
