"""Mirror: the product as operators run it, a process with a store, a config file and a log."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests import forked

START_LIMIT = 60.0
STOP_LIMIT = 40.0
ROOT = Path(__file__).parents[1]
PROGRAM = Path(sys.executable).with_name("ociproxy")
"""As it was installed."""
LISTENING = re.compile(r"\blistening\b.*\bport\"?[=:] ?(\d+)")


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def digest(self) -> str | None:
        return self.headers.get("docker-content-digest")

    @property
    def cache_status(self) -> str:
        return self.headers.get("cache-status", "")


class Mirror:
    """`config` is the config file's content: a mapping, or a list for the classic shape.

    `tls` is the client's side of a server that speaks HTTPS; `before` a command that runs it. With
    `admin` it has an admin listener.
    """

    def __init__(
        self,
        folder: Path,
        config: object = None,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        store: Path | None = None,
        tls: ssl.SSLContext | None = None,
        before: Sequence[str] = (),
        admin: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.store = store or folder / "store"
        self.config_path = folder / "config.yaml"
        self.log_path = folder / "log"
        self.args, self.env = tuple(args), dict(env or {})
        self.tls, self.before = tls, tuple(before)
        self.host, self.port = "127.0.0.1", 0
        self.admin_port = free_port() if admin else 0
        self.process: subprocess.Popen[bytes] | None = None
        self.write_config({} if config is None else config)

    # Life

    def start(self) -> None:
        """Returns when it listens. A server that was started before gets the same port again."""
        seen = len(self.log())
        with self.log_path.open("ab") as log:
            self.process = forked.popen(
                [*self.before, *self.command(), "--port", str(self.port), *self.args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONUNBUFFERED": "1",
                    "OCIPROXY_ADMIN_PORT": str(self.admin_port),
                    **self.env,
                },
            )
        limit = time.monotonic() + START_LIMIT
        while (found := LISTENING.search(self.log()[seen:])) is None:
            if (code := self.process.poll()) is not None:
                self.process = None
                raise AssertionError(f"the server ended with {code} at its start:\n{self.log()}")
            if time.monotonic() > limit:
                self.kill()
                raise AssertionError(
                    f"the server does not listen after {START_LIMIT} s:\n{self.log()}"
                )
            time.sleep(0.02)
        self.port = int(found[1])

    def command(self) -> list[str]:
        """Without --port and further arguments. A handler that blocks the event loop is caught."""
        program = [sys.executable, "-m", "tests.watched", "serve", "--host", self.host]
        return [*program, "--image-path", str(self.store), "--config-path", str(self.config_path)]

    def stop(self) -> None:
        """SIGTERM; the server has to end by itself and with 0."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still there {STOP_LIMIT} s after SIGTERM:\n{self.log()}"
            ) from None
        self.process = None
        assert code == 0, f"the server ended with {code} on SIGTERM:\n{self.log()}"

    def kill(self) -> None:
        """SIGKILL, as the kernel or a power cut does it. Harmless on a server that has ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def restart(self, *, args: Sequence[str] | None = None) -> None:
        """Stop and start on the same port and store, with other arguments if given."""
        self.stop()
        if args is not None:
            self.args = tuple(args)
        self.start()

    def reload(self) -> None:
        """SIGHUP: read the config file again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def write_config(self, config: object) -> None:
        self.config_path.write_text(yaml.safe_dump(config), encoding="utf-8")

    # What it says

    def log(self) -> str:
        """Everything it has written to stdout and stderr, over all its starts."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, what: Callable[[], bool], named: str = "", limit: float = 10.0) -> None:
        """Until it is so."""
        end = time.monotonic() + limit
        while not what():
            assert time.monotonic() < end, f"not {named} within {limit} s; log:\n{self.log()}"
            time.sleep(0.02)

    def wait_for_log(self, text: str, limit: float = 10.0) -> None:
        self.wait_for(lambda: text in self.log(), f"{text!r} logged", limit)

    def wait_for_file(self, path: str, limit: float = 10.0) -> Path:
        """A path in the store, which background work will make."""
        self.wait_for(lambda: (self.store / path).exists(), f"{path} stored", limit)
        return self.store / path

    # Requests to it

    @property
    def registry(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.registry}"

    def connect(self, timeout: float = 30.0) -> http.client.HTTPConnection:
        if self.tls is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=self.tls)

    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 30.0,
    ) -> Answer:
        connection = self.connect(timeout)
        try:
            connection.request(method, path, headers=dict(headers or {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers)

    def head(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("HEAD", path, headers)

    def manifest(self, registry: str, repository: str, reference: str) -> Answer:
        """As containerd asks: the repository in the path, the registry in `ns`."""
        return self.get(f"/v2/{repository}/manifests/{reference}?ns={registry}")

    def blob(
        self,
        registry: str,
        repository: str,
        digest: str,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        return self.get(f"/v2/{repository}/blobs/{digest}?ns={registry}", headers)

    def admin(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """A GET to its admin listener."""
        connection = http.client.HTTPConnection(self.host, self.admin_port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=dict(headers or {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())

    def metrics(self) -> dict[str, float]:
        """Each series with its value, as /metrics writes it."""
        lines = self.admin("/metrics").body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def peak_rss(self) -> int:
        """Bytes, of the server process itself."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def upstream_entry(url: str, **more: object) -> dict[str, object]:
    """The config's `upstreams` entry for a registry at `url`, plain HTTP or HTTPS as that says."""
    parts = urlsplit(url)
    return {"name": parts.netloc, "scheme": parts.scheme, **more}
