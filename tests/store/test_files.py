"""Publication, names, and what the operating system's refusals become."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from ociproxy.errors import StoreError, StoreFull
from ociproxy.oci.digest import Digest
from ociproxy.store.files import Silence, file_name, heartbeat, publish, store_errors


def test_a_published_file_is_gone_from_where_it_was_staged(tmp_path: Path) -> None:
    staged = tmp_path / "staged"
    staged.write_bytes(b"new")
    target = tmp_path / "deep" / "er" / "target"
    publish(staged, target)
    assert target.read_bytes() == b"new"
    assert not staged.exists()


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


def test_a_beat_that_is_a_little_late_is_no_silence(tmp_path: Path) -> None:
    file = os.open(tmp_path, os.O_RDONLY)
    silence = Silence(file, 0.1)
    heartbeat.start(file)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        assert not silence.is_long()
        time.sleep(0.01)
    heartbeat.stop(file)
    os.close(file)
