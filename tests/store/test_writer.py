"""Blobs that come from front to end: committed when they are right, gone when they are not."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from ociproxy.errors import DigestMismatch, SizeMismatch, StoreError
from ociproxy.oci.digest import Digest
from ociproxy.store.store import Store
from tests.images import random_bytes
from tests.parts.tools import read_only

SIZES = [0, 1, 128 * 1024, 1024 * 1024, 1024 * 1024 + 1, 5_000_000]


class Dribble(io.BytesIO):
    """A source that gives less than is asked for, as a pipe does."""

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        return super().readinto(buffer[:70_001])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("source", [io.BytesIO, Dribble])
def test_what_was_taken_is_stored_and_sealed(
    store: Store, size: int, source: type[io.BytesIO]
) -> None:
    data = random_bytes(size)
    with store.blob_writer() as writer:
        digest = writer.write(source(data), size, Digest.of(data))
    found = store.blobs.find(digest)
    assert found is not None
    with found.file:
        assert found.sealed
        assert found.file.read() == data


def test_the_digest_is_found_where_none_is_expected(store: Store) -> None:
    with store.blob_writer() as writer:
        assert writer.write(io.BytesIO(b"abc"), 3) == Digest.of(b"abc")


def test_sha512_is_verified_as_such(store: Store) -> None:
    with store.blob_writer() as writer:
        digest = writer.write(io.BytesIO(b"abc"), 3, Digest.of(b"abc", "sha512"))
    assert store.blobs.find_size(digest) == 3


@pytest.mark.parametrize(
    ("size", "error"), [(2_999_999, DigestMismatch), (3_000_001, SizeMismatch)]
)
def test_what_is_wrong_leaves_nothing(store: Store, size: int, error: type[Exception]) -> None:
    data = random_bytes(3_000_000)
    with store.blob_writer() as writer:
        with pytest.raises(error):
            writer.write(io.BytesIO(data), size, Digest.of(data))
        assert list(store.staging.root.iterdir()) == []
    assert list((store.root / "blobs").iterdir()) == []


def test_many_are_committed_together(store: Store) -> None:
    with store.blob_writer() as writer:
        digests = [writer.write(io.BytesIO(b"%d" % n), len(b"%d" % n)) for n in range(200)]
        writer.drain()
        assert all(store.blobs.find_size(digest) is not None for digest in digests)
        assert list(store.staging.root.iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(store: Store) -> None:
    script = f"""
import io, os, signal
from pathlib import Path
from ociproxy.store.store import Store
class Stuck(io.BytesIO):
    def readinto(self, buffer):
        os.kill(os.getpid(), signal.SIGKILL)
with Store(Path({str(store.root)!r})).blob_writer() as writer:
    writer.write(Stuck(), 10)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == -9
    assert len(list(store.staging.root.iterdir())) == 1

    class Looking(io.BytesIO):
        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
            with store.staging.using(0.0):
                seen.extend(written())
            return super().readinto(buffer)

    def written() -> list[Path]:
        return [path for path in store.staging.root.iterdir() if "using" not in path.name]

    seen: list[Path] = []
    with store.staging.using(0.0), store.blob_writer() as writer:
        assert written() == []
        writer.write(Looking(b"abc"), 3)
    assert len(seen) == 1


def test_a_read_only_store_is_one_clear_error(store: Store) -> None:
    with (
        read_only(store.root),
        store.blob_writer() as writer,
        pytest.raises(StoreError, match="read-only"),
    ):
        writer.write(io.BytesIO(b"abc"), 3)
