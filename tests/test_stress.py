"""A short form of `make stress`: see `tests.stress`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress.events import Event, Recorder
from tests.stress.judge import History, Said
from tests.stress.run import Setting, run, table
from tests.upstream_faults import Request


def test_a_store_that_is_too_small_fails_no_client_and_loses_nothing(tmp_path: Path) -> None:
    setting = Setting(seconds=4, images=80, seed=1)
    found = run(setting, tmp_path)
    print(table(setting, found))
    assert found.wrong == []
    assert found.counts["pulls"] > 0
    assert found.counts["removed"] > 0
    assert all(found.counts[name] for name in ("load", "prune", "check"))


def came(when: float, name: str, folder: str = "blobs") -> Event:
    return Event(when, folder, name, came=True, moved=True)


def went(when: float, name: str, folder: str = "blobs", *, moved: bool = True) -> Event:
    return Event(when, folder, name, came=False, moved=moved)


def asked(when: float, name: str, **headers: str) -> Request:
    return Request("GET", f"/v2/app/blobs/sha256:{name}", "", headers, began=when)


def test_the_judge_allows_manifests_above_the_cap_and_no_blob() -> None:
    sizes = {"a": 60, "b": 40, "c": 1, "m": 7}
    events = [came(1, "a"), came(2, "b"), came(3, "m", "img"), came(4, "m", "img")]
    assert History(events, sizes, (), ()).sizes(100).largest == 107
    assert History(events, sizes, (), ()).sizes(100).beyond == 0
    late = [*events, came(20, "c")]
    found = History(late, sizes, (), ()).sizes(100)
    assert (found.beyond, found.blob) == (8, "c")
    instead = [*events, went(19, "b"), came(20, "c")]
    assert History(instead, sizes, (), ()).sizes(100).beyond == 0


@pytest.mark.parametrize(
    ("between", "said", "kills", "found"),
    [
        ([], [], [], 1),
        ([went(15, "a")], [], [], 0),
        ([went(25, "a")], [], [], 1),
        ([went(15, "a", "pulls", moved=False)], [], [], 1),  # it is stored: that was of no use
        ([], [Said(15, "mirror1", "WARN  passing through digest=sha256:a reason=x")], [], 0),
        ([], [Said(15, "mirror1", "INFO  filled digest=sha256:a bytes=1 kept=False")], [], 0),
        ([], [Said(15, "mirror1", "INFO  filled digest=sha256:a bytes=1")], [], 1),
        ([], [Said(15, "mirror1", "WARN  leader stopped digest=sha256:a")], [], 0),
        ([], [], [15.0], 0),
    ],
)
def test_the_judge_wants_a_reason_for_a_second_download(
    between: list[Event], said: list[Said], kills: list[float], found: int
) -> None:
    events = [came(10.1, "a"), *between]
    gets = [asked(10, "a"), asked(20, "a")]
    assert len(list(History(events, {"a": 1}, gets, said, kills).doubles())) == found
    # One reason is none for a third.
    gets = [*gets, asked(30, "a")]
    if not kills:
        assert len(list(History(events, {"a": 1}, gets, said).doubles())) >= 1
    resumed = [asked(10, "a"), asked(20, "a", Range="bytes=5-")]
    assert not list(History([came(10.1, "a")], {"a": 1}, resumed, ()).doubles())


def test_the_recorder_tells_what_happened_in_order(tmp_path: Path) -> None:
    for name in ("blobs", "img", "fat", "pulls"):
        (tmp_path / name).mkdir()
    recorder = Recorder(tmp_path)
    (tmp_path / "pulls/a").write_bytes(b"12345")
    (tmp_path / "pulls/a").rename(tmp_path / "blobs/a")
    (tmp_path / "blobs/a").unlink()
    recorder.stop()
    assert [str(each) for each in recorder.events] == [
        "made as pulls/a",
        "renamed from pulls/a",
        "renamed to blobs/a",
        "deleted from blobs/a",
    ]
    assert recorder.is_whole
