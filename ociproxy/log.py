"""Log lines: `event key=value ...`, as text or as JSON, always on stderr.

A value is quoted, as JSON does, only if it needs to be. A `Secret` prints as asterisks.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

TRACE: Final = 5
LEVELS: Final = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_NAMES: Final = {
    TRACE: "TRACE",
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARN",
    logging.ERROR: "ERROR",
    logging.CRITICAL: "ERROR",
}
_threshold: int = logging.WARNING
_style: str = "text"


def event(level: int, name: str, **fields: object) -> None:
    """Log one event with its fields; a field that is None is left out."""
    if level >= _threshold:
        _write(time.time(), level, name, fields, "")


def failure(name: str, exc: BaseException, **fields: object) -> None:
    """Log an exception that is no `OciProxyError`, with its traceback: a bug of ours."""
    trace = "".join(traceback.format_exception(exc)).rstrip("\n")
    _write(time.time(), logging.ERROR, name, fields, trace)


def enabled(level: int) -> bool:
    return level >= _threshold


def set_up(level: str, style: str) -> None:
    """Log this level and above to stderr, as `text` or `json`. A second call replaces the first."""
    global _threshold, _style
    _threshold, _style = LEVELS[level], style
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    # Of libraries only warnings and errors are logged: the rest is of no use to the operator.
    root.setLevel(max(LEVELS[level], logging.WARNING))


class _Foreign(logging.Handler):
    """Writes what libraries log as lines of ours. Our own events skip `logging`'s records and
    handlers: the log line is a large part of what a cached manifest costs."""

    def emit(self, record: logging.LogRecord) -> None:
        trace = ""
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        _write(record.created, record.levelno, message, {}, trace)


def _write(created: float, level: int, name: str, fields: Mapping[str, object], trace: str) -> None:
    line = _json if _style == "json" else _text
    try:
        # One write for a line, so that lines of several threads and processes do not mix.
        sys.stderr.write(line(created, _NAMES.get(level, "INFO"), name, fields, trace) + "\n")
    except (OSError, ValueError):
        return  # stderr is closed or its reader has gone: the server goes on without a log


def _time(created: float) -> str:
    seconds = int(created)
    return f"{_whole_second(seconds)}.{int((created - seconds) * 1000):03d}Z"


_last: tuple[int, str] = (0, "")


def _whole_second(seconds: int) -> str:
    # strftime is most of the cost of a log line, and most lines have the second of the last one.
    global _last
    last = _last
    if last[0] != seconds:
        last = _last = (seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)))
    return last[1]


# A value that needs no quotes: printable ASCII without space, `"`, `'`, `=` and backslash.
_PLAIN: Final = re.compile(r"[!#-&(-<>-\[\]-~]+")
_PLAIN_BYTES: Final = bytes(code for code in range(128) if _PLAIN.fullmatch(chr(code)))


def _facts(fields: Mapping[str, object]) -> str:
    """`key=value ` for each field, the space included."""
    facts = [
        f"{key}={value:.3f} " if value.__class__ is float else f"{key}={value} "
        for key, value in fields.items()
        if value is not None
    ]
    line = "".join(facts)
    # Most lines need no quotes at all, which one test of the whole line tells: each field has one
    # `=` and one space, no other character needs quotes, and no value is empty.
    standing_out = line.encode("ascii", "backslashreplace").translate(None, _PLAIN_BYTES)
    if standing_out == b"= " * len(facts) and "= " not in line:
        return line
    return "".join(f"{key}={_value(v)} " for key, v in fields.items() if v is not None)


def _value(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else _quoted(text)


def _quoted(text: str) -> str:
    # json.dumps escapes every control character except DEL.
    return json.dumps(text).replace("\x7f", "\\u007f")


def _text(created: float, level: str, name: str, fields: Mapping[str, object], trace: str) -> str:
    line = f"{_time(created)} {level:<5} {_one_line(name)} {_facts(fields)}"[:-1]
    if not trace:
        return line
    # An exception may quote hostile text: indented, no line of it can pass for a line of ours.
    return "\n".join([line, *(f"  {_one_line(each)}" for each in trace.splitlines())])


def _json(created: float, level: str, name: str, fields: Mapping[str, object], trace: str) -> str:
    document: dict[str, object] = {"time": _time(created), "level": level.lower(), "event": name}
    for key, value in fields.items():
        if value is not None:
            document[key] = value if isinstance(value, bool | int | float) else str(value)
    if trace:
        document["traceback"] = trace
    return json.dumps(document)


def _one_line(text: str) -> str:
    return text if text.isprintable() else _quoted(text)
