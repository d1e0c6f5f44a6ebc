"""The watch itself: it sees what blocks the event loop, and knows what may."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts.tools import run
from tests.server import ROOT

PROGRAM = """
import asyncio, sys
from pathlib import Path
from ociproxy.oci.digest import Digest
from ociproxy.store.store import Store
from tests.watched import watch

store = Store(Path(sys.argv[1]))
watch()

async def work():
    {work}

asyncio.run(work())
"""


def run_in_loop(work: str, tmp_path: Path) -> subprocess.CompletedProcess[bytes]:
    program = PROGRAM.format(work=work)
    return run(sys.executable, "-c", program, tmp_path / "store", check=False, cwd=ROOT)


@pytest.mark.parametrize(
    "work",
    [
        "store.check_writable()",
        "store.staging.sweep(0.0)",
        "store.blobs.verify(Digest.of(b''))",
        "list(store.refs.repositories())",
    ],
)
def test_what_may_not_run_in_the_event_loop(work: str, tmp_path: Path) -> None:
    (tmp_path / "store" / "blobs").mkdir(parents=True)
    (tmp_path / "store" / "blobs" / EMPTY).touch()
    assert b"BlockingError: Blocking call to" in run_in_loop(work, tmp_path).stderr


def test_a_look_into_the_store_may(tmp_path: Path) -> None:
    done = run_in_loop("store.manifests.find(Digest.of(b''))", tmp_path)
    assert done.returncode == 0, done.stderr


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
