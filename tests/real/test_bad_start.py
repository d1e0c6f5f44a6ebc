"""A server that cannot start says why in one line, with the exit code that scripts rely on."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ociproxy.store.store import Store
from tests.parts.tools import read_only, require_root, run
from tests.server import PROGRAM, ROOT

USAGE, STORE = 2, 4


def serve(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
    command = [PROGRAM, "serve", "--host", "127.0.0.1", *words]
    return run(*command, check=False, cwd=ROOT)


def as_nobody(*words: str) -> subprocess.CompletedProcess[bytes]:
    """With all it needs imported before: nobody may not be allowed to read the checkout."""
    code = "import os, sys, encodings.utf_8_sig; from ociproxy.cli.main import main;"
    code += "from ociproxy.cli import diff_command, export_command, import_command, list_command;"
    code += "from ociproxy.cli import load_command, serve_command;"
    code += "os.setgroups([]); os.setgid(65534); os.setuid(65534); main(sys.argv[1:])"
    # Nor to leave there what coverage has measured.
    env = {"COVERAGE_PROCESS_CONFIG": ""}
    return run(sys.executable, "-c", code, *words, env=env, check=False, cwd=ROOT)


def assert_one_line(done: subprocess.CompletedProcess[bytes], code: int, *parts: str) -> None:
    said = done.stderr.decode()
    assert done.returncode == code, said
    assert len(said.splitlines()) == 1, said
    for part in parts:
        assert part in said


def test_a_store_below_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    store = tmp_path / "file" / "store"
    hint = "say a folder with --image-path"
    assert_one_line(serve("--port", "0", "--image-path", store), STORE, str(store), hint)


def test_a_store_that_is_a_regular_file(tmp_path: Path) -> None:
    store = tmp_path / "file"
    store.write_text("no folder", encoding="utf-8")
    hint = "say a folder with --image-path"
    assert_one_line(serve("--port", "0", "--image-path", store), STORE, str(store), hint)
    assert store.read_text(encoding="utf-8") == "no folder"


def test_a_store_that_the_unit_keeps_from_the_service(tmp_path: Path) -> None:
    words = ("serve", "--port", "0", "--image-path", tmp_path / "store")
    with read_only(tmp_path):
        done = run(PROGRAM, *words, env={"INVOCATION_ID": "1"}, check=False, cwd=ROOT, limit=60)
    assert_one_line(done, STORE, "read-only file system; the unit needs a line ReadWritePaths=")


def test_a_store_where_nothing_can_be_made() -> None:
    # /proc refuses even root.
    store = "/proc/ociproxy-store"
    assert_one_line(serve("--port", "0", "--image-path", store), STORE, store)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = serve("--port", port, "--image-path", tmp_path / "store")
    assert_one_line(done, USAGE, port)


def test_an_address_that_is_not_ours(tmp_path: Path) -> None:
    done = serve("--host", "192.0.2.1", "--port", "0", "--image-path", tmp_path / "store")
    assert_one_line(done, USAGE, "cannot listen on 192.0.2.1:0: no address of this machine")


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("serve:\n  prot: 80\n", 2, "serve.prot"),
        ("upstreams:\n- name: 'no spaces'\n", 2, "upstreams[0].name"),
        ("- name: quay.io\n- name: quay.io\n", 2, "quay.io"),
        ("serve:\n  port: eighty\n", 2, "serve.port"),
        ("serve: [\n", 2, ""),
        ("- name: quay.io\n  tls: {ca: /no/such/file}\n", 2, "/no/such/file"),
    ],
)
def test_a_config_file_that_is_wrong(text: str, line: int, part: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    done = serve("--port", "0", "--image-path", tmp_path / "store", "--config-path", config)
    assert_one_line(done, USAGE, f"{config}:{line}", part)
    assert not (tmp_path / "store").exists()


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    done = serve("--port", "0", "--image-path", tmp_path / "store", "--config-path", config)
    assert_one_line(done, USAGE, str(config))


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--image-path", "{closed}/store"],
        ["export", "{open}/a.tar", "--image-path", "{closed}/store"],
        ["diff", "{closed}/store", "{closed}/store"],
        ["load", "{list}", "--image-path", "{closed}/store"],
        ["import", "{list}", "--image-path", "{closed}/store"],
        ["serve", "--port", "0", "--image-path", "{closed}/store"],
    ],
    ids=lambda words: words[0],
)
def test_a_store_in_somebody_else_s_folder(words: list[str]) -> None:
    require_root()
    with tempfile.TemporaryDirectory() as folder:
        places = {"open": Path(folder), "closed": Path(folder, "root"), "list": Path(folder, "l")}
        places["open"].chmod(0o755)
        places["list"].write_text("nginx\n", encoding="utf-8")
        Store(places["closed"] / "store")
        places["closed"].chmod(0o700)
        done = as_nobody(*(word.format_map(places) for word in words))
    assert_one_line(done, STORE, str(places["closed"] / "store"), "permission denied", "run as")


@pytest.mark.parametrize("words", [["--port", "eighty"], ["--no-such-option"], ["argument"]])
def test_wrong_usage(words: list[str], tmp_path: Path) -> None:
    done = serve("--image-path", tmp_path / "store", *words)
    assert done.returncode == USAGE
    assert b"Traceback" not in done.stderr
    assert words[-1].encode() in done.stderr
