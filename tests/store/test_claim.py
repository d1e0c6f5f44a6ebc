"""Work that one process of a store does: another one takes over where that ended or was stopped."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from ociproxy.store import claim
from ociproxy.store.store import Store
from tests.store.test_removal import LIMIT, go_on, line, process

OWNER = """
import sys
from pathlib import Path
from ociproxy.store.store import Store
claim = Store(Path(sys.argv[1])).removals.claim("work")
assert claim.take()
print("owner", flush=True)
while sys.stdin.readline():
    print("held" if claim.is_held() else "taken" if claim.take() else "lost", flush=True)
"""


def test_work_of_a_stopped_process_is_taken_over_and_it_finds_that_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "SILENT", 2.0)
    store = Store(tmp_path)
    waiting = [store.removals.claim("work") for _ in range(2)]
    with process(OWNER, tmp_path) as owner:
        assert line(owner) == "owner"
        assert not any(each.take() for each in waiting)
        owner.send_signal(signal.SIGSTOP)
        end = time.monotonic() + LIMIT
        while not any([each.take() for each in waiting]):
            assert time.monotonic() < end
            time.sleep(0.05)
        assert [each.is_held() for each in waiting].count(True) == 1
        owner.send_signal(signal.SIGCONT)
        go_on(owner)
        assert line(owner) == "lost"
        for each in waiting:
            each.close()
        go_on(owner)
        assert line(owner) == "taken"


def test_work_of_a_process_that_works_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "SILENT", 2.0)
    store = Store(tmp_path)
    owner, other = store.removals.claim("work"), store.removals.claim("work")
    assert owner.take()
    touched = (tmp_path / "locks/work").stat().st_mtime_ns
    with owner.working():  # for longer than it may be silent
        end = time.monotonic() + 3.5
        while time.monotonic() < end:
            assert not other.take()
            time.sleep(0.1)
    assert owner.is_held()
    assert (tmp_path / "locks/work").stat().st_mtime_ns > touched
    owner.close()
    assert other.take()
    other.close()
