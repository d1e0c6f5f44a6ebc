"""Archives and layouts as other tools wrote them, and as ociproxy once did: `foreign/` has one of
each, small ones with content made for the purpose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from ociproxy.archive.lock import read_lock
from tests.archive.importing import Import
from tests.archive.test_bundle import serving

FOREIGN = Path(__file__).with_name("foreign")
IMAGE = "sha256:aa19b5e344a26d05bfae32acb63323d5b36ab762e8d45d28bc9dd380df6082b9"
SIGNATURE = "sha256:62fa28247263e6630a6d067dec71ec33349765b3be3d4913a16e03748149d218"
SBOM = "sha256:b9c8f407dee6cc5866906a6022fee3bb51351df7e06bca400a65cb2db3d42e96"
TAG = IMAGE.replace(":", "-")


@pytest.fixture
def job(tmp_path: Path) -> Import:
    return Import(tmp_path)


def packed(name: str) -> Path:
    return FOREIGN / f"{name}.tar.zst"


def unpacked(name: str, folder: Path) -> Path:
    """The archive as a plain tar, which is what a bundle is."""
    path = folder / f"{name}.tar"
    with packed(name).open("rb") as source, path.open("wb") as target:
        zstandard.ZstdDecompressor().copy_stream(source, target)
    return path


def ociproxy(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ociproxy", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


OLD = "ociproxy-lock-without-platform"
SIGNED = "up.test/tiny/one"


def test_an_archive_of_ours_whose_lock_has_an_empty_platform_is_read(
    job: Import, tmp_path: Path
) -> None:
    old = unpacked(OLD, tmp_path)
    done = job.run(packed(OLD))
    assert (done.code, set(done.statuses.values())) == (0, {"imported"}), done.problems
    assert set(done.statuses) == {f"{SIGNED}:{tag}" for tag in ("v1", TAG, f"{TAG}.sig")}
    with serving(tmp_path, old) as mirror:
        assert mirror.manifest("up.test", "tiny/one", f"{TAG}.sig").digest == SIGNATURE
    assert ociproxy("diff", old, old).returncode == 0
    delta = tmp_path / "delta.tar"
    exported = ociproxy("export", "--image-path", job.store, delta, "--since", old)
    assert exported.returncode == 0, exported.stderr
    assert len(read_lock(delta).omitted) == len(read_lock(delta).contents) - 4  # all blobs


def test_what_a_signature_is_exported_in_can_be_read_again(job: Import, tmp_path: Path) -> None:
    assert job.run(packed(OLD)).code == 0
    archive = tmp_path / "again.tar"
    assert job.export(archive).returncode == 0
    assert b'""' not in archive.read_bytes().partition(b"contents")[0]
    other = Import(tmp_path / "other")
    assert other.run(archive).code == 0
    assert other.listed() == job.listed()
    assert ociproxy("diff", job.store, archive).returncode == 0
