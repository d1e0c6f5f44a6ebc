"""Connections over bad links: what they cost, and what ends them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ociproxy.config.settings import Fetch, Timeouts
from ociproxy.errors import OciProxyError, UpstreamDenied, UpstreamRateLimited, UpstreamUnavailable
from ociproxy.fetch.backend import Backend
from ociproxy.fetch.download.download import Download
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Repository
from ociproxy.store.store import Store
from tests.fetch.conftest import OpenBackend
from tests.images import Content, random_blob
from tests.upstream import FakeUpstream
from tests.upstream_faults import HTML, Fault, too_many_requests

KIB, MIB = 1024, 1024 * 1024
TIMEOUTS_OF_PATIENCE = Timeouts(connect=10.0, headers=10.0, stall=10.0)


class Pull:
    """One download in a thread, and its readers."""

    def __init__(self, store: Store, upstream: FakeUpstream) -> None:
        self.store, self.upstream = store, upstream
        self.threads = ThreadPoolExecutor(8)
        self.changed = threading.Condition()

    def start(
        self, blob: Content, backend: Backend, limits: Fetch, size: int | None = None
    ) -> None:
        self.download = Download(
            Repository(self.upstream.registry, "app"),
            Digest.parse(blob.digest),
            self.store,
            limits,
            partition="",
            expected_size=size,
            believes=True,
            spawn=self.threads.submit,
        )
        self.download.notify = self._notify
        fetch = backend.fetch_blob
        self.running: Future[None] = self.threads.submit(self.download.run, fetch)

    def read(self, offset: int, seconds: float = 30.0) -> int:
        """Wait for the byte at offset, as a client does; returns the end of the bytes there."""
        self.download.want(offset)
        try:
            with self.changed:
                assert self.changed.wait_for(
                    lambda: self.download.assembly.available(offset) > offset, seconds
                )
        finally:
            self.download.assembly.unwant(offset)
        return self.download.assembly.available(offset)

    def body(self) -> bytes:
        """What is in the store once the download has ended well."""
        self.running.result(60)
        with os.fdopen(self.download.duplicate_file(), "rb") as file:
            return file.read()

    def close(self) -> None:
        self.download.abort()
        self.upstream.release()
        self.threads.shutdown()
        self.download.close()

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()


@pytest.fixture
def pull(tmp_path: Path, upstream: FakeUpstream) -> Iterator[Pull]:
    made = Pull(Store(tmp_path / "store"), upstream)
    yield made
    made.close()


def add(upstream: FakeUpstream, size: int) -> Content:
    return upstream.add_content("app", random_blob(size, seed="bad link"))


# Bad links


def test_a_link_that_cuts_every_200_kb_brings_the_whole_blob(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = add(upstream, 3 * MIB)
    upstream.fault("/blobs/", Fault(cut_after=200_000))
    pull.start(blob, open_backend(upstream), Fetch(retries=2))
    assert pull.body() == blob.data
    assert upstream.bytes_sent("/blobs/") == blob.size


@pytest.mark.parametrize(
    "odd",
    [
        too_many_requests("1"),
        Fault(status=403),
        Fault(status=401),
        Fault(status=404),
        Fault(status=400),
        Fault(body=HTML.body, no_range=True),
        Fault(body=HTML.body, chunked=True, no_range=True),
    ],
    ids=["429", "403", "401", "404", "400", "portal", "portal without a length"],
)
def test_an_odd_answer_in_the_middle_costs_one_try_and_not_the_blob(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend, odd: Fault
) -> None:
    blob = add(upstream, 3 * MIB)
    upstream.fault("/blobs/", Fault(cut_after=2 * MIB), times=1)
    upstream.fault("/blobs/", odd, times=1)
    pull.start(blob, open_backend(upstream), Fetch(retries=2))
    assert pull.body() == blob.data
    good = [each.sent for each in upstream.seen("/blobs/") if each.sent > KIB]
    assert good == [2 * MIB, MIB]


def test_a_429_in_the_middle_is_waited_out(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = add(upstream, 3 * MIB)
    upstream.fault("/blobs/", Fault(cut_after=MIB), times=1)
    upstream.fault("/blobs/", too_many_requests("2"), times=1)
    began = time.monotonic()
    pull.start(blob, open_backend(upstream), Fetch(retries=2, retry_wait_max=0.0))
    assert pull.body() == blob.data
    assert time.monotonic() - began >= 2


@pytest.mark.parametrize(
    ("odd", "error"),
    [(too_many_requests("60"), UpstreamRateLimited), (Fault(status=403), UpstreamDenied)],
)
def test_a_refusal_that_lasts_ends_the_download_and_keeps_what_arrived(
    pull: Pull,
    upstream: FakeUpstream,
    open_backend: OpenBackend,
    odd: Fault,
    error: type[OciProxyError],
) -> None:
    blob = add(upstream, 3 * MIB)
    upstream.fault("/blobs/", Fault(cut_after=MIB), times=1)
    upstream.fault("/blobs/", odd)
    limits = Fetch(retries=2, retry_wait_max=0.1)
    pull.start(blob, open_backend(upstream), limits)
    with pytest.raises(error):
        pull.running.result(30)
    pull.download.close()
    assert upstream.count("/blobs/") <= 4
    upstream.heal()
    pull.start(blob, open_backend(upstream), limits)
    assert pull.body() == blob.data
    assert upstream.bytes_sent("/blobs/") == blob.size


def test_a_refusal_at_the_start_is_passed_on_at_once(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = add(upstream, MIB)
    upstream.fault("/blobs/", too_many_requests("1"))
    pull.start(blob, open_backend(upstream), Fetch())
    with pytest.raises(UpstreamRateLimited):
        pull.running.result(30)
    assert upstream.count("/blobs/") == 1


def test_one_byte_a_connection_does_not_go_on_for_ever(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = add(upstream, MIB)
    upstream.fault("/blobs/", Fault(cut_after=1))
    pull.start(blob, open_backend(upstream), Fetch(retry_wait_max=0.1, crawl=1.0))
    with pytest.raises(UpstreamUnavailable):
        pull.running.result(30)
    assert upstream.count("/blobs/") > 4


# What a reader waits for


def ranges(upstream: FakeUpstream) -> list[str | None]:
    """What each request for a blob asked for."""
    return [each.headers.get("Range") for each in upstream.seen("/blobs/")]


def test_the_tail_of_a_slow_small_blob_does_not_wait_for_all_before_it(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = add(upstream, 24 * MIB)
    upstream.fault("/blobs/", Fault(rate=4 * MIB))
    began = time.monotonic()
    pull.start(blob, open_backend(upstream), Fetch(), blob.size)
    pull.read(0)
    pull.read(23 * MIB)
    assert time.monotonic() - began < 4
    assert pull.body() == blob.data
    assert ranges(upstream)[0] is None
    assert ranges(upstream)[1] == f"bytes={23 * MIB}-{blob.size - 1}"
    assert upstream.bytes_sent("/blobs/") < blob.size + Fetch().segment


def test_two_readers_far_ahead_get_a_request_each_and_no_byte_arrives_twice(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = add(upstream, 24 * MIB)
    upstream.fault("/blobs/", Fault(stall_after=MIB), times=1)
    pull.start(blob, open_backend(upstream, timeouts=TIMEOUTS_OF_PATIENCE), Fetch(), blob.size)
    pull.read(0)
    upstream.fault("/blobs/", Fault(rate=2 * MIB))
    pull.read(8 * MIB, seconds=5)
    pull.read(20 * MIB, seconds=5)
    upstream.heal()
    assert pull.body() == blob.data
    assert pull.download.bytes_fetched <= blob.size + 4 * MIB


def test_a_plain_sequential_read_of_a_slow_small_blob_is_one_request(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = add(upstream, 8 * MIB)
    upstream.fault("/blobs/", Fault(rate=4 * MIB))
    pull.start(blob, open_backend(upstream), Fetch(), blob.size)
    offset = 0
    while offset < blob.size - 1:
        offset = pull.read(offset)
    assert pull.body() == blob.data
    assert upstream.count("/blobs/") == 1
    assert upstream.bytes_sent("/blobs/") == blob.size


def test_bytes_that_come_soon_anyway_are_not_asked_for_again(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = add(upstream, 6 * MIB)
    # A new connection would take longer than the rest of this one.
    upstream.fault("/blobs/", Fault(delay=2.0, rate=12 * MIB))
    pull.start(blob, open_backend(upstream, timeouts=TIMEOUTS_OF_PATIENCE), Fetch(), blob.size)
    pull.read(0)
    pull.read(5 * MIB)
    assert pull.body() == blob.data
    assert upstream.count("/blobs/") == 1


def test_a_reader_ahead_at_an_upstream_without_ranges_costs_no_second_body(
    pull: Pull, upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    blob = add(upstream, 12 * MIB)
    upstream.fault("/blobs/", Fault(no_range=True, rate=6 * MIB))
    pull.start(blob, open_backend(upstream), Fetch(), blob.size)
    pull.read(0)
    pull.read(10 * MIB)
    assert pull.body() == blob.data
    assert upstream.count("/blobs/") == 2
    assert pull.download.bytes_fetched == blob.size
