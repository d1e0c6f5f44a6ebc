"""A supervisor is told when the server is ready, reloads, is alive and stops."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ociproxy import log
from ociproxy.serve.supervisor import Supervisor
from tests.server import Mirror

LIMIT = 20.0


class Systemd:
    """Listens as systemd does, with the kernel's word on who sent each state."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.said: list[tuple[int, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.settimeout(LIMIT)

    def close(self) -> None:
        self._socket.close()

    def hear(self, state: str) -> int:
        """Reads on until this state comes, and returns the sender's process id."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            data, ancillary, *_ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
            sender = int.from_bytes(ancillary[0][2][:4], "little")
            self.said.append((sender, data.decode()))
            if data.decode().startswith(state):
                return sender
        raise AssertionError(f"no {state}, but {self.said}")


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    # The path of a unix socket has to be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        systemd = Systemd(f"{folder}/notify")
        yield systemd
        systemd.close()


def started(mirror: Callable[..., Mirror], systemd: Systemd, **serve: object) -> tuple[Mirror, int]:
    """A server under `systemd`, and its process id."""
    env = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "400000"}
    server = mirror({"serve": serve}, env=env)
    assert server.process is not None
    return server, server.process.pid


def test_systemd_hears_of_start_reload_life_and_stop(
    mirror: Callable[..., Mirror], systemd: Systemd
) -> None:
    server, pid = started(mirror, systemd)
    assert systemd.hear("READY=1") == pid
    systemd.hear("WATCHDOG=1")
    server.write_config("a text is no configuration")
    server.reload()
    assert systemd.hear("RELOADING=1\nMONOTONIC_USEC=") == pid
    # A broken file ends the reload, too: systemd must not wait for it for ever.
    assert systemd.hear("READY=1") == pid
    server.wait_for_log("configuration not reloaded")
    server.stop()
    assert systemd.hear("STOPPING=1") == pid


def test_the_end_of_a_worker_is_not_told_as_that_of_the_service(
    mirror: Callable[..., Mirror], systemd: Systemd
) -> None:
    server, pid = started(mirror, systemd, workers=2)
    worker = systemd.hear("READY=1")
    assert worker != pid
    assert systemd.hear("WATCHDOG=1") == pid
    os.kill(worker, signal.SIGTERM)
    server.wait_for_log("worker died")
    server.stop()
    systemd.hear("STOPPING=1")
    states = [(sender, state) for sender, state in systemd.said if state == "STOPPING=1"]
    assert states == [(pid, "STOPPING=1")]


def test_children_cannot_speak_in_the_name_of_the_server(systemd: Systemd) -> None:
    environment = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "30000000", "PATH": "/bin"}
    supervisor = Supervisor(environment)
    assert environment == {"PATH": "/bin"}
    assert supervisor.interval == 15
    supervisor.ready()
    assert systemd.hear("READY=1") == os.getpid()


def test_a_name_in_the_abstract_namespace_is_an_address() -> None:
    name = f"@ociproxy-test-{os.getpid()}"
    systemd = Systemd(name)
    with contextlib.closing(systemd):
        Supervisor({"NOTIFY_SOCKET": name}).ready()
        assert systemd.hear("READY=1") == os.getpid()


def test_the_watchdog_of_another_process_is_none_of_ours(systemd: Systemd) -> None:
    of_another = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    assert Supervisor(of_another).interval is None


def test_a_supervisor_that_is_gone_stops_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Supervisor({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    log.flush()
    assert "supervisor not told state=ready" in capfd.readouterr().err


def test_without_a_supervisor_nothing_is_sent(capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = Supervisor({"WATCHDOG_USEC": "1000000"})
    supervisor.ready()
    assert supervisor.interval is None
    log.flush()
    assert capfd.readouterr().err == ""
