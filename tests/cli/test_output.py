"""Standard streams that are full, closed, or whose reader has left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ociproxy.store.store import Store
from tests.images import image
from tests.server import ROOT
from tests.stores import put

LIMIT = 60


@pytest.fixture
def store(tmp_path: Path) -> Path:
    put(Store(tmp_path / "store"), "quay.io/a/b:1", image("one"))
    return tmp_path / "store"


def shell(store: Path, words: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which `ociproxy` is the program."""
    program = f'ociproxy() {{ "{sys.executable}" -m ociproxy "$@"; }}'
    return subprocess.run(
        ["bash", "-c", f"cd {ROOT}; export OCIPROXY_IMAGE_PATH={store}; {program}; {words}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.parametrize("command", ["list", "diff . $OCIPROXY_IMAGE_PATH", "check --json"])
def test_a_full_disk_behind_the_output_is_named(store: Path, command: str) -> None:
    """Not with exit code 1, by which `diff` says that it found differences."""
    command = command.replace(" . ", f" {store.parent / 'empty'} ")
    Store(store.parent / "empty")
    done = shell(store, f"ociproxy {command} >/dev/full")
    assert done.stderr == "Error: cannot write the output: no space left on device\n"
    assert done.returncode == 4


def test_a_full_disk_behind_the_messages_is_an_exit_code(store: Path) -> None:
    done = shell(store, "ociproxy list nosuch/thing 2>/dev/full >/dev/full")
    assert (done.returncode, done.stderr) == (4, "")


def test_a_reader_that_leaves_is_no_failure_to_report(store: Path) -> None:
    done = shell(store, "ociproxy list --format refs | true; echo ${PIPESTATUS[0]}")
    assert done.stdout in ("141\n", "0\n")  # 0 where the line was written before `true` ended
    assert done.stderr == ""
    done = shell(store, "ociproxy config schema | sleep 0; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export - >&-", "cannot write -: standard output is closed"),
        ("load - <&-", "standard input: is closed"),
        ("import - <&-", "standard input: is closed"),
    ],
)
def test_a_closed_stream_is_named(store: Path, words: str, message: str) -> None:
    done = shell(store, f"ociproxy {words}")
    assert message in done.stderr
    assert done.returncode in (2, 4)
    assert "Traceback" not in done.stderr


def test_no_file_takes_the_number_of_a_closed_stream(store: Path) -> None:
    """Else a child process writes its messages into a file of the store."""
    watch = (
        "import os, ociproxy.cli.main as m;"
        " m.main = lambda: print(*(os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)),"
        " file=open(os.environ['OUT'], 'w'));"
        " from ociproxy.__main__ import main; main()"
    )
    seen = store.parent / "seen"
    shell(store, f'OUT={seen} "{sys.executable}" -c "{watch}" <&- >&- 2>&-')
    assert seen.read_text() == "/dev/null /dev/null /dev/null\n"
