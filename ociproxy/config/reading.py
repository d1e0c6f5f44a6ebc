"""Read files that people write: bytes up to a limit, then text.

Tests: tests/config/test_config.py, tests/load/test_loader.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ociproxy.errors import ConfigError


def read_file(path: Path, limit: int) -> bytes:
    """All bytes. Raises ConfigError if the file cannot be read or has more than `limit` bytes."""
    with _named_errors(str(path)), path.open("rb") as file:
        return read_stream(file, str(path), limit)


def read_stream(stream: BinaryIO, source: str, limit: int) -> bytes:
    """All bytes of an open stream. Raises ConfigError like `read_file`."""
    with _named_errors(source):
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ConfigError(f"larger than {limit} bytes", file=source)
    return data


def decode(data: bytes, source: str, encoding: str = "utf-8") -> str:
    """The text. Raises ConfigError with the line that is not in the encoding."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8", file=source, line=line) from error


@contextmanager
def _named_errors(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", file=source) from error
