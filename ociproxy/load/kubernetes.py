"""The images that Kubernetes manifests name: plain ones and rendered Helm charts.

YAML is read as a stream of events, so that nesting, aliases and size cost nothing: no tree is
built, and an anchor's content is seen where it stands. Wherever a mapping has an `image` it is
looked at: a container's must be a reference; elsewhere it is one if it looks like one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from ociproxy.errors import ConfigError, DigestInvalid, NameInvalid, shorten
from ociproxy.load.imagelist import parse_reference
from ociproxy.oci.reference import Reference

SIZE_LIMIT: Final = 64 * 1024 * 1024
"""Bytes of one file: a large chart with its resource definitions has ten million."""

_IMAGE: Final = "image"
_OWNER_LIMIT: Final = 200
_DEPTH_LIMIT: Final = 256
_CONTAINERS: Final = frozenset({"containers", "initContainers", "ephemeralContainers"})
_LIKE_CONTAINERS: Final = frozenset({"container", "script", "sidecars", "steps"})
"""Where workflow engines have theirs: with templates of their own, so not all are references."""
_INJECTED: Final = "auto"
"""What Istio has in a container whose image it fills in."""
_NOTHING: Final = frozenset({"", "~", "null"})
# Ten times as fast, where PyYAML was built with it.
_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Named:
    """An image, and who wants it: `Deployment/web` on that line."""

    reference: Reference
    line: int
    owner: str


@dataclass(slots=True)
class Findings:
    """`passed_over` are lines of what may have been meant as an image and was not taken."""

    images: list[Named] = field(default_factory=list)
    problems: list[ConfigError] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Candidate:
    """`required` must be a reference; `likely` is one where it can be, be it a bare word."""

    text: str
    line: int
    required: bool = False
    likely: bool = False


@dataclass(slots=True)
class _Frame:
    """An open mapping or list; `key` is under which key of its parent it stands."""

    key: str
    mapping: bool
    line: int
    pending: str | None = None
    values: dict[str, tuple[str, int]] = field(default_factory=dict)
    name: str = ""
    candidates: list[_Candidate] = field(default_factory=list)


def find_images(text: str, source: str) -> Findings:
    """Every image in a file of any number of documents, in order."""
    findings = Findings()
    walk = _Walk(source, findings)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if not walk.take(event):
                break
    except yaml.YAMLError as error:
        findings.problems.append(_translated(error, text, source))
    return findings


class _Walk:
    def __init__(self, source: str, findings: Findings) -> None:
        self._source = source
        self._findings = findings
        self._stack: list[_Frame] = []

    def take(self, event: yaml.Event) -> bool:
        """False where there is no use in going on."""
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event.value, _line(event.start_mark))
        elif isinstance(event, yaml.AliasEvent):
            self._scalar("", _line(event.start_mark))
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            mapping = isinstance(event, yaml.MappingStartEvent)
            line = _line(event.start_mark)
            if len(self._stack) == _DEPTH_LIMIT:
                # The parser's own cost grows with the depth squared.
                reason = f"nested deeper than {_DEPTH_LIMIT} levels"
                self._findings.problems.append(ConfigError(reason, file=self._source, line=line))
                return False
            self._stack.append(_Frame(self._next_key(), mapping, line))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._end(self._stack.pop())
        return True

    def _next_key(self) -> str:
        """Under which key the value that begins now stands; a list's items stand under its own."""
        if not self._stack:
            return ""
        parent = self._stack[-1]
        if not parent.mapping:
            return parent.key
        key, parent.pending = parent.pending, None
        if key is None:
            # A mapping or a list as a key: what follows is its value.
            parent.pending = ""
            return ""
        return key

    def _scalar(self, text: str, line: int) -> None:
        if not self._stack or not self._stack[-1].mapping:
            return
        frame = self._stack[-1]
        if frame.pending is None:
            frame.pending = text
            return
        frame.values[frame.pending] = (text, line)
        frame.pending = None

    def _end(self, frame: _Frame) -> None:
        parent = self._stack[-1] if self._stack else None
        if frame.mapping:
            self._look(frame)
            if parent is not None and frame.key == "metadata" and "name" in frame.values:
                parent.name = frame.values["name"][0]
        if parent is None or ("kind" in frame.values and "apiVersion" in frame.values):
            kind = frame.values.get("kind", ("", 0))[0]
            owner = _printable("/".join(part for part in (kind, frame.name) if part)) or "document"
            for candidate in frame.candidates:
                self._settle(candidate, owner)
        else:
            parent.candidates += frame.candidates

    def _look(self, frame: _Frame) -> None:
        text, line = frame.values.get(_IMAGE, ("", 0))
        if text not in _NOTHING:
            required = frame.key in _CONTAINERS and text != _INJECTED
            likely = frame.key in _LIKE_CONTAINERS
            frame.candidates.append(_Candidate(text, line, required, likely))
        if frame.key == _IMAGE:
            joined = _joined({key: value for key, (value, _) in frame.values.items()})
            if joined:
                frame.candidates.append(_Candidate(joined, frame.line, likely=True))

    def _settle(self, candidate: _Candidate, owner: str) -> None:
        text, line = candidate.text, candidate.line
        try:
            reference = parse_reference(text)
        except (NameInvalid, DigestInvalid) as error:
            if candidate.required:
                problem = ConfigError(f"{owner}: {error}", file=self._source, line=line)
                self._findings.problems.append(problem)
                return
        else:
            # `image: logo` of some custom resource is hardly Docker Hub's.
            if candidate.required or candidate.likely or any(mark in text for mark in ":/@"):
                self._findings.images.append(Named(reference, line, owner))
                return
        note = f"{self._source}:{line}: {owner}: image {shorten(text)} is no reference: passed over"
        self._findings.passed_over.append(note)


def _printable(text: str) -> str:
    """It may end on a terminal, and nobody knows who wrote the chart."""
    return "".join(c for c in text[:_OWNER_LIMIT] if c.isprintable())


def _line(mark: Any) -> int:
    """PyYAML's two parsers have a type each for this, and both may have none."""
    return 1 if mark is None else int(mark.line) + 1


def _joined(values: dict[str, str]) -> str:
    """An image in parts, as charts and operators have it; empty where it is none.

    Also an image volume's `image: {reference: ...}`.
    """
    values = {key: value for key, value in values.items() if value not in _NOTHING}
    whole = values.get("reference")
    if whole:
        return whole
    name = values.get("repository")
    if not name:
        return ""
    if "registry" in values:
        name = f"{values['registry']}/{name}"
    tag = f":{values['tag']}" if "tag" in values else ""
    digest = f"@{values['digest']}" if "digest" in values else ""
    return f"{name}{tag}{digest}"


def _translated(error: yaml.YAMLError, text: str, source: str) -> ConfigError:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return ConfigError(f"not valid YAML: {what}", file=source, line=_line(mark))
    if isinstance(error, yaml.reader.ReaderError) and isinstance(error.position, int):
        line = text.count("\n", 0, error.position) + 1
        return ConfigError(f"not valid YAML: {error.reason}", file=source, line=line)
    return ConfigError("not valid YAML", file=source)
