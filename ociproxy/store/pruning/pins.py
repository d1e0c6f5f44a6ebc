"""Pins: what no prune removes. They are references, or globs on references.

Operators and commands put them into `pins/` of the store, a JSON file each; the configuration has
others. A reference with a digest pins that digest in its repository, whatever its tag means.
Tests: tests/cli/test_pins_command.py.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from ociproxy.config.units import utc_time
from ociproxy.errors import DigestInvalid, NameInvalid
from ociproxy.oci.digest import Digest
from ociproxy.oci.reference import Reference, is_glob
from ociproxy.store.files import store_errors
from ociproxy.store.staging import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_SUFFIX: Final = ".json"


@dataclass(frozen=True, slots=True)
class Pin:
    """`by` is what made it: a command, or a file with its line."""

    pattern: str
    by: str
    added: str = ""
    """When, in ISO 8601; empty for one that the configuration has."""

    @staticmethod
    def parse(text: str, by: str, added: str = "") -> Pin:
        """`nginx` pins docker.io/library/nginx:latest. Raises NameInvalid or DigestInvalid."""
        if is_glob(text):
            return Pin(text, by, added)
        return Pin.of(Reference.parse(text), by, added)

    @staticmethod
    def of(reference: Reference, by: str, added: str = "") -> Pin:
        if reference.digest is not None:
            reference = Reference(reference.repository, digest=reference.digest)
        return Pin(str(reference), by, added)

    @property
    def is_glob(self) -> bool:
        return is_glob(self.pattern)


class Pins:
    """All that hold. `unmet` are those without a glob that have no image in the store."""

    def __init__(self, pins: Iterable[Pin]) -> None:
        self._exact: dict[str, Pin] = {}
        self._globs: list[str] = []
        for pin in pins:
            self._exact.setdefault(pin.pattern, pin)
            if pin.is_glob:
                self._globs.append(pin.pattern)
        self._met: set[str] = set()

    def match(self, reference: Reference, digest: Digest) -> bool:
        """Whether an image is pinned; the reference is that of `list`."""
        names = {str(reference), f"{reference.repository}@{digest}"}
        met = names & self._exact.keys()
        self._met |= met
        return bool(met) or any(fnmatchcase(n, glob) for n in names for glob in self._globs)

    def unmet(self) -> list[Pin]:
        return [p for name, p in self._exact.items() if not (p.is_glob or name in self._met)]


class PinFiles:
    """`pins/` of one store. Any number of processes may write there."""

    def __init__(self, folder: Path, staging: Path) -> None:
        self._folder = folder
        self._staging = staging

    def __iter__(self) -> Iterator[Pin]:
        """Ordered by pattern. Raises StoreError, also for a file that is no pin: an image that was
        pinned must not go because of it."""
        with store_errors(self._folder):
            paths = sorted(self._folder.glob(f"*{_SUFFIX}")) if self._folder.is_dir() else []
        found = []
        for path in paths:
            with store_errors(path), suppress(FileNotFoundError):
                try:
                    document = json.loads(path.read_bytes())
                    pattern, by, added = (document[key] for key in ("pattern", "by", "added"))
                    found.append(Pin.parse(str(pattern), str(by), str(added)))
                except (ValueError, KeyError, TypeError, NameInvalid, DigestInvalid) as exc:
                    raise OSError("is not a pin: remove the file") from exc
        yield from sorted(found, key=lambda pin: pin.pattern)

    def add(self, pin: Pin, now: float) -> None:
        """A pin that is there already stays as it is. Raises StoreError."""
        path = self._path(pin.pattern)
        if path.exists():
            return
        document = {"pattern": pin.pattern, "by": pin.by, "added": utc_time(now)}
        data = json.dumps(document, indent=1).encode() + b"\n"
        write_atomically(path, data, staging=self._staging)

    def remove(self, pattern: str) -> bool:
        """False if there is no such pin. Raises StoreError."""
        path = self._path(pattern)
        with store_errors(path):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
        return True

    def _path(self, pattern: str) -> Path:
        # A reference has characters, and may have a length, that no file name has.
        return self._folder / f"{Digest.of(pattern.encode()).encoded[:32]}{_SUFFIX}"
