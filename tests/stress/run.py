"""The clients, servers and commands of `make stress`, and the table of what came of them.

Tests: tests/test_stress.py.
"""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ociproxy.store.store import Store
from ociproxy.store.usage import Usage, size_of
from tests.images import Image, image_of, layer, random_bytes
from tests.pruning import command, listed
from tests.server import ROOT, Mirror, upstream_entry
from tests.stress.events import CONTENT, PULLS, Recorder
from tests.stress.judge import History, Said, read_log
from tests.upstream import FakeUpstream

KIB = 1024
LAYER = 100 * KIB
FAMILY = 10
"""Images that share a layer."""
PAUSE = 0.2
"""Seconds, at most, between two pulls of a client."""
LOADED = 3
"""Images of one load."""
KEPT = 4
"""Images that are pinned, and loaded before the clients come."""
NO_ROOM = 4
"""Exit code of a load of which something has no room: others need it just then."""
EXPECTED = {"load": (0, NO_ROOM), "prune": (0, 3, 75), "check": (0, 3)}
"""The exit codes that an operator can expect."""
SILENCE = 60.0
"""Seconds without a finished pull that count as a deadlock."""


@dataclass(slots=True)
class Setting:
    seconds: float
    images: int
    seed: int
    share: int = 5
    """The store may have one in so many of the images."""
    pullers: int = 8
    kill_every: float = 0.0
    """Seconds between two kills; 0 for none."""


@dataclass(slots=True)
class Findings:
    """`counts` are what the table shows; `wrong` is a line for each thing that must not be."""

    cap: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    largest: int = 0
    beyond: int = 0
    meanwhile: int = 0
    uncounted: int = 0
    left: int = 0
    """Bytes: of the store, of blobs beyond the cap, of manifests that came beside those, of the
    store that `locks/usage` does not know of, of `pulls/` in the end."""
    silence: float = 0.0


