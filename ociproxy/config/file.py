"""Read and check the configuration file; print its JSON Schema.

The file is a mapping, or a list of upstreams and nothing else. Every problem is reported with file,
line and key; a file with a problem is not used at all.
Tests: tests/config/test_config.py, tests/fuzz/test_parsers.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path

from ociproxy.config.kinds import JsonObject, Place, Problem, Refused
from ociproxy.config.reading import decode, read_file
from ociproxy.config.settings import Config
from ociproxy.config.table import ROOT, build_config
from ociproxy.config.upstream_table import UPSTREAMS
from ociproxy.config.yaml import SIZE_LIMIT, ListNode, MappingNode, ScalarNode, parse_yaml
from ociproxy.errors import ConfigError


class ConfigFileInvalid(ConfigError):
    """Every problem of one file, a line each; the attributes are those of the first problem."""

    def __init__(self, file: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(
            ConfigError(problem.reason, file=file, line=problem.line, key=problem.key)
            for problem in sorted(problems, key=attrgetter("line"))
        )
        first = self.problems[0]
        super().__init__(first.reason, file=file, line=first.line, key=first.key)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def read_config(path: Path) -> Config:
    """The configuration in a file. Raises ConfigError with the file's name."""
    return parse_config(decode(read_file(path, SIZE_LIMIT), str(path)), str(path))


def parse_config(text: str, source: str) -> Config:
    """The configuration in a text; a relative path starts at the folder of `source`. Raises
    ConfigError."""
    root = parse_yaml(text, source)
    if root is None or (isinstance(root, ScalarNode) and root.value is None):
        return Config()
    place = Place("", Path(source).parent)
    try:
        if isinstance(root, ListNode):
            return build_config({"upstreams": UPSTREAMS.read(root, place)})
        if not isinstance(root, MappingNode):
            raise place.refuse(root.line, "must be a mapping, or a list of upstreams")
        config: Config = ROOT.read(root, place)
        return config
    except Refused:
        raise ConfigFileInvalid(source, place.problems) from None


def schema() -> JsonObject:
    """JSON Schema (draft 2020-12) of the file, for editors; `parse_config` checks more."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ociproxy configuration",
        "anyOf": [ROOT.schema(), UPSTREAMS.schema(), {"type": "null"}],
    }
