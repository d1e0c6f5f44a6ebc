"""The skopeo backend: the contract of all backends, and what is its own."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from ociproxy.errors import NameUnknown
from ociproxy.fetch.skopeo.backend import SkopeoBackend
from ociproxy.fetch.upstream import Backend
from ociproxy.store.store import Store
from tests.fetch.conftest import entry
from tests.fetch.contract import BackendContract, repository
from tests.images import artifact, image
from tests.parts.tools import require_tool
from tests.upstream import FakeUpstream


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Store:
    require_tool("skopeo")
    return Store(tmp_path / "store")


class TestSkopeo(BackendContract):
    names: ClassVar[tuple[str, ...]] = ("a", "team/app.js", "a/b/c/d.e/f__g/h-i", "v2/manifests")

    @pytest.fixture(autouse=True)
    def _use(self, store: Store) -> None:
        self.store = store

    def open_backend(self, upstream: FakeUpstream) -> Backend:
        return SkopeoBackend(entry(upstream), self.store)

    def test_referrers(self, upstream: FakeUpstream, backend: Backend) -> None:
        """skopeo does not know them; the caller goes on to the fallback tag."""
        top = upstream.add("team/app", image(), tag="v1").top
        upstream.add("team/app", artifact(top))
        with pytest.raises(NameUnknown):
            backend.fetch_listing(repository(upstream), f"referrers/{top.digest}", "")
        assert upstream.requests == []
