"""Kinds of single values in a configuration file: how a value is read, checked and described.

A kind returns the value of a node, or reports the problem and raises `Refused`. No message quotes
a value that could be a secret.
Tests: tests/config/test_config.py, tests/fuzz/test_parsers.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from ociproxy.config.local_settings import Share
from ociproxy.config.units import (
    DURATION,
    SIZE,
    parse_duration,
    parse_size,
    show_duration,
    show_size,
)
from ociproxy.config.yaml import ListNode, MappingNode, Node
from ociproxy.errors import shorten

JsonObject = dict[str, Any]
_PERCENTAGE: Final = r"[0-9]{1,3}(?:\.[0-9]{1,3})?%"


class Refused(Exception):
    """The value is wrong, and the problem is in the report already."""


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Place:
    """The key path of a node, the folder where relative paths start, and the report of problems."""

    key: str
    folder: Path
    problems: list[Problem] = field(default_factory=list)

    def child(self, name: str) -> Place:
        name = name if re.fullmatch(r"[\w-]{1,64}", name) else shorten(name, 40)
        key = f"{self.key}.{name}" if self.key else name
        return dataclasses.replace(self, key=key)

    def item(self, index: int) -> Place:
        return dataclasses.replace(self, key=f"{self.key}[{index}]")

    def refuse(self, line: int, reason: str) -> Refused:
        """Report a problem here; the caller may raise the result."""
        self.problems.append(Problem(line, self.key, reason))
        return Refused()


class Kind(Protocol):
    """One kind of value."""

    def read(self, node: Node, place: Place) -> Any: ...

    def schema(self) -> JsonObject: ...

    def show(self, value: Any) -> Any:
        """A default value as the JSON Schema has it."""
        return value


def _scalar(node: Node, place: Place, wanted: str) -> str | int | float | bool:
    if isinstance(node, ListNode):
        raise place.refuse(node.line, f"must be {wanted}, not a list")
    if isinstance(node, MappingNode):
        raise place.refuse(node.line, f"must be {wanted}, not a mapping")
    if node.value is None:
        raise place.refuse(node.line, f"must be {wanted}: give a value or remove the key")
    return node.value


@dataclass(frozen=True, slots=True)
class Text(Kind):
    """A string; `parse` makes the value of it, or raises ValueError with the reason. `pattern` is
    for the schema; `words` say what it matches."""

    pattern: str | None = None
    words: str = ""
    parse: Callable[[str], object] = str
    empty: bool = False
    length: int = 4096

    def read(self, node: Node, place: Place) -> Any:
        value = _scalar(node, place, "a string")
        if not isinstance(value, str):
            raise place.refuse(node.line, "must be a string: put it in quotes")
        if not value and not self.empty:
            raise place.refuse(node.line, "must not be empty")
        if len(value) > self.length:
            raise place.refuse(node.line, f"longer than {self.length} characters")
        if any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise place.refuse(node.line, "must not contain control characters")
        try:
            # First, for its reason is in words.
            parsed = self.parse(value)
        except ValueError as error:
            raise place.refuse(node.line, str(error)) from error
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            raise place.refuse(node.line, f"must be {self.words or f'text like {self.pattern}'}")
        return parsed

    def schema(self) -> JsonObject:
        schema: JsonObject = {"type": "string", "maxLength": self.length}
        if not self.empty:
            schema["minLength"] = 1
        if self.pattern is not None:
            schema["pattern"] = f"^(?:{self.pattern})$"
        return schema


@dataclass(frozen=True, slots=True)
class Flag(Kind):
    def read(self, node: Node, place: Place) -> bool:
        value = _scalar(node, place, "true or false")
        if not isinstance(value, bool):
            raise place.refuse(node.line, "must be true or false")
        return value

    def schema(self) -> JsonObject:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Number(Kind):
    at_least: int
    at_most: int

    def read(self, node: Node, place: Place) -> int:
        value = _scalar(node, place, "a whole number")
        bounds = f"{self.at_least} to {self.at_most}"
        if not isinstance(value, int) or isinstance(value, bool):
            raise place.refuse(node.line, f"must be a whole number, {bounds}")
        if not self.at_least <= value <= self.at_most:
            raise place.refuse(node.line, f"must be {bounds}, not {value}")
        return value

    def schema(self) -> JsonObject:
        return {"type": "integer", "minimum": self.at_least, "maximum": self.at_most}


@dataclass(frozen=True, slots=True)
class Choice(Kind):
    values: tuple[str, ...]

    def read(self, node: Node, place: Place) -> str:
        wanted = " or ".join(self.values)
        value = _scalar(node, place, wanted)
        if value not in self.values:
            raise place.refuse(node.line, f"must be {wanted}, not {shorten(str(value), 40)}")
        return str(value)

    def schema(self) -> JsonObject:
        return {"enum": list(self.values)}


@dataclass(frozen=True, slots=True)
class Duration(Kind):
    """Seconds as a float. With `never`, the word `never` is read as None."""

    at_least: float = 0.0
    at_most: float = 3650 * 86400.0
    never: bool = False

    def read(self, node: Node, place: Place) -> float | None:
        wanted = "a duration such as 500ms, 30s, 15m, 1h or 7d"
        value = _scalar(node, place, wanted)
        if self.never and value == "never":
            return None
        seconds = parse_duration(value)
        if seconds is None:
            raise place.refuse(node.line, f"must be {wanted}{', or never' if self.never else ''}")
        if not self.at_least <= seconds <= self.at_most:
            least, most = show_duration(self.at_least), show_duration(self.at_most)
            raise place.refuse(node.line, f"must be between {least} and {most}")
        return seconds

    def schema(self) -> JsonObject:
        # A JSON Schema cannot compare "90s" with "1m": its bounds hold for bare numbers only.
        pattern = rf"^(?:{DURATION}|0{'|never' if self.never else ''})$"
        return {
            "type": ["string", "number"],
            "pattern": pattern,
            "minimum": self.at_least,
            "maximum": self.at_most,
        }

    def show(self, value: Any) -> Any:
        return "never" if value is None else show_duration(value)


@dataclass(frozen=True, slots=True)
class Size(Kind):
    """Bytes as an int."""

    at_least: int
    at_most: int

    def read(self, node: Node, place: Place) -> int:
        wanted = "a size such as 65536, 512KiB, 32MiB or 1GiB"
        value = _scalar(node, place, wanted)
        size = parse_size(value)
        if size is None:
            raise place.refuse(node.line, f"must be {wanted}")
        if not self.at_least <= size <= self.at_most:
            least, most = show_size(self.at_least), show_size(self.at_most)
            raise place.refuse(node.line, f"must be between {least} and {most}")
        return size

    def schema(self) -> JsonObject:
        return {
            "type": ["string", "integer"],
            "pattern": f"^(?:{SIZE})$",
            "minimum": self.at_least,
            "maximum": self.at_most,
        }

    def show(self, value: Any) -> Any:
        return show_size(value)


@dataclass(frozen=True, slots=True)
class SizeOrShare(Kind):
    """Bytes as an int, or a Share of the file system, written as a percentage. 0 is none, and
    refused unless `may_be_none`."""

    may_be_none: bool = False

    def read(self, node: Node, place: Place) -> int | Share:
        found = self._read(node, place)
        if found in (0, Share(0)) and not self.may_be_none:
            raise place.refuse(node.line, "must be more than 0; remove the key for no limit")
        return found

    def _read(self, node: Node, place: Place) -> int | Share:
        value = _scalar(node, place, "a size such as 200G, or a percentage such as 80%")
        if isinstance(value, str) and re.fullmatch(_PERCENTAGE, value):
            share = Share(float(value[:-1]))
            if share.percent > 100:
                raise place.refuse(node.line, "must be 100% at most")
            return share
        size = parse_size(value)
        if size is None:
            raise place.refuse(node.line, "must be a size such as 200G, or a percentage")
        if size > 1024**6:
            raise place.refuse(node.line, "must be 1024PiB at most")
        return size

    def schema(self) -> JsonObject:
        return {"type": ["string", "integer"], "pattern": f"^(?:{SIZE}|{_PERCENTAGE})$"}


@dataclass(frozen=True, slots=True)
class FilePath(Kind):
    """A path; a relative one starts at the configuration file's folder. With `exists` the file must
    be readable."""

    exists: bool = True

    def read(self, node: Node, place: Place) -> Path:
        text: str = Text().read(node, place)
        path = place.folder / text
        if self.exists:
            try:
                with path.open("rb"):
                    pass
            except FileNotFoundError as error:
                raise place.refuse(node.line, f"no such file: {path}") from error
            except OSError as error:
                raise place.refuse(
                    node.line, f"cannot be read: {path}: {error.strerror}"
                ) from error
        return path

    def schema(self) -> JsonObject:
        return Text().schema()

    def show(self, value: Any) -> Any:
        return str(value)
