"""Log lines: one event, one line, whatever the facts are; and no secret in any."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ociproxy import log
from ociproxy.config.settings import Auth, Secret

HOSTILE = [
    "two\nlines",
    "carriage\rreturn",
    "\r\n2026-01-01T00:00:00.000Z ERROR forged=line",
    "\x1b[31mred\x1b[0m",
    "nul\x00 bell\x07 del\x7f",
    "next\x85line\u2028separator\u2029",
    "bidi\u202eoverride",
    "surrogate\ud800",
    'quote" back\\slash',
    "a=b",
    "",
]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture(autouse=True)
def restored_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`set_up` is for the whole process: put back what it changes."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.setattr(log, "_threshold", logging.WARNING)
    monkeypatch.setattr(log, "_style", "text")
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_has_time_level_event_and_facts(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("info", "text")
    log.event(logging.INFO, "filled", digest="sha256:ab", bytes=7, seconds=0.12345, none=None)
    moment, rest = capsys.readouterr().err.rstrip("\n").split(" ", 1)
    assert TIME.fullmatch(moment)
    assert rest == "INFO  filled digest=sha256:ab bytes=7 seconds=0.123"


@pytest.mark.parametrize("text", ["", " ", "=", "a =b", "x= y", "= = ", "\\", "'", "é", "\ud800"])
def test_one_fact_that_needs_quotes_leaves_the_others_without(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    log.set_up("info", "text")
    log.event(logging.INFO, "request", status=200, path=text, seconds=1.0)
    line = capsys.readouterr().err.rstrip("\n")
    assert line.endswith(f"request status=200 path={json.dumps(text)} seconds=1.000")


def test_a_json_line_keeps_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("info", "json")
    log.event(logging.WARNING, "filled", bytes=7, whole=True, path=Secret("x"), none=None)
    document = json.loads(capsys.readouterr().err)
    assert TIME.fullmatch(document.pop("time"))
    assert document == {
        "level": "warn",
        "event": "filled",
        "bytes": 7,
        "whole": True,
        "path": "********",
    }


@pytest.mark.parametrize("style", ["text", "json"])
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_in_its_line_and_can_be_read_back(
    capsys: pytest.CaptureFixture[str], style: str, text: str
) -> None:
    log.set_up("info", style)
    log.event(logging.INFO, "request", path=text)
    output = capsys.readouterr().err
    line = output.removesuffix("\n")
    assert line.isascii()
    assert line.isprintable()
    if style == "json":
        assert json.loads(line)["path"] == text
    else:
        assert json.loads(line.partition("path=")[2]) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_library_that_logs_hostile_text_gets_one_line(
    capsys: pytest.CaptureFixture[str], text: str
) -> None:
    log.set_up("info", "text")
    logging.getLogger("library").warning("said %s", text)
    output = capsys.readouterr().err
    assert output.endswith("\n")
    assert output.removesuffix("\n").isprintable()


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_secret_is_masked_wherever_it_turns_up(
    capsys: pytest.CaptureFixture[str], style: str
) -> None:
    log.set_up("trace", style)
    secret = Secret("wonderland")
    log.event(logging.INFO, "login", password=secret, auth=Auth(user="alice", password=secret))
    try:
        raise ValueError(secret)
    except ValueError as exc:
        log.failure("broken", exc, password=secret)
    output = capsys.readouterr().err
    assert "wonderland" not in output
    assert output.count("********") >= 3


def test_a_bug_comes_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for style in ("text", "json"):
        log.set_up("error", style)
        try:
            raise ZeroDivisionError("found it")
        except ZeroDivisionError as exc:
            log.failure("broken", exc)
        assert "ZeroDivisionError: found it" in capsys.readouterr().err


def test_what_a_bug_says_looks_like_no_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Its text may be a client's."""
    log.set_up("error", "text")
    forged = "2026-01-01T00:00:00.000Z INFO  request user=admin"
    try:
        raise ValueError(f"no tag:\r\n{forged}\u2028{forged}\x1b[2J")
    except ValueError as exc:
        log.failure("broken", exc)
    first, *rest = capsys.readouterr().err.rstrip("\n").split("\n")
    assert first.endswith("ERROR broken")
    assert len(rest) >= 3
    assert all(line.startswith("  ") and line.isprintable() for line in rest)


@pytest.mark.parametrize("level", log.LEVELS)
def test_only_what_is_at_the_level_or_above_is_logged(
    capsys: pytest.CaptureFixture[str], level: str
) -> None:
    log.set_up(level, "text")
    for name, number in log.LEVELS.items():
        log.event(number, name)
    names = [line.split()[-1] for line in capsys.readouterr().err.splitlines()]
    wanted = [name for name, number in log.LEVELS.items() if number >= log.LEVELS[level]]
    assert names == wanted
    assert log.enabled(log.LEVELS[level])
    assert not log.enabled(log.LEVELS[level] - 1)


def test_setting_up_again_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up("info", "json")
    log.set_up("info", "text")
    log.event(logging.INFO, "once")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_closed_stderr_ends_the_log_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        log.event(logging.ERROR, "unheard")
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            broken.close()


IN_THE_LOOP = """
import asyncio, json
from ociproxy import log
from tests.watched import watch

async def fail():
    try:
        json.loads("no JSON")
    except ValueError as exc:
        log.failure("broken", exc)
    log.event(log.LEVELS["error"], "next")

log.set_up("error", "text")
watch()
asyncio.run(fail())
"""


def test_a_traceback_is_made_outside_the_event_loop() -> None:
    """It quotes source files, which are on a disk."""
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_LOOP], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "JSONDecodeError: Expecting value" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("ERROR next")


TO_THE_JOURNAL = """
import logging
from ociproxy import log

log.set_up("info", "text")
log.event(logging.WARNING, "before")
try:
    raise RuntimeError
except RuntimeError as exc:
    log.failure("broken", exc)
"""


@pytest.mark.parametrize("is_journal", [True, False])
def test_the_journal_is_told_how_much_a_line_matters(tmp_path: Path, is_journal: bool) -> None:
    """`journalctl --priority=warning` finds warnings; no other reader sees a prefix."""
    path = tmp_path / "log"
    with path.open("wb") as journal:
        at = os.fstat(journal.fileno())
        named = f"{at.st_dev}:{at.st_ino if is_journal else at.st_ino + 1}"
        subprocess.run(
            [sys.executable, "-c", TO_THE_JOURNAL],
            stderr=journal,
            env={**os.environ, "JOURNAL_STREAM": named},
            check=True,
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) > 3
    starts = [line[:3] for line in lines]
    assert starts == ["<4>", *["<3>"] * (len(lines) - 1)] if is_journal else "<" not in str(starts)
