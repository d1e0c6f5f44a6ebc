"""Files that a command writes for its user: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click


def write_file(path: Path, data: bytes) -> None:
    """Replaces what is there. Raises ClickException where that cannot be done."""
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
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
