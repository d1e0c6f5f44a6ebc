"""The first pull through a new mirror, as the page shows it while it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from selenium import webdriver

from tests.images import image
from tests.parts.containerd import Containerd
from tests.server import Mirror
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

MIB = 1024 * 1024
LAYERS, LAYER = 4, 50 * MIB
PACE = 4 * MIB
"""Bytes a second of one connection: a layer has several."""

pytestmark = pytest.mark.real


def test_a_pull_by_containerd_is_seen_on_the_page_while_it_runs(
    browser: webdriver.Chrome,
    containerd: Containerd,
    mirror: Callable[..., Mirror],
    upstream: FakeUpstream,
    tmp_path: Path,
) -> None:
    """The picture is kept in the folder that ARTIFACTS names."""
    repository, name = "vendor/model-server", "ghcr.io/vendor/model-server"
    large = upstream.add(repository, image("large", layers=LAYERS, layer_size=LAYER), tag="2.1")
    upstream.fault("/blobs/", Fault(rate=PACE))
    entry = {"name": "ghcr.io", "endpoint": upstream.url}
    server = mirror({"upstreams": [entry]}, admin=True)
    containerd.use_mirror(server.url)
    browser.get(f"http://127.0.0.1:{server.admin_port}/")
    picture = Path(os.environ.get("ARTIFACTS", tmp_path)) / "first-pull.png"
    picture.parent.mkdir(parents=True, exist_ok=True)

    def pulls() -> list[list[str]]:
        """The cells of each pull under way."""
        cells: list[list[str]] = browser.execute_script(
            "return [...document.querySelectorAll('[aria-labelledby=pulls] tbody tr')]"
            ".map(row => [...row.cells].map(cell => cell.textContent.trim()));"
        )
        return cells

    def is_told() -> bool:
        """That a layer comes: from where to whom, how far, how fast, and for how long yet."""
        return any(
            [image, client] == [name, "127.0.0.1"]
            and re.fullmatch(r"sha256:[0-9a-f]{12}", layer)
            and how in ("downloads", "follows a download")
            and re.fullmatch(r"[0-9.]+ MB of 52\.4 MB", progress)
            and re.fullmatch(r"[0-9.]+ MB/s", rate)
            and re.fullmatch(r"[0-9]+ s", left)
            for image, layer, client, how, progress, rate, left in pulls()
        )

    with ThreadPoolExecutor(1) as thread:
        pulling = thread.submit(containerd.pull, f"{name}:2.1")
        server.wait_for(lambda: is_told() or pulling.done(), "the pull on the page", limit=60)
        assert not pulling.done(), pulling.result()
        assert browser.save_screenshot(str(picture))
        assert pulling.result() == large.digest
    assert picture.stat().st_size > 10_000
    server.wait_for(lambda: pulls() == [], "the page without it")
    wanted = sum(each.size for each in large.blobs)
    assert sum(each.sent for each in upstream.seen("/blobs/")) == wanted
