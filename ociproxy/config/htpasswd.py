"""The htpasswd file: the users who may pull, and the bcrypt hashes of their passwords."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ociproxy.config.reading import read_file
from ociproxy.errors import ConfigError

_SIZE_LIMIT: Final = 1 << 20
"""Bytes of the file: more than ten thousand users."""
_BCRYPT: Final = re.compile(rb"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")
_COSTS: Final = range(4, 16)
"""Each step doubles the work of one check: cost 12 takes a quarter of a second, 16 four seconds."""


def read_htpasswd(path: Path) -> Mapping[bytes, bytes]:
    """Each user's bcrypt hash. Raises ConfigError with the file and the line."""
    data = read_file(path, _SIZE_LIMIT)
    users: dict[bytes, bytes] = {}
    for number, raw in enumerate(data.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith(b"#"):
            continue
        user, colon, hashed = line.partition(b":")
        found = _BCRYPT.fullmatch(hashed)
        # No error quotes the line: by mistake the user may have written a password there.
        if not user or not colon:
            raise ConfigError("not USER:HASH", file=str(path), line=number)
        if found is None:
            reason = "not a bcrypt hash: make it with htpasswd -B"
            raise ConfigError(reason, file=str(path), line=number)
        if int(found[1]) not in _COSTS:
            reason = f"a bcrypt cost of {int(found[1])}: it must be 4 to {_COSTS[-1]}"
            raise ConfigError(reason, file=str(path), line=number)
        if user in users:
            raise ConfigError("a user that an earlier line has", file=str(path), line=number)
        users[user] = hashed
    if not users:
        raise ConfigError("no user in it", file=str(path))
    return users
