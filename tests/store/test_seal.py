"""Seals: broken by any write, kept by a faithful copy and by a read."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ociproxy.store.files import TOUCH_AFTER, is_sealed, seal, touch


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "sealed"
    path.write_bytes(b"content")
    with path.open("rb") as file:
        seal(file.fileno(), path.name)
    assert is_sealed(path.stat(), path.name)
    return path


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def change_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"C")


def rewrite_the_same(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def truncate(path: Path) -> None:
    os.truncate(path, 3)


def test_a_file_that_was_never_sealed_is_not(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    path.write_bytes(b"content")
    assert not is_sealed(path.stat(), path.name)


@pytest.mark.parametrize("write", [append, change_in_place, rewrite_the_same, truncate])
def test_any_write_breaks_the_seal(sealed: Path, write: Callable[[Path], None]) -> None:
    write(sealed)
    assert not is_sealed(sealed.stat(), sealed.name)


def test_a_seal_is_for_one_name(sealed: Path) -> None:
    assert not is_sealed(sealed.stat(), "another")


@pytest.mark.parametrize("command", [["cp", "-a"], ["rsync", "-a"]])
def test_a_seal_survives_a_faithful_copy(sealed: Path, tmp_path: Path, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    copies = tmp_path / "copies"
    copies.mkdir()
    subprocess.run([*command, str(sealed), str(copies)], check=True)
    assert is_sealed((copies / sealed.name).stat(), sealed.name)


def test_a_plain_copy_is_not_sealed(sealed: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    shutil.copyfile(sealed, copies / sealed.name)
    assert not is_sealed((copies / sealed.name).stat(), sealed.name)


def test_a_read_leaves_the_seal_alone(sealed: Path) -> None:
    sealed.read_bytes()
    now = time.time() + 2 * TOUCH_AFTER
    with sealed.open("rb") as file:
        touch(file.fileno(), os.fstat(file.fileno()), now)
    assert sealed.stat().st_atime == pytest.approx(now)
    assert is_sealed(sealed.stat(), sealed.name)


def test_use_is_recorded_once_a_minute(sealed: Path) -> None:
    before = sealed.stat()
    with sealed.open("rb") as file:
        touch(file.fileno(), before, before.st_atime + TOUCH_AFTER - 1)
    assert sealed.stat().st_atime_ns == before.st_atime_ns
