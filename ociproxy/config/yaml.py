"""YAML text as a tree of nodes that remember their line. Only this part and load/kubernetes.py
import PyYAML.

Scalars follow YAML 1.2's core schema. By PyYAML's own rules `no` is false and `1:30` is ninety,
which would silently change a password or a duration. The input may be hostile: size, depth and the
number of nodes after expanding aliases are bounded, and no tag builds an object.
Tests: tests/config/test_config.py, tests/fuzz/test_parsers.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import yaml

from ociproxy.errors import ConfigError, shorten

SIZE_LIMIT: Final = 1024 * 1024
"""Bytes of a file, and characters of a text: several thousand upstreams."""
_DEPTH_LIMIT: Final = 32
"""Levels of nesting: the configuration needs seven."""
_NODE_LIMIT: Final = 200_000
"""Nodes after expanding aliases: a thousand upstreams of twenty values each are a tenth of that."""

_NULL: Final = "tag:yaml.org,2002:null"
_BOOL: Final = "tag:yaml.org,2002:bool"
_INT: Final = "tag:yaml.org,2002:int"
_FLOAT: Final = "tag:yaml.org,2002:float"
_STR: Final = "tag:yaml.org,2002:str"
_SEQ: Final = "tag:yaml.org,2002:seq"
_MAP: Final = "tag:yaml.org,2002:map"


@dataclass(frozen=True, slots=True)
class ScalarNode:
    line: int
    value: str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class ListNode:
    line: int
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """One `key: value` of a mapping; `line` is the key's."""

    key: str
    line: int
    value: Node


@dataclass(frozen=True, slots=True)
class MappingNode:
    """Pairs in the order of the file. A key may come twice: `Section` reports it."""

    line: int
    pairs: tuple[Pair, ...]


Node = ScalarNode | ListNode | MappingNode


def parse_yaml(text: str, source: str) -> Node | None:
    """The document in the text, None if it is empty. Raises ConfigError with the line."""
    if len(text) > SIZE_LIMIT:
        raise ConfigError(f"larger than {SIZE_LIMIT} bytes", file=source)
    try:
        root = _Loader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"character U+{ord(text[error.position]):04X} is not allowed"
        raise ConfigError(reason, file=source, line=line) from error
    except yaml.MarkedYAMLError as error:
        raise translated(error, source) from error
    return None if root is None else _Conversion(source).node(root, depth=0)


class _Loader(yaml.SafeLoader):
    # The parent's rules are YAML 1.1's: start with none, and add those of YAML 1.2 below.
    yaml_implicit_resolvers = {}  # noqa: RUF012 - the parent declares it
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # The parent recurses: a file full of "[[[[" must not end in a RecursionError.
        self._depth += 1
        try:
            if self._depth > _DEPTH_LIMIT:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=mark)
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


for _tag, _pattern, _first in (
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]{1,18}", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(?:\.[0-9]+|[0-9]{1,18}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{1,3})?",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


class _Conversion:
    """Makes our nodes of PyYAML's, and counts: ten lines of aliases can expand to 10^9 nodes."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._count = 0

    def node(self, node: yaml.Node, *, depth: int) -> Node:
        line = line_of_mark(node.start_mark)
        self._count += 1
        if self._count > _NODE_LIMIT or depth > _DEPTH_LIMIT:
            raise ConfigError("aliases expand to too much", file=self._source, line=line)
        if isinstance(node, yaml.ScalarNode):
            return ScalarNode(line, self._scalar(node, line))
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
            items = tuple(self.node(item, depth=depth + 1) for item in node.value)
            return ListNode(line, items)
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return MappingNode(line, tuple(self._pair(*pair, depth=depth) for pair in node.value))
        raise self._unsupported(node, line)

    def _pair(self, key: yaml.Node, value: yaml.Node, *, depth: int) -> Pair:
        line = line_of_mark(key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError("a key must be a word", file=self._source, line=line)
        return Pair(key.value, line, self.node(value, depth=depth + 1))

    def _scalar(self, node: yaml.ScalarNode, line: int) -> str | int | float | bool | None:
        text: str = node.value
        try:
            if node.tag == _STR:
                return text
            if node.tag == _NULL:
                return None
            if node.tag == _BOOL:
                return text.lower() == "true"
            if node.tag == _INT:
                return int(text)
            if node.tag == _FLOAT:
                return float(text)
        except ValueError as error:
            raise ConfigError("not a number", file=self._source, line=line) from error
        raise self._unsupported(node, line)

    def _unsupported(self, node: yaml.Node, line: int) -> ConfigError:
        return ConfigError(
            f"tag {shorten(node.tag)} is not supported", file=self._source, line=line
        )


def line_of_mark(mark: Any) -> int:
    """Counted from 1. PyYAML's two parsers have a type of mark each, and both may have none."""
    return 1 if mark is None else int(mark.line) + 1


def translated(error: yaml.MarkedYAMLError, source: str) -> ConfigError:
    """The error of either of PyYAML's parsers as one line."""
    mark = error.problem_mark or error.context_mark
    column = "" if mark is None else f" (column {mark.column + 1})"
    what = ", ".join(part for part in (error.context, error.problem) if part)
    return ConfigError(f"not valid YAML: {what}{column}", file=source, line=line_of_mark(mark))
