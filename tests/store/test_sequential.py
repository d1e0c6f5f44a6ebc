"""SequentialWriter: everything arrives, whatever it is written to."""

from __future__ import annotations

import hashlib
import os
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from ociproxy.store.sequential import SequentialWriter

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024 * 1024
PIECES = [os.urandom(size) for size in (1, 3 * MIB, 128 * 1024, 9 * MIB, 0, 7 * MIB + 5)]


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        writer = SequentialWriter(file.fileno())
        for piece in PIECES:
            writer.write(memoryview(piece))
    assert (tmp_path / "file").read_bytes() == b"".join(PIECES)


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
