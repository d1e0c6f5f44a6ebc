"""A server that cannot start says why in one line, with the exit code that scripts rely on."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts.tools import run
from tests.server import ROOT

USAGE, STORE = 2, 4


def serve(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ociproxy", "serve", "--host", "127.0.0.1", *words]
    return run(*command, check=False, cwd=ROOT, limit=20)


def assert_one_line(done: subprocess.CompletedProcess[bytes], code: int, *parts: str) -> None:
    said = done.stderr.decode()
    assert done.returncode == code, said
    assert len(said.splitlines()) == 1, said
    for part in parts:
        assert part in said


def test_a_store_below_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    store = tmp_path / "file" / "store"
    assert_one_line(serve("--port", "0", "--image-path", store), STORE, str(store))


def test_a_store_that_is_a_regular_file(tmp_path: Path) -> None:
    store = tmp_path / "file"
    store.write_text("no folder", encoding="utf-8")
    assert_one_line(serve("--port", "0", "--image-path", store), STORE, str(store))
    assert store.read_text(encoding="utf-8") == "no folder"


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
    assert_one_line(done, USAGE, "192.0.2.1")


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


@pytest.mark.parametrize("words", [["--port", "eighty"], ["--no-such-option"], ["argument"]])
def test_wrong_usage(words: list[str], tmp_path: Path) -> None:
    done = serve("--image-path", tmp_path / "store", *words)
    assert done.returncode == USAGE
    assert b"Traceback" not in done.stderr
    assert words[-1].encode() in done.stderr
