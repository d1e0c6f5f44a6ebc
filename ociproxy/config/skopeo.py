"""What `backend: skopeo` needs, checked before an upstream is asked.

Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any, Final

PROGRAM: Final = "skopeo"
MISSING: Final = "skopeo is not installed, or not on the PATH (Debian: apt-get install skopeo)"


def find_problems(upstream: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a key of an entry of `upstreams`, and what is wrong with its value."""
    if upstream.get("backend") != "skopeo":
        return
    if shutil.which(PROGRAM) is None:
        yield "backend", MISSING
    if upstream.get("scheme") == "auto":
        # skopeo falls back to plain HTTP only if it does not verify TLS.
        yield "scheme", "skopeo cannot do auto: say https or http"
