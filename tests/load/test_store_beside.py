"""A load and everybody else on the same store: a server, a small disk, little memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from tests.images import image, multi_platform
from tests.load.loading import LIMIT, Load
from tests.parts.tools import small_disk
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MIB = 1 << 20


def test_running_server_sees_an_image_as_soon_as_it_is_whole(
    upstream: FakeUpstream, load: Load, mirror: Callable[..., Mirror]
) -> None:
    app = upstream.add("team/app", multi_platform("app", layer_size=300_000), tag="v1")
    server = mirror([upstream_entry(upstream.url)], store=load.store)
    amd64 = app.manifests[0]
    layer = amd64.json()["layers"][0]["digest"]
    upstream.fault(f"/blobs/{layer}", Fault(stall_after=100_000))
    process = load.start(load.write(f"{upstream.registry}/team/app:v1"), "--arch", "amd64")
    limit = time.monotonic() + LIMIT
    while upstream.bytes_sent(layer) < 100_000:
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert load.cached() == set()
    upstream.heal()
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    upstream.requests.clear()
    for reference in ("v1", app.digest, amd64.digest):
        answer = server.manifest(upstream.registry, "team/app", reference)
        assert (answer.status, answer.cache_status) == (200, "ociproxy; hit")
    assert server.blob(upstream.registry, "team/app", layer).cache_status == "ociproxy; hit"
    assert upstream.requests == []


def test_full_disk_ends_the_load_with_4_and_what_is_whole_stays(
    upstream: FakeUpstream, load: Load
) -> None:
    small = upstream.add("team/small", image("small"), tag="v1")
    upstream.add("team/big", image("big", layer_size=6 * MIB), tag="v1")
    names = [f"{upstream.registry}/team/{name}:v1" for name in ("small", "big")]
    failures = load.folder / "failed.txt"
    with small_disk(load.store, "4m"):
        done = load.run(load.write(*names), "--jobs", "1", "--failures", str(failures))
        assert done.code == 4
        assert "no space left on device" in done.stderr
        assert load.complete() == {names[0]}
        assert load.has(small)
    assert names[1] in failures.read_text()


def test_what_does_not_fit_is_not_begun_and_what_fits_goes_on(
    upstream: FakeUpstream, load: Load
) -> None:
    upstream.add("team/big", image("big", layer_size=6 * MIB), tag="v1")
    upstream.add("team/small", image("small"), tag="v1")
    names = [f"{upstream.registry}/team/{name}:v1" for name in ("big", "small")]
    with small_disk(load.store, "4m"):
        planned = load.run(load.write(*names), "--plan")
        assert (planned.code, "NOT ENOUGH" in planned.stdout) == (4, True)
        done = load.run(load.write(*names), "--jobs", "1")
        assert done.code == 4
        assert "bytes to come" in done.stderr
        assert load.complete() == {names[1]}
    assert upstream.bytes_sent("team/big/blobs") < 5_000


def test_what_arrived_before_the_disk_was_full_is_kept(upstream: FakeUpstream, load: Load) -> None:
    big = upstream.add("team/big", image("big", layer_size=6 * MIB), tag="v1")
    (layer,) = big.layers
    name = f"{upstream.registry}/team/big:v1"
    upstream.fault(layer.digest, Fault(rate=3 * MIB))
    with small_disk(load.store, "8m"):
        with load.start(load.write(name)) as process:
            limit = time.monotonic() + LIMIT
            while upstream.bytes_sent(layer.digest) < MIB and time.monotonic() < limit:
                time.sleep(0.01)
            filler = load.store / "filler"
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(8 * MIB))
            process.communicate(timeout=LIMIT)
        assert process.returncode == 4
        filler.unlink()
        upstream.heal()
        before = upstream.bytes_sent(layer.digest)
        assert load.run(load.write(name)).code == 0
        assert upstream.bytes_sent(layer.digest) - before < 5.5 * MIB
        assert load.has(big)


def test_memory_does_not_grow_with_what_is_loaded(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/small", image("small"), tag="v1")
    upstream.add("team/big", image("big", layers=4, layer_size=50 * MIB), tag="v1")
    small, big = (
        peak_memory(load, load.write(f"{upstream.registry}/team/{name}:v1"))
        for name in ("small", "big")
    )
    # Each of four downloads has a few pieces of 1 MiB in hand, where hashing is behind.
    assert big - small < 40 * MIB


def peak_memory(load: Load, listed: str) -> int:
    """Bytes, of the process itself."""
    peak = 0
    process = load.start(listed)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with contextlib.suppress(OSError):
            for line in status.read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return peak
