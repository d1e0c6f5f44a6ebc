"""`python -m tests.stress`: a store far too small for what clients pull, and all that works on it.

Clients pull images from two servers that share a store, which may have a fifth of them, while
`load`, `prune` and `check` run on it again and again. The table says what went wrong: nothing may.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.images import Image, image_of, layer, random_bytes
from tests.pruning import command, listed
from tests.server import ROOT, Mirror, upstream_entry
from tests.upstream import FakeUpstream

KIB = 1024
PULLERS = 8
SHARE = 5
"""The store may have one in so many of the images."""
LAYER = 100 * KIB
FAMILY = 10
"""Images that share a layer."""
PAUSE = 0.2
"""Seconds, at most, between two pulls of a client."""
LOADED = 3
"""Images of one load."""
KEPT = 4
"""Images that are pinned, and loaded before the clients come."""
SAMPLE = 0.02
"""Seconds between two looks at the store: no blob comes and goes in between."""
WINDOW = 10.0
NEAR = 0.98
"""Of the cap: from there on the store counts as full."""
NO_ROOM = 4
"""Exit code of a load of which something has no room: others need it just then."""
SILENCE = 60.0
"""Seconds without a finished pull that count as a deadlock."""


@dataclass
class Findings:
    """`counts` are what the table shows; `wrong` is a line for each thing that must not be."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    largest: int = 0
    in_flight: int = 0
    beyond: int = 0
    """Bytes: of the store, of what was arriving, and of the store beyond the cap and that."""
    silence: float = 0.0


class Watcher:
    """Looks at the store all the time: how large it is, and which blobs went. What arrived within
    `WINDOW` counts as in flight: it may have waited so long for room."""

    def __init__(self, store: Path, cap: int) -> None:
        self._cap = cap
        self._arriving: deque[tuple[float, int]] = deque()
        self._store = store
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._known: set[str] = set()
        self._size = self._manifests = 0
        """Bytes of the store, and of the manifests that came while it was full: they ask for no
        room."""
        self.removed: Counter[str] = Counter()
        self.largest = self.in_flight = self.beyond = 0
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    def look(self) -> None:
        sizes, manifests = {}, 0
        for name in ("blobs", "img", "fat"):
            for path in (self._store / name).iterdir():
                try:
                    sizes[path.name] = path.stat().st_size
                except FileNotFoundError:
                    continue
                if name != "blobs" and path.name not in self._known:
                    manifests += sizes[path.name]
        size, now = sum(sizes.values()), time.monotonic()
        self._manifests = manifests + (self._manifests if self._size > NEAR * self._cap else 0)
        self._size = size
        self._arriving.append((now, bytes_in(self._store / "pulls")))
        while self._arriving[0][0] < now - WINDOW:
            self._arriving.popleft()
        in_flight = max(each for _, each in self._arriving)
        self.largest = max(self.largest, size)
        self.in_flight = max(self.in_flight, in_flight)
        self.beyond = max(self.beyond, size - self._cap - in_flight - self._manifests)
        self.removed.update(self._known - sizes.keys())
        self._known = set(sizes)

    def _run(self) -> None:
        while not self._ending.wait(SAMPLE):
            self.look()


def bytes_in(folder: Path) -> int:
    found = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


