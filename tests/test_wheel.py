"""The wheel holds the product only, and serves from an empty virtual environment."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest

from ociproxy import __version__

CHECKOUT = Path(__file__).parent.parent
SOURCES = ("ociproxy", "tests", "bench", "docs", "pyproject.toml", "README.md", "LICENSE")
START_SECONDS = 30

pytestmark = [pytest.mark.network, pytest.mark.timeout(300)]


def run_pip(python: Path | str, *arguments: str | Path) -> None:
    """Runs pip; no package index is a failure in CI and a visible skip for a developer."""
    done = subprocess.run(
        [python, "-m", "pip", "--quiet", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode and "NewConnectionError" in done.stderr and not os.environ.get("CI"):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout and nothing stale gets in."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignore)
        elif path.exists():
            shutil.copy(path, source)
    run_pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", directory, source)
    (built,) = directory.glob("*.whl")
    return built


def test_wheel_holds_the_product_only(wheel: Path) -> None:
    assert wheel.name == f"ociproxy-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"ociproxy-{__version__}.dist-info/METADATA").decode()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"ociproxy", f"ociproxy-{__version__}.dist-info"}
    modules = {str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("ociproxy/**/*.py")}
    assert modules | {"ociproxy/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def test_serve_runs_from_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True, symlinks=True)
    run_pip(environment / "bin" / "python", "install", wheel)

    log = tmp_path / "log"
    program = environment / "bin" / "ociproxy"
    options = ["--host", "127.0.0.1", "--port", "0", "--image-path", str(tmp_path / "store")]
    with log.open("wb") as stderr:
        # The working directory is elsewhere, so that the checkout's package cannot be the one.
        server = subprocess.Popen(
            [program, "serve", *options],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        port = wait_for_port(server, log)
        with urlopen(f"http://127.0.0.1:{port}/v2/", timeout=10) as response:
            assert response.status == 200
            assert response.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0, log.read_text()
    finally:
        server.kill()
        server.wait(timeout=10)


def wait_for_port(server: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        found = re.search(r"listening\b.*\bport=(\d+)", log.read_text())
        if found:
            return int(found[1])
        assert server.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"not listening after {START_SECONDS} s: {log.read_text()}")
