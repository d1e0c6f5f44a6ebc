"""A certificate authority made for the tests, with a server's and a client's certificate."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import trustme


class Authority:
    def __init__(
        self, folder: Path, *names: str, valid_until: datetime.datetime | None = None
    ) -> None:
        """The server certificate is for loopback and for `names`."""
        folder.mkdir(parents=True, exist_ok=True)
        authority = trustme.CA(organization_name="ociproxy tests")
        server = authority.issue_cert(
            "127.0.0.1", "127.0.0.2", "localhost", *names, not_after=valid_until
        )
        client = authority.issue_cert("client.test")
        self.ca = folder / "ca.pem"
        self.cert, self.key = folder / "server.pem", folder / "server-key.pem"
        self.client_cert, self.client_key = folder / "client.pem", folder / "client-key.pem"
        authority.cert_pem.write_to_path(self.ca)
        server.cert_chain_pems[0].write_to_path(self.cert)
        server.private_key_pem.write_to_path(self.key)
        client.cert_chain_pems[0].write_to_path(self.client_cert)
        client.private_key_pem.write_to_path(self.client_key)
        self.client_key.chmod(0o600)

    def client_context(self, *, certificate: bool = False) -> ssl.SSLContext:
        """For a client that trusts this authority, and shows the client's certificate if told."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if certificate:
            context.load_cert_chain(self.client_cert, self.client_key)
        return context

    def server_context(self, *, ask_client: bool = False) -> ssl.SSLContext:
        """For a FakeUpstream over TLS; with `ask_client` a client certificate is required."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.cert, self.key)
        if ask_client:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context
