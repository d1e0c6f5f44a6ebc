"""The TLS of the main port."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from ociproxy.errors import ConfigError

if TYPE_CHECKING:
    from ociproxy.config.local_settings import Serve


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
