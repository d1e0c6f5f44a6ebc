"""Files that people write: their bytes, up to a limit, and their text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ociproxy.errors import ConfigError


def read_file(path: Path, limit: int) -> bytes:
    """Raises ConfigError naming the file: it cannot be read, or has more than `limit` bytes."""
    with _named_errors(str(path)), path.open("rb") as file:
        return read_stream(file, str(path), limit)


def read_stream(stream: BinaryIO, source: str, limit: int) -> bytes:
    """The same for what is open already, to its end."""
    with _named_errors(source):
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ConfigError(f"larger than {limit} bytes", file=source)
    return data


def decode(data: bytes, source: str, encoding: str = "utf-8") -> str:
    """Raises ConfigError naming the line that is no text."""
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
