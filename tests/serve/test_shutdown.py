"""Stopping: what is under way finishes, within a bound that an operator sets."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.serve.scene import MIB, Scene
from tests.server import Mirror
from tests.upstream_faults import Fault

HALF = Fault(stall_after=MIB)
CUT = (http.client.IncompleteRead, ConnectionError)


def terminate(server: Mirror) -> subprocess.Popen[bytes]:
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    return server.process


def test_an_idle_connection_does_not_delay_the_end(scene: Scene) -> None:
    server = scene.start()
    with closing(http.client.HTTPConnection(server.host, server.port)) as client:
        client.request("GET", "/v2/")
        with client.getresponse() as response:
            assert response.read() == b"{}"
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 10  # the grace is 30 s


@pytest.mark.parametrize("workers", [1, 2])
def test_a_response_under_way_finishes(scene: Scene, workers: int) -> None:
    blob = scene.blob(4 * MIB, HALF)
    server = scene.start(serve={"workers": workers})
    with scene.open(blob) as response:
        head = response.read(1)
        process = terminate(server)
        server.wait_for_log("stopping")
        with pytest.raises(ConnectionError):
            server.get("/healthz")
        scene.upstream.heal()
        assert head + response.read() == blob.data
    assert process.wait(10) == 0
    assert scene.is_stored(blob)


def test_a_stored_blob_under_way_finishes(scene: Scene) -> None:
    blob = scene.blob(32 * MIB)
    server = scene.start()
    scene.get(blob)
    server.wait_for_file(f"blobs/{blob.encoded}")
    with scene.open(blob) as response:
        head = response.read(1)
        process = terminate(server)
        server.wait_for_log("stopping")
        assert head + response.read() == blob.data
    assert process.wait(10) == 0


def test_a_second_signal_ends_the_wait(scene: Scene) -> None:
    blob = scene.blob(4 * MIB, HALF)
    server = scene.start(serve={"shutdown_grace": "1m"})
    with scene.open(blob) as response:
        response.read(1)
        process = terminate(server)
        server.wait_for_log("stopping")
        time.sleep(1.1)
        began = time.monotonic()
        terminate(server)
        assert process.wait(15) == 0
        assert time.monotonic() - began < 10
        with pytest.raises(CUT):
            response.read()


@pytest.mark.parametrize("workers", [1, 2])
def test_beyond_the_grace_a_response_is_cut(scene: Scene, workers: int) -> None:
    blob = scene.blob(4 * MIB, HALF)
    server = scene.start(serve={"shutdown_grace": "1s", "workers": workers})
    with scene.open(blob) as response:
        response.read(1)
        began = time.monotonic()
        process = terminate(server)
        assert process.wait(20) == 0
        assert 0.9 < time.monotonic() - began < 12
        with pytest.raises(CUT):
            response.read()
    # What had come is there for the next start, and only the rest is asked for.
    scene.upstream.heal()
    sent = scene.upstream.bytes_sent("/blobs/")
    server.start()
    assert scene.get(blob).body == blob.data
    assert scene.upstream.bytes_sent("/blobs/") - sent < blob.size


@pytest.mark.parametrize("signals", [1, 2])
def test_a_stored_blob_that_nobody_reads_is_cut(scene: Scene, signals: int) -> None:
    """By the grace, or by the second signal."""
    blob = scene.blob(32 * MIB)
    server = scene.start(serve={"shutdown_grace": "1s" if signals == 1 else "1m"})
    scene.get(blob)
    server.wait_for_file(f"blobs/{blob.encoded}")
    with scene.open(blob) as response:
        response.read(1)
        process = terminate(server)
        if signals == 2:
            time.sleep(1.1)
            terminate(server)
        assert process.wait(15) == 0
        with pytest.raises(CUT):
            response.read()
    assert "Traceback" not in server.log()
    assert "exception" not in server.log()


def test_workers_do_not_outlive_who_leads_them(scene: Scene) -> None:
    """Killed, it can tell them nothing; the next one needs the port."""
    server = scene.start(serve={"workers": 2})
    blob = scene.blob(MIB)
    assert scene.get(blob).body == blob.data
    server.kill()

    def refuses() -> bool:
        try:
            server.get("/healthz")
        except ConnectionError:
            return True
        return False

    server.wait_for(refuses)
    server.wait_for(lambda: server.log().count("stopping") == 2)


def test_a_signal_to_every_process_is_one_signal(scene: Scene) -> None:
    """systemd tells each process of a service, and the one that leads the workers tells them
    too."""
    blob = scene.blob(4 * MIB, HALF)
    server = scene.start(serve={"workers": 2})
    assert server.process is not None
    leader = server.process.pid
    workers = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    assert len(workers) == 2
    with scene.open(blob) as response:
        head = response.read(1)
        for worker in workers:
            os.kill(int(worker), signal.SIGTERM)
        process = terminate(server)
        server.wait_for_log("stopping")
        time.sleep(0.5)
        scene.upstream.heal()
        assert head + response.read() == blob.data
    assert process.wait(10) == 0


def test_a_question_that_hangs_upstream_does_not_delay_the_end(scene: Scene) -> None:
    scene.upstream.fault("/manifests/", Fault(delay=60))
    server = scene.start(serve={"shutdown_grace": "1s"})
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(scene.manifest, "v1")
        server.wait_for(lambda: scene.upstream.count("/manifests/") == 1, "asked")
        process, began = terminate(server), time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 8
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            asking.result(10)
    said = [line for line in server.log().splitlines() if "/v1" in line or ":v1" in line]
    assert len(said) == 1
    assert "request cut" in said[0]
    assert 'reason="the server stops"' in said[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_download_of_before_a_reload_does_not_delay_the_end(scene: Scene, workers: int) -> None:
    blob = scene.blob(4 * MIB, HALF)
    server = scene.start(serve={"shutdown_grace": "1s", "workers": workers})
    with scene.open(blob) as response:
        response.read(1)
        server.reload()
        server.wait_for_log("configuration reloaded")
        process, began = terminate(server), time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 8


def test_a_client_that_reads_nothing_costs_the_grace_once(scene: Scene) -> None:
    blob = scene.blob(64 * MIB)
    server = scene.start(serve={"shutdown_grace": "6s"})
    assert scene.get(blob).status == 200
    server.wait_for_file(f"blobs/{blob.encoded}")
    with scene.open(blob) as response:
        response.read(1)
        process, began = terminate(server), time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 11


@pytest.mark.parametrize("workers", [1, 2])
def test_a_log_that_is_not_read_stops_no_request_and_no_end(scene: Scene, workers: int) -> None:
    """Lines are dropped, and counted once the pipe is read again."""
    server = scene.start(serve={"workers": workers, "shutdown_grace": "2s"})
    server.stop()
    program = [sys.executable, "-m", "ociproxy", *server.command()[3:], "--port", str(server.port)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        server.wait_for(lambda: is_up(server), "up", 20)
        for _ in range(6000 * workers):
            assert server.get("/v2/none/x/tags/list/x").status == 404
        lines: list[bytes] = []
        reader = threading.Thread(target=lambda out: lines.extend(out), args=(process.stderr,))
        reader.start()
        server.wait_for(lambda: any(b"log lines dropped lines=" in x for x in lines), "counted")
        process.terminate()
        assert process.wait(20) == 0
        reader.join(10)
        assert any(b" stopped" in line for line in lines)
    finally:
        process.kill()
        process.wait(10)
        process.stderr.close()


def is_up(server: Mirror) -> bool:
    try:
        return server.get("/healthz").status == 200
    except ConnectionError:
        return False
