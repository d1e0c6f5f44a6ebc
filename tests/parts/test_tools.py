"""A tool that is missing may be skipped by a user, never by the machine that decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parts.tools import go_install, require_tool, run


def test_missing_tool_is_skipped_by_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-tool"):
        require_tool("no-such-tool")


def test_missing_tool_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool"):
        require_tool("no-such-tool")


def test_a_program_that_cannot_be_built_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("GOPROXY", "off")
    with pytest.raises(pytest.fail.Exception, match=r"needs Go|go install"):
        go_install("go.example/no-such-program@v1.0.0", tmp_path)


def test_a_failing_command_shows_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit 2 from: ls .*no-such-file"):
        run("ls", tmp_path / "no-such-file")
