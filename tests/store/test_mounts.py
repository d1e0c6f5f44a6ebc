from __future__ import annotations

import os
from pathlib import Path

import pytest

from ociproxy.store.mounts import is_remote

LINE = "36 35 {device} / /srv rw,noatime shared:1 - {kind} server:/srv rw,hard\n"


@pytest.mark.parametrize(
    ("kind", "remote"),
    [("ext4", False), ("xfs", False), ("overlay", False), ("nfs4", True), ("fuse.s3fs", True)],
)
def test_a_file_system_behind_a_network_or_a_program_is_told(
    tmp_path: Path, kind: str, remote: bool
) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    other = LINE.format(device="0:999", kind="nfs" if not remote else "ext4")
    own = LINE.format(device=f"{os.major(device)}:{os.minor(device)}", kind=kind)
    mounts.write_text(other + own)
    assert is_remote(tmp_path, mounts) is remote


def test_where_the_kernel_does_not_tell_it_counts_as_local(tmp_path: Path) -> None:
    assert not is_remote(tmp_path, tmp_path / "none")
    assert not is_remote(tmp_path / "gone")
