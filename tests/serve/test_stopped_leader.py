"""A process that fetches a blob is stopped (SIGSTOP, a frozen cgroup): others fetch it."""

from __future__ import annotations

import http.client
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.images import Content
from tests.parts.tools import small_disk
from tests.serve.scene import MIB, Scene
from tests.server import Mirror
from tests.upstream_faults import Fault

STALL = {"stall": "2s"}


@contextmanager
def stopped(server: Mirror) -> Iterator[None]:
    """Ends with the server killed, for it does not hear a signal to end."""
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)
        server.kill()


@pytest.fixture
def beside(scene: Scene, mirror: Callable[..., Mirror]) -> Callable[[Mirror], Mirror]:
    """One more server on the same store, where `scene` goes on."""

    def start(server: Mirror) -> Mirror:
        return scene.start(store=server.store, timeouts=STALL)

    return start


def open_blob(scene: Scene, stack: ExitStack, blob: Content) -> http.client.HTTPResponse:
    return stack.enter_context(scene.open(blob))


def test_a_client_that_has_read_half_of_the_blob_gets_the_rest(
    scene: Scene, beside: Callable[[Mirror], Mirror]
) -> None:
    blob = scene.blob(8 * MIB, Fault(rate=2 * MIB))
    leader = scene.start(timeouts=STALL)
    with ExitStack() as stack:
        open_blob(scene, stack, blob)
        beside(leader)
        followed = open_blob(scene, stack, blob)
        head = followed.read(2 * MIB)
        with stopped(leader):
            assert head + followed.read() == blob.data
            assert "leader stopped" in scene.server.log()
            # What the leader had brought was not fetched again.
            assert scene.upstream.seen("/blobs/")[-1].headers.get("Range", "").startswith("bytes=")
    scene.server.wait_for_file(f"blobs/{blob.encoded}")


def test_a_client_that_waits_for_the_first_byte_gets_the_blob(
    scene: Scene, beside: Callable[[Mirror], Mirror]
) -> None:
    blob = scene.blob(MIB, Fault(delay=60), times=1)
    leader = scene.start(timeouts=STALL)
    with ExitStack() as stack:
        asking = http.client.HTTPConnection(leader.host, leader.port)
        stack.callback(asking.close)
        asking.request("GET", scene.path("blobs", blob.digest))
        leader.wait_for(lambda: bool(scene.upstream.seen("/blobs/")), "asked")
        with stopped(leader):
            beside(leader)
            assert scene.get(blob).body == blob.data


def test_what_both_bring_in_the_end_is_the_blob(
    scene: Scene, beside: Callable[[Mirror], Mirror]
) -> None:
    """The stopped process goes on after the other one has published the blob."""
    blob = scene.blob(6 * MIB, Fault(rate=2 * MIB))
    leader = scene.start(timeouts=STALL)
    with ExitStack() as stack:
        first = open_blob(scene, stack, blob)
        head = first.read(MIB)
        assert leader.process is not None
        leader.process.send_signal(signal.SIGSTOP)
        other = beside(leader)
        assert scene.get(blob).body == blob.data
        other.wait_for_file(f"blobs/{blob.encoded}")
        leader.process.send_signal(signal.SIGCONT)
        assert head + first.read() == blob.data
    leader.stop()
    assert (other.store / "blobs" / blob.encoded).read_bytes() == blob.data
    other.wait_for(
        lambda: not list((other.store / "pulls").glob(f"{blob.encoded}*")), "nothing left"
    )


def test_a_client_of_the_following_process_is_told_the_length(scene: Scene) -> None:
    blob = scene.blob(8 * MIB, Fault(stall_after=4 * MIB))
    leader = scene.start()
    with ExitStack() as stack:
        open_blob(scene, stack, blob).read(MIB)
        scene.start(store=leader.store)
        followed = open_blob(scene, stack, blob)
        assert followed.getheader("Content-Length") == str(blob.size)
        scene.upstream.release()
        assert followed.read() == blob.data


def test_processes_that_were_frozen_together_go_on_together(
    scene: Scene, beside: Callable[[Mirror], Mirror]
) -> None:
    blob = scene.blob(8 * MIB, Fault(rate=MIB))
    leader = scene.start(timeouts=STALL)
    with ExitStack() as stack:
        open_blob(scene, stack, blob)
        follower = beside(leader)
        followed = open_blob(scene, stack, blob)
        head = followed.read(MIB)
        processes = [server.process for server in (leader, follower)]
        for process in processes:
            assert process is not None
            process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        for process in reversed(processes):
            assert process is not None
            process.send_signal(signal.SIGCONT)
            time.sleep(0.3)
        assert head + followed.read() == blob.data
        assert "leader stopped" not in follower.log()


def test_bytes_that_the_stopped_leader_left_damaged_cost_one_try(
    scene: Scene, beside: Callable[[Mirror], Mirror]
) -> None:
    blob = scene.blob(8 * MIB, Fault(rate=2 * MIB))
    leader = scene.start(timeouts=STALL)
    with ExitStack() as stack:
        open_blob(scene, stack, blob).read(2 * MIB)
        with stopped(leader):
            with (leader.store / "pulls" / blob.encoded).open("r+b") as file:
                file.seek(MIB)
                file.write(bytes(100))
            scene.upstream.heal()
            server = beside(leader)
            with pytest.raises(http.client.IncompleteRead):
                scene.get(blob)
            assert scene.get(blob).body == blob.data
            server.wait_for_file(f"blobs/{blob.encoded}")


def test_a_disk_that_is_too_small_for_two_copies(
    scene: Scene, beside: Callable[[Mirror], Mirror], tmp_path: Path
) -> None:
    blob = scene.blob(7 * MIB, Fault(stall_after=5 * MIB), times=1)
    with small_disk(tmp_path / "disk", "8m") as disk:
        leader = scene.start(store=disk, timeouts={"stall": "9s"})
        with ExitStack() as stack:
            open_blob(scene, stack, blob).read(4 * MIB)
            with stopped(leader):
                beside(leader)
                assert scene.get(blob).body == blob.data
                data = [p for p in (disk / "pulls").glob(f"{blob.encoded}*") if not p.suffix]
                assert [path.name for path in data] == [blob.encoded]
                scene.server.stop()
