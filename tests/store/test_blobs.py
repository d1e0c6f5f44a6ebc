"""Stored blobs: found, told apart from damaged ones, and taken out of service."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from threading import Barrier, Thread

import pytest

from ociproxy.errors import DigestMismatch, OciProxyError, SizeMismatch
from ociproxy.oci.descriptor import Descriptor
from ociproxy.oci.digest import Digest
from ociproxy.store.store import Store
from tests.images import random_bytes
from tests.parts.tools import read_only

DATA = random_bytes(3_000_000, seed="blobs")


class MovedClock:
    """A clock that runs ahead of the system's."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return time.time() + self.ahead

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def commit(store: Store, data: bytes = DATA, algorithm: str = "sha256") -> Digest:
    digest = Digest.of(data, algorithm)
    staged = store.staging.root / "staged"
    staged.write_bytes(data)
    store.blobs.commit(staged, digest)
    return digest


def flip_byte(path: Path, offset: int = 1_500_000) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def is_sealed(store: Store, digest: Digest) -> bool:
    found = store.blobs.find(digest)
    assert found is not None
    with found.file:
        return found.sealed


def test_a_committed_blob_is_found_whole_and_sealed(store: Store) -> None:
    digest = commit(store)
    found = store.blobs.find(digest)
    assert found is not None
    with found.file:
        assert found.file.read() == DATA
        assert (found.size, found.sealed) == (len(DATA), True)
    assert store.blobs.find_size(digest) == len(DATA)
    assert list(store.staging.root.iterdir()) == []
    assert store.blobs.path(digest).stat().st_mode & 0o777 == 0o644


def test_a_blob_that_is_not_stored_is_not_found(store: Store) -> None:
    digest = Digest.of(b"another")
    assert store.blobs.find(digest) is None
    assert store.blobs.find_size(digest) is None


def test_the_kernel_knows_of_a_blob_that_was_just_missed_that_it_is_not_there(
    store: Store,
) -> None:
    found, _ = store.blobs.find_cached(commit(store))
    if found is None:
        pytest.skip("this kernel, or its file system, does not tell what it knows")
    found.file.close()
    digest = Digest.of(b"another")
    assert store.blobs.find_size(digest) is None
    assert store.blobs.find_cached(digest) == (None, True)


def test_a_sha512_blob_lies_beside_the_others_under_its_own_name(store: Store) -> None:
    digest = commit(store, algorithm="sha512")
    assert store.blobs.path(digest) == store.root / "blobs" / f"sha512-{digest.encoded}"
    assert is_sealed(store, digest)
    store.blobs.verify(digest)
    assert store.blobs.find(Digest.of(DATA)) is None


def test_a_flipped_byte_breaks_the_seal_and_verifying_quarantines_it(store: Store) -> None:
    digest = commit(store)
    path = store.blobs.path(digest)
    flip_byte(path)
    damaged = path.read_bytes()
    assert not is_sealed(store, digest)
    with pytest.raises(DigestMismatch) as caught:
        store.blobs.verify(digest)
    assert digest.encoded in str(caught.value)
    assert store.blobs.find(digest) is None
    assert (store.root / "quarantine" / path.name).read_bytes() == damaged


@pytest.mark.parametrize("size", [0, 1, len(DATA) - 1])
def test_a_truncated_blob_is_quarantined(store: Store, size: int) -> None:
    digest = commit(store)
    path = store.blobs.path(digest)
    path.write_bytes(DATA[:size])
    assert not is_sealed(store, digest)
    with pytest.raises(DigestMismatch):
        store.blobs.verify(digest)
    assert store.blobs.find(digest) is None


def test_a_right_blob_without_a_seal_is_sealed_by_verifying(store: Store) -> None:
    digest = Digest.of(DATA)
    store.blobs.path(digest).write_bytes(DATA)
    assert not is_sealed(store, digest)
    store.blobs.verify(digest)
    assert is_sealed(store, digest)
    assert not (store.root / "quarantine").exists()


def test_a_quarantined_blob_can_be_replaced(store: Store) -> None:
    digest = commit(store)
    for _ in range(2):
        flip_byte(store.blobs.path(digest))
        with pytest.raises(DigestMismatch):
            store.blobs.verify(digest)
        assert store.blobs.find(digest) is None
        assert commit(store) == digest
        store.blobs.verify(digest)


