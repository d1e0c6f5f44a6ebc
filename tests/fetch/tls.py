"""A certificate authority for tests: server contexts, and the files a config names."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme


class Authority:
    """Its files are in `folder`: `ca`, and the client pair of `client()`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca)

    def server(self, *names: str, clients: Authority | None = None) -> ssl.SSLContext:
        """For these names, 127.0.0.1 if there are none; `clients` signs who may come."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*(names or ("127.0.0.1",))).configure_cert(context)
        if clients is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            clients._ca.configure_trust(context)
        return context

    def client(self, name: str = "client") -> tuple[Path, Path]:
        """Certificate and key."""
        made = self._ca.issue_cert(f"{name}@example.org")
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        made.cert_chain_pems[0].write_to_path(cert)
        made.private_key_pem.write_to_path(key)
        return cert, key
