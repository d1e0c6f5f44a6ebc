"""The TLS of the main port."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final

from ociproxy.errors import ConfigError

if TYPE_CHECKING:
    from ociproxy.config.local_settings import Serve

PLAIN_HTTP: Final = "plain HTTP on a port of HTTPS"
_NOT_TRUSTED: Final = (
    "BAD_CERTIFICATE",
    "CERTIFICATE_UNKNOWN",
    "CERTIFICATE_EXPIRED",
    "UNKNOWN_CA",
)
"""Alerts by which a client says that it does not accept a certificate. What stands before them in
OpenSSL's names differs between its releases."""


def server_context(serve: Serve) -> ssl.SSLContext | None:
    """TLS 1.2 or newer, HTTP/1.1 inside; None for plain HTTP. With `serve.tls.client_ca` only
    clients with a certificate of that CA are let in.

    Blocks: it reads files. Raises ConfigError.
    """
    tls = serve.tls
    if tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An empty passphrase keeps OpenSSL from asking the terminal for one.
        context.load_cert_chain(tls.cert, tls.key, password="")
        if tls.client_ca is not None:
            context.load_verify_locations(cafile=tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as exc:
        # ssl.SSLError is an OSError. `config check` says which file is wrong, and why.
        raise ConfigError(f"files not usable: {exc}", key="serve.tls") from exc
    return context


def handshake_failure(exc: OSError) -> str:
    """Why a client got no further than the TLS handshake, in words for the log."""
    reason = exc.reason if isinstance(exc, ssl.SSLError) else None
    if reason == "HTTP_REQUEST":
        return PLAIN_HTTP
    if reason is not None and "_ALERT_" in reason and reason.endswith(_NOT_TRUSTED):
        return f"the client does not accept this server's certificate: {_words(reason)}"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"TLS handshake: certificate verify failed: {exc.verify_message}"
    return f"TLS handshake: {_words(reason) or exc}"


def _words(reason: str | None) -> str:
    return (reason or "").replace("_", " ").lower()
