"""SIGHUP: a new configuration takes over, and what was begun before is finished."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ociproxy.serve.reload import READ_AT_START
from tests.images import image
from tests.serve.scene import MIB, Scene
from tests.server import Answer, Mirror
from tests.upstream_faults import Fault


def manifest_across_a_reload(scene: Scene) -> Answer:
    """The answer to a request that waits for its upstream while the server reloads."""
    scene.upstream.fault("/manifests/", Fault(delay=30))
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(scene.manifest, "v1")
        scene.server.wait_for(lambda: scene.upstream.count("/manifests/v1") == 1, "asked")
        scene.server.reload()
        scene.server.wait_for_log("configuration reloaded")
        scene.upstream.heal()
        return asking.result(20)


def test_a_reload_drops_no_request_that_waits_for_its_upstream(scene: Scene) -> None:
    app = scene.upstream.add("app", image("app"), tag="v1")
    server = scene.start()
    answer = manifest_across_a_reload(scene)
    assert (answer.status, answer.digest) == (200, app.digest)
    server.wait_for_log("status=200")


def test_a_reload_drops_no_response_that_is_being_sent(scene: Scene) -> None:
    blob = scene.blob(4 * MIB, Fault(stall_after=MIB))
    server = scene.start()
    with scene.open(blob) as response:
        head = response.read(1)
        server.reload()
        server.wait_for_log("configuration reloaded")
        scene.upstream.heal()
        assert head + response.read() == blob.data
    assert scene.upstream.count("/blobs/") == 1


def test_layers_that_wait_for_their_turn_are_fetched_after_a_reload(scene: Scene) -> None:
    app = scene.upstream.add("app", image("app", layers=12), tag="v1")
    scene.upstream.fault("/blobs/", Fault(stall_after=0))
    server = scene.start(background_fills=2)
    assert scene.manifest("v1").status == 200
    server.wait_for(lambda: scene.upstream.count("/blobs/") == 2, "two fills begun")
    server.reload()
    server.wait_for_log("configuration reloaded")
    scene.upstream.heal()
    for blob in app.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")


def test_what_a_request_of_before_a_reload_leads_to_is_fetched(scene: Scene) -> None:
    """Its manifest comes after the reload; the layers follow all the same."""
    app = scene.upstream.add("app", image("app", layers=3), tag="v1")
    server = scene.start()
    assert manifest_across_a_reload(scene).status == 200
    for blob in app.blobs:
        server.wait_for_file(f"blobs/{blob.encoded}")


def test_downloads_of_before_a_reload_end_when_its_grace_is_over(scene: Scene) -> None:
    blob = scene.blob(4 * MIB, Fault(stall_after=MIB))
    server = scene.start(serve={"reload_grace": "1s"})
    with scene.open(blob) as response:
        response.read(1)
        server.reload()
        server.wait_for_log("reload grace is over")
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
    # What had come is kept, and the new configuration goes on from there.
    scene.upstream.heal()
    assert scene.get(blob).body == blob.data


def is_blocked(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"SigBlk:\s+([0-9a-f]+)", status)
    assert found is not None
    return bool(int(found[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_that_comes_while_the_server_starts_is_done_after_the_start(
    mirror: Callable[..., Mirror], workers: int
) -> None:
    """systemd counts SIGHUP as a clean end: the server would stay away."""
    server = mirror({"serve": {"workers": workers, "admin": {"port": 0}}})
    server.stop()
    seen = len(server.log())
    with server.log_path.open("ab") as out:
        command = [sys.executable, "-m", "ociproxy", *server.command()[3:], "--port", "0"]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        server.wait_for(lambda: process.poll() is None and is_blocked(process.pid, signal.SIGHUP))
        process.send_signal(signal.SIGHUP)
        server.wait_for(
            lambda: server.log()[seen:].count("configuration reloaded") == workers, "reloaded", 20
        )
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)


def test_the_last_of_two_reloads_decides(scene: Scene) -> None:
    """The first one reads a file that takes long to parse."""
    server = scene.start()
    many = [{"name": f"r{n}.example"} for n in range(3000)]
    server.write_config({"upstreams": many, "serve": {"default_upstream": "r1.example"}})
    server.reload()
    time.sleep(0.2)
    server.write_config({"fetch": {"unlisted": "deny"}})
    server.reload()
    server.wait_for(lambda: server.log().count("configuration reloaded") == 2, "twice", 30)
    assert server.get("/v2/x/manifests/v1?ns=r1.example").status == 403


def test_a_reload_names_the_settings_that_take_a_restart(scene: Scene) -> None:
    server = scene.start()
    server.write_config({"serve": {"port": 1, "client_stall": "9m", "keepalive": "9m"}})
    server.reload()
    server.wait_for_log("configuration reloaded")
    server.wait_for_log("restart needed keys=serve.client_stall")  # an option says the port
    assert server.log().count("restart needed") == 1


def test_the_documents_name_each_setting_that_takes_a_restart() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    found = re.search(r"`SIGHUP` changes all of the file except(.*?)take a restart", text, re.S)
    assert found is not None
    told = re.findall(r"`([a-z_.]+)`", found[1].replace("`serve`", ""))
    assert told == [key.removeprefix("serve.") for key in READ_AT_START]
