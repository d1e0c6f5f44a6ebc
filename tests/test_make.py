"""`make` and continuous integration: which Python runs the tests, and what a target runs."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
SYSTEM = Path("/usr/bin/python3")


def planned(folder: Path, *arguments: str) -> str:
    """What `make` would run for a new virtual environment, with another python3 first in PATH."""
    other = folder / "bin" / "python3"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", ".venv/serve.stamp", *arguments],
        cwd=CHECKOUT,
        env={"PATH": f"{other.parent}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def dry_run(*arguments: str) -> str:
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif(not SYSTEM.exists(), reason="a system without a Python of its own")
def test_make_takes_the_python_of_the_system(tmp_path: Path) -> None:
    assert f"\n{SYSTEM} -m venv" in planned(tmp_path)


def test_make_takes_the_python_that_it_is_told(tmp_path: Path) -> None:
    assert "\npython3.12 -m venv" in planned(tmp_path, "PYTHON=python3.12")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["serve", "--image-path", ".store", "--port", "8080"]),
        (["CONFIG=a.yaml"], ["serve", "--config-path", "a.yaml"]),
        (
            ["CONFIG=a.yaml", "PORT=9000", "STORE=/srv/a b"],
            ["serve", "--image-path", "/srv/a b", "--port", "9000", "--config-path", "a.yaml"],
        ),
    ],
)
def test_a_config_file_says_where_the_store_is_unless_make_is_told(
    arguments: list[str], words: list[str]
) -> None:
    _, _, line = dry_run("serve", *arguments).partition("bin/ociproxy ")
    assert shlex.split(line.replace("\\\n", " ")) == words


def test_a_release_looks_for_known_vulnerabilities_first() -> None:
    lines = [line for line in dry_run("release").splitlines() if "-m tools." in line]
    assert [line.rpartition(".")[2] for line in lines] == ["audit", "release"]


def test_ci_reads_files_with_the_newest_supported_python_too(tmp_path: Path) -> None:
    """In a checkout whose `make` only says what it was asked for."""
    scripts = tmp_path / ".ci"
    shutil.copytree(CHECKOUT / ".ci", scripts)
    (tmp_path / "bin").mkdir()
    for name, script in {"make": 'echo "make $*"', "python3.13": "exit 0"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = subprocess.run(
        [scripts / "run"],
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    oldest, newest = done.stdout.splitlines()[:2], done.stdout.splitlines()[2]
    assert oldest == ["make check", "make test"]
    assert f"PYTHON={tmp_path / 'bin' / 'python3.13'} VENV=.venv-newest" in newest
    assert "tests/archive" in newest
