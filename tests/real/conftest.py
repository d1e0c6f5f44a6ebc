"""Real upstreams and clients for the end-to-end tests; each lives as long as one test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.images import Image, image, multi_platform
from tests.parts.certificates import Authority
from tests.parts.clients import Podman, Skopeo
from tests.parts.containerd import Containerd
from tests.parts.registry import Registry
from tests.parts.tools import require_tool

TAG = "V1.0-rc_1"
BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def held() -> dict[str, Image]:
    """What the upstream holds under `TAG`: both kinds of images, for one and many platforms."""
    return {
        "team/oci.index": multi_platform("oci", layers=2, layer_size=200_000),
        "team/docker-list": multi_platform("docker", docker=True),
        "a/b/c/d/e/oci-image": image("single", layers=3),
        "docker-image": image("single", docker=True),
    }


@pytest.fixture
def registry(tmp_path: Path, held: dict[str, Image]) -> Iterator[Registry]:
    """A plain HTTP docker-registry that holds `held`."""
    with Registry(tmp_path / "registry") as started:
        for repository, each in held.items():
            started.push(repository, each, tag=TAG)
        yield started


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def containerd() -> Iterator[Containerd]:
    with Containerd() as started:
        yield started


@pytest.fixture
def skopeo(tmp_path: Path) -> Skopeo:
    return Skopeo(tmp_path / "skopeo")


@pytest.fixture
def podman(tmp_path: Path) -> Podman:
    return Podman(tmp_path / "podman")


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = require_tool("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for flag in (*BROWSER_FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(require_tool("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()
