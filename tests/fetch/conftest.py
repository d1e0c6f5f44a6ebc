"""Fixtures of the backend tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ociproxy.config.settings import Fetch, Timeouts, Upstream
from ociproxy.fetch.oras.backend import OrasBackend
from tests.fetch.tls import Authority
from tests.upstream import FakeUpstream

TIMEOUTS = Timeouts(connect=2.0, headers=2.0, stall=2.0)

OpenBackend = Callable[..., OrasBackend]


def entry(upstream: FakeUpstream | str, **changes: object) -> Upstream:
    """The config of an upstream, or of one with this name, with short time-outs."""
    name, scheme = upstream, "https"
    if isinstance(upstream, FakeUpstream):
        name, scheme = upstream.registry, upstream.url.partition(":")[0]
    values: dict[str, object] = {"name": name, "scheme": scheme, "timeouts": TIMEOUTS}
    return Upstream(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def open_backend() -> Iterator[OpenBackend]:
    """Opens oras backends, with the arguments of `entry`."""
    opened: list[OrasBackend] = []

    def make(upstream: FakeUpstream | str, **changes: object) -> OrasBackend:
        opened.append(OrasBackend(entry(upstream, **changes), Fetch()))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other-authority"))
