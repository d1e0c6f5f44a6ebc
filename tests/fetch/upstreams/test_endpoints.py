"""Several endpoints of one upstream: which one is asked, and what each gets to know."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ociproxy import log
from ociproxy.clock import Deadline
from ociproxy.config.settings import Auth, Endpoint, Fetch, Secret, Timeouts, Upstream
from ociproxy.errors import (
    BlobUnknown,
    DigestMismatch,
    ManifestUnknown,
    OciProxyError,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from ociproxy.fetch.oras.backend import OrasBackend
from ociproxy.fetch.upstreams.endpoints import Endpoints
from ociproxy.oci.reference import Reference, Repository
from ociproxy.store.store import Store
from tests.clock import HandClock
from tests.fetch.conftest import TIMEOUTS
from tests.fetch.contract import BackendContract, digest, fetch_blob, new_download, run
from tests.images import Image, image, random_blob
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth
from tests.upstream_faults import HTML, Fault, too_many_requests

MakeUpstream = Callable[..., FakeUpstream]
OpenEndpoints = Callable[..., Endpoints]

MIB = 1024 * 1024
NAME = "registry.example"
APP = Repository(NAME, "team/app")
V1 = Reference(APP, "v1")


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def open_endpoints(clock: HandClock) -> Iterator[OpenEndpoints]:
    opened: list[Endpoints] = []

    def make(*endpoints: FakeUpstream | Endpoint, name: str = NAME, **entry: object) -> Endpoints:
        each = tuple(e if isinstance(e, Endpoint) else Endpoint(url=e.url) for e in endpoints)
        values = {"timeouts": TIMEOUTS, **entry}
        upstream = Upstream(name=name, endpoints=each, **values)  # type: ignore[arg-type]
        opened.append(
            Endpoints(
                upstream, lambda one: OrasBackend(one, Fetch()), Fetch(pause=30.0), clock=clock
            )
        )
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def two(make_upstream: MakeUpstream) -> tuple[FakeUpstream, FakeUpstream]:
    return make_upstream(), make_upstream()


class TestBehindADeadEndpoint(BackendContract):
    """Whatever a backend must do, it does when the first endpoint is not there."""

    def open_backend(self, upstream: FakeUpstream) -> Endpoints:
        # Port 9 of a loopback address that nothing listens on.
        dead, alive = Endpoint(url="http://127.0.0.9:9"), Endpoint(url=upstream.url)
        entry = Upstream(name=upstream.registry, endpoints=(dead, alive), timeouts=TIMEOUTS)
        return Endpoints(entry, lambda one: OrasBackend(one, Fetch()), Fetch(pause=30.0))


def add(upstream: FakeUpstream, held: Image) -> Image:
    return upstream.add("team/app", held, tag="v1")


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=404),
        Fault(status=403),
        Fault(status=400),
        Fault(drop=True),
        Fault(digest_header="sha256:" + "0" * 64),
        HTML,
        too_many_requests(),
    ],
)
def test_the_next_one_is_asked_for_what_one_does_not_give(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, fault: Fault
) -> None:
    for each in two:
        add(each, image())
    two[0].fault("/manifests/", fault)
    backend = open_endpoints(*two)
    assert backend.fetch_manifest(V1).raw == image().top.data
    assert [each.count("/manifests/") for each in two] == [1, 1]
    two[0].heal()


def test_the_first_one_is_preferred_and_asked_with_ns(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, store: Store
) -> None:
    held = add(two[0], image())
    add(two[1], image())
    backend = open_endpoints(*two)
    backend.resolve(V1)
    backend.fetch_manifest(V1)
    blob = held.blobs[0]
    assert backend.stat_blob(APP, digest(blob)) == blob.size
    assert fetch_blob(backend, APP, digest(blob), store) == blob.data
    backend.fetch_listing(APP, "tags/list", "n=1")
    assert {request.query for request in two[0].requests} == {
        "ns=registry.example",
        "n=1&ns=registry.example",
    }
    assert two[1].requests == []


def test_one_that_is_away_is_left_alone_and_then_asked_once(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, clock: HandClock
) -> None:
    for each in two:
        add(each, image())
    backend = open_endpoints(*two)
    two[0].stop_listening()
    backend.fetch_manifest(V1)
    two[0].listen_again()
    clock.time = 1.9
    backend.fetch_manifest(V1)
    assert two[0].count("/manifests/") == 0
    clock.time = 2.1
    backend.fetch_manifest(V1)
    assert [each.count("/manifests/") for each in two] == [1, 2]


def test_a_silent_one_leaves_the_next_one_time(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints
) -> None:
    """Of what the client of the request has left."""
    silent, good = two
    held = good.add(APP.name, image(), tag="v1")
    silent.fault("/manifests/", Fault(delay=30))
    with Deadline.after(2.0).kept():
        found = open_endpoints(silent, good, timeouts=Timeouts()).fetch_manifest(V1)
    silent.release()
    assert found.raw == held.top.data


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(delay=30), Fault(drop=True)])
def test_one_that_fails_is_left_alone_like_one_that_is_away(
    two: tuple[FakeUpstream, FakeUpstream],
    open_endpoints: OpenEndpoints,
    clock: HandClock,
    fault: Fault,
) -> None:
    for each in two:
        add(each, image())
    backend = open_endpoints(*two)
    two[0].fault("/manifests/", fault, times=1)
    for clock.time in (0.0, 1.9, 2.1):
        backend.fetch_manifest(V1)
    assert [each.count("/manifests/") for each in two] == [2, 2]
    two[0].release()


def test_one_that_throttles_is_left_alone_for_as_long_as_it_says(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, clock: HandClock
) -> None:
    for each in two:
        add(each, image())
    backend = open_endpoints(*two)
    two[0].fault("/manifests/", too_many_requests("60"), times=1)
    for clock.time in (0.0, 59.0, 61.0):
        backend.fetch_manifest(V1)
    assert [each.count("/manifests/") for each in two] == [2, 2]
    for each in two:
        each.fault("/manifests/", too_many_requests("60"))
    for clock.time in (62.0, 63.0):
        with pytest.raises(UpstreamRateLimited):
            backend.fetch_manifest(V1)
    assert [each.count("/manifests/") for each in two] == [3, 3]


@pytest.mark.parametrize("size", [500_000, 3_000_000])
def test_a_blob_that_breaks_off_goes_on_at_the_next_one(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, store: Store, size: int
) -> None:
    """Whether the first endpoint brought little or much."""
    blob = random_blob(size)
    for each in two:
        each.add_content("team/app", blob)
    two[0].fault("/blobs/", Fault(cut_after=size * 2 // 5))
    assert fetch_blob(open_endpoints(*two), APP, digest(blob), store) == blob.data
    assert two[1].bytes_sent("/blobs/") == size - size * 2 // 5


def test_an_endpoint_that_breaks_off_a_blob_is_left_alone(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, store: Store
) -> None:
    blob, other = (random_blob(500_000, seed=seed) for seed in ("one", "other"))
    for each in two:
        each.add_content("team/app", blob)
        each.add_content("team/app", other)
    two[0].fault("/blobs/", Fault(cut_after=200_000), times=1)
    backend = open_endpoints(*two)
    for wanted in (blob, other):
        assert fetch_blob(backend, APP, digest(wanted), store) == wanted.data
    assert two[0].count("/blobs/") == 1


def test_wrong_bytes_of_one_endpoint_are_not_joined_to_those_of_another(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, store: Store
) -> None:
    """The blob is fetched once more from zero, by the caller."""
    blob = random_blob(500_000)
    for each in two:
        each.add_content("team/app", blob)
    two[0].fault("/blobs/", Fault(flip_at=200_000))
    with pytest.raises(DigestMismatch):
        fetch_blob(open_endpoints(*two), APP, digest(blob), store)
    assert two[1].requests == []


def test_an_aborted_download_is_no_endpoints_fault(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, store: Store
) -> None:
    blob = two[0].add_content("team/app", random_blob(500_000))
    two[0].fault("/blobs/", Fault(stall_after=1000), times=1)
    backend = open_endpoints(*two)
    download = new_download(APP, digest(blob), store)
    timer = threading.Timer(0.2, download.abort)
    timer.start()
    with pytest.raises(UpstreamUnavailable, match=r"aborted|shutting down"):
        run(download, backend)
    timer.join()
    assert two[1].requests == []
    assert fetch_blob(backend, APP, digest(blob), store) == blob.data


def test_a_stop_and_a_leader_that_gives_up_pause_no_endpoint(
    two: tuple[FakeUpstream, FakeUpstream],
    open_endpoints: OpenEndpoints,
    store: Store,
    capfd: pytest.CaptureFixture[str],
) -> None:
    blob, led = (two[0].add_content("team/app", random_blob(MIB, seed=s)) for s in "ab")
    two[0].fault("/blobs/", Fault(stall_after=1000), times=1)
    backend = open_endpoints(*two)
    leader = store.staging.lead(digest(led))
    assert leader is not None
    for wanted in (blob, led):  # the second one is followed
        download = new_download(APP, digest(wanted), store)
        timer = threading.Timer(0.2, download.abort)
        timer.start()
        with pytest.raises(UpstreamUnavailable, match=r"aborted|shutting down"):
            run(download, backend)
        timer.join()
    leader.close()
    two[0].release()
    log.flush()
    assert "endpoint paused" not in capfd.readouterr().err


def test_a_blob_that_another_process_brings_says_nothing_of_an_endpoint_that_is_away(
    two: tuple[FakeUpstream, FakeUpstream],
    open_endpoints: OpenEndpoints,
    store: Store,
    clock: HandClock,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "_threshold", logging.INFO)
    held = add(two[1], image())
    blob = random_blob(1000)
    backend = open_endpoints(*two)
    two[0].stop_listening()
    backend.fetch_manifest(V1)
    clock.time = 2.1
    leader = store.staging.lead(digest(blob))
    assert leader is not None
    leader.write(0, blob.data)
    leader.arrived(0, blob.size)

    def commit() -> None:
        leader.set_size(blob.size)
        leader.commit(store.blobs.commit)

    timer = threading.Timer(0.2, commit)
    timer.start()
    assert fetch_blob(backend, APP, digest(blob), store) == blob.data
    timer.join()
    log.flush()
    assert "endpoint is back" not in capfd.readouterr().err
    assert backend.fetch_manifest(V1).raw == held.top.data


def test_an_endpoint_is_back_with_the_first_bytes_of_a_large_blob(
    two: tuple[FakeUpstream, FakeUpstream],
    open_endpoints: OpenEndpoints,
    store: Store,
    clock: HandClock,
) -> None:
    for each in two:
        add(each, image())
    blob = two[0].add_content("team/app", random_blob(MIB))
    two[0].fault("/blobs/", Fault(stall_after=1000))
    backend = open_endpoints(*two)
    two[0].stop_listening()
    backend.fetch_manifest(V1)
    two[0].listen_again()
    clock.time = 2.1
    done: list[bytes] = []
    client = threading.Thread(
        target=lambda: done.append(fetch_blob(backend, APP, digest(blob), store))
    )
    client.start()
    while two[0].bytes_sent("/blobs/") < 1000:
        time.sleep(0.01)
    time.sleep(0.2)  # until they have arrived
    backend.fetch_manifest(V1)
    assert [each.count("/manifests/") for each in two] == [1, 1]
    two[0].release()
    client.join(20)
    assert done == [blob.data]


def test_a_damaged_blob_is_asked_again_of_another_endpoint(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, store: Store
) -> None:
    blob, other = (random_blob(500_000, seed=seed) for seed in ("one", "other"))
    for each in two:
        each.add_content("team/app", blob)
        each.add_content("team/app", other)
    two[0].fault("/blobs/", Fault(flip_at=200_000), times=1)
    backend = open_endpoints(*two)
    with pytest.raises(DigestMismatch):
        fetch_blob(backend, APP, digest(blob), store)
    assert fetch_blob(backend, APP, digest(blob), store) == blob.data
    assert [each.count("/blobs/") for each in two] == [1, 1]
    assert fetch_blob(backend, APP, digest(other), store) == other.data
    assert [each.count("/blobs/") for each in two] == [2, 1]


def test_when_all_are_away_they_are_asked_all_the_same(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints
) -> None:
    """Whether to ask at all is decided above: a fill that was cut may go on at once."""
    for each in two:
        add(each, image())
        each.stop_listening()
    backend = open_endpoints(*two)
    for _ in range(2):
        with pytest.raises(UpstreamUnavailable) as caught:
            backend.fetch_manifest(V1)
        assert caught.value.unreachable
    for each in two:
        each.listen_again()
    assert backend.fetch_manifest(V1).raw == image().top.data


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (Fault(status=404), Fault(status=500), UpstreamUnavailable),
        (Fault(status=500), Fault(status=404), ManifestUnknown),
        (Fault(status=404), Fault(status=404), ManifestUnknown),
    ],
)
def test_the_last_one_has_the_last_word(
    two: tuple[FakeUpstream, FakeUpstream],
    open_endpoints: OpenEndpoints,
    first: Fault,
    last: Fault,
    expected: type[OciProxyError],
) -> None:
    for each, fault in zip(two, (first, last), strict=True):
        each.fault("/manifests/", fault)
    with pytest.raises(expected):
        open_endpoints(*two).fetch_manifest(V1)


def test_no_endpoint_sees_the_credentials_of_another(make_upstream: MakeUpstream) -> None:
    hub, robot = BasicAuth("hub", "own-secret"), BasicAuth("robot", "its-secret")
    mirror, harbor, origin = (make_upstream(auth=auth) for auth in (None, robot, hub))
    entry = Upstream(
        name=origin.registry,
        auth=Auth(user="hub", password=Secret("own-secret")),
        endpoints=(
            Endpoint(url=mirror.url),
            Endpoint(url=harbor.url, auth=Auth(user="robot", password=Secret("its-secret"))),
            Endpoint(url=origin.url),
        ),
        timeouts=TIMEOUTS,
    )
    # A mirror that asks for a password does not get the registry's.
    mirror.fault("/v2/", Fault(status=401, headers={"WWW-Authenticate": "Basic realm=give"}))
    held = add(origin, image())
    backend = Endpoints(entry, lambda one: OrasBackend(one, Fetch()), Fetch(pause=30.0))
    try:
        holder = backend.fetch_manifest(Reference(Repository(origin.registry, "team/app"), "v1"))
    finally:
        backend.close()
    assert str(holder.descriptor.digest) == held.digest

    def given(upstream: FakeUpstream) -> set[str | None]:
        return {request.headers.get("Authorization") for request in upstream.requests}

    assert given(mirror) == {None}
    assert len(given(harbor) - {None}) == len(given(origin) - {None}) == 1
    assert given(harbor) & given(origin) == {None}


def test_a_path_leads_the_repositorys_and_ns_stays_away(
    upstream: FakeUpstream, open_endpoints: OpenEndpoints
) -> None:
    upstream.add("hub/team/app", image(), tag="v1")
    backend = open_endpoints(Endpoint(url=f"{upstream.url}/hub"))
    assert backend.fetch_manifest(V1).raw == image().top.data
    assert [request.query for request in upstream.requests] == [""]
    with pytest.raises(BlobUnknown):
        backend.stat_blob(APP, digest(random_blob(10)))


def test_wrong_bytes_of_a_paused_endpoint_end_the_download_too(
    two: tuple[FakeUpstream, FakeUpstream], open_endpoints: OpenEndpoints, store: Store
) -> None:
    """All endpoints are left alone, so all are asked: the file of the first is gone by then."""
    blob = random_blob(500_000)
    for each in two:
        each.add_content("team/app", blob)
        each.fault("/manifests/", Fault(status=503))
    backend = open_endpoints(*two)
    with pytest.raises(UpstreamUnavailable):
        backend.fetch_manifest(V1)
    two[0].fault("/blobs/", Fault(flip_at=200_000))
    with pytest.raises(DigestMismatch):
        fetch_blob(backend, APP, digest(blob), store)
    assert two[1].count("/blobs/") == 0
    assert list(store.blobs.path(digest(blob)).parent.iterdir()) == []
