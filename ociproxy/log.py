"""Log lines: `event key=value ...`, as text or as JSON, always on stderr.

Values are written as they are unless they need quotes. Secrets are never passed here: `Secret`
prints as asterisks wherever it turns up.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Final

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
_LOGGER: Final = logging.getLogger("ociproxy")


def event(level: int, name: str, **fields: object) -> None:
    """Log one event with its facts; a fact that is None is left out."""
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, name, extra={"fields": fields})


def failure(name: str, exc: BaseException, **fields: object) -> None:
    """Log a bug, with its traceback: what no domain error describes."""
    _LOGGER.error(name, exc_info=exc, extra={"fields": fields})


def enabled(level: int) -> bool:
    return _LOGGER.isEnabledFor(level)


def set_up(level: str, style: str) -> None:
    """Send everything of this level and above to stderr, in `text` or `json`; may be called
    again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if style == "json" else _Text())
    # What no formatter here prints must not be collected for each line (logging, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # documented, though named as if it were not
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries speak up when something is wrong; their chatter is not the operator's.
    root.setLevel(max(LEVELS[level], logging.WARNING))
    _LOGGER.setLevel(LEVELS[level])


def _time(created: float) -> str:
    seconds = int(created)
    return f"{_whole_second(seconds)}.{int((created - seconds) * 1000):03d}Z"


_last: tuple[int, str] = (0, "")


def _whole_second(seconds: int) -> str:
    # strftime is most of the cost of a log line, and most lines share their second with the one
    # before.
    global _last
    last = _last
    if last[0] != seconds:
        last = _last = (seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)))
    return last[1]


# Printable ASCII but for space, quotes, `=` and backslash: what needs no quotes.
_PLAIN: Final = re.compile(r"[!#-&(-<>-\[\]-~]+")


def _text_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = value if isinstance(value, str) else str(value)
    return text if _PLAIN.fullmatch(text) else _quoted(text)


def _quoted(text: str) -> str:
    # JSON escapes every control character but this one.
    return json.dumps(text).replace("\x7f", "\\u007f")


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        parts = [_time(record.created), f"{_NAMES.get(record.levelno, 'INFO'):<5}"]
        parts.append(_one_line(record.getMessage()))
        parts += [f"{k}={_text_value(v)}" for k, v in fields.items() if v is not None]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        document: dict[str, object] = {
            "time": _time(record.created),
            "level": _NAMES.get(record.levelno, "INFO").lower(),
            "event": record.getMessage(),
        }
        for key, value in fields.items():
            if value is not None:
                document[key] = value if isinstance(value, bool | int | float) else str(value)
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document)


def _one_line(text: str) -> str:
    return text if text.isprintable() else _quoted(text)
