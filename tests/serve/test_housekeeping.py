"""Jobs of a server that run as child processes: one for a store, and none outlives its server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ociproxy.cli.child import command_maker
from ociproxy.config.settings import Config
from ociproxy.oci.digest import Digest
from ociproxy.serve import housekeeping
from ociproxy.serve.housekeeping import Housekeeper
from ociproxy.store import claim
from ociproxy.store.store import Store
from tests.images import random_blob
from tests.server import ROOT
from tests.store.test_removal import process

LIMIT = 60.0
"""Seconds: the commands yield the processor, which other tests need at the same time."""
SAY = """
import json, os, sys
for word in sys.argv[1:]:
    print(json.dumps({"event": word, "pid": os.getpid()}), flush=True)
"""
LISTEN = SAY + "sys.stdin.read()"
"""It ends when its server has."""


class Errand:
    """A job that is due again and again."""

    def __init__(self, *words: str) -> None:
        self.name = "errand"
        self.words: Sequence[str] | None = words
        self.heard_events: list[dict[str, Any]] = []
        self.codes: list[int] = []
        self.changed = threading.Condition()

    def use(self, config: Config) -> None:
        pass

    def due(self) -> Sequence[str] | None:
        return self.words

    def heard(self, event: dict[str, Any]) -> None:
        with self.changed:
            self.heard_events.append(event)
            self.changed.notify_all()

    def ended(self, code: int) -> None:
        with self.changed:
            self.codes.append(code)
            self.changed.notify_all()

    def wait_for(self, what: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(what, LIMIT)


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Housekeeper]]:
    monkeypatch.setattr(housekeeping, "LOOK", 0.02)
    started = []

    def make(errand: Errand, program: str) -> Housekeeper:
        def command(_store: Path, _config: Config, words: Sequence[str]) -> list[str]:
            return [sys.executable, "-c", program, *words]

        keeper = Housekeeper(Store(tmp_path / "store"), errand, command, Config())
        keeper.start()
        started.append(keeper)
        return keeper

    yield make
    for keeper in started:
        keeper.stop()


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def reads(pid: int, path: Path) -> bool:
    """Whether the process has this file open."""
    with contextlib.suppress(OSError):  # it opens and closes others meanwhile
        return any(each.readlink() == path for each in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_a_job_hears_what_its_command_prints_and_how_it_ended(
    keep: Callable[..., Housekeeper],
) -> None:
    errand = Errand("one", "two")
    keep(errand, SAY + "print('no event'); sys.exit(3)")
    errand.wait_for(lambda: errand.codes)
    assert [event["event"] for event in errand.heard_events[:2]] == ["one", "two"]
    assert errand.codes[0] == 3


def test_one_process_runs_a_job_and_another_takes_over(keep: Callable[..., Housekeeper]) -> None:
    first, second = Errand("first"), Errand("second")
    keeper = keep(first, LISTEN)
    first.wait_for(lambda: first.heard_events)
    keep(second, LISTEN)
    with second.changed:
        assert not second.changed.wait_for(lambda: second.heard_events, 0.3)
    keeper.stop()
    second.wait_for(lambda: second.heard_events)
    assert not is_running(first.heard_events[0]["pid"])


SERVER = """
import sys, threading
from pathlib import Path
from ociproxy.config.settings import Config
from ociproxy.serve.housekeeping import Housekeeper
from ociproxy.store.store import Store
class Errand:
    name = "errand"
    def use(self, config): pass
    def due(self): return []
    def heard(self, event): pass
    def ended(self, code): pass
def command(store, *_):
    with (store / "begun").open("a") as file:
        print("begun", file=file)
    return ["true"]
Housekeeper(Store(Path(sys.argv[1])), Errand(), command, Config()).start()
threading.Event().wait()
"""


def test_a_stopped_server_is_relieved_and_begins_no_work_when_it_goes_on(
    keep: Callable[..., Housekeeper], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "SILENT", 2.0)
    path = Store(tmp_path / "store").root / "begun"

    def begun() -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    with process(SERVER, tmp_path / "store") as server:
        while not begun():
            time.sleep(0.02)
        server.send_signal(signal.SIGSTOP)
        errand = Errand("other")
        keep(errand, LISTEN)
        errand.wait_for(lambda: errand.heard_events)
        before = begun()
        server.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        # One was about to begin: of two that remove, one waits for the other or gives up.
        assert (after := begun()) <= before + 1
        time.sleep(1.0)
        assert begun() == after


def test_a_child_that_does_not_end_is_killed(
    keep: Callable[..., Housekeeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "_END_TIME", 0.5)
    errand = Errand("deaf")
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    keeper = keep(errand, ignore + SAY + "time.sleep(60)")
    errand.wait_for(lambda: errand.heard_events)
    keeper.stop()
    assert not is_running(errand.heard_events[0]["pid"])


def test_a_command_ends_in_order_where_its_server_was_killed(tmp_path: Path) -> None:
    """It sees the end of its standard input; the server's variables are not its own."""
    store = Store(tmp_path / "store")
    blob = random_blob(1000)
    path = store.blobs.path(Digest.parse(blob.digest))
    path.write_bytes(blob.data)
    command = command_maker(None)(store.root, Config(), ["check", "--rate", "10"])
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OCIPROXY_QUICK": "1", "OCIPROXY_RATE": "1G"},
    )
    try:
        end = time.monotonic() + LIMIT
        while not reads(child.pid, path):  # where a signal before that ends it, it prints nothing
            assert time.monotonic() < end
            time.sleep(0.02)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == min(own + 10, 19)
        out, _ = child.communicate(timeout=LIMIT)  # closes its standard input
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == 130
    assert json.loads(out.splitlines()[-1])["interrupted"] is True
