"""The skopeo program: how it is called for one upstream, and when it is ended.

Of this process's environment skopeo gets the search path, the proxies and the trust store. It gets
credentials as a file in memory, mode 0600, that ends with the run, and never as an argument. It
runs in a process group of its own, which is killed when a limit is reached.

Tests: tests/fetch/skopeo/test_backend.py.
"""

from __future__ import annotations

import base64
import json
import os
import selectors
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import urlsplit

from ociproxy.clock import time_left
from ociproxy.config.skopeo import PROGRAM
from ociproxy.errors import (
    Interrupted,
    ManifestInvalid,
    OciProxyError,
    UpstreamDenied,
    UpstreamUnavailable,
    UpstreamUntrusted,
)
from ociproxy.fetch.credential_helper import CredentialSource
from ociproxy.fetch.skopeo.errors import SkopeoStderr, rate_limited, translate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from threading import Event

    from ociproxy.config.settings import Upstream
    from ociproxy.fetch.credentials import Credentials
    from ociproxy.oci.reference import Repository

_TICK: Final = 0.05
"""Seconds that `pump` waits for output: how late a time limit or a shutdown may be noticed."""
_END_LIMIT: Final = 10.0
"""Seconds for a process to end after it has closed its output or was killed."""
_READ: Final = 64 * 1024
"""Bytes of one read: as many as a pipe holds."""
_ANYWHERE: Final = Path("/")
"""Where a command runs that reads and writes no path of its own: no file system is kept busy."""
_PROXIES: Final = tuple(f"{name}_proxy" for name in ("http", "https", "no", "all"))
_PASSED_ON: Final = ("PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", *_PROXIES, *map(str.upper, _PROXIES))


