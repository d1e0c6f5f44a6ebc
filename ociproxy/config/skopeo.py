"""What `backend: skopeo` asks for, known before an upstream is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any, Final

PROGRAM: Final = "skopeo"
MISSING: Final = "skopeo is not installed, or not on the PATH (Debian: apt-get install skopeo)"


def find_problems(upstream: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The key of an entry of `upstreams` and what is wrong with it."""
    if upstream.get("backend") != "skopeo":
        return
    if shutil.which(PROGRAM) is None:
        yield "backend", MISSING
    if upstream.get("scheme") == "auto":
        # Without verification it falls back to plain HTTP, with verification it does not.
        yield "scheme", "skopeo cannot do auto: say https or http"
