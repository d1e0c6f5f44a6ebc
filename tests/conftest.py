"""Fixtures every test may use. The environment of a test says nothing to the product."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ociproxy import log
from tests.load.loading import Load
from tests.server import Mirror
from tests.upstream import FakeUpstream
from tests.watched import watcher

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SETTINGS = (
    "DOCKER_CONFIG",
    "REGISTRY_AUTH_FILE",
    "NETRC",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",  # requests puts these two above what the code asks for
    "CURL_CA_BUNDLE",
    "XDG_CONFIG_HOME",
    "XDG_RUNTIME_DIR",
)


# Slow is a busy machine, and `timeout` in pyproject.toml is the bound.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

# What runs in the background of a shell ignores SIGINT, and so would every process it starts: the
# tests interrupt some.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No settings, credentials or proxies of whoever runs the tests. Gives the empty home."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("OCIPROXY_") or name.lower() in PROXIES:
                patch.delenv(name)
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def log_of_its_own() -> Iterator[None]:
    """A command that runs in this process sets the log's level and form up: for its test alone."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_threshold", "_style", "_queued"):
            patch.setattr(log, name, getattr(log, name))
        yield
        log.flush()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """A call of the pull engine or the server that blocks the event loop of an async test fails it.

    Servers that run as processes are watched by `tests.watched`.
    """
    if not inspect.iscoroutinefunction(getattr(request, "function", None)):
        yield
        return
    blockbuster = watcher("ociproxy.fetch", "ociproxy.serve", "tests.upstream")
    blockbuster.activate()
    try:
        yield
    finally:
        blockbuster.deactivate()


@pytest.fixture
def make_upstream() -> Iterator[Callable[..., FakeUpstream]]:
    """Starts fake upstreams, with the arguments of `FakeUpstream`; stops them after the test."""
    with contextlib.ExitStack() as stack:

        def make(**arguments: object) -> FakeUpstream:
            return stack.enter_context(FakeUpstream(**arguments))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def upstream(make_upstream: Callable[..., FakeUpstream]) -> FakeUpstream:
    return make_upstream()


@pytest.fixture
def load(tmp_path: Path, upstream: FakeUpstream) -> Load:
    """`ociproxy load` from the fake upstream."""
    return Load(tmp_path / "load", upstream.url)


@pytest.fixture
def mirror(tmp_path: Path, make_upstream: object) -> Iterator[Callable[..., Mirror]]:
    """Starts servers, with the arguments of `Mirror`; their stores and logs lie in `tmp_path`.

    They stop before any fake upstream does, or they would wait for one that has gone.
    After the test each is stopped as an operator stops it, and has to exit with 0.
    """
    started: list[Mirror] = []

    def make(config: object = None, **arguments: object) -> Mirror:
        folder = tmp_path / f"mirror-{len(started)}"
        made = Mirror(folder, config, **arguments)  # type: ignore[arg-type]
        started.append(made)
        made.start()
        return made

    try:
        yield make
        for each in started:
            each.stop()
    finally:
        for each in started:
            each.kill()


@pytest.fixture
def make_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a credential helper, a shell script, on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        program = folder / f"docker-credential-{name}"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return make
