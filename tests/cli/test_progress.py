"""What a load shows: bars on a terminal, lines in a pipe, events for a program."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import time

import pytest
from rich.console import Console

from ociproxy.cli.progress import Bars
from ociproxy.cli.terminal import Step
from tests.images import OCI_MANIFEST, Image, content, image
from tests.load.loading import LIMIT, Load, lines_of
from tests.server import ROOT
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(load: Load, *args: str) -> tuple[int, str, str]:
    """Exit code, what the terminal was sent, and standard output."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140", "LINES": "24"}
    with subprocess.Popen(
        load.command(*args),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=ROOT,
        env=environment,
    ) as process:
        os.close(theirs)
        seen = b""
        limit = time.monotonic() + LIMIT
        while time.monotonic() < limit:
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        os.close(ours)
        out, _ = process.communicate(timeout=LIMIT)
    return process.returncode, seen.decode("utf-8", "replace"), out.decode()


def test_terminal_has_a_bar_for_all_and_one_for_each(upstream: FakeUpstream, load: Load) -> None:
    names = []
    for number in range(3):
        upstream.add(f"team/app{number}", image(f"app{number}", layer_size=500_000), tag="v1")
        names.append(f"{upstream.registry}/team/app{number}:v1")
    upstream.fault("/blobs/", Fault(rate=500_000))
    code, seen, out = on_terminal(load, load.write(*names))
    assert (code, out) == (0, "")
    shown = ESCAPES.sub("", seen)
    assert "0/3 images" in shown
    assert re.search(r"\d\.\d/1\.5 MB", shown), "bytes of all images"
    assert re.search(r"[\d.]+ [kM]B/s", shown), "the rate"
    assert re.search(r"00:0\d", shown), "the time left"
    for name in names:
        assert re.search(rf"{re.escape(name)} +\S+ +[\d.]+/5\d\d\.\d kB", shown), name
        assert f"loaded {name}@sha256:" in shown
    assert "3 loaded; 1.5 MB fetched in" in shown


def test_terminal_and_json_are_kept_apart(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    code, _, out = on_terminal(load, load.write(f"{upstream.registry}/team/app:v1"), "--json")
    assert code == 0
    assert [line.partition(",")[0] for line in out.splitlines()] == [
        '{"event": "loaded"',
        '{"event": "done"',
    ]


def test_whole_digests_are_for_those_who_ask_and_for_programs(
    upstream: FakeUpstream, load: Load
) -> None:
    made = upstream.add("team/app", image("app"), tag="v1")
    listed = load.write(f"{upstream.registry}/team/app:v1")
    assert f"@{made.digest[:19]} " in load.run(listed).stderr
    assert f"@{made.digest} " in load.run(listed, "-v").stderr
    (event,) = load.run(listed, "--json").events("loaded")
    assert event["digest"] == made.digest


def test_an_error_is_an_event_too(load: Load) -> None:
    bad = load.run(load.write("a b"), "--json")
    assert bad.code == 2
    (event,) = bad.events()
    assert (event["event"], event["error"], event["exitCode"]) == ("error", "ImageListInvalid", 2)
    assert "images.txt:1: after the reference" in event["reason"]


def test_pipe_has_a_line_an_image_and_no_escapes(
    upstream: FakeUpstream, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # is no terminal
    long = "team/" + "long-name-" * 20 + "x"
    upstream.add(long, image("app"), tag="v1")
    done = load.run(load.write(f"{upstream.registry}/{long}:v1", f"{upstream.registry}/gone:v1"))
    assert done.code == 3
    assert "\x1b" not in done.stderr
    lines = sorted(line.partition(" ")[0] for line in done.stderr.splitlines())
    assert lines == ["1", "failed", "loaded"]
    assert f"{upstream.registry}/{long}:v1@sha256:" in done.stderr


def test_reader_that_goes_away_is_no_traceback(upstream: FakeUpstream, load: Load) -> None:
    upstream.add("team/app", image("app"), tag="v1")
    command = load.command(load.write(f"{upstream.registry}/team/app:v1"), "--json")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.wait(LIMIT)
    assert "Traceback" not in err, err
    assert load.complete() == {f"{upstream.registry}/team/app:v1"}


def test_failures_are_written_though_nobody_reads_what_is_said(
    upstream: FakeUpstream, load: Load
) -> None:
    names = [f"{upstream.registry}/gone{number}:v1" for number in range(6)]
    failed = load.folder / "failed.txt"
    ours, theirs = os.pipe()
    os.close(ours)
    command = load.command(load.write(*names), "--jobs", "1", "--failures", str(failed))
    done = subprocess.run(command, stderr=theirs, cwd=ROOT, timeout=LIMIT, check=False)
    os.close(theirs)
    assert done.returncode != 0
    assert [line.split()[0] for line in lines_of(failed)] == names


def test_a_reference_is_shown_as_it_is(upstream: FakeUpstream, load: Load) -> None:
    """rich makes a picture of `:fire:` and takes `[...]` for a style."""
    name = f"{upstream.registry}/gone:fire"
    _, seen, _ = on_terminal(load, load.write(name))
    assert f"manifest {name}: unknown" in ESCAPES.sub("", seen)


def test_a_bar_has_the_name_as_it_is() -> None:
    shown = io.StringIO()
    bars = Bars(Console(file=shown, force_terminal=True, width=140))
    with bars.moving_beside(lambda: Step("all", "[fe80::1]:5000/team/app:v1", 1, 2)):
        limit = time.monotonic() + LIMIT
        while "team/app" not in shown.getvalue() and time.monotonic() < limit:
            time.sleep(0.01)
    assert "[fe80::1]:5000/team/app:v1" in ESCAPES.sub("", shown.getvalue())


def test_words_of_an_upstream_do_not_reach_the_terminal(upstream: FakeUpstream, load: Load) -> None:
    raw = json.dumps({"schemaVersion": 2, "mediaType": "text/\x1b[31mred\r\n"}).encode()
    upstream.add("team/app", Image(content(raw, OCI_MANIFEST)), tag="v1")
    done = load.run(load.write(f"{upstream.registry}/team/app:v1"))
    assert done.code == 3
    assert "text/?[31mred" in done.stderr
    assert all(line.isprintable() for line in done.stderr.splitlines())
