"""What came a moment ago is on the disk when a command reports it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ociproxy.store.recent import RecentFiles


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """All that is flushed, in order."""
    found: list[Path] = []
    fsync = os.fsync

    def record(file: int) -> None:
        found.append(Path(f"/proc/self/fd/{file}").readlink())
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    return found


def test_a_file_is_flushed_then_its_folder(tmp_path: Path, flushed: list[Path]) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    RecentFiles().flush([file, tmp_path / "none"])
    assert flushed == [file, tmp_path]


def test_what_several_images_share_is_flushed_once(tmp_path: Path, flushed: list[Path]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x")
    recent = RecentFiles()
    recent.flush([one])
    recent.flush([one])
    assert flushed == [one, tmp_path]
    two.write_bytes(b"x")
    recent.flush([one, two])
    assert flushed[2:] == [two, tmp_path]


def test_what_is_there_for_long_is_not_flushed(
    tmp_path: Path, flushed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    RecentFiles().flush([file])
    assert flushed == []
