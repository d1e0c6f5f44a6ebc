"""Log lines: `event key=value ...`, as text or as JSON, always on stderr.

A value is quoted, as JSON does, only if it needs to be. A `Secret` prints as asterisks. After
`set_up` a thread writes the lines, so that no caller waits for the reader of a pipe.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import sys
import time
import traceback
from collections import deque
from functools import partial
from threading import Condition, Thread
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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
_PRIORITIES: Final = {
    TRACE: "<7>",
    logging.DEBUG: "<7>",
    logging.INFO: "<6>",
    logging.WARNING: "<4>",
    logging.ERROR: "<3>",
    logging.CRITICAL: "<3>",
}
"""Before a line, these tell systemd's journal how much the line matters: see sd-daemon(3)."""
_QUEUE: Final = 4096
"""Lines that wait to be written; further ones are dropped, and counted."""
_FLUSH_TIME: Final = 1.0
"""Seconds that the end of the process waits for the lines to be written."""
_BATCH: Final = 4096
"""Bytes that are written at once where a line is no longer: the kernel keeps as many in one piece,
so that the lines of several processes do not mix."""
_threshold: int = logging.WARNING
_style: str = "text"
_to_journal: bool = False


def event(level: int, name: str, **fields: object) -> None:
    """Log one event with its fields; a field that is None is left out."""
    if level >= _threshold:
        _write(time.time(), level, name, fields, None)


def failure(name: str, exc: BaseException, **fields: object) -> None:
    """Log an exception that is no `OciProxyError`, with its traceback: a bug of ours."""
    _write(time.time(), logging.ERROR, name, fields, exc)


def enabled(level: int) -> bool:
    return level >= _threshold


def set_up(level: str, style: str) -> None:
    """Log this level and above to stderr, as `text` or `json`. A second call replaces the first."""
    global _threshold, _style, _to_journal, _queued
    _threshold, _style, _to_journal = LEVELS[level], style, _is_journal()
    if not _queued:
        _queued = True
        atexit.register(flush)
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    # Of libraries only warnings and errors are logged: the rest is of no use to the operator.
    root.setLevel(max(LEVELS[level], logging.WARNING))


def _is_journal() -> bool:
    """Whether stderr is systemd's journal: a command's output that goes elsewhere is not."""
    named = os.environ.get("JOURNAL_STREAM")
    if named is None or sys.__stderr__ is None:
        return False
    try:
        found = os.fstat(sys.__stderr__.fileno())
    except (OSError, ValueError):
        return False
    return named == f"{found.st_dev}:{found.st_ino}"


class _Foreign(logging.Handler):
    """Writes what libraries log as lines of ours. Our own events skip `logging`'s records and
    handlers: the log line is a large part of what a cached manifest costs."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        exc = record.exc_info[1] if record.exc_info else None
        _write(record.created, record.levelno, message, {}, exc)


def _write(
    created: float, level: int, name: str, fields: Mapping[str, object], exc: BaseException | None
) -> None:
    line = partial(_line, created, level, name, fields)
    if not _queued or sys.stderr is not sys.__stderr__:
        _put(line(_trace(exc)))
    elif exc is None:
        _writer.add(line(""))
    else:
        # A traceback quotes source files: the thread that may block reads them.
        _writer.add(lambda: line(_trace(exc)))


def _line(created: float, level: int, name: str, fields: Mapping[str, object], trace: str) -> str:
    style = _json if _style == "json" else _text
    text = style(created, _NAMES.get(level, "INFO"), name, fields, trace) + "\n"
    if not _to_journal:
        return text
    priority = _PRIORITIES.get(level, "<6>")
    return "".join(priority + each for each in text.splitlines(keepends=True))


def _trace(exc: BaseException | None) -> str:
    return "".join(traceback.format_exception(exc)).rstrip("\n") if exc else ""


def _put(text: str) -> None:
    """Blocks while the reader of a pipe reads nothing."""
    try:
        if sys.stderr is not sys.__stderr__:
            sys.stderr.write(text)
        elif sys.__stderr__ is not None:
            # Past its buffer, whose lock a thread must not hold when the interpreter ends.
            data = text.encode("utf-8", "backslashreplace")
            while data:
                data = data[os.write(sys.__stderr__.fileno(), data) :]
    except (OSError, ValueError):
        return  # stderr is closed or its reader has gone: the server goes on without a log


class _Writer:
    """A queue of lines, and the thread that writes them, which starts with the first line. A forked
    process has its own."""

    def __init__(self) -> None:
        self._lines: deque[str | Callable[[], str]] = deque()
        self._changed = Condition()
        self._idle = True
        self._dropped = 0
        self._thread: Thread | None = None

    def add(self, line: str | Callable[[], str]) -> None:
        """Never waits for the reader of the log. A function is called by the thread that writes."""
        with self._changed:
            if len(self._lines) >= _QUEUE:
                self._dropped += 1
                return
            self._lines.append(line)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            if self._idle:
                self._idle = False
                self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Return when all is written, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._dropped:
                    self._idle = True
                    self._changed.notify_all()
                    self._changed.wait()
                self._idle = False
                batch = self._take()
            _put(batch if isinstance(batch, str) else batch())

    def _take(self) -> str | Callable[[], str]:
        """Some whole lines; after a time of dropping all there are, and then how many were not
        kept."""
        batch: list[str] = []
        size = 0
        while self._lines:
            first = self._lines[0]
            if not isinstance(first, str):
                if batch:
                    break
                self._lines.popleft()
                return first
            if batch and size + len(first) > _BATCH:
                break
            batch.append(first)
            self._lines.popleft()
            size += len(first)
        if self._dropped and not self._lines:
            fields = {"lines": self._dropped, "reason": "stderr was not read"}
            batch.append(_line(time.time(), logging.WARNING, "log lines dropped", fields, ""))
            self._dropped = 0
        return "".join(batch)


_writer = _Writer()
_queued = False


def _start_again() -> None:
    """In a forked process, which has no threads: the lines of its parent are not its own."""
    global _writer
    _writer = _Writer()


os.register_at_fork(after_in_child=_start_again)


def flush() -> None:
    """Wait until what was logged is written, or for `_FLUSH_TIME`. For a process that ends without
    the interpreter's help."""
    _writer.flush(_FLUSH_TIME)


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