class Stress:
    def __init__(self, folder: Path, upstream: FakeUpstream, images: int, seed: int) -> None:
        self._folder = folder
        self._store = folder / "store"
        self._upstream = upstream
        self._random = random.Random(seed)
        self._images = {f"app{n}": self._make(f"app{n}", n // FAMILY) for n in range(images)}
        self._kept = {f"kept{n}": self._make(f"kept{n}", -1) for n in range(KEPT)}
        files = {
            each.digest: each.size for made in self._images.values() for each in made.all_content()
        }
        self.cap = sum(files.values()) // SHARE
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._pulled = time.monotonic()
        self._not_kept: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self.found = Findings()

    def run(self, seconds: float) -> Findings:
        self._store.mkdir(parents=True)
        for name in ("blobs", "img", "fat"):
            (self._store / name).mkdir()
        lists = self._folder / "kept.txt"
        lists.write_text("".join(f"{self._upstream.registry}/{name}:v1\n" for name in self._kept))
        servers = [
            Mirror(self._folder / f"mirror{n}", self._config(), store=self._store) for n in (1, 2)
        ]
        try:
            for each in servers:
                each.start()
            self._call("load", "--config-path", str(servers[0].config_path), str(lists))
            watcher = Watcher(self._store, self.cap)
            try:
                self._run_beside(servers, seconds, watcher)
                watcher.look()
            finally:
                self._ending.set()
                watcher.stop()
            for each in servers:
                each.stop()  # fails where it does not end in time
            for each in servers:
                # The client had the blob, and the store had no room for it in the end.
                for name in re.findall(r"filled digest=sha256:(\w+) .*kept=False", each.log()):
                    self._not_kept[name] += 1
            self._judge(watcher)
        finally:
            for each in servers:
                each.kill()
        for each in servers:
            log = each.log()
            self.found.counts["evicted images"] += log.count(" evicted ")
            if "Traceback" in log:
                self.found.wrong.append(f"traceback in {each.log_path}")
        return self.found

    def _run_beside(self, servers: list[Mirror], seconds: float, watcher: Watcher) -> None:
        """For so long, and until something was removed."""
        config = str(servers[0].config_path)
        target = str(self.cap * 8 // 10)
        threads = [
            threading.Thread(target=self._pull_all, args=(servers, number))
            for number in range(PULLERS)
        ]
        threads += [
            threading.Thread(target=self._repeat, args=(work, pause * min(1.0, seconds / 30)))
            for work, pause in (
                (lambda: self._load(config), 5.0),
                (lambda: self._call("prune", "--to-size", target, "--config-path", config), 7.0),
                (lambda: self._call("check"), 3.0),
            )
        ]
        for each in threads:
            each.start()
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end or (not watcher.removed and now < end + SILENCE):
            time.sleep(0.2)
            silence = time.monotonic() - self._pulled
            self.found.silence = max(self.found.silence, silence)
            if silence > SILENCE:
                self.found.wrong.append(f"no pull has ended for {silence:.0f} s")
                break
        self._ending.set()
        for each in threads:
            each.join(120)
            if each.is_alive():
                self.found.wrong.append("a client or a command does not end")

    def _make(self, name: str, family: int) -> Image:
        shared = layer({"shared": random_bytes(LAYER, seed=f"family {family}")})
        own = layer({name: random_bytes(LAYER, seed=name)})
        return self._upstream.add(name, image_of([shared, own], command=[name]), tag="v1")

    def _config(self) -> dict[str, object]:
        return {
            "store": {
                "max_size": self.cap,
                "keep_recent": "0s",
                "pins": [f"{self._upstream.registry}/kept*"],
            },
            "upstreams": [upstream_entry(self._upstream.url)],
            "log": {"level": "info"},
        }

    # What runs

    def _pull_all(self, servers: list[Mirror], number: int) -> None:
        choice = random.Random(f"{self._random.random()} {number}")
        names = list(self._images)
        while not self._ending.is_set():
            # Some images are asked for more often than others.
            name = names[min(int(choice.paretovariate(0.5)), len(names)) - 1]
            if choice.random() < 0.5:
                name = choice.choice(names)
            try:
                self._pull(choice.choice(servers), name)
            except Exception as exc:  # noqa: BLE001 each is a finding
                self._wrong("failed pulls", f"pull of {name}: {exc!r:.300}")
            with self._lock:
                self._pulled = time.monotonic()
                self.found.counts["pulls"] += 1
            self._ending.wait(choice.random() * PAUSE)

    def _pull(self, server: Mirror, name: str) -> None:
        made = self._images[name]
        answer = server.manifest(self._upstream.registry, name, "v1")
        assert answer.status == 200, (answer.status, answer.body[:200])
        assert answer.body == made.top.data
        for blob in made.blobs:
            answer = server.blob(self._upstream.registry, name, blob.digest)
            assert answer.status == 200, (answer.status, answer.body[:200])
            assert answer.body == blob.data
            passed = answer.cache_status.endswith("not-stored")
            with self._lock:
                self.found.counts["blobs passed through" if passed else "blobs"] += 1
                self.found.counts["hits"] += answer.cache_status == "ociproxy; hit"
                self._not_kept[blob.encoded] += passed

    def _load(self, config: str) -> None:
        names = self._random.sample(list(self._images), LOADED)
        path = self._folder / "load.txt"
        path.write_text("".join(f"{self._upstream.registry}/{name}:v1\n" for name in names))
        if self._call("load", "--config-path", config, str(path)) == NO_ROOM:
            with self._lock:
                # What it fetched and could not keep, a prune may have removed since.
                self._refused.update(each.encoded for n in names for each in self._images[n].blobs)

    def _repeat(self, work: Callable[[], None], pause: float) -> None:
        while not self._ending.wait(pause):
            work()

    def _call(self, name: str, *words: str) -> int:
        """Run a command to its end; the exit code has to be one that an operator can expect."""
        expected = {"load": (0, NO_ROOM), "prune": (0, 3, 75), "check": (0, 3)}[name]
        done = subprocess.run(
            command(self._store, name, *words),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        with self._lock:
            self.found.counts[name] += 1
            self.found.counts["loads without room"] += done.returncode == NO_ROOM
        if done.returncode not in expected or "Traceback" in done.stderr:
            said = f"{done.stdout[-300:]} {done.stderr[-600:]}"
            self._wrong("failed commands", f"{name} ended with {done.returncode}: {said}")
        return done.returncode

    def _wrong(self, kind: str, line: str) -> None:
        with self._lock:
            self.found.counts[kind] += 1
            self.found.wrong.append(line)

    # What came of it

    def _judge(self, watcher: Watcher) -> None:
        found = self.found
        found.largest, found.in_flight = watcher.largest, watcher.in_flight
        found.counts["removed"] = sum(watcher.removed.values())
        found.beyond = max(0, watcher.beyond)
        if found.beyond:
            self._wrong("above the cap", f"{found.beyond} bytes beyond cap and what was arriving")
        images = listed(self._store)
        for name in self._kept:
            if not images.get(f"{self._upstream.registry}/{name}:v1"):
                self._wrong("lost images", f"{name} is pinned and was lost")
        for reference, complete in images.items():
            name = reference.rpartition("/")[2].removesuffix(":v1")
            made = self._images.get(name)
            if complete or made is None:
                continue
            lacking = [b for b in made.blobs if not (self._store / "blobs" / b.encoded).exists()]
            if not all(self._not_kept[each.encoded] for each in lacking):
                self._wrong("incomplete images", f"{reference} lacks a blob")
        for name, made in self._images.items():
            for blob in made.blobs:
                times = self._upstream.count(blob.digest, "GET")
                allowed = 1 + watcher.removed[blob.encoded] + self._not_kept[blob.encoded]
                allowed += self._refused[blob.encoded]
                found.counts["downloads"] += times
                if times > allowed:
                    text = f"{blob.digest} of {name}: {times} times, {allowed} expected"
                    self._wrong("double downloads", text)


def table(stress: Stress, found: Findings) -> str:
    counts, cap = found.counts, stress.cap
    rows = [
        ("pulls, by 8 clients from 2 servers", counts["pulls"], ""),
        ("blobs from the store", counts["hits"], ""),
        ("blobs passed through, for nothing might go", counts["blobs passed through"], ""),
        ("images evicted by the servers", counts["evicted images"], ""),
        ("files removed, by them and by prune", counts["removed"], ""),
        ("runs of load, prune, check", sum(counts[n] for n in ("load", "prune", "check")), ""),
        ("loads of which something got no room", counts["loads without room"], ""),
        ("largest size of the store, % of the cap", round(100 * found.largest / cap), ""),
        ("most that was in flight, % of the cap", round(100 * found.in_flight / cap), ""),
        ("bytes above the cap and what was in flight", found.beyond, 0),
        ("longest time without a finished pull, s", round(found.silence, 1), ""),
        ("failed pulls", counts["failed pulls"], 0),
        ("failed commands", counts["failed commands"], 0),
        ("pinned images lost", counts["lost images"], 0),
        ("blobs downloaded twice", counts["double downloads"], 0),
        ("images incomplete that were not evicted", counts["incomplete images"], 0),
    ]
    lines = ["| | found | wanted |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {name} | {value} | {wanted} |" for name, value, wanted in rows)]
    )


def run(seconds: float, images: int, seed: int, folder: Path) -> tuple[Stress, Findings]:
    with FakeUpstream() as upstream:
        stress = Stress(folder, upstream, images, seed)
        return stress, stress.run(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--folder", type=Path, help="keep the store and the logs there")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="stress-") as name:
        folder = options.folder or Path(name)
        stress, found = run(options.seconds, options.images, options.seed, folder)
        print(table(stress, found))
        for line in found.wrong[:20]:
            print(f"wrong: {line}")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
