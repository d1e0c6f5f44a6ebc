"""Check that OpenSSL can use the files of a `tls` section, before the first handshake.

Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator

from ociproxy.config.settings import Tls


def find_problems(tls: Tls) -> Iterator[tuple[str, str]]:
    """Yield a key of the section, and what is wrong with its file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.ca is not None:
        try:
            context.load_verify_locations(cafile=tls.ca)
        except (ssl.SSLError, OSError):
            yield "ca", f"no PEM certificate in it: {tls.ca}"
    if tls.cert is not None and tls.key is not None:
        try:
            # An empty passphrase keeps OpenSSL from asking the terminal for one.
            context.load_cert_chain(tls.cert, tls.key, password="")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                yield "key", f"not the key of the certificate: {tls.key}"
            else:
                yield "cert", f"with its key not usable (PEM, no passphrase): {tls.cert}, {tls.key}"
        except (OSError, ValueError):
            yield "cert", f"with its key not usable (PEM, no passphrase): {tls.cert}, {tls.key}"
