"""Files that a command writes for its user: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ociproxy.errors import OutputError


def write_file(path: Path, data: bytes) -> None:
    """Replaces what is there. Raises OutputError where that cannot be done."""
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)  # a terminal, a pipe
            return
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                os.fchmod(descriptor, 0o644)
            os.replace(name, path)  # noqa: PTH105 - mkstemp gives a string
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(path, (error.strerror or str(error)).lower()) from error


def check_target(path: Path) -> None:
    """Known before the work whose outcome the file is to hold. Raises OutputError."""
    try:
        if path.exists() and not path.is_file():
            return
        with tempfile.TemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(path, (error.strerror or str(error)).lower()) from error