def test_an_open_blob_outlives_its_removal(store: Store) -> None:
    digest = commit(store)
    found = store.blobs.find(digest)
    assert found is not None
    with found.file:
        store.blobs.path(digest).unlink()
        assert found.file.read() == DATA


def test_finding_a_blob_records_its_use_and_keeps_the_seal(tmp_path: Path) -> None:
    clock = MovedClock()
    store = Store(tmp_path / "store", clock=clock)
    digest = commit(store)
    clock.ahead = 7 * 24 * 3600.0
    assert is_sealed(store, digest)
    assert store.blobs.path(digest).stat().st_atime == pytest.approx(clock.now(), abs=60)
    assert is_sealed(store, digest)


def test_asking_for_the_size_is_no_use(tmp_path: Path) -> None:
    clock = MovedClock()
    store = Store(tmp_path / "store", clock=clock)
    digest = commit(store)
    before = store.blobs.path(digest).stat().st_atime_ns
    clock.ahead = 7 * 24 * 3600.0
    store.blobs.find_size(digest)
    assert store.blobs.path(digest).stat().st_atime_ns == before


def test_a_blob_that_is_gone_needs_no_verifying(store: Store) -> None:
    store.blobs.verify(Digest.of(b"another"))


def test_a_damaged_blob_that_many_verify_is_one_fault(store: Store) -> None:
    """The others wait, and look again: the blob is gone."""
    digest = commit(store)
    flip_byte(store.blobs.path(digest))
    faults: list[BaseException] = []
    together = Barrier(8)

    def verify() -> None:
        together.wait()
        try:
            store.blobs.verify(digest)
        except OciProxyError as exc:
            faults.append(exc)

    threads = [Thread(target=verify) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(fault) for fault in faults] == [DigestMismatch]
    assert store.blobs.find(digest) is None


def test_what_replaces_a_damaged_blob_meanwhile_stays(store: Store) -> None:
    """Another thread verifies the blob meanwhile, and finds old bytes wrong after the new came."""
    data = random_bytes(100_000_000, seed="long to hash")
    digest = commit(store, data)
    path = store.blobs.path(digest)
    flip_byte(path)
    replacement = store.staging.root / "replacement"
    replacement.write_bytes(data)
    with replacement.open("rb") as file:
        os.fsync(file.fileno())
    damaged = path.open("rb")
    outcome: list[BaseException] = []

    def verify() -> None:
        try:
            store.blobs.verify(digest)
        except DigestMismatch as exc:
            outcome.append(exc)

    thread = Thread(target=verify)
    with damaged:
        thread.start()
        while not is_locked(damaged.fileno()) and thread.is_alive():
            time.sleep(0.001)
        store.blobs.commit(replacement, digest)
        thread.join()
    assert len(outcome) == 1
    assert is_sealed(store, digest)
    assert not (store.root / "quarantine").exists()


def test_a_read_only_store_is_verified_once_and_served(store: Store) -> None:
    digest = Digest.of(DATA)
    path = store.blobs.path(digest)
    path.write_bytes(DATA)
    with read_only(store.root):
        assert not is_sealed(store, digest)
        store.blobs.verify(digest)
        assert is_sealed(store, digest)
        assert not is_sealed(Store(store.root), digest)
    flip_byte(path)
    assert not is_sealed(store, digest)


def test_a_blob_of_another_program_is_adopted_and_its_file_stays(
    store: Store, tmp_path: Path
) -> None:
    path, digest = tmp_path / "layer", Digest.of(DATA, "sha512")
    path.write_bytes(DATA)
    (tmp_path / "verified").write_bytes(b"left by a process that died")
    store.blobs.adopt(path, Descriptor("application/octet-stream", digest, len(DATA)))
    found = store.blobs.find(digest)
    assert found is not None
    with found.file as file:
        assert (found.sealed, found.size, file.read()) == (True, len(DATA), DATA)
    assert path.read_bytes() == DATA


@pytest.mark.parametrize(
    ("data", "error"), [(DATA[1:], SizeMismatch), (DATA[1:] + b"x", DigestMismatch)]
)
def test_a_wrong_blob_of_another_program_is_not_adopted(
    store: Store, tmp_path: Path, data: bytes, error: type[OciProxyError]
) -> None:
    path, digest = tmp_path / "layer", Digest.of(DATA)
    path.write_bytes(data)
    with pytest.raises(error):
        store.blobs.adopt(path, Descriptor("application/octet-stream", digest, len(DATA)))
    assert store.blobs.find_size(digest) is None
