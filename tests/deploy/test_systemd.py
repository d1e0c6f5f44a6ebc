"""The systemd unit: systemd reads it without a complaint and finds it closed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from ociproxy.config.local_settings import Serve
from ociproxy.serve.ending import MARGIN
from tests.parts.tools import require_tool, run

UNIT = Path(__file__).parents[2] / "deploy/systemd/ociproxy.service"
EXPOSURE = 20
"""Of systemd's 100, tenths of what it prints. A service on the network cannot be at 0."""


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """As installed, with the program where this checkout has it."""
    text = UNIT.read_text(encoding="utf-8")
    program = Path(sys.executable).with_name("ociproxy")
    changed = text.replace("ExecStart=/opt/ociproxy/bin/ociproxy ", f"ExecStart={program} ")
    assert changed != text
    path = tmp_path / UNIT.name
    path.write_text(changed, encoding="utf-8")
    return path


def test_systemd_understands_each_line_of_the_unit(unit: Path) -> None:
    # A key that systemd does not know is a line on stderr, and no failure.
    done = run(require_tool("systemd-analyze"), "verify", unit, check=False)
    said = done.stderr.decode()
    assert (done.returncode, [line for line in said.splitlines() if unit.name in line]) == (0, [])


def test_the_unit_leaves_the_service_little(unit: Path) -> None:
    analyze = require_tool("systemd-analyze")
    done = run(analyze, "security", "--offline=true", f"--threshold={EXPOSURE}", unit, check=False)
    assert done.returncode == 0, done.stdout.decode()


def test_the_unit_waits_as_long_as_a_stop_may_take() -> None:
    found = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    assert int(found[1]) > Serve().shutdown_grace + MARGIN
