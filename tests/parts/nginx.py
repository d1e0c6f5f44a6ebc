"""nginx in front of upstreams: TLS and client certificates as a real server does them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.parts.certificates import Authority
from tests.parts.tools import Daemon, require_tool

CONFIG = """\
daemon off;
master_process off;
pid {folder}/pid;
error_log stderr notice;
events {{ worker_connections 512; }}
http {{
  access_log {folder}/access;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  proxy_set_header Host $http_host;
  proxy_buffering off;
{servers}
}}
"""


@dataclass(frozen=True, slots=True)
class Site:
    """`address` with each of `ports` leads to `target` (host:port, plain HTTP). With `tls` it is
    HTTPS, and with `ask_client` only clients of the same authority get in."""

    address: str
    ports: tuple[int, ...]
    target: str
    tls: Authority | None = None
    ask_client: bool = False

    def config(self) -> str:
        secure = " ssl" if self.tls else ""
        lines = [f"listen {self.address}:{port}{secure};" for port in self.ports]
        if self.tls is not None:
            lines += [f"ssl_certificate {self.tls.cert};", f"ssl_certificate_key {self.tls.key};"]
        if self.tls is not None and self.ask_client:
            lines += [f"ssl_client_certificate {self.tls.ca};", "ssl_verify_client on;"]
        lines.append(f"location / {{ proxy_pass http://{self.target}; }}")
        return "  server { " + " ".join(lines) + " }"


class Nginx:
    def __init__(self, folder: Path, sites: Sequence[Site]) -> None:
        program = require_tool("nginx")
        folder.mkdir(parents=True)
        config = folder / "nginx.conf"
        servers = "\n".join(site.config() for site in sites)
        config.write_text(CONFIG.format(folder=folder, servers=servers), encoding="utf-8")
        self._daemon = Daemon([program, "-p", folder, "-c", config], folder / "log")

    def __enter__(self) -> Self:
        self._daemon.start(r"using the .* event method")
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.stop()
