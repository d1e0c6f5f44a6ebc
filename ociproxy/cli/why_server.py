"""What a running server adds to `why`: the last request for the reference, and its upstream now.

Tests: tests/cli/test_why_command.py.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rich.filesize import decimal

from ociproxy.cli.server_client import AdminListener, ServerRefused, ServerUnavailable
from ociproxy.cli.terminal import utc_time
from ociproxy.config.units import show_duration

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ociproxy.config.settings import Config
    from ociproxy.oci.reference import Reference

_PATIENCE: Final = 1.0
"""Seconds that a server may take to answer which the user did not name."""
_NAMED_PATIENCE: Final = 10.0
"""Seconds that one may take which the user named."""
_STATE: Final = 64 * 1024 * 1024
"""Bytes of the answer: 192 KiB of each process at most."""
_CONDITIONS: Final = {
    "available": "asked when needed",
    "probing": "left alone until now; the next request finds out whether it is back",
    "unreachable": "left alone, because it failed to answer",
    "limited": "left alone, because it throttles",
}


@dataclass(frozen=True, slots=True)
class ServerView:
    """`request` is the last one for the reference, `upstream` the worker's account of it that
    leaves it alone for the longest; each None where the server knows of none."""

    url: str
    request: dict[str, Any] | None
    upstream: dict[str, Any] | None

    def lines(self) -> Iterator[tuple[str, str]]:
        """For the screen."""
        last = self.request
        if last is None:
            yield "asked", "not among the last requests of the running server"
        else:
            yield (
                "asked",
                f"last at {utc_time(last['at'])} by {last['client']}: {last['method']}, "
                f"{last['status']} {last['outcome']}, {decimal(last['bytes'])} "
                f"in {last['seconds']:.1f} s",
            )
        if self.upstream is None:
            return
        text = _CONDITIONS.get(self.upstream["condition"], self.upstream["condition"])
        if self.upstream["seconds"] and self.upstream["condition"] != "available":
            text += f", for {self.upstream['seconds']:.0f} s more"
        quota = self.upstream.get("quota")
        if quota is not None:
            window = "" if quota["window"] is None else f" in {show_duration(quota['window'])}"
            text += f"; {quota['remaining']} of {quota['limit']} pulls left{window}"
        yield "now", f"the server has {self.upstream['registry']} {text}"


def look(
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
        return _view(where, state["workers"], reference)
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


def _view(url: str, workers: list[dict[str, Any]], reference: Reference) -> ServerView:
    names = ("at", "method", "name", "status", "outcome", "bytes", "seconds", "client")
    recent = [
        dict(zip(names, each, strict=True)) for worker in workers for each in worker["recent"]
    ]
    asked = [each for each in recent if each["name"] == str(reference)]
    registry = reference.repository.registry
    upstreams = [
        each for worker in workers for each in worker["upstreams"] if each["registry"] == registry
    ]
    return ServerView(
        url,
        max(asked, key=lambda each: float(each["at"]), default=None),
        max(upstreams, key=lambda each: float(each["seconds"]), default=None),
    )
