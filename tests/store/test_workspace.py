"""Workspaces: directories in `pulls/` with one owner."""

from __future__ import annotations

import os
from pathlib import Path

from ociproxy.store.staging import Staging


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    staging = Staging(tmp_path)
    first = staging.workspace("copy")
    assert first is not None
    assert first.path.stat().st_mode & 0o777 == 0o700
    assert staging.workspace("copy") is None
    assert staging.workspace("other") is not None
    (first.path / "sub").mkdir()
    first.remove()
    assert not first.path.exists()
    second = staging.workspace("copy")
    assert second is not None
    assert list(second.path.iterdir()) == []


def test_what_a_dead_owner_left_goes_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "layer").write_bytes(b"left behind")
    workspace = Staging(tmp_path).workspace("copy")
    assert workspace is not None
    assert (workspace.path / "layer").read_bytes() == b"left behind"


def test_sweep_removes_those_without_an_owner(tmp_path: Path) -> None:
    staging = Staging(tmp_path)
    owned = staging.workspace("owned")
    assert owned is not None
    (tmp_path / "abandoned" / "sub").mkdir(parents=True)
    (tmp_path / "fresh").mkdir()
    for name in ("owned", "abandoned"):
        os.utime(tmp_path / name, (1000, 1000))
    assert staging.sweep(2000) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "owned"]
