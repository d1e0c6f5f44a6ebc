"""What went wrong with a store, told from all that happened to it in the order of time.

- *The cap.* When a blob comes, the store has `max_size` bytes at most, but for manifests: those ask
  for no room (docs/store.md). Bytes are those of `blobs/`, `img/` and `fat/`. What is in `pulls/`
  does not count: it is in flight, or was left by a load that got no room. The product promises the
  room before it flushes and renames the blob. So it knows nothing of the manifests that come
  meanwhile, which are allowed for `SETTLING` seconds: less than one layer at the rate of this run.
- *Double downloads.* Each further request for a blob upstream has a reason of its own since the one
  before: the blob was removed; what had arrived was removed; a server passed it through, or did
  not keep it, since nothing might go; a stopped leader was relieved; the process was killed.
- *Images.* An image lacks a blob only if a server did not keep it since it was removed last.

Each finding has its history: what was done to the file, asked upstream, and said in the logs.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from tests.stress.events import PULLS, Event
from tests.upstream_faults import Request

SETTLING = 5.0
"""Seconds: longer than a blob of this run takes from its promise to its name."""
LAG = 1.0
"""Seconds that an event may be read late, compared with a request upstream."""
_LINE = re.compile(r"(\S+Z) (.*)")
_NOT_KEPT = re.compile(
    r" (?:filled digest=sha256:(\w+) .*kept=False|passing .*digest=sha256:(\w+))"
)
_RELIEVED = re.compile(r" leader stopped digest=sha256:(\w+)")
_HISTORY = 16
"""Lines of a history, at most."""


@dataclass(frozen=True, slots=True)
class Said:
    """A line of a log."""

    when: float
    who: str
    text: str


@dataclass(slots=True)
class Sizes:
    """Bytes."""

    largest: int = 0
    beyond: int = 0
    """By which blobs exceeded the cap, and the manifests that came meanwhile."""
    meanwhile: int = 0
    """The most that was allowed for those."""
    at: float = 0.0
    """When it was exceeded most."""
    blob: str = ""
    """What came then."""


class History:
    def __init__(
        self,
        events: list[Event],
        sizes: Mapping[str, int],
        requests: Iterable[Request],
        said: Iterable[Said],
        kills: Iterable[float] = (),
    ) -> None:
        self._events, self._sizes = events, sizes
        self._gets = [each for each in requests if each.method == "GET" and "/blobs/" in each.path]
        self._said = sorted(said, key=lambda each: each.when)
        self._kills = sorted(kills)
        self._excuses = self._find_excuses()

    def sizes(self, cap: int) -> Sizes:
        """How large the store became."""
        found, present, size = Sizes(), set[str](), 0
        recent: deque[tuple[float, int]] = deque()
        for event in self._events:
            if event.folder == PULLS:
                continue
            this = self._sizes.get(event.name, 0)
            if not event.came and event.name in present:
                present.discard(event.name)
                size -= this
            elif event.came and event.name not in present:
                present.add(event.name)
                size += this
                found.largest = max(found.largest, size)
                if event.folder != "blobs":
                    recent.append((event.when, this))
                    continue
                while recent and recent[0][0] < event.when - SETTLING:
                    recent.popleft()
                meanwhile = sum(each for _, each in recent)
                over = size - cap
                if over > 0:
                    found.meanwhile = max(found.meanwhile, min(over, meanwhile))
                if over - meanwhile > found.beyond:
                    found.beyond, found.at = over - meanwhile, event.when
                    found.blob = event.name
        return found

    def removed(self) -> int:
        """Files of content."""
        return sum(not each.came for each in self._events if each.folder != PULLS)

    def downloads(self) -> int:
        return sum(map(_is_new, self._gets))

    def doubles(self) -> Iterator[str]:
        """The name of a blob for each request without a reason."""
        by_blob: dict[str, list[float]] = {}
        for each in filter(_is_new, self._gets):
            by_blob.setdefault(each.path.rpartition(":")[2], []).append(each.began)
        for name, asked in by_blob.items():
            excuses, before = deque(self._excuses.get(name, ())), 0.0
            for when in asked:
                if before:
                    while excuses and excuses[0] < before - LAG:
                        excuses.popleft()
                    if excuses and excuses[0] <= when + LAG:
                        excuses.popleft()
                        # One removal explains one request, however many files went.
                        while excuses and excuses[0] <= when - LAG:
                            excuses.popleft()
                    elif not any(before - LAG < each <= when + LAG for each in self._kills):
                        yield name
                before = when

    def is_left_out(self, name: str) -> bool:
        """Whether a server did not keep the blob since it was removed last, or was killed while it
        arrived."""
        mine = [each for each in self._events if each.name == name]
        last = max((e.when for e in mine if e.folder == "blobs" and not e.came), default=0.0)
        began = max((e.when for e in mine if e.folder == PULLS and e.came), default=0.0)
        if began > last and any(each > began - LAG for each in self._kills):
            return True
        return any(
            each.when > last - LAG and any(name in found for found in _NOT_KEPT.findall(each.text))
            for each in self._said
        )

    def of(self, name: str) -> str:
        """All that is known of a blob or a manifest, the last lines of it."""
        said = [
            (each.when, f"{each.who}: {each.text}")
            for each in self._said
            if name in each.text and " request method" not in f" {each.text}"
        ]
        asked = [
            (each.began, f"GET {each.path} {each.headers.get('Range', '')}")
            for each in self._gets
            if name in each.path
        ]
        files = [(each.when, str(each)) for each in self._events if each.name.startswith(name)]
        return self._text(files, asked, said)

    def around(self, when: float) -> str:
        """What happened to the store just before: its size, in brackets what `locks/usage` said
        when that was read, and the file."""
        lines, present, size = [], set[str](), 0
        for event in self._events:
            if event.folder == PULLS:
                continue
            if event.came is not (event.name in present):
                size += self._sizes.get(event.name, 0) * (1 if event.came else -1)
            (present.add if event.came else present.discard)(event.name)
            if event.when <= when:
                lines.append((event.when, f"{size} ({event.counted}) {event}"))
        return self._text(
            lines[-2 * _HISTORY :],
            [
                (each.when, f"{each.who}: {each.text}")
                for each in self._said
                if when - SETTLING < each.when <= when and " request method" not in each.text
            ][-_HISTORY:],
        )

    def _text(self, *parts: list[tuple[float, str]]) -> str:
        lines = sorted(line for part in parts for line in part)[-3 * _HISTORY :]
        return "".join(f"\n    {when % 10000:9.3f} {text:.200}" for when, text in lines)

    def _find_excuses(self) -> dict[str, list[float]]:
        """For each blob, when it was lost in a way that allows one more request."""
        found: dict[str, list[float]] = {}
        present: set[str] = set()
        for event in self._events:
            name = event.name
            if event.folder == "blobs":
                (present.add if event.came else present.discard)(name)
                if not event.came:
                    found.setdefault(name, []).append(event.when)
            elif event.folder == PULLS and not event.came and not event.moved:
                # What had arrived; not what another process had stored by then.
                name = name.partition("-")[0]
                if name not in present and not name.endswith(".spans"):
                    found.setdefault(name, []).append(event.when)
        for each in self._said:
            for names in (*_NOT_KEPT.findall(each.text), *_RELIEVED.findall(each.text)):
                for name in filter(None, (names,) if isinstance(names, str) else names):
                    found.setdefault(name, []).append(each.when)
        return {name: sorted(times) for name, times in found.items()}


def _is_new(request: Request) -> bool:
    """Whether it does not go on where an earlier one ended."""
    start = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
    return start is None or start[1] == "0"


def read_log(who: str, text: str) -> Iterator[Said]:
    for line in text.splitlines():
        if found := _LINE.match(line):
            yield Said(datetime.fromisoformat(found[1]).timestamp(), who, found[2])
