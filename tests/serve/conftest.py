"""The scene most tests of the server play in."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.serve.scene import Scene
from tests.server import Mirror
from tests.upstream import FakeUpstream


@pytest.fixture
def scene(upstream: FakeUpstream, mirror: Callable[..., Mirror]) -> Scene:
    return Scene(upstream, mirror)
