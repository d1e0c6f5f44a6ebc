"""The images that Kubernetes manifests and rendered Helm charts name.

The YAML is read as a stream of events: no tree is built and no alias is expanded, so that a hostile
file costs little. The value of each key `image` is looked at. In a container it must be a
reference; elsewhere it is taken if it looks like one. The id of an image on a node, as `kubectl
get pods -o yaml` shows it, is passed over. Text in which images often hide (arguments, environment,
ConfigMaps) is searched, and what is found there is reported, not taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from ociproxy.config.yaml import line_of_mark, translated
from ociproxy.errors import ConfigError, DigestInvalid, NameInvalid, shorten
from ociproxy.load.imagelist import parse_reference
from ociproxy.load.mentions import mentioned
from ociproxy.oci.reference import Reference, is_image_id

SIZE_LIMIT: Final = 64 * 1024 * 1024
"""Bytes of one file: a large chart with its resource definitions has ten million."""

_IMAGE: Final = "image"
_OWNER_LIMIT: Final = 200
"""Characters of `kind/name` in a message: Kubernetes allows 253 for the name, mostly far less."""
_DEPTH_LIMIT: Final = 256
"""Levels of nesting: the parser's own work grows with the square of the depth."""
_CONTAINERS: Final = frozenset({"containers", "initContainers", "ephemeralContainers"})
_LIKE_CONTAINERS: Final = frozenset({"container", "script", "sidecars", "steps"})
"""Keys where workflow engines have containers. Their images may be templates, not references."""
_ARGUMENTS: Final = frozenset({"args", "command"})
_ENVIRONMENT: Final = "env"
_DATA: Final = "data"
_CONFIG_MAP: Final = "ConfigMap"
_TEXTS: Final = (_CONFIG_MAP, "Secret")
"""Kinds whose values are text, whatever they are called."""
_BLOCK_STYLES: Final = ("|", ">")
"""Of a scalar: its text begins on the line after the mark."""
_INJECTED: Final = "auto"
"""Istio replaces this image of a container when the pod starts."""
_NOTHING: Final = frozenset({"", "~", "null"})
# The C parser is ten times as fast; not every build of PyYAML has it.
_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Named:
    """An image, the line that names it, and the object that wants it, such as `Deployment/web`."""

    reference: Reference
    line: int
    owner: str


@dataclass(slots=True)
class Findings:
    """`passed_over` has a line for each `image` that is no reference and was not taken."""

    images: list[Named] = field(default_factory=list)
    mentions: list[Named] = field(default_factory=list)
    """References in text that only looks like it names an image."""
    problems: list[ConfigError] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Candidate:
    """A value of `image`. It must be a reference if `required`; if `likely`, one word is enough."""

    text: str
    line: int
    required: bool = False
    likely: bool = False


@dataclass(slots=True)
class _Mention:
    """A reference in text below the key `where`."""

    reference: Reference
    line: int
    where: str


@dataclass(slots=True)
class _Frame:
    """An open mapping or list and its key in the parent; `pending` is a key whose value is next,
    or in a list the item before."""

    key: str
    mapping: bool
    line: int
    pending: str | None = None
    values: dict[str, tuple[str, int]] = field(default_factory=dict)
    name: str = ""
    candidates: list[_Candidate] = field(default_factory=list)
    mentions: list[_Mention] = field(default_factory=list)


def find_images(text: str, source: str) -> Findings:
    """Every image of a file, which may have several documents, in the order of the file."""
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
        """Take in one event. False if the rest of the file must not be read."""
        if isinstance(event, yaml.ScalarEvent):
            below = event.style in _BLOCK_STYLES
            self._scalar(event.value, line_of_mark(event.start_mark) + below)
        elif isinstance(event, yaml.AliasEvent):
            self._scalar("", line_of_mark(event.start_mark))
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            mapping = isinstance(event, yaml.MappingStartEvent)
            line = line_of_mark(event.start_mark)
            if len(self._stack) == _DEPTH_LIMIT:
                reason = f"nested deeper than {_DEPTH_LIMIT} levels"
                self._findings.problems.append(ConfigError(reason, file=self._source, line=line))
                return False
            self._stack.append(_Frame(self._next_key(), mapping, line))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._end(self._stack.pop())
        return True

    def _next_key(self) -> str:
        """The key of the value that begins now. Items of a list have the key of the list."""
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
        if not self._stack:
            return
        frame = self._stack[-1]
        if not frame.mapping:
            if frame.key in _ARGUMENTS:
                self._search(frame, text, line, frame.pending or "")
                frame.pending = text
            return
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
            # `image` of a ConfigMap is text as its other values are: a mention.
            for candidate in () if kind in _TEXTS else frame.candidates:
                self._settle(candidate, owner)
            for each in frame.mentions:
                if each.where != _DATA or kind == _CONFIG_MAP:
                    place = f"{owner}, {each.where}"
                    self._findings.mentions.append(Named(each.reference, each.line, place))
        else:
            parent.candidates += frame.candidates
            parent.mentions += frame.mentions

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
        if frame.key == _ENVIRONMENT and "value" in frame.values:
            text, line = frame.values["value"]
            self._search(frame, text, line, frame.values.get("name", ("", 0))[0])
        if frame.key == _DATA:
            for key, (text, line) in frame.values.items():
                self._search(frame, text, line, key)

    def _search(self, frame: _Frame, text: str, line: int, hint: str) -> None:
        for reference, offset in mentioned(text, hint):
            frame.mentions.append(_Mention(reference, line + offset, frame.key))

    def _settle(self, candidate: _Candidate, owner: str) -> None:
        text, line = candidate.text, candidate.line
        if is_image_id(text):
            self._pass_over(candidate, owner, "the id of an image on a node, which has no name")
            return
        try:
            reference = parse_reference(text)
        except (NameInvalid, DigestInvalid) as error:
            if candidate.required:
                problem = ConfigError(f"{owner}: {error}", file=self._source, line=line)
                self._findings.problems.append(problem)
                return
        else:
            # `image: logo` in a custom resource is hardly an image of Docker Hub.
            if candidate.required or candidate.likely or any(mark in text for mark in ":/@"):
                self._findings.images.append(Named(reference, line, owner))
                return
        self._pass_over(candidate, owner, "no reference")

    def _pass_over(self, candidate: _Candidate, owner: str, what: str) -> None:
        place = f"{self._source}:{candidate.line}: {owner}"
        note = f"{place}: image {shorten(candidate.text)} is {what}: passed over"
        self._findings.passed_over.append(note)


def _printable(text: str) -> str:
    """Without control characters: the chart may be hostile, and the text may reach a terminal."""
    return "".join(c for c in text[:_OWNER_LIMIT] if c.isprintable())


def _joined(values: dict[str, str]) -> str:
    """The image of a chart's `{registry, repository, tag, digest}` or of an image volume's
    `{reference}`; empty if the mapping is neither."""
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
        return translated(error, source)
    if isinstance(error, yaml.reader.ReaderError) and isinstance(error.position, int):
        line = text.count("\n", 0, error.position) + 1
        return ConfigError(f"not valid YAML: {error.reason}", file=source, line=line)
    return ConfigError("not valid YAML", file=source)
