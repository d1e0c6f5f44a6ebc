"""A load that is killed, interrupted or resumed: what is visible is whole, little comes twice."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.images import Image, image
from tests.load.loading import LIMIT, Load, lines_of
from tests.upstream import FakeUpstream
from tests.upstream_faults import CHUNK, Fault

KILLS = 20
IMAGES = 8


def wait_for_bytes(upstream: FakeUpstream, more: int, process: subprocess.Popen[str]) -> None:
    """Until that many more bytes of blobs were sent, or the process has ended."""
    limit = time.monotonic() + LIMIT
    target = upstream.bytes_sent("/blobs/") + more
    while upstream.bytes_sent("/blobs/") < target and process.poll() is None:
        assert time.monotonic() < limit, "nothing is loaded"
        time.sleep(0.005)


def add_images(upstream: FakeUpstream) -> dict[str, Image]:
    """Images of some megabytes that share one layer, each under a name of its own."""
    shared = image("shared", layer_size=700_000).layers[0]
    made = {}
    for number in range(IMAGES):
        name = f"team/app{number}"
        made[f"{upstream.registry}/{name}:v1"] = upstream.add(
            name, image(f"app{number}", layers=2, layer_size=600_000), tag="v1"
        )
        upstream.add_content(name, shared)
    return made


@pytest.mark.timeout(240)
def test_killed_twenty_times_it_ends_complete_with_hardly_a_byte_twice(
    upstream: FakeUpstream, load: Load
) -> None:
    images = add_images(upstream)
    upstream.fault("/blobs/", Fault(rate=200_000))
    listed = load.write(*images)
    size = sum(blob.size for each in images.values() for blob in each.blobs)
    chance = random.Random(20)
    kills = in_flight = 0
    for _ in range(KILLS):
        process = load.start(listed)
        # The start, a moment with much in flight, or the end: wherever chance has it.
        wait_for_bytes(upstream, chance.randrange(1, size // KILLS), process)
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        in_flight += CHUNK * sum(not request.done for request in upstream.seen("/blobs/"))
        upstream.release()
        assert load.cached() == load.complete(), "half an image can be seen"
    assert kills == KILLS
    upstream.heal()
    assert load.run(listed).code == 0
    assert load.complete() == set(images)
    assert all(load.has(each) for each in images.values())
    assert upstream.bytes_sent("/blobs/") <= 1.1 * size + in_flight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_keeps_what_came_and_says_so(
    upstream: FakeUpstream, load: Load, number: signal.Signals
) -> None:
    big = upstream.add("team/big", image("big", layer_size=2_000_000), tag="v1")
    small = upstream.add("team/small", image("small"), tag="v1")
    upstream.fault(f"/blobs/{big.layers[0].digest}", Fault(stall_after=1_000_000))
    names = [f"{upstream.registry}/team/{name}:v1" for name in ("big", "small")]
    failures = load.folder / "failed.txt"
    process = load.start(load.write(*names), "--failures", str(failures), "--jobs", "1")
    wait_for_bytes(upstream, 1_000_000, process)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert time.monotonic() - began < 5.0
    assert "Traceback" not in err
    assert "0 loaded, 2 not finished" in err
    assert "interrupted: run it again to go on" in err
    assert [line.split()[0] for line in lines_of(failures)] == names
    assert load.cached() == set()
    upstream.heal()
    assert load.run(str(failures)).code == 0
    assert load.has(big)
    assert load.has(small)
    (rest,) = (r for r in upstream.seen(big.layers[0].digest) if "Range" in r.headers)
    # All but what one read was waiting for.
    assert int(rest.headers["Range"].removeprefix("bytes=").split("-")[0]) >= 700_000


def test_upstream_that_does_not_answer_does_not_delay_the_end(
    upstream: FakeUpstream, load: Load
) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    upstream.fault("/manifests/", Fault(delay=60.0))
    process = load.start(load.write(f"{upstream.registry}/team/app:v1"))
    limit = time.monotonic() + LIMIT
    while not upstream.requests:
        assert time.monotonic() < limit
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert time.monotonic() - began < 6.0


def test_manifest_comes_after_its_blobs_and_the_tag_last(
    upstream: FakeUpstream, load: Load
) -> None:
    app = upstream.add("team/app", image("app", layers=2), tag="v1")
    upstream.fault(f"/blobs/{app.layers[1].digest}", Fault(status=404))
    name = f"{upstream.registry}/team/app:v1"
    assert load.run(load.write(name)).code == 3
    assert not (load.store / "img" / app.top.encoded).exists()
    assert load.tag(name) is None


def test_two_loads_at_once_fetch_once(upstream: FakeUpstream, load: Load) -> None:
    images = add_images(upstream)
    upstream.fault("/blobs/", Fault(rate=1_000_000))
    listed = load.write(*images)
    both = [load.start(listed), load.start(listed)]
    for process in both:
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, err
    assert all(load.has(each) for each in images.values())
    size = sum(blob.size for each in images.values() for blob in each.blobs)
    assert upstream.bytes_sent("/blobs/") == size


@contextmanager
def stopped_load(upstream: FakeUpstream, load: Load, name: str) -> Iterator[None]:
    """Beside a load of this image that was stopped after it got a part, as by Ctrl-Z."""
    process = load.start(load.write(name))
    try:
        wait_for_bytes(upstream, 300_000, process)
        process.send_signal(signal.SIGSTOP)
        yield
    finally:
        process.kill()
        process.communicate()


def test_beside_a_stopped_load_it_fetches_the_image_itself(
    upstream: FakeUpstream, load: Load
) -> None:
    upstream.add("team/app", image(layer_size=2_000_000), tag="v1")
    name = f"{upstream.registry}/team/app:v1"
    upstream.fault("/blobs/", Fault(rate=400_000))
    load.write_config(upstream.url, fetch={"timeouts": {"stall": "1s"}})
    with stopped_load(upstream, load, name):
        upstream.heal()
        done = load.run(load.write(name))
    assert done.code == 0, done.stderr
    assert load.complete() == {name}


def test_beside_a_stopped_load_it_gives_up_after_the_pull_timeout(
    upstream: FakeUpstream, load: Load
) -> None:
    upstream.add("team/app", image(layer_size=2_000_000), tag="v1")
    name = f"{upstream.registry}/team/app:v1"
    upstream.fault("/blobs/", Fault(rate=400_000))
    with stopped_load(upstream, load, name):
        upstream.heal()
        done = load.run(load.write(name), "--pull-timeout", "1000")
    assert done.code == 75, done.stderr
    assert "got no further in 1 s" in done.stderr
