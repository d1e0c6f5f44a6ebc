"""Digests: names of content, parsed at the edge and passed on as `Digest`, not as text.

Grammar and algorithms: OCI image-spec descriptor.md, "Digests". Only sha256 and sha512 are
accepted, for the store must be able to verify all that it names.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from ociproxy.errors import DigestInvalid

_ENCODED: Final = {
    "sha256": re.compile(r"[a-f0-9]{64}"),
    "sha512": re.compile(r"[a-f0-9]{128}"),
}


_DIGITS: Final = 12
"""Hex digits of a digest that a person reads: as many as Docker shows."""


class Hasher(Protocol):
    """An object that `hashlib.new` returns."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class Digest(NamedTuple):
    """`algorithm:encoded`, for example `sha256:e3b0c442...`. A tuple: a walk through a store makes
    and compares millions."""

    algorithm: str
    encoded: str

    @staticmethod
    def parse(text: str) -> Digest:
        """Parse `algorithm:hex`. Raises DigestInvalid."""
        return _parse(text)

    @classmethod
    def of(cls, data: bytes | memoryview, algorithm: str = "sha256") -> Digest:
        """The digest of data; `algorithm` is sha256 or sha512."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    @classmethod
    def finish(cls, hasher: Hasher, algorithm: str) -> Digest:
        """The digest of all bytes that this hasher was given; it is one of this algorithm."""
        return cls(algorithm, hasher.hexdigest())

    def hasher(self) -> Hasher:
        """A new hasher of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.encoded}"

    @property
    def short(self) -> str:
        """For a person; programs get all of it."""
        return f"{self.algorithm}:{self.encoded[:_DIGITS]}"


@lru_cache(maxsize=4096)
def _parse(text: str) -> Digest:
    algorithm, separator, encoded = text.partition(":")
    if not separator:
        raise DigestInvalid(text, "expected <algorithm>:<hex>")
    pattern = _ENCODED.get(algorithm)
    if pattern is None:
        raise DigestInvalid(text, "algorithm is neither sha256 nor sha512")
    if not pattern.fullmatch(encoded):
        length = 64 if algorithm == "sha256" else 128
        raise DigestInvalid(text, f"expected {length} lowercase hexadecimal digits after the colon")
    return Digest(algorithm, encoded)