class Run:
    """One running skopeo. Leaving the context kills it."""

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str],
        *,
        upstream: str,
        stopped: Event,
        auth: int | None,
        stdout_limit: int,
        folder: Path,
    ) -> None:
        self.stderr = SkopeoStderr()
        self.stdout = bytearray()
        self._upstream = upstream
        self._stopped = stopped
        self._limit = stdout_limit
        self._selector = selectors.DefaultSelector()
        try:
            self._process = subprocess.Popen(  # noqa: S603 no shell; names were parsed
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
                cwd=folder,
                pass_fds=() if auth is None else (auth,),
                start_new_session=True,
            )
        except OSError as exc:
            self._selector.close()
            reason = f"{PROGRAM} cannot be run: {(exc.strerror or str(exc)).lower()}"
            raise Interrupted(upstream, reason) from exc
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                self._selector.register(pipe, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck in the kernel, for as long as that takes
            self._process.wait(_END_LIMIT)
        self._selector.close()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def pump(self) -> bool:
        """Read its output for up to `_TICK` seconds; False when the output has ended. Raises
        UpstreamRateLimited when skopeo waits out a 429, ManifestInvalid for more output than the
        limit, and UpstreamUnavailable when the backend is closed."""
        for key, _ in self._selector.select(_TICK):
            data = os.read(key.fd, _READ)
            if not data:
                self._selector.unregister(key.fileobj)
            elif key.fileobj is self._process.stderr:
                self.stderr.feed(data)
            else:
                self.stdout += data
        if self._stopped.is_set():
            raise Interrupted(self._upstream, "shutting down")
        if self.stderr.throttled:
            raise rate_limited(self.stderr, self._upstream)
        if len(self.stdout) > self._limit:
            reason = f"a document of more than {self._limit} bytes is too large"
            raise ManifestInvalid(self._upstream, reason)
        if self._selector.get_map():
            return True
        self.stderr.end()
        return False

    @property
    def is_stopped(self) -> bool:
        """Whether a signal stopped it (proc(5), the state in `stat`)."""
        with suppress(OSError):
            state = Path(f"/proc/{self._process.pid}/stat").read_bytes().rpartition(b") ")[2][:1]
            return state in (b"T", b"t")
        return False

    def check(self, unknown: OciProxyError) -> None:
        """Call after the last `pump`. Raises a failed run's error, which is `unknown` for a 404."""
        try:
            code = self._process.wait(_END_LIMIT)
        except subprocess.TimeoutExpired as exc:
            raise UpstreamUnavailable(self._upstream, f"{PROGRAM} does not end") from exc
        if code < 0 and not self.stderr.fatal:
            name = signal.Signals(-code).name
            raise UpstreamUnavailable(self._upstream, f"{PROGRAM} was ended by {name}")
        if code != 0:
            raise translate(self.stderr, self._upstream, unknown)

    def timed_out(self, seconds: float, what: str) -> UpstreamUnavailable:
        """The error of a run that the caller ends after so many seconds of `what`."""
        reason = f"timed out after {seconds:g} s {what}"
        return UpstreamUnavailable(
            self._upstream, reason, timed_out=True, unreachable=not self.stderr.answered
        )


class Program:
    """skopeo with the settings of one upstream's entry, which are files in `folder`."""

    def __init__(self, upstream: Upstream, folder: Path, stopped: Event) -> None:
        """`folder` is empty. Raises UpstreamUntrusted for certificate files that cannot be used."""
        self._upstream = upstream
        self._stopped = stopped
        self._credentials = (
            None if upstream.auth is None else CredentialSource(upstream.auth, upstream.server)
        )
        parts = urlsplit(upstream.urls[0])
        self._host = parts.netloc
        path = parts.path.strip("/")
        self._prefix = path.removeprefix("v2").strip("/") if path.split("/")[0] == "v2" else path
        self._secure = parts.scheme == "https" and not upstream.tls.insecure_skip_verify
        # skopeo runs in another folder than this process: a relative path would lead elsewhere.
        self._folder = folder.absolute()
        self._env = self._make_environment()
        self._make_folder()

    def name_of(self, repository: Repository) -> str:
        """The repository as skopeo's arguments name it."""
        return f"{self._host}/{self._path_of(repository)}"

    def _path_of(self, repository: Repository) -> str:
        return "/".join(part for part in (self._prefix, repository.name) if part)

    def call(
        self, repository: Repository, *words: str, output_limit: int, unknown: OciProxyError
    ) -> Run:
        """Run a short command to its end, within the connect and header time-outs and what the
        request has left. A refused run is repeated with fresh credentials, if a helper has some.
        Raises UpstreamError kinds, OutOfTime, or `unknown` for a 404."""
        source, path = self._credentials, self._path_of(repository)
        given = None if source is None else source.get(path)
        try:
            return self._call(words, output_limit, unknown, given)
        except UpstreamDenied:
            fresh = None if source is None else source.replace(given, path)
            if fresh is None:
                raise
            return self._call(words, output_limit, unknown, fresh)

    @contextmanager
    def start(
        self, repository: Repository, command: str, *words: str, folder: Path
    ) -> Iterator[Run]:
        """A command that runs in `folder`, with the options that tell it about this upstream and
        the credentials for this repository."""
        source, path = self._credentials, self._path_of(repository)
        given = None if source is None else source.get(path)
        try:
            with self._run((command, *words), given, folder=folder) as run:
                yield run
        except UpstreamDenied:
            if source is not None:
                with suppress(UpstreamDenied):
                    source.replace(given, path)  # for the next run
            raise

    def _call(
        self,
        words: Sequence[str],
        output_limit: int,
        unknown: OciProxyError,
        credentials: Credentials | None,
    ) -> Run:
        timeouts = self._upstream.timeouts
        limit = time_left(timeouts.connect + timeouts.headers)
        deadline = time.monotonic() + limit
        with self._run(words, credentials, output_limit=output_limit) as run:
            while run.pump():
                if time.monotonic() > deadline:
                    raise run.timed_out(limit, "waiting for an answer")
            run.check(unknown)
            return run

    @contextmanager
    def _run(
        self,
        words: Sequence[str],
        credentials: Credentials | None,
        *,
        output_limit: int = 0,
        folder: Path = _ANYWHERE,
    ) -> Iterator[Run]:
        command, *rest = words
        prefix = "--src-" if command == "copy" else "--"
        with self._authentication(prefix, credentials) as (options, auth):
            argv = [
                PROGRAM,
                "--debug",
                "--insecure-policy",
                f"--registries-conf={self._folder / 'registries.conf'}",
                f"--registries.d={self._folder / 'registries.d'}",
                f"--tmpdir={self._folder / 'tmp'}",
                command,
                f"{prefix}tls-verify={str(self._secure).lower()}",
                f"{prefix}cert-dir={self._folder / 'certs'}",
                *options,
                *rest,
            ]
            with Run(
                argv,
                self._env,
                upstream=self._upstream.name,
                stopped=self._stopped,
                auth=auth,
                stdout_limit=output_limit,
                folder=folder,
            ) as run:
                yield run

    @contextmanager
    def _authentication(
        self, prefix: str, credentials: Credentials | None
    ) -> Iterator[tuple[list[str], int | None]]:
        if credentials is None:
            yield [f"{prefix}no-creds"], None
            return
        pair = f"{credentials.user}:{credentials.password.reveal()}".encode()
        entry = {"auth": base64.b64encode(pair).decode()}
        # A file in memory has no name on a disk: however this process ends, nothing is left of it.
        file = os.memfd_create("auth.json")
        try:
            os.fchmod(file, 0o600)
            os.write(file, json.dumps({"auths": {self._host: entry}}).encode())
            flag = "--src-authfile" if prefix == "--src-" else "--authfile"
            yield [f"{flag}=/proc/self/fd/{file}"], file
        finally:
            os.close(file)

    def _make_environment(self) -> dict[str, str]:
        env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        if self._upstream.tls.ca is not None:
            # In `certs`, this certificate would be trusted beside the system's, not instead.
            env["SSL_CERT_FILE"] = str(self._upstream.tls.ca.absolute())
            env["SSL_CERT_DIR"] = str(self._folder / "empty")
        home = str(self._folder / "home")
        return {**env, "HOME": home, "XDG_RUNTIME_DIR": home, "TMPDIR": str(self._folder / "tmp")}

    def _make_folder(self) -> None:
        """Empty settings in place of the machine's, and links to the client certificate."""
        tls = self._upstream.tls
        try:
            for name in ("registries.d", "certs", "empty", "home", "tmp"):
                (self._folder / name).mkdir()
            (self._folder / "registries.conf").touch()
            if tls.cert is not None and tls.key is not None:
                (self._folder / "certs" / "client.cert").symlink_to(tls.cert.absolute())
                (self._folder / "certs" / "client.key").symlink_to(tls.key.absolute())
        except OSError as exc:
            reason = f"cannot use its certificates: {exc.strerror or exc}"
            raise UpstreamUntrusted(self._upstream.name, reason) from exc
