"""The product's commands as processes that are forked, not started: hundreds of them are killed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from ociproxy.cli.main import main
from ociproxy.store.store import Store
from tests.disk.disk import Disk
from tests.images import Image, image, multi_platform
from tests.server import LISTENING, upstream_entry
from tests.stores import put
from tests.upstream import FakeUpstream

PATIENCE = 120.0
"""Seconds that one run may take."""


def some_images(name: str) -> dict[str, Image]:
    """By tag. Two of them share a layer's worth of nothing; one is an index."""
    return {
        "small": image(f"{name} small", layer_size=2000),
        "layers": image(f"{name} layers", layers=3, layer_size=40_000),
        "multi": multi_platform(f"{name} multi", platforms=("linux/amd64", "linux/arm64")),
    }


@contextlib.contextmanager
def upstream_of(images: dict[str, Image]) -> Iterator[str]:
    """The URL of a registry that has them, in a process of its own: so this one has no thread, and
    may be forked."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        logging.disable()  # of clients that were killed
        with FakeUpstream() as upstream:
            for tag, each in images.items():
                upstream.add("app", each, tag=tag)
            os.write(writing, upstream.url.encode())
            signal.pause()
        os._exit(0)
    try:
        yield os.read(reading, 1000).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def is_running(process: int) -> bool:
    """Whether it has not ended, as a zombie or for good."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children_of(process: int) -> set[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return {int(number) for task in tasks for number in task.read_text().split()}


def kill_parent(disk: Disk, process: int, step: int) -> None:
    """Kill a server once its children have made so many changes and flushes, or have ended; return
    when they have."""
    end = time.monotonic() + PATIENCE
    while not (children := children_of(process)):
        assert time.monotonic() < end, "the server begins no child"
        time.sleep(0.01)
    disk.kill_at(0)  # counts from here on
    while disk.steps() < step and any(map(is_running, children)):
        assert time.monotonic() < end, "a child does not end"
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    while any(map(is_running, children)):
        assert time.monotonic() < end, "a child outlives its server"
        time.sleep(0.01)


class Runs:
    """Commands on a store, on a disk, from one upstream."""

    def __init__(self, disk: Disk, folder: Path, url: str, images: dict[str, Image]) -> None:
        self.disk, self.folder, self.url, self.images = disk, folder, url, images
        self.registry = url.partition("://")[2]
        self.config, self.listed = folder / "config.yaml", folder / "images.txt"
        self.config.write_text(yaml.safe_dump({"upstreams": [upstream_entry(url)]}))
        self.capped = folder / "capped.yaml"
        """The same with a store that is too small for all: `multi` has to go."""
        pins = [f"{self.registry}/app:{tag}" for tag in images if tag != "multi"]
        store = {"max_size": 1000, "min_free": 0, "keep_recent": "0s", "pins": pins}
        self.capped.write_text(yaml.safe_dump({"upstreams": [upstream_entry(url)], "store": store}))
        self.listed.write_text("".join(f"{self.registry}/app:{tag}\n" for tag in images))
        self.output = folder / "output"
        self._stores = 0
        self.store = disk.root

    def new_store(self, *, filled: bool = False) -> None:
        """Go on with another store; with `filled` it has all images."""
        self._stores += 1
        self.store = self.disk.root / f"store-{self._stores}"
        if filled:
            store = Store(self.store)
            for tag, each in self.images.items():
                put(store, f"{self.registry}/app:{tag}", each, resolved=time.time())

    def begin(self, command: str, *words: str, output: Path | None = None) -> int:
        """The process. What it prints goes to `output`, else to `self.output`."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        written = os.open(output or self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number in (1, 2):
            os.dup2(written, number)
        code = 70
        try:
            main([command, *words, "--image-path", str(self.store)], standalone_mode=True)
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self, command: str, *words: str, output: Path | None = None) -> int:
        """How it ended: its exit code, or the signal as a negative number."""
        return self.end_of(self.begin(command, *words, output=output))

    def end_of(self, process: int) -> int:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise AssertionError(f"a run does not end; it said:\n{self.said()}")

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def load(self, output: Path | None = None) -> int:
        words = (str(self.listed), "--config-path", str(self.config), "--all-platforms")
        return self.run("load", *words, output=output)

    @contextlib.contextmanager
    def serving(self, config: Path | None = None) -> Iterator[tuple[int, int]]:
        """A server: its process and its port. Killed in the end, where it still runs."""
        self.output.unlink(missing_ok=True)
        where = ("--config-path", str(config or self.config), "--host", "127.0.0.1", "--port", "0")
        process = self.begin("serve", *where)
        try:
            end = time.monotonic() + PATIENCE
            while (found := LISTENING.search(self.said())) is None:
                if time.monotonic() > end or os.waitpid(process, os.WNOHANG)[0]:
                    raise ChildProcessError(self.said())
                time.sleep(0.005)
            yield process, int(found[1])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, 0)

    def reported(self, said: str) -> Sequence[Image]:
        """The images that a load said it has loaded."""
        tags = re.findall(r"^loaded \S+/app:([a-z]+)", said, re.MULTILINE)
        return [self.images[tag] for tag in tags]
