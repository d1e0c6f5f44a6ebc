"""When a sync is due: every so often, in a window, over midnight and changes of the clocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from ociproxy.config.file import ConfigFileInvalid, parse_config
from ociproxy.config.schedule import Sync, Window
from ociproxy.oci.platform import Platform

HOUR = 3600.0
NIGHT = Window.parse("01:00-05:00")


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str, fold: int = 0) -> float:
    """Local time, in 2026; clocks change on 29 March and 25 October."""
    return datetime.fromisoformat(f"2026-{text}").replace(fold=fold).timestamp()


@pytest.mark.parametrize(
    ("window", "open_at", "closed_at"),
    [
        ("01:00-05:00", ["01:00", "03:30", "04:59"], ["00:59", "05:00", "12:00"]),
        ("22:30-04:00", ["22:30", "23:59", "00:00", "03:59"], ["04:00", "22:29"]),
        ("22:00-24:00", ["22:00", "23:59"], ["00:00", "21:59"]),
    ],
)
def test_a_window_is_open_between_two_times(
    window: str, open_at: list[str], closed_at: list[str]
) -> None:
    parsed = Window.parse(window)
    assert str(parsed) == window
    assert all(parsed.is_open(at(f"06-10T{each}")) for each in open_at)
    assert not any(parsed.is_open(at(f"06-10T{each}")) for each in closed_at)


@pytest.mark.parametrize(
    ("now", "opening"),
    [
        ("06-10T00:30", "06-10T01:00"),
        ("06-10T01:00", "06-10T01:00"),
        ("06-10T02:00", "06-11T01:00"),
        ("03-28T12:00", "03-29T01:00"),
        ("10-24T12:00", "10-25T01:00"),
    ],
)
def test_the_next_opening(now: str, opening: str) -> None:
    assert NIGHT.next_opening(at(now)) == at(opening)


def test_a_window_in_the_hour_that_is_left_out_opens_the_night_after() -> None:
    window = Window.parse("02:15-02:45")
    assert window.next_opening(at("03-28T12:00")) == at("03-30T02:15")
    # In the hour that comes twice it is open twice.
    assert window.is_open(at("10-25T02:20", fold=0))
    assert window.is_open(at("10-25T02:20", fold=1))


def test_a_run_is_due_every_so_often() -> None:
    sync = Sync(images=("*",), every=6 * HOUR)
    now = at("06-10T12:00")
    assert sync.next_run(None, now) == now
    assert sync.next_run(now - HOUR, now) == now + 5 * HOUR
    assert sync.next_run(now - 7 * HOUR, now) == now
    # The clock was set back since.
    assert sync.next_run(now + 100 * HOUR, now) == now


def test_a_run_waits_for_its_window() -> None:
    sync = Sync(images=("*",), every=6 * HOUR, window=NIGHT)
    assert sync.next_run(None, at("06-10T12:00")) == at("06-11T01:00")
    assert sync.next_run(at("06-10T01:00"), at("06-10T03:00")) == at("06-11T01:00")


def test_a_long_window_has_no_run_early() -> None:
    sync = Sync(images=("*",), every=6 * HOUR, window=Window.parse("01:00-12:00"))
    assert sync.next_run(at("06-10T01:00"), at("06-10T01:30")) == at("06-10T07:00")


@pytest.mark.parametrize("began", ["03-28T01:00", "03-28T01:40", "10-24T01:00"])
def test_a_run_of_every_night_skips_none(began: str) -> None:
    sync = Sync(images=("*",), every=24 * HOUR, window=Window.parse("01:00-02:00"))
    month_day, _, _ = began.partition("T")
    month, day = month_day.split("-")
    begun = at(began)
    for night in range(int(day) + 1, int(day) + 4):
        due = sync.next_run(begun, begun + 2 * HOUR)
        assert datetime.fromtimestamp(due).strftime("%m-%d %H") == f"{month}-{night:02} 01"
        begun = due


def test_the_configuration_says_what_is_synced_and_when(tmp_path: object) -> None:
    text = """
sync:
  - images: ["docker.io/library/*", "quay.io/team/app:v1"]
    every: 6h
    window: "22:30-04:00"
    platforms: [linux/amd64, aarch64/arm64]
    referrers: true
"""
    (sync,) = parse_config(text.replace("aarch64/arm64", "linux/aarch64"), "a.yaml").sync
    assert sync == Sync(
        images=("docker.io/library/*", "quay.io/team/app:v1"),
        every=6 * HOUR,
        window=Window(22 * 60 + 30, 4 * 60),
        platforms=(Platform("linux", "amd64"), Platform.parse("linux/arm64")),
        referrers=True,
    )


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("{every: 6h}", "a.yaml:2: sync[0].images: is required"),
        ("{images: []}", "a.yaml:2: sync[0].images: names no image"),
        ("{images: [nginx]}", "a.yaml:2: sync[0].images[0]: matches nothing"),
        ("{images: none.txt}", "a.yaml:2: sync[0].images: no such file"),
        ("{images: ['*'], every: 1s}", "a.yaml:2: sync[0].every: must be between 1m and"),
        ("{images: ['*'], window: '1-5'}", "a.yaml:2: sync[0].window: must be two times"),
        ("{images: ['*'], window: '25:00-26:00'}", "a.yaml:2: sync[0].window: must be two"),
        ("{images: ['*'], window: '01:00-01:00'}", "a.yaml:2: sync[0].window: is never open"),
        ("{images: ['*'], platforms: [x]}", "a.yaml:2: sync[0].platforms[0]: "),
        ("{images: ['*'], evry: 6h}", "a.yaml:2: sync[0].evry: unknown key (did you mean every?)"),
        ("{images: ['*']}\n- {images: ['*']}", "a.yaml:3: sync[1]: * is listed twice"),
    ],
)
def test_a_bad_entry_is_named_with_its_line(entry: str, problem: str) -> None:
    with pytest.raises(ConfigFileInvalid) as failure:
        parse_config(f"sync:\n- {entry}\n", "a.yaml")
    assert problem in str(failure.value)
