"""Looking at a source before it is read."""

from __future__ import annotations

import os

import pytest

from ociproxy.errors import SizeMismatch
from ociproxy.oci.digest import Digest
from ociproxy.store.reader import PeekableReader


class Dripping:
    """Gives seven bytes at most."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def readinto(self, buffer: memoryview, /) -> int:
        count = min(len(buffer), 7, len(self._data))
        buffer[:count], self._data = self._data[:count], self._data[count:]
        return count


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
@pytest.mark.parametrize("peek", [0, 100])
def test_what_was_peeked_at_is_read_again(size: int, peek: int) -> None:
    data = os.urandom(size)
    peeked = PeekableReader(Dripping(data))
    if peek:
        assert peeked.peek(min(size, peek)) == data[:peek]
    assert peeked.read(size, Digest.of(data)) == data
    assert not peeked.readinto(memoryview(bytearray(1)))


@pytest.mark.parametrize("held", [0, 50, 100, 150])
def test_an_early_end_is_noticed(held: int) -> None:
    data = os.urandom(200)
    peeked = PeekableReader(Dripping(data[:held]))
    assert peeked.peek(100) == data[: min(held, 100)]
    with pytest.raises(SizeMismatch) as caught:
        peeked.read(200, Digest.of(data))
    assert caught.value.actual == held
