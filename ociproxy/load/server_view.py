"""What a running server adds to `why`: the last request for the reference, and its upstream now.

Tests: tests/cli/test_why_command.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ociproxy.config.units import show_bytes, show_duration, utc_time

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ociproxy.oci.reference import Reference

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
    """Of the admin listener; empty where the server itself looks."""
    request: dict[str, Any] | None
    upstream: dict[str, Any] | None

    @staticmethod
    def of(url: str, workers: list[dict[str, Any]], reference: Reference) -> ServerView:
        """Of what the workers said last. Raises ValueError, LookupError or TypeError where a server
        of another version said it."""
        names = ("at", "method", "name", "status", "outcome", "bytes", "seconds", "client")
        recent = [
            dict(zip(names, each, strict=True)) for worker in workers for each in worker["recent"]
        ]
        asked = [each for each in recent if each["name"] == str(reference)]
        registry = reference.repository.registry
        upstreams = [
            each
            for worker in workers
            for each in worker["upstreams"]
            if each["registry"] == registry
        ]
        return ServerView(
            url,
            max(asked, key=lambda each: float(each["at"]), default=None),
            max(upstreams, key=lambda each: float(each["seconds"]), default=None),
        )

    def lines(self) -> Iterator[tuple[str, str]]:
        """For the screen."""
        last = self.request
        if last is None:
            yield "asked", "not among the last requests of the running server"
        else:
            yield (
                "asked",
                f"last at {utc_time(last['at'])} by {last['client']}: {last['method']}, "
                f"{last['status']} {last['outcome']}, {show_bytes(last['bytes'])} "
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
