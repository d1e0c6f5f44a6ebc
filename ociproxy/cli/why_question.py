"""Asking a running server for what it adds to `why`.

Tests: tests/cli/test_why_command.py.
"""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING, Final

from ociproxy.cli.server_client import AdminListener, ServerRefused, ServerUnavailable
from ociproxy.load.server_view import ServerView

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.config.settings import Config
    from ociproxy.oci.reference import Reference

_PATIENCE: Final = 1.0
"""Seconds that a server may take to answer which the user did not name."""
_NAMED_PATIENCE: Final = 10.0
"""Seconds that one may take which the user named."""
_STATE: Final = 64 * 1024 * 1024
"""Bytes of the answer: 192 KiB of each process at most."""


def ask_server(
    url: str | None, auth: Path | None, config: Config, reference: Reference
) -> ServerView | None:
    """What the server says whose admin listener the user named. Without one, what that of the
    configuration says, if it answers and serves the same store; else None.

    Raises ConfigError, ServerRefused, ServerUnavailable; without a URL only the first.
    """
    where = url or _configured(config)
    if where is None:
        return None
    # What listens there may be another program: only one that the user named gets the password.
    listener = AdminListener(where, auth if url else None)
    try:
        patience = _NAMED_PATIENCE if url else _PATIENCE
        with listener.ask("GET", "/api/state", timeout=patience) as answer:
            state = json.loads(answer.read(_STATE))
        if url is None and state["store"] != str(config.store.path.absolute()):
            return None
        return ServerView.of(where, state["workers"], reference)
    except (ServerRefused, ServerUnavailable):
        if url is not None:
            raise
    except (ValueError, LookupError, TypeError) as exc:
        if url is not None:
            raise ServerRefused(f"{where}: not the state of a server of this version") from exc
    return None


def _configured(config: Config) -> str | None:
    admin = config.serve.admin
    if admin.port == 0:
        return None
    try:
        address = ipaddress.ip_address(admin.host)
    except ValueError:
        return f"http://{admin.host}:{admin.port}"
    if address.is_unspecified:
        return f"http://localhost:{admin.port}"
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"http://{host}:{admin.port}"
