"""Publishing and removing keep off each other, over all processes of a store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ociproxy.errors import Busy
from ociproxy.store import removal
from ociproxy.store.removal import Removals
from ociproxy.store.store import Store
from tests.server import ROOT

LIMIT = 60.0

REMOVER = """
import sys, time
from pathlib import Path
from ociproxy.store.store import Store
root = Path(sys.argv[1])
with Store(root).removals.remover() as remover:
    with remover.batch():
        print("in", flush=True)
        sys.stdin.readline()
        remover.take(root / "blobs" / "victim")
        print("taken", flush=True)
"""

BETWEEN = """
import sys
from pathlib import Path
from ociproxy.store.store import Store
root = Path(sys.argv[1])
with Store(root).removals.remover() as remover:
    with remover.batch():
        pass
    print("between", flush=True)
    sys.stdin.readline()
    with remover.batch():
        remover.take(root / "blobs" / "victim")
"""

PUBLISHER = """
import sys
from pathlib import Path
from ociproxy.store.store import Store
with Store(Path(sys.argv[1])).removals.kept_off():
    print("in", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def process(script: str, store: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", script, str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def line(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def go_on(running: subprocess.Popen[str]) -> None:
    assert running.stdin is not None
    running.stdin.write("\n")
    running.stdin.flush()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    (tmp_path / "blobs" / "victim").write_bytes(b"victim")
    return store


def publish(removals: Removals, done: threading.Event) -> threading.Thread:
    def run() -> None:
        with removals.kept_off():
            done.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_publisher_waits_until_the_batch_has_ended(store: Store) -> None:
    published = threading.Event()
    with process(REMOVER, store.root) as remover:
        assert line(remover) == "in"
        thread = publish(store.removals, published)
        assert not published.wait(0.3)
        go_on(remover)
        assert published.wait(LIMIT)
        thread.join(LIMIT)
        assert remover.wait(LIMIT) == 0
    assert not (store.root / "blobs" / "victim").exists()
    assert list(store.staging.root.iterdir()) == []


def test_publishers_that_take_long_in_turns_do_not_keep_a_batch_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a slow disk, where each waits for its flush longer than a turn."""
    monkeypatch.setattr(removal, "_TURN", 0.3)
    monkeypatch.setattr(removal, "_PAUSE", 0.05)
    removed, turns = threading.Event(), 3

    def publish_in_turns(number: int) -> None:
        removals = Store(store.root).removals
        time.sleep(number * 0.2)
        while not removed.is_set():
            with removals.kept_off():
                removed.wait(0.6)

    publishers = [threading.Thread(target=publish_in_turns, args=(n,)) for n in range(turns)]
    for each in publishers:
        each.start()
    time.sleep(0.7)
    with store.removals.remover() as remover:
        try:
            with remover.batch():
                removed.set()
        finally:
            removed.set()
            for each in publishers:
                each.join(LIMIT)


def test_a_batch_waits_until_the_publishers_have_ended(store: Store) -> None:
    with process(PUBLISHER, store.root) as publisher:
        assert line(publisher) == "in"
        with process(REMOVER, store.root) as remover:
            go_on(remover)
            time.sleep(0.5)
            assert (store.root / "blobs" / "victim").exists()
            go_on(publisher)
            assert (line(remover), line(remover)) == ("in", "taken")


def test_a_thread_that_publishes_an_image_publishes_its_parts_inside(store: Store) -> None:
    removals = store.removals
    with removals.kept_off():
        with removals.kept_off():
            pass
        with process(REMOVER, store.root) as remover:
            go_on(remover)
            time.sleep(0.5)
            assert (store.root / "blobs" / "victim").exists()


def test_threads_that_publish_at_once_share_a_lock(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "_JOINED", LIMIT)
    inside, leaving = threading.Barrier(9), threading.Event()

    def publish() -> None:
        with store.removals.kept_off():
            inside.wait(LIMIT)
            leaving.wait(LIMIT)

    with store.removals.kept_off():  # so that no thread has to take one
        threads = [threading.Thread(target=publish) for _ in range(8)]
        for thread in threads:
            thread.start()
        inside.wait(LIMIT)
        lock = store.root / "locks" / "publishing"
        links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
        assert [link.readlink() for link in links if link.is_symlink()].count(lock) == 1
        leaving.set()
    for thread in threads:
        thread.join(LIMIT)
    with store.removals.remover() as remover, remover.batch():
        pass


def test_publishers_without_a_pause_do_not_keep_a_remover_out(store: Store) -> None:
    stopping = threading.Event()

    def publish_on() -> None:
        while not stopping.is_set():
            with store.removals.kept_off():
                time.sleep(0.05)

    threads = [threading.Thread(target=publish_on) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        with store.removals.remover() as remover:
            for _ in range(5):
                with remover.batch():
                    pass
    finally:
        stopping.set()
        for thread in threads:
            thread.join(LIMIT)


def test_no_other_user_of_the_machine_can_reach_the_locks(store: Store) -> None:
    """A user who may read a file may lock it, and hold up all that publishes or asks for room."""
    locks = store.root / "locks"
    with store.removals.kept_off():
        assert locks.stat().st_mode & 0o007 == 0
    locks.chmod(0o755)  # as an earlier version made it
    Store(store.root)
    assert locks.stat().st_mode & 0o007 == 0


def test_two_prunes_do_not_run_at_once(store: Store) -> None:
    with store.removals.remover(), pytest.raises(Busy, match="another prune"):
        store.removals.remover()
    store.removals.remover().__exit__()


def test_a_prune_that_was_stopped_holds_up_no_pull_and_removes_nothing_later(store: Store) -> None:
    """The publisher that goes on may need what the stopped process was about to remove."""
    with process(REMOVER, store.root) as remover:
        assert line(remover) == "in"
        os.kill(remover.pid, signal.SIGSTOP)
        published = threading.Event()
        publish(store.removals, published).join(LIMIT)
        assert published.is_set()
        with store.removals.remover() as other, other.batch():  # nor any other prune
            pass
        os.kill(remover.pid, signal.SIGCONT)
        _, errors = remover.communicate("\n", LIMIT)
        assert "lost its turn" in errors
    assert (store.root / "blobs" / "victim").exists()
    assert list(store.staging.root.glob(".removed-*")) == []


def test_a_prune_that_was_stopped_between_two_batches_holds_up_no_other(store: Store) -> None:
    with process(BETWEEN, store.root) as stopped:
        assert line(stopped) == "between"
        with pytest.raises(Busy, match="another prune"):
            store.removals.remover()  # it works still
        os.kill(stopped.pid, signal.SIGSTOP)
        with store.removals.remover() as other, other.batch():
            pass
        os.kill(stopped.pid, signal.SIGCONT)
        _, errors = stopped.communicate("\n", LIMIT)
        assert "lost its turn" in errors
    assert (store.root / "blobs" / "victim").exists()


def test_a_prune_that_was_killed_leaves_no_lock_and_its_rubbish_goes(store: Store) -> None:
    with process(REMOVER, store.root) as remover:
        assert line(remover) == "in"
        remover.kill()
        remover.wait(LIMIT)
    with store.removals.kept_off():
        pass
    with store.removals.remover() as other, other.batch():
        assert other.take(store.root / "blobs" / "victim")
        assert not other.take(store.root / "blobs" / "victim")
    assert list(store.staging.root.iterdir()) == []
