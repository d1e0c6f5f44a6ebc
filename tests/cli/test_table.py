"""Tables on terminals of different widths, and in a pipe."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from tests.cli.test_progress import ESCAPES
from tests.images import image
from tests.load.loading import LIMIT, Load
from tests.server import ROOT
from tests.upstream import FakeUpstream

REFERENCE = "registry.example.com/platform-team/observability/collector:v1.2.3-alpine"
PLATFORMS = "linux/amd64,linux/arm64,linux/arm/v7,linux/ppc64le,linux/s390x"
PROGRAM = f"""
from ociproxy.cli.table import print_table
print_table(
    ("REFERENCE", "DIGEST", "PLATFORMS", "SIZE", "COMPLETE", "RESOLVED", "LAST USED"),
    [
        ("{REFERENCE}", "sha256:0123456789ab", "{PLATFORMS}", "169.2 MB", "yes",
         "2026-11-29T06:00:00Z", "2026-11-29T06:00:00Z"),
        ("docker.io/library/nginx:1.27", "sha256:0123456789ab", "linux/amd64", "1.0 GB",
         "not linux/amd64", "2026-11-29T06:00:00Z", "2026-11-29T06:00:00Z"),
    ],
    numbers=("SIZE",),
    spare=("DIGEST", "RESOLVED", "LAST USED"),
    folding=("PLATFORMS", "COMPLETE"),
)
"""


def shown(columns: int, *command: str) -> list[str]:
    """The lines that a terminal of so many columns gets as standard output."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, cwd=ROOT, env=environment
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        process.wait(LIMIT)
    os.close(ours)
    assert process.returncode == 0
    return ESCAPES.sub("", seen.decode()).splitlines()


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 110, 140, 180, 250])
def test_a_terminal_cuts_no_reference_number_or_unit(columns: int) -> None:
    lines = shown(columns, sys.executable, "-c", PROGRAM)
    text = "\n".join(lines)
    for whole in (REFERENCE, "nginx:1.27", "169.2 MB", "1.0 GB", "not linux/amd64"):
        assert whole in text
    for platform in PLATFORMS.split(","):
        assert platform in text
    head = lines[0] + lines[1]
    assert "SIZE" in head
    assert "COMPLETE" in head
    assert ("DIGEST" in head) == (columns >= 250)
    assert all(len(line) <= max(columns, len(REFERENCE)) for line in lines)


def test_a_pipe_has_one_line_a_row_with_all_columns() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, "COLUMNS": "40", "FORCE_COLOR": "1"},
    )
    assert "\x1b" not in done.stdout
    head, first, _ = done.stdout.splitlines()
    assert head.split() == [
        *("REFERENCE", "DIGEST", "PLATFORMS", "SIZE", "COMPLETE", "RESOLVED", "LAST", "USED")
    ]
    assert f"{PLATFORMS}  169.2 MB  yes" in first


def test_list_and_plan_at_80_columns(upstream: FakeUpstream, load: Load) -> None:
    name = "platform-team/observability/collector"
    upstream.add(name, image("app", layer_size=50_000), tag="v1.2.3-alpine")
    reference = f"{upstream.registry}/{name}:v1.2.3-alpine"
    listed = load.write(reference)
    plan = shown(80, *load.command(listed, "--plan"))
    assert load.run(listed).code == 0
    store = ["--image-path", str(load.store)]
    cached = shown(80, sys.executable, "-m", "ociproxy", "list", *store)
    for lines in (plan[:-1], cached):
        assert any(reference in line for line in lines)
        assert re.search(r" 6[0-9.]+ kB", "\n".join(lines))
        assert all(len(line) <= 80 for line in lines)
    assert any(" yes" in line for line in cached)
