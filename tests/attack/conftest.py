"""What the attack cases share: a drawn network, and a server inside it."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.server import Answer, Mirror

FOLDER = Path(__file__).parent / "network"
PUBLIC = "198.51.100.7"
"""An address of documentation (RFC 5737) that leads to this machine in the drawn network."""


class Network:
    """See `network/sitecustomize.py`."""

    def __init__(self, folder: Path, names: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._log = folder / "connected"
        self._file = folder / "network.json"
        drawn = {"names": names, "routes": {PUBLIC: "127.0.0.1"}, "log": str(self._log)}
        self._file.write_text(json.dumps(drawn), encoding="utf-8")

    @property
    def environment(self) -> dict[str, str]:
        """For the server's process."""
        return {"PYTHONPATH": str(FOLDER), "DRAWN_NETWORK": str(self._file)}

    def connected(self) -> set[str]:
        """The addresses that were connected to."""
        return set(self._log.read_text(encoding="utf-8").split()) if self._log.exists() else set()


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Network]:
    """`draw({"name": [["first answer"], ["second answer"]]})`."""
    return lambda names: Network(tmp_path, names)


def refusal(answer: Answer) -> tuple[int, str]:
    """Status and code."""
    return answer.status, str(answer.json()["errors"][0]["code"])


def assert_quiet(server: Mirror) -> None:
    """No bug was met."""
    log = server.log()
    assert "Traceback" not in log, log
    assert " ERROR " not in log, log


def attempt(server: Mirror, registry: str, digest: str) -> None:
    """Ask for a blob in `app`, and take what comes, a broken transfer too."""
    with contextlib.suppress(http.client.HTTPException, OSError):
        server.blob(registry, "app", digest)


def wait_until(condition: Callable[[], bool], limit: float = 10.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
