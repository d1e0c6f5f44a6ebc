"""Mappings and lists in a configuration file: known keys, defaults, rules between keys.

Reading goes on after a problem, so that one run of `config check` reports all of them.
Tests: tests/config/test_config.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ociproxy.config.kinds import JsonObject, Kind, Place, Refused
from ociproxy.config.yaml import ListNode, MappingNode, Node, ScalarNode


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a section. If it is `inherited`, another section has the default."""

    kind: Kind
    meaning: str
    required: bool = False
    inherited: bool = False


# Checks the values of a section together; reports each problem to the place.
Rule = Callable[[Mapping[str, Any], MappingNode, Place], None]


@dataclass(frozen=True, slots=True)
class Section(Kind):
    """A mapping with known keys, read into the dataclass `shape`, which has the defaults.

    With `build` the result is what that function makes of the values that were given.
    """

    shape: type[Any]
    keys: Mapping[str, Key]
    build: Callable[[dict[str, Any]], Any] | None = None
    rules: Sequence[Rule] = ()
    schema_rules: Mapping[str, Any] = field(default_factory=dict)

    def read(self, node: Node, place: Place) -> Any:
        if not isinstance(node, MappingNode):
            got = "a list" if isinstance(node, ListNode) else "a single value"
            if isinstance(node, ScalarNode) and node.value is None:
                got = "nothing: give a value or remove the key"
            raise place.refuse(node.line, f"must be a mapping, not {got}")
        before = len(place.problems)
        values: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for pair in node.pairs:
            child = place.child(pair.key)
            if pair.key in seen:
                child.refuse(pair.line, f"given twice, first on line {seen[pair.key]}")
                continue
            seen[pair.key] = pair.line
            key = self.keys.get(pair.key)
            if key is None:
                child.refuse(pair.line, f"unknown key{_suggestion(pair.key, self.keys)}")
                continue
            try:
                values[pair.key] = key.kind.read(pair.value, child)
            except Refused:
                continue
        for name, key in self.keys.items():
            if key.required and name not in seen:
                place.child(name).refuse(node.line, "is required")
        if len(place.problems) == before:
            for rule in self.rules:
                rule(values, node, place)
        if len(place.problems) > before:
            raise Refused
        return self.shape(**values) if self.build is None else self.build(values)

    def schema(self) -> JsonObject:
        defaults = self._defaults()
        properties: JsonObject = {}
        for name, key in self.keys.items():
            schema = {**key.kind.schema(), "description": key.meaning}
            if name in defaults:
                schema["default"] = key.kind.show(defaults[name])
            properties[name] = schema
        required = [name for name, key in self.keys.items() if key.required]
        return {
            "type": "object",
            "additionalProperties": False,
            "properties": properties,
            **({"required": required} if required else {}),
            **self.schema_rules,
        }

    def _defaults(self) -> Mapping[str, Any]:
        """The defaults that the schema tells: those of single values, unless None says "absent"."""
        return {
            item.name: item.default
            for item in dataclasses.fields(self.shape)
            if item.default is not dataclasses.MISSING
            and item.name in self.keys
            and not self.keys[item.name].inherited
            and not isinstance(self.keys[item.name].kind, Section | Items)
            and not dataclasses.is_dataclass(item.default)
            and (item.default is not None or getattr(self.keys[item.name].kind, "never", False))
        }


@dataclass(frozen=True, slots=True)
class Items(Kind):
    """A list of one kind. No two items may have the same `identity`."""

    kind: Kind
    identity: Callable[[Any], str] | None = None

    def read(self, node: Node, place: Place) -> tuple[Any, ...]:
        if not isinstance(node, ListNode):
            raise place.refuse(node.line, "must be a list")
        before = len(place.problems)
        values: list[Any] = []
        seen: dict[str, int] = {}
        for index, item in enumerate(node.items):
            try:
                value = self.kind.read(item, place.item(index))
            except Refused:
                continue
            if self.identity is not None:
                name = self.identity(value)
                if name in seen:
                    place.item(index).refuse(
                        item.line, f"{name} is listed twice, first on line {seen[name]}"
                    )
                seen.setdefault(name, item.line)
            values.append(value)
        if len(place.problems) > before:
            raise Refused
        return tuple(values)

    def schema(self) -> JsonObject:
        return {"type": "array", "items": self.kind.schema()}


def line_of(node: MappingNode, key: str) -> int:
    """The line of a key of the mapping; if the key is absent, the mapping's first line."""
    return next((pair.line for pair in node.pairs if pair.key == key), node.line)


def _suggestion(name: str, known: Iterable[str]) -> str:
    import difflib  # few files have an unknown key

    # Other programs say `cafile`, `ca-cert` or `caFile` for `ca`, and `insecure`, in short.
    plain = {_plain(each): each for each in sorted(known)}
    said = _plain(name)
    found = plain.get(said) or plain.get(_KIND_OF_VALUE.sub("", said))
    near = [plain[each] for each in difflib.get_close_matches(said, plain, n=1)]
    words = re.split(r"[_-]", name.lower())
    near += [each for each in plain.values() if each in words or each.startswith(f"{said}_")]
    found = found or next(iter(near), None)
    return f" (did you mean {found}?)" if found else ""


_KIND_OF_VALUE: Final = re.compile(r"(file|path|cert|certs|crt|pem|bundle)$")


def _plain(name: str) -> str:
    return re.sub(r"[_-]", "", name.lower())


@dataclass(frozen=True, slots=True)
class Either(Kind):
    """One of two kinds: `first` if `when` is true of the node, else `second`."""

    when: Callable[[Node], bool]
    first: Kind
    second: Kind

    def read(self, node: Node, place: Place) -> Any:
        kind = self.first if self.when(node) else self.second
        return kind.read(node, place)

    def schema(self) -> JsonObject:
        return {"anyOf": [self.first.schema(), self.second.schema()]}

    def show(self, value: Any) -> Any:
        return value if isinstance(value, bool) else self.second.show(value)


def is_flag(node: Node) -> bool:
    return isinstance(node, ScalarNode) and isinstance(node.value, bool)


def is_list(node: Node) -> bool:
    return isinstance(node, ListNode)


def is_mapping(node: Node) -> bool:
    return isinstance(node, MappingNode)
