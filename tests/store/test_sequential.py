"""SequentialWriter: everything arrives, whatever it is written to."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest

from ociproxy.archive.export.output import open_output
from ociproxy.errors import OutputError, StoreError
from ociproxy.oci.digest import Digest
from ociproxy.store.sequential import SequentialWriter
from ociproxy.store.store import Store

MIB = 1024 * 1024
PIECES = [os.urandom(size) for size in (1, 3 * MIB, 128 * 1024, 9 * MIB, 0, 70 * MIB + 5)]


def fail(_file: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        writer = SequentialWriter(file.fileno())
        for piece in PIECES:
            writer.write(memoryview(piece))
        writer.settle()
    assert (tmp_path / "file").read_bytes() == b"".join(PIECES)


def test_a_flush_does_not_lose_its_file_when_that_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number may be another file's the next moment."""
    flushing, closed = Event(), Event()
    flushed: list[Path] = []

    def flush(file: int) -> None:
        flushing.set()
        assert closed.wait(10)
        flushed.append(Path(f"/proc/self/fd/{file}").readlink())

    monkeypatch.setattr(os, "fdatasync", flush)
    writer = SequentialWriter(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT))
    writer.write(bytes(64 * MIB))
    try:
        assert flushing.wait(10)
        writer.close()
        other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    finally:
        closed.set()
    writer.settle()
    os.close(other)
    assert flushed == [tmp_path / "file"]


def test_without_threads_it_writes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", start)
    writer = SequentialWriter(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT))
    writer.write(bytes(64 * MIB))
    writer.write(bytes(64 * MIB))
    writer.settle()
    writer.close()
    assert (tmp_path / "file").stat().st_size == 128 * MIB


def test_a_pipe_takes_it_too() -> None:
    """What no disk is behind takes no advice, and large pieces only by and by."""
    reading, writing = os.pipe()
    hasher = hashlib.sha256()

    def read() -> None:
        while data := os.read(reading, MIB):
            hasher.update(data)

    reader = Thread(target=read)
    reader.start()
    try:
        writer = SequentialWriter(writing)
        for piece in PIECES:
            writer.write(piece)
        writer.settle()
    finally:
        os.close(writing)
        reader.join()
        os.close(reading)
    assert hasher.digest() == hashlib.sha256(b"".join(PIECES)).digest()


def test_what_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        (tmp_path / "file").open("rb", buffering=0) as file,
        pytest.raises(OSError, match="Bad file descriptor"),
    ):
        SequentialWriter(file.fileno()).write(b"data")


@pytest.mark.parametrize("more", [MIB, 100 * MIB])
def test_what_a_flush_on_the_way_found_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """The kernel tells it once: the fsync at the end would say that all is well."""
    failing = Event()

    def flush(file: int) -> None:
        failing.set()
        fail(file)

    monkeypatch.setattr(os, "fdatasync", flush)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        writer = SequentialWriter(file.fileno())
        writer.write(bytes(64 * MIB))
        assert failing.wait(10)
        with suppress(OSError):
            writer.write(bytes(more))
        with pytest.raises(OSError, match="Input/output error"):
            writer.settle()


def test_an_archive_that_the_disk_did_not_take_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fdatasync", fail)
    path = tmp_path / "x.tar"
    with open_output(path) as output:
        output.write(bytes(64 * MIB))
        with pytest.raises(OutputError, match="input/output error"):
            output.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_blob_that_the_disk_did_not_take_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    data = bytes(65 * MIB)
    monkeypatch.setattr(os, "fdatasync", fail)
    with (
        pytest.raises(StoreError, match="input/output error"),
        store.blob_writer() as writer,
    ):
        writer.write(io.BytesIO(data), len(data), Digest.of(data))
    assert store.blobs.find_size(Digest.of(data)) is None
    assert large_files(tmp_path) == []


def large_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > MIB]
