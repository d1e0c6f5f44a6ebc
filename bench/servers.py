"""The servers that are compared, and the real registry they all pull from.

Each runs as its own documentation starts it: default logging (to a file), default workers. Only
nginx is told not to log, because it stands for the limit of the machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import trustme

from bench.processes import READY_SECONDS, BenchError, ServerProcess, free_port, spawn

if TYPE_CHECKING:
    from collections.abc import Iterator

UPSTREAM = "direct"
OCIPROXY = "ociproxy"
REGISTRY = "docker-registry"
DRAYAGE = "drayage"
NGINX = "nginx static"
OCIREGISTRY = "ociregistry"
DISTRIBUTION = "Distribution 3"
FLOOR = "oras-py alone"
# gorilla's combined log, which docker-registry writes when a request has ended.
ACCESS = re.compile(rb'"GET (?P<path>/v2/\S+) HTTP/1\.1" \d+ (?P<bytes>\d+)')


@dataclass(frozen=True)
class Target:
    """Where a client sends its requests: a port, and what it appends to each path."""

    name: str
    port: int
    query: str = ""

    def blob(self, repository: str, digest: str) -> str:
        return f"/v2/{repository}/blobs/{digest}{self.query}"

    def manifest(self, repository: str, reference: str) -> str:
        return f"/v2/{repository}/manifests/{reference}{self.query}"


@dataclass(frozen=True)
class Upstream:
    """A docker-registry whose own access log counts the bytes, so that counting costs nothing.
    With a `ca` it speaks TLS under a certificate of that authority."""

    process: ServerProcess
    ca: Path | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.process.port}"

    @property
    def scheme(self) -> str:
        return "http" if self.ca is None else "https"

    @property
    def target(self) -> Target:
        return Target(UPSTREAM, self.process.port)

    def mark(self) -> int:
        return self.process.log.stat().st_size

    def blob_bytes(self, mark: int, digest: str = "") -> int:
        """Bytes of this blob, or of all, that were sent since `mark`, over all requests."""
        with self.process.log.open("rb") as log:
            log.seek(mark)
            found = ACCESS.finditer(log.read())
        wanted = (m for m in found if b"/blobs/" in m["path"])
        return sum(int(m["bytes"]) for m in wanted if m["path"].endswith(digest.encode()))


@dataclass(frozen=True)
class Running:
    process: ServerProcess
    target: Target


@dataclass(frozen=True)
class Rival:
    """`prepare` writes a configuration into a directory and says what to run."""

    name: str
    prepare: Callable[[Path, int, Upstream], list[str]]
    by_namespace: bool = False
    proxies: bool = True

    def start(self, directory: Path, upstream: Upstream) -> Running:
        """A second port is tried once: between choosing one and binding it, it may be taken."""
        query = f"?ns={upstream.host}" if self.by_namespace else ""
        for last in (False, True):
            port = free_port()
            argv = self.prepare(directory, port, upstream)
            process = spawn(self.name, argv, port, directory / "log")
            try:
                process.wait_ready()
            except BaseException as error:
                process.stop()
                if last or not isinstance(error, BenchError):
                    raise
            else:
                return Running(process, Target(self.name, port, query))
        raise AssertionError("unreachable")

    @contextmanager
    def cold(self, parent: Path, upstream: Upstream) -> Iterator[Running]:
        """A server with an empty store, both gone afterwards."""
        directory = Path(mkdtemp(prefix="cold-", dir=parent))
        try:
            running = self.start(directory, upstream)
            try:
                yield running
            finally:
                running.process.stop()
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def start_upstream(directory: Path) -> Upstream:
    argv = [find("docker-registry"), "serve", str(directory / "config.yml")]
    port = free_port()
    (directory / "config.yml").write_text(_registry_config(directory / "store", port, "error"))
    process = spawn("upstream", argv, port, directory / "log")
    try:
        process.wait_ready()
    except BaseException:
        process.stop()
        raise
    return Upstream(process)


def start_static_upstream(directory: Path, static: Path) -> Upstream:
    """nginx, which costs next to nothing beside what is measured."""
    directory.mkdir()
    port = free_port()
    argv = _nginx(directory, static, port)
    process = spawn("static upstream", argv, port, directory / "log")
    try:
        process.wait_ready()
    except BaseException:
        process.stop()
        raise
    return Upstream(process)


def start_tls_upstream(directory: Path, store: Path) -> Upstream:
    """Another registry over the same store."""
    directory.mkdir()
    authority = trustme.CA()
    ca, key = directory / "ca.pem", directory / "key.pem"
    authority.cert_pem.write_to_path(ca)
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(key)
    port = free_port()
    config = _registry_config(store, port, "error").replace(
        "'}\n", f"', tls: {{certificate: '{key}', key: '{key}'}}}}\n"
    )
    (directory / "config.yml").write_text(config)
    argv = [find("docker-registry"), "serve", str(directory / "config.yml")]
    process = spawn("upstream over TLS", argv, port, directory / "log")
    deadline = time.perf_counter() + READY_SECONDS
    while time.perf_counter() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return Upstream(process, ca)
        time.sleep(0.05)
    process.stop()
    raise BenchError(f"the upstream over TLS does not listen: {process.tail()}")


def rivals(static: Path) -> list[Rival]:
    """`static` is the tree of files that nginx serves."""

    def nginx(directory: Path, port: int, _upstream: Upstream) -> list[str]:
        return _nginx(directory, static, port)

    return [
        Rival(OCIPROXY, _ociproxy, by_namespace=True),
        Rival(REGISTRY, _registry_proxy),
        Rival(DRAYAGE, _drayage),
        Rival(NGINX, nginx, proxies=False),
    ]


def _ociproxy(directory: Path, port: int, upstream: Upstream) -> list[str]:
    if importlib.util.find_spec("ociproxy") is None:
        raise BenchError("ociproxy cannot be imported")
    config = directory / "config.yaml"
    entry = f'{{name: "{upstream.host}", scheme: {upstream.scheme}}}'
    if upstream.ca is not None:
        entry = entry.replace("}", f', tls: {{ca: "{upstream.ca}"}}}}')
    config.write_text(f"upstreams:\n  - {entry}\n")
    return ociproxy_command(directory, port)


def two_workers() -> Rival:
    """Both cores, as the others use them: one process of Python keeps little more than one busy."""
    return Rival(
        OCIPROXY,
        lambda *where: [*_ociproxy(*where), "--workers", "2"],
        by_namespace=True,
    )


def ociproxy_command(directory: Path, port: int) -> list[str]:
    """`directory` has the `config.yaml`, and gets the store."""
    store = directory / "store"
    store.mkdir(exist_ok=True)
    where = ["--host", "127.0.0.1", "--port", str(port)]
    files = ["--image-path", str(store), "--config-path", str(directory / "config.yaml")]
    return [sys.executable, "-m", "ociproxy", "serve", *where, *files]


def _registry_proxy(directory: Path, port: int, upstream: Upstream) -> list[str]:
    return registry_proxy("docker-registry", directory, port, upstream)


def registry_proxy(program: str, directory: Path, port: int, upstream: Upstream) -> list[str]:
    """`program` is a version of Distribution, which all read the same configuration."""
    config = directory / "config.yml"
    proxy = f"proxy: {{remoteurl: '{upstream.scheme}://{upstream.host}'}}\n"
    config.write_text(_registry_config(directory / "store", port, "info") + proxy)
    trust = [] if upstream.ca is None else ["/usr/bin/env", f"SSL_CERT_FILE={upstream.ca}"]
    return [*trust, find(program), "serve", str(config)]


def _registry_config(store: Path, port: int, level: str) -> str:
    return (
        "version: 0.1\n"
        f"log: {{level: {level}}}\n"
        "storage:\n"
        "  cache: {blobdescriptor: inmemory}\n"
        f"  filesystem: {{rootdirectory: '{store}'}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )


def _drayage(directory: Path, port: int, upstream: Upstream) -> list[str]:
    store = directory / "store"
    store.mkdir(exist_ok=True)
    config = directory / "config.toml"
    config.write_text(
        f'listen = "127.0.0.1:{port}"\n'
        f'cache_dir = "{store}"\n'
        "[upstreams.docker_io]\n"
        f'registry = "http://{upstream.host}"\n'
    )
    return [find("drayage"), "serve", "--config", str(config)]


def _nginx(directory: Path, static: Path, port: int) -> list[str]:
    (directory / "nginx.conf").write_text(_nginx_config(directory, static, port))
    config = str(directory / "nginx.conf")
    return [find("nginx"), "-c", config, "-p", str(directory), "-e", str(directory / "error")]


def _nginx_config(directory: Path, static: Path, port: int) -> str:
    temporary = "".join(
        f"  {kind}_temp_path {directory / kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # Without a user of its own, root's nginx drops to one that cannot enter a temporary directory.
    user = "user root;\n" if os.geteuid() == 0 else ""
    return (
        f"{user}daemon off;\nworker_processes auto;\npid {directory / 'pid'};\n"
        "events { worker_connections 1024; }\n"
        "http {\n"
        f"{temporary}"
        "  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000;\n"
        "  default_type application/octet-stream;\n"
        "  server {\n"
        f"    listen 127.0.0.1:{port}; root {static};\n"
        "    location = /v2/ { return 200 '{}'; }\n"
        "    location ~ /manifests/ {\n"
        "      default_type application/vnd.oci.image.manifest.v1+json;\n"
        "    }\n"
        "  }\n"
        "}\n"
    )


def find(program: str) -> str:
    """The virtual environment first, then PATH, then where Debian puts daemons."""
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
    )
    found = shutil.which(program, path=path)
    if found is None:
        raise BenchError(f"{program} is not installed")
    return found


def find_wrk() -> str:
    return find("wrk")