class Stress:
    def __init__(self, setting: Setting, folder: Path, upstream: FakeUpstream) -> None:
        self._setting = setting
        self._folder = folder
        self._store = folder / "store"
        self._upstream = upstream
        self._random = random.Random(setting.seed)
        self._images = {
            f"app{n}": self._make(f"app{n}", n // FAMILY) for n in range(setting.images)
        }
        self._kept = {f"kept{n}": self._make(f"kept{n}", -1) for n in range(KEPT)}
        files = {
            each.digest: each.size for made in self._images.values() for each in made.all_content()
        }
        self.found = Findings(cap=sum(files.values()) // setting.share)
        self._servers = [
            Mirror(folder / f"mirror{n}", self._config(), store=self._store) for n in (1, 2)
        ]
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._pulled = time.monotonic()
        self._said: list[Said] = []
        self._kills: list[float] = []
        self._cut: set[str] = set()
        """Images whose pull was cut by a kill."""
        self._running: set[subprocess.Popen[str]] = set()

    def run(self) -> Findings:
        self._store.mkdir(parents=True)
        for name in (*CONTENT, PULLS):
            (self._store / name).mkdir()
        lists = self._folder / "kept.txt"
        lists.write_text("".join(f"{self._upstream.registry}/{name}:v1\n" for name in self._kept))
        recorder = Recorder(self._store)
        try:
            for each in self._servers:
                each.start()
            self._call("load", "--config-path", self._config_path, str(lists))
            try:
                self._run_beside(recorder)
            finally:
                self._ending.set()
            for each in self._servers:
                each.stop()  # fails where it does not end in time
        finally:
            recorder.stop()
            for each in self._servers:
                each.kill()
        self._judge(recorder)
        return self.found

    def _run_beside(self, recorder: Recorder) -> None:
        """For so long, and until something was removed."""
        seconds = self._setting.seconds
        target = ("--to-size", str(self.found.cap * 8 // 10), "--config-path", self._config_path)
        works: list[tuple[Callable[[], object], float]] = [
            (self._load, 10.0),
            (lambda: self._call("prune", *target), 7.0),
            (lambda: self._call("check"), 3.0),
        ]
        pauses = [(work, pause * min(1.0, seconds / 30)) for work, pause in works]
        if self._setting.kill_every:
            pauses.append((self._kill, self._setting.kill_every))
        threads = [
            threading.Thread(target=self._pull_all, args=(number,))
            for number in range(self._setting.pullers)
        ]
        threads += [threading.Thread(target=self._repeat, args=each) for each in pauses]
        for each in threads:
            each.start()
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end or (
            now < end + SILENCE
            and not any(e.folder == "blobs" and not e.came for e in recorder.events)
        ):
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
                "max_size": self.found.cap,
                "keep_recent": "0s",
                "pins": [f"{self._upstream.registry}/kept*"],
            },
            "upstreams": [upstream_entry(self._upstream.url)],
            "log": {"level": "info"},
        }

    @property
    def _config_path(self) -> str:
        return str(self._servers[0].config_path)

    # What runs

    def _pull_all(self, number: int) -> None:
        choice = random.Random(f"{self._setting.seed} {number}")
        names = list(self._images)
        while not self._ending.is_set():
            # Some images are asked for more often than others.
            name = names[min(int(choice.paretovariate(0.5)), len(names)) - 1]
            if choice.random() < 0.5:
                name = choice.choice(names)
            began = time.time()
            try:
                self._pull(choice.choice(self._servers), name)
            except Exception as exc:  # noqa: BLE001 each is a finding
                if any(began - 1.0 < each for each in self._kills):
                    self.found.counts["pulls cut by a kill"] += 1
                    self._cut.add(name)
                else:
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

    def _load(self) -> None:
        names = self._random.sample(list(self._images), LOADED)
        path = self._folder / "load.txt"
        path.write_text("".join(f"{self._upstream.registry}/{name}:v1\n" for name in names))
        self._call("load", "--config-path", self._config_path, str(path))

    def _repeat(self, work: Callable[[], object], pause: float) -> None:
        while not self._ending.wait(pause):
            work()

    def _call(self, name: str, *words: str) -> None:
        """Run a command to its end."""
        began = time.time()
        process = subprocess.Popen(
            command(self._store, name, *words),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with self._lock:
            self._running.add(process)
        try:
            stdout, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
            with self._lock:
                self._running.discard(process)
        code = process.returncode
        with self._lock:
            who = f"{name} {process.pid} (from {began % 10000:.3f})"
            self._said += [Said(time.time(), who, each) for each in (stdout + stderr).splitlines()]
            self._said.append(Said(time.time(), who, f"ended with {code}"))
            self.found.counts[name] += 1
            self.found.counts["loads without room"] += code == NO_ROOM
        killed = code == -9 and self._kills
        if "Traceback" in stderr or not (killed or code in EXPECTED[name]):
            said = f"{stdout[-300:]} {stderr[-600:]}"
            self._wrong("failed commands", f"{name} ended with {code}: {said}")

    def _kill(self) -> None:
        """A command, or a server, which begins anew."""
        with self._lock:
            victims: list[Mirror | subprocess.Popen[str]] = [*self._servers, *self._running]
            chosen = self._random.choice([*victims, *self._running])
            self._kills.append(time.time())
            who = "server" if isinstance(chosen, Mirror) else "command"
            self._said.append(Said(time.time(), "stress", f"kill {who}"))
            self.found.counts["kills"] += 1
        if isinstance(chosen, Mirror):
            chosen.kill()
            chosen.start()
            self._kills.append(time.time())
        else:
            chosen.kill()

    def _wrong(self, kind: str, line: str) -> None:
        with self._lock:
            self.found.counts[kind] += 1
            self.found.wrong.append(line)

    # What came of it

    def _judge(self, recorder: Recorder) -> None:
        found = self.found
        for server in self._servers:
            log = server.log()
            self._said += read_log(server.log_path.parent.name, log)
            found.counts["evicted images"] += log.count(" evicted ")
            if "Traceback" in log:
                found.wrong.append(f"traceback in {server.log_path}")
        if not recorder.is_whole:
            found.wrong.append("the kernel dropped events of files: what follows is not exact")
        history = History(
            recorder.events, recorder.sizes, self._upstream.requests, self._said, self._kills
        )
        sizes = history.sizes(found.cap)
        found.largest, found.meanwhile = sizes.largest, sizes.meanwhile
        found.beyond = sizes.beyond
        if found.beyond:
            where = f"{found.beyond} bytes of blobs above the cap when {sizes.blob} came"
            self._wrong("above the cap", where + history.around(sizes.at) + history.of(sizes.blob))
        found.counts["removed"] = history.removed()
        found.counts["downloads"] = history.downloads()
        for name in history.doubles():
            self._wrong("double downloads", f"{name} was fetched again{history.of(name)}")
        self._judge_images(history)
        usage = Store(self._store).usage.read() or Usage()
        stored = sum(size_of(self._store / name)[1] for name in CONTENT)
        found.uncounted = stored - usage.stored
        found.left = size_of(self._store / PULLS)[1]
        if found.uncounted > 0:
            self._wrong("uncounted", f"locks/usage lacks {found.uncounted} bytes: {usage}")

    def _judge_images(self, history: History) -> None:
        images = listed(self._store)
        for name in self._kept:
            if not images.get(f"{self._upstream.registry}/{name}:v1"):
                self._wrong("lost images", f"{name} is pinned and was lost")
        for reference, complete in images.items():
            name = reference.rpartition("/")[2].removesuffix(":v1")
            made = self._images.get(name)
            if complete or made is None or name in self._cut:
                continue
            lacking = [b for b in made.blobs if not (self._store / "blobs" / b.encoded).exists()]
            for blob in lacking:
                if not history.is_left_out(blob.encoded):
                    said = f"{reference} lacks {blob.digest}{history.of(blob.encoded)}"
                    self._wrong("incomplete images", said + history.of(made.top.encoded))


def table(setting: Setting, found: Findings) -> str:
    counts, cap = found.counts, found.cap
    rows = [
        (f"pulls, by {setting.pullers} clients from 2 servers", counts["pulls"], ""),
        ("blobs from the store", counts["hits"], ""),
        ("blobs passed through, for nothing might go", counts["blobs passed through"], ""),
        ("blobs asked upstream", counts["downloads"], ""),
        ("images evicted by the servers", counts["evicted images"], ""),
        ("files removed, by them and by prune", counts["removed"], ""),
        ("runs of load, prune, check", sum(counts[n] for n in EXPECTED), ""),
        ("loads of which something got no room", counts["loads without room"], ""),
        ("kills", counts["kills"], ""),
        ("pulls cut by a kill", counts["pulls cut by a kill"], ""),
        ("largest size of the store, % of the cap", round(100 * found.largest / cap, 2), ""),
        ("most by which manifests exceeded the cap, bytes", found.meanwhile, ""),
        ("bytes of downloads left in pulls/", found.left, ""),
        ("longest time without a finished pull, s", round(found.silence, 1), ""),
        ("bytes of blobs above the cap", found.beyond, 0),
        ("bytes stored that locks/usage lacks", max(0, found.uncounted), 0),
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


def run(setting: Setting, folder: Path) -> Findings:
    with FakeUpstream() as upstream:
        return Stress(setting, folder, upstream).run()
