"""What may pass is waited out: for as long as something comes, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from ociproxy.errors import (
    ManifestUnknown,
    OciProxyError,
    UpstreamError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from ociproxy.fetch.retry import ImageRetry, Progress
from tests.clock import HandClock

REGISTRY = "registry.example"


class Upstream:
    """Gives these answers, one after the other; an error is raised, a number passes as seconds
    before the next answer, anything else is the answer."""

    def __init__(self, clock: HandClock, *answers: object, seconds: float = 10.0) -> None:
        self.clock, self.answers, self.seconds = clock, list(answers), seconds
        self.asked = 0

    async def __call__(self) -> object:
        self.asked += 1
        self.clock.time += self.seconds
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def clock() -> HandClock:
    return HandClock(1000.0)


@pytest.fixture
def waits() -> list[tuple[UpstreamError, float]]:
    return []


@pytest.fixture
def retry(clock: HandClock, waits: list[tuple[UpstreamError, float]]) -> ImageRetry:
    return ImageRetry(60.0, wait_max=0.0, clock=clock, waiting=lambda *wait: waits.append(wait))


def down() -> UpstreamUnavailable:
    return UpstreamUnavailable(REGISTRY, "down")


async def outcome(work: Callable[[], Awaitable[object]]) -> object:
    try:
        return await work()
    except OciProxyError as error:
        return type(error)


async def test_what_passes_is_tried_again(clock: HandClock, retry: ImageRetry) -> None:
    upstream = Upstream(clock, down(), down(), "answer")
    assert await retry.run(REGISTRY, Progress(clock.time), upstream) == "answer"
    assert upstream.asked == 3


async def test_what_lasts_is_given_up_after_the_limit(clock: HandClock, retry: ImageRetry) -> None:
    upstream = Upstream(clock, down())
    with pytest.raises(UpstreamUnavailable):
        await retry.run(REGISTRY, Progress(clock.time), upstream)
    assert upstream.asked == 7


async def test_what_cannot_pass_is_not_tried_again(clock: HandClock, retry: ImageRetry) -> None:
    upstream = Upstream(clock, ManifestUnknown("x", "gone"))
    with pytest.raises(ManifestUnknown):
        await retry.run(REGISTRY, Progress(clock.time), upstream)
    assert upstream.asked == 1


async def test_bytes_that_came_start_the_limit_anew(clock: HandClock, retry: ImageRetry) -> None:
    progress, upstream = Progress(clock.time), Upstream(clock, down(), seconds=40.0)

    async def work() -> object:
        if upstream.asked < 9:
            progress.when = clock.time + 39.0
        return await upstream()

    assert await outcome(lambda: retry.run(REGISTRY, progress, work)) is UpstreamUnavailable
    assert upstream.asked == 11


async def test_rest_of_a_dead_upstream_fails_at_the_first_try(
    clock: HandClock, retry: ImageRetry
) -> None:
    first, second, other = (Upstream(clock, down()) for _ in range(3))
    await outcome(lambda: retry.run(REGISTRY, Progress(clock.time), first))
    await outcome(lambda: retry.run(REGISTRY, Progress(clock.time), second))
    await outcome(lambda: retry.run("other.example", Progress(clock.time), other))
    assert (first.asked, second.asked, other.asked) == (7, 1, 7)
    back = Upstream(clock, "answer")
    assert await retry.run(REGISTRY, Progress(clock.time), back) == "answer"
    third = Upstream(clock, down())
    await outcome(lambda: retry.run(REGISTRY, Progress(clock.time), third))
    assert third.asked == 7


async def test_a_name_that_does_not_resolve_is_not_waited_for(
    clock: HandClock, retry: ImageRetry, waits: list[tuple[UpstreamError, float]]
) -> None:
    nowhere = UpstreamUnavailable("qauy.io", "name does not resolve", unresolved=True)
    first, second = Upstream(clock, nowhere), Upstream(clock, nowhere)
    for each in (first, second):
        with pytest.raises(UpstreamUnavailable):
            await retry.run("qauy.io", Progress(clock.time), each)
    assert (first.asked, second.asked, waits) == (1, 1, [])
    # Of an upstream that has answered it is a resolver's hiccup.
    hiccup = Upstream(clock, nowhere, "answer")
    await retry.run(REGISTRY, Progress(clock.time), Upstream(clock, "fine"))
    assert await retry.run(REGISTRY, Progress(clock.time), hiccup) == "answer"


async def test_one_bad_image_does_not_make_its_upstream_dead(
    clock: HandClock, retry: ImageRetry
) -> None:
    bad = Upstream(clock, down())

    async def work() -> object:
        await retry.run(REGISTRY, Progress(clock.time), Upstream(clock, "fine"))
        return await bad()

    await outcome(lambda: retry.run(REGISTRY, Progress(clock.time), work))
    late = Upstream(clock, down(), "answer")
    assert await retry.run(REGISTRY, Progress(clock.time), late) == "answer"


async def test_throttling_is_waited_out_where_it_fits(
    clock: HandClock,
    retry: ImageRetry,
    waits: list[tuple[UpstreamError, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def sleep(seconds: float) -> None:
        clock.time += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    throttled = UpstreamRateLimited(REGISTRY, "slow down", retry_after=30.0)
    upstream = Upstream(clock, throttled, "answer", seconds=0.0)
    assert await retry.run(REGISTRY, Progress(clock.time), upstream) == "answer"
    assert waits == [(throttled, 30.0)]
    forever = UpstreamRateLimited(REGISTRY, "go away", retry_after=3600.0)
    upstream = Upstream(clock, forever)
    with pytest.raises(UpstreamRateLimited):
        await retry.run(REGISTRY, Progress(clock.time), upstream)
    assert upstream.asked == 1
