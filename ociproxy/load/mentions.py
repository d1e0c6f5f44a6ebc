"""References in free text: arguments, values of environment variables, files in ConfigMaps.

Text has no place that says "an image": a guess is reported to the user, never loaded.
Tests: tests/load/test_kubernetes.py.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ociproxy.errors import DigestInvalid, NameInvalid
from ociproxy.oci.reference import Reference, is_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORD: Final = re.compile(r"[A-Za-z0-9._/:@-]+")
_LENGTH_LIMIT: Final = 512
"""Characters: the longest name, tag and digest."""
_HINT: Final = "image"
_SCHEMES: Final = ("docker://", "oci://")


def mentioned(text: str, hint: str) -> Iterator[tuple[Reference, int]]:
    """Each reference that the text seems to name, with the number of line ends before it.

    It must have a `/`, and a tag or a digest. If its first part is no registry, `hint` (the name of
    the variable, the argument before) or its own line must say "image".
    """
    hinted = _HINT in hint.lower()
    for number, line in enumerate(text.split("\n")):
        # A cheap look first: most text has no such word.
        if "/" not in line or not (":" in line or "@" in line):
            continue
        likely = hinted or _HINT in line.lower()
        for match in _WORD.finditer(line):
            reference = _reference(match[0], likely=likely)
            if reference is not None:
                yield reference, number


def _reference(word: str, *, likely: bool) -> Reference | None:
    for scheme in _SCHEMES:
        word = word.removeprefix(scheme)
    word = word.strip(".:/-@")
    first, slash, rest = word.partition("/")
    if not slash or not (":" in rest or "@" in rest) or len(word) > _LENGTH_LIMIT:
        return None
    if not (likely or is_registry(first)):
        return None
    try:
        return Reference.parse(word)
    except (NameInvalid, DigestInvalid):
        return None
