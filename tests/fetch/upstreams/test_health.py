"""When an upstream is left alone, and how its return is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociproxy.errors import (
    Interrupted,
    ManifestUnknown,
    OciProxyError,
    StoreFull,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from ociproxy.fetch.upstreams.health import Health

AWAY = UpstreamUnavailable("r", "connection refused", unreachable=True)
LATE = UpstreamUnavailable("r", "timed out", timed_out=True)
BROKEN = UpstreamUnavailable("r", "answered 500")
THROTTLED = UpstreamRateLimited("r", "answered 429", retry_after=7.0)


def admitted(health: Health, now: float) -> bool:
    """Whether a question may be asked."""
    try:
        health.admit(now)
    except (UpstreamUnavailable, UpstreamRateLimited):
        return False
    return True


def test_each_back_off_is_longer_up_to_the_limit() -> None:
    health, now = Health("r", 30.0), 0.0
    pauses: list[float] = []
    for _ in range(6):
        assert health.admit(now) is bool(pauses)
        assert health.failed(AWAY, now)
        condition, seconds = health.condition(now)
        assert condition == "unreachable"
        pauses.append(seconds)
        assert not admitted(health, now + seconds - 0.01)
        now += seconds
    assert pauses == [2, 4, 8, 16, 30, 30]


def test_one_question_finds_out_and_the_others_fail_at_once() -> None:
    health = Health("r", 30.0)
    health.failed(AWAY, 0.0)
    with pytest.raises(UpstreamUnavailable, match="left alone for 2 s more: connection refused"):
        health.admit(0.5)
    assert health.admit(2.0)
    assert health.condition(2.0) == ("probing", 0.0)
    with pytest.raises(UpstreamUnavailable, match="while one request finds out"):
        health.admit(2.1)
    assert health.answered()
    assert health.admit(2.2) is False
    assert health.condition(2.2) == ("available", 0.0)


def test_a_question_that_never_tells_is_not_waited_for_for_ever() -> None:
    health = Health("r", 30.0)
    health.failed(AWAY, 0.0)
    assert health.admit(2.0)
    assert not admitted(health, 21.9)
    assert health.admit(22.0)


def test_a_probe_that_asked_nothing_leaves_its_turn_to_the_next_request() -> None:
    health = Health("r", 30.0)
    health.failed(AWAY, 0.0)
    assert health.admit(2.0)
    health.unasked()
    assert health.condition(2.1) == ("probing", 0.0)
    assert health.admit(2.1)
    assert not admitted(health, 2.2)


def test_questions_that_began_before_the_back_off_do_not_lengthen_it() -> None:
    health = Health("r", 30.0)
    assert [health.failed(AWAY, at / 10) for at in range(5)] == [True, False, False, False, False]
    assert health.condition(0.5) == ("unreachable", 1.5)


@pytest.mark.parametrize("error", [LATE, BROKEN])
def test_some_failures_in_a_row_are_an_upstream_that_is_away(error: OciProxyError) -> None:
    health = Health("r", 30.0)
    assert [health.failed(error, 0.0) for _ in range(2)] == [False, False]
    health.answered()
    assert [health.failed(error, 0.0) for _ in range(3)] == [False, False, True]
    assert health.admit(2.0)
    assert health.failed(error, 2.0)
    assert health.condition(2.0) == ("unreachable", 4.0)


def test_every_other_answer_says_that_it_is_there() -> None:
    health = Health("r", 30.0)
    health.failed(AWAY, 0.0)
    assert health.admit(2.0)
    assert not health.failed(ManifestUnknown("r/a:b", "unknown to the upstream"), 2.1)
    assert health.admit(2.2) is False


@pytest.mark.parametrize(
    "error", [StoreFull(Path("/x"), "no space left"), Interrupted("r", "shutting down")]
)
def test_a_full_disk_and_a_stop_say_nothing_of_the_upstream(error: OciProxyError) -> None:
    health = Health("r", 30.0)
    assert not any(health.failed(error, 0.0) for _ in range(4))
    health.failed(AWAY, 0.0)
    assert health.admit(2.0)
    assert not health.failed(error, 2.1)
    assert health.admit(2.2)  # it may have asked nothing, and been the probe
    assert not admitted(health, 2.3)


def test_a_429_lasts_as_long_as_it_says() -> None:
    health = Health("r", 30.0)
    assert health.failed(THROTTLED, 0.0)
    assert not health.answered()  # what was under way when it came
    with pytest.raises(UpstreamRateLimited) as caught:
        health.admit(2.5)
    assert caught.value.retry_after == 5
    assert health.condition(2.5) == ("limited", 4.5)
    assert [health.admit(7.0), health.admit(7.0)] == [False, False]


def test_the_request_that_finds_out_does_not_refuse_itself_when_it_has_waited() -> None:
    health = Health("r", 30.0)
    health.failed(UpstreamUnavailable("r", "away", unreachable=True), 0.0)
    assert health.admit(60.0)
    health.check(62.0)
    with pytest.raises(UpstreamUnavailable, match="one request finds out"):
        health.admit(62.0)
    health.failed(UpstreamUnavailable("r", "away", unreachable=True), 63.0)
    with pytest.raises(UpstreamUnavailable, match="left alone for"):
        health.check(63.1)
