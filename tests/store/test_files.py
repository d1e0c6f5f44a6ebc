"""Publication, seals, and what the operating system's refusals become."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ociproxy.errors import StoreError, StoreFull
from ociproxy.oci.digest import Digest
from ociproxy.store.files import publish, store_errors
from ociproxy.store.seal import TOUCH_AFTER, file_name, is_sealed, seal, touch
from ociproxy.store.staging import remove_abandoned, stage, write_atomically


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


def test_a_published_file_is_gone_from_where_it_was_staged(tmp_path: Path) -> None:
    staged = tmp_path / "staged"
    staged.write_bytes(b"new")
    target = tmp_path / "deep" / "er" / "target"
    publish(staged, target)
    assert target.read_bytes() == b"new"
    assert not staged.exists()


def test_an_atomic_write_replaces_the_whole_file_for_everyone(tmp_path: Path) -> None:
    target, staging = tmp_path / "target", tmp_path / "staging"
    staging.mkdir()
    target.write_bytes(b"old and longer")
    with target.open("rb") as reader:
        write_atomically(target, b"new", staging=staging, sealed=True)
        assert reader.read() == b"old and longer"
    assert target.read_bytes() == b"new"
    assert is_sealed(target.stat(), target.name)
    assert target.stat().st_mode & 0o777 == 0o644
    assert list(staging.iterdir()) == []


def test_an_atomic_write_that_fails_leaves_nothing_staged(tmp_path: Path) -> None:
    target, staging = tmp_path / "target", tmp_path / "staging"
    staging.mkdir()
    (target / "in the way").mkdir(parents=True)
    with pytest.raises(StoreError) as caught:
        write_atomically(target, b"new", staging=staging)
    assert caught.value.path == target
    assert list(staging.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_used_up_quota_are_store_full(number: int) -> None:
    with pytest.raises(StoreFull), store_errors(Path("/somewhere")):
        raise OSError(number, os.strerror(number))


def test_a_real_full_device_is_store_full() -> None:
    full = Path("/dev/full")
    with pytest.raises(StoreFull, match="/dev/full: no space left"), store_errors(full):
        full.write_bytes(b"x")


def test_any_other_refusal_names_the_path_and_is_not_full(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(StoreError) as caught, store_errors(missing):
        missing.read_bytes()
    assert not isinstance(caught.value, StoreFull)
    assert caught.value.path == missing
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_what_is_no_refusal_passes_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), store_errors(Path("/somewhere")):
        raise ZeroDivisionError


def test_a_file_is_named_after_its_digest() -> None:
    assert file_name(Digest("sha256", "ab")) == "ab"
    assert file_name(Digest("sha512", "ab")) == "sha512-ab"


def test_what_is_being_written_is_left_to_its_writer(tmp_path: Path) -> None:
    """Another process begins an import, or a server starts, all the while."""
    staging = tmp_path / "pulls"
    staging.mkdir()
    over = threading.Event()

    def sweep() -> None:
        while not over.is_set():
            remove_abandoned(staging)

    sweepers = [threading.Thread(target=sweep) for _ in range(3)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        for number in range(100):
            target = tmp_path / f"record-{number}"
            write_atomically(target, b"record", staging=staging)
            assert target.read_bytes() == b"record"
    finally:
        over.set()
        for sweeper in sweepers:
            sweeper.join()


def test_what_a_killed_process_was_writing_goes(tmp_path: Path) -> None:
    held, mine = stage(tmp_path)
    file, left = stage(tmp_path)
    os.close(file)  # as the kernel does it
    (tmp_path / "other").touch()
    try:
        remove_abandoned(tmp_path)
    finally:
        os.close(held)
    assert mine.exists()
    assert not left.exists()
    assert (tmp_path / "other").exists()
