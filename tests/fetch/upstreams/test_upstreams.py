"""What is remembered of upstreams, and who may be asked."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from threading import Event

import pytest

from ociproxy.clock import Deadline
from ociproxy.config.settings import Config, Fetch, Upstream
from ociproxy.errors import OciProxyError, StoreError, UpstreamForbidden, UpstreamUnavailable
from ociproxy.fetch.backend import Quota
from ociproxy.fetch.oras.backend import OrasBackend
from ociproxy.fetch.upstreams.requests import Requests
from ociproxy.fetch.upstreams.upstreams import Upstreams, UpstreamState
from ociproxy.oci.reference import Reference, Repository
from tests.clock import HandClock
from tests.fetch.conftest import TIMEOUTS
from tests.images import image
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault, too_many_requests

Open = Callable[..., Upstreams]


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
async def upstreams(upstream: FakeUpstream, clock: HandClock) -> AsyncIterator[Upstreams]:
    entry = Upstream(name=upstream.registry, scheme="http", timeouts=TIMEOUTS)
    config = Config(fetch=Fetch(pause=30.0), upstreams={entry.name: entry})
    opened = Upstreams(config, lambda one: OrasBackend(one, config.fetch), clock=clock)
    yield opened
    opened.close()


@pytest.fixture
async def requests(upstreams: Upstreams, clock: HandClock) -> AsyncIterator[Requests]:
    opened = Requests(upstreams, Config(fetch=Fetch(pause=30.0)), clock=clock)
    yield opened
    opened.close()


async def resolve(requests: Requests, upstream: FakeUpstream, tag: str = "v1") -> None:
    reference = Reference(Repository(upstream.registry, "app"), tag)
    await requests.call(reference.repository, reference, lambda backend: backend.resolve(reference))


async def test_states_tell_the_condition_and_the_quota(
    upstreams: Upstreams, requests: Requests, upstream: FakeUpstream, clock: HandClock
) -> None:
    assert upstreams.states() == []
    upstream.add("app", image(), tag="v1")
    said = {"ratelimit-limit": "100;w=60", "ratelimit-remaining": "7;w=60"}
    upstream.fault("/manifests/", Fault(headers=said), times=1)
    await resolve(requests, upstream)
    quota = Quota(100, 7, 60)
    assert upstreams.states() == [UpstreamState(upstream.registry, True, "available", 0.0, quota)]
    upstream.fault("/manifests/", too_many_requests("9"), times=1)
    with pytest.raises(OciProxyError):
        await resolve(requests, upstream)
    clock.time = 4.0
    assert upstreams.states() == [UpstreamState(upstream.registry, True, "limited", 5.0, quota)]
    clock.time = 9.0
    await asyncio.to_thread(upstream.stop_listening)
    with pytest.raises(OciProxyError):
        await resolve(requests, upstream)
    assert upstreams.states() == [UpstreamState(upstream.registry, True, "unreachable", 2.0, quota)]
    await asyncio.to_thread(upstream.listen_again)


async def test_whoever_waits_for_the_question_that_finds_out_is_not_kept(
    upstreams: Upstreams, requests: Requests, upstream: FakeUpstream, clock: HandClock
) -> None:
    upstream.add("app", image(), tag="v1")
    await asyncio.to_thread(upstream.stop_listening)
    with pytest.raises(UpstreamUnavailable):
        await resolve(requests, upstream)
    await asyncio.to_thread(upstream.listen_again)
    clock.time = 2.0
    upstream.fault("/manifests/", Fault(delay=30), times=1)
    before = asyncio.get_running_loop().time()
    first = asyncio.create_task(resolve(requests, upstream))
    await asyncio.sleep(0.1)
    with pytest.raises(UpstreamUnavailable, match="while one request finds out"):
        await resolve(requests, upstream, "v2")
    with pytest.raises(UpstreamUnavailable, match="still does not answer"):
        await first
    assert asyncio.get_running_loop().time() - before < 1.5
    upstream.release()
    for _ in range(100):
        await asyncio.sleep(0.02)
        if upstreams.states()[0].condition == "available":
            break
    await resolve(requests, upstream)


async def test_what_a_look_finds_in_the_store_is_asked_of_no_upstream(
    upstreams: Upstreams, requests: Requests, upstream: FakeUpstream
) -> None:
    repository = Repository(upstream.registry, "app")
    found = await requests.call_after(repository, "key", lambda: 7, lambda _: 8)
    assert found == 7
    assert upstreams.states()[0].condition == "available"
    assert await requests.call_after(repository, "key", lambda: None, lambda _: 8) == 8


async def test_clients_that_come_while_one_looks_share_its_request(
    requests: Requests, upstream: FakeUpstream
) -> None:
    repository, looking, asked = Repository(upstream.registry, "app"), Event(), list[int]()

    def look() -> None:
        looking.wait(10)

    def ask(_: object) -> int:
        asked.append(1)
        return 8

    first = asyncio.create_task(requests.call_after(repository, "key", look, ask))
    await asyncio.sleep(0)
    assert await requests.call_after(repository, "key", lambda: 7, lambda _: 9) is None
    joined = asyncio.create_task(requests.call(repository, "key", lambda _: 9))
    await asyncio.sleep(0)
    looking.set()
    assert [await first, await joined] == [8, 8]
    assert asked == [1]


async def test_a_look_that_hangs_is_given_up_and_asks_no_upstream_when_it_ends(
    requests: Requests, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ociproxy.fetch.upstreams.requests.LOOK", 0.1)
    repository, goes_on, asked = Repository(upstream.registry, "app"), Event(), list[int]()
    ended = Event()

    def look() -> None:
        goes_on.wait(10)
        ended.set()

    with pytest.raises(StoreError, match="does not answer"):
        await requests.call_after(repository, "key", look, lambda _: asked.append(1))
    assert await requests.call(repository, "key", lambda _: 8) == 8
    goes_on.set()
    assert await asyncio.to_thread(ended.wait, 10)
    assert await requests.call(repository, "key", lambda _: 9) == 9
    assert not asked


async def test_an_upstream_that_is_left_alone_is_not_asked_after_a_look(
    upstreams: Upstreams, requests: Requests, upstream: FakeUpstream
) -> None:
    upstream.add("app", image(), tag="v1")
    upstream.fault("/manifests/", too_many_requests("9"), times=1)
    with pytest.raises(OciProxyError):
        await resolve(requests, upstream)
    repository, looked = Repository(upstream.registry, "app"), list[int]()
    assert (
        await requests.call_after(repository, "key", lambda: looked.append(1), lambda _: 8) is None
    )
    assert not looked


async def test_a_registry_that_a_rule_forbids_is_not_asked(
    upstream: FakeUpstream, clock: HandClock
) -> None:
    isolated = Upstream(name="private.example", isolation="repository")
    config = Config(upstreams={isolated.name: isolated})
    opened = Upstreams(config, lambda one: OrasBackend(one, config.fetch), clock=clock)
    with pytest.raises(UpstreamForbidden, match="isolates repositories"):
        await resolve(Requests(opened, config, clock=clock), upstream)
    assert opened.states() == []
    opened.close()


async def test_what_a_client_has_waited_before_counts(upstreams: Upstreams) -> None:
    """As for its password to be checked: it has its answer in time all the same."""
    began = asyncio.get_running_loop().time()
    with Deadline.after(0.2).kept(), pytest.raises(UpstreamUnavailable) as caught:
        async with upstreams.answer_time("r"):
            await asyncio.sleep(30)
    assert caught.value.timed_out
    assert asyncio.get_running_loop().time() - began < 3


async def test_the_thread_of_a_request_ends_with_the_time_of_its_client(
    requests: Requests, upstream: FakeUpstream
) -> None:
    upstream.add("app", image(), tag="v1")
    upstream.fault("/manifests/", Fault(delay=30))
    with Deadline.after(0.5).kept(), pytest.raises(UpstreamUnavailable, match=r"0\.5 s"):
        await resolve(requests, upstream)
    upstream.release()


async def test_an_error_that_comes_when_its_client_has_left_is_no_bug(
    requests: Requests, upstream: FakeUpstream
) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))
    upstream.fault("/manifests/", Fault(delay=30))
    leaving = asyncio.create_task(resolve(requests, upstream))
    await asyncio.wait([leaving], timeout=0.5)
    leaving.cancel()
    await asyncio.wait([leaving])
    upstream.release()
    await requests.drain()
    del leaving
    gc.collect()
    assert complaints == []


async def test_an_engine_ends_although_a_request_has_just_begun(
    requests: Requests, upstream: FakeUpstream
) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: complaints.append(about))
    upstream.fault("/manifests/", Fault(status=404))
    asking = asyncio.create_task(resolve(requests, upstream))
    await asyncio.sleep(0)  # begun, and not one step further
    requests.close()
    with pytest.raises(UpstreamUnavailable, match="shutting down"):
        await asking
    await asyncio.wait_for(requests.drain(), 5)
    await asyncio.sleep(0.2)
    del asking
    gc.collect()
    assert complaints == []
