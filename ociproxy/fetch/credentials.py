"""User and password of an upstream, read where its `auth` section says, anew at each call.

So a rotated password file or a short-lived credential of a helper is picked up without a restart.
What cannot be read is `UpstreamDenied`: the upstream is not asked, and the message says why without
any part of a secret.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ociproxy.config.settings import Secret
from ociproxy.errors import NameInvalid, UpstreamDenied, shorten
from ociproxy.oci.reference import DOCKER_HUB, parse_registry

if TYPE_CHECKING:
    from ociproxy.config.settings import Auth

HELPER_TIMEOUT: Final = 10.0

# What Docker and its helpers know Docker Hub by.
_DOCKER_HUB_SERVER: Final = "https://index.docker.io/v1/"
_HELPER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Every helper made with Docker's library prints this on stdout and exits with 1.
_NOT_FOUND: Final = b"credentials not found in native keychain"
# As a user name it says that the secret is an OAuth2 refresh token.
_TOKEN_USER: Final = "<token>"  # noqa: S105 - a marker
_FILE_LIMIT: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Credentials:
    user: str
    password: Secret


AskHelper = Callable[[str, str], Credentials | None]
"""`ask_helper`, or something that remembers what it answered."""


def credentials_for(
    auth: Auth, registry: str, *, ask: AskHelper | None = None
) -> Credentials | None:
    """Credentials for the registry, None if Docker's file has none. Raises UpstreamDenied."""
    ask = ask or ask_helper
    if auth.helper is not None:
        found = ask(auth.helper, registry)
        if found is None:
            raise _denied(registry, f"docker-credential-{auth.helper} has no credentials for it")
        return found
    if auth.docker_config:
        path = _docker_config() if auth.docker_config is True else Path(auth.docker_config)
        return _from_docker_config(path, registry, ask)
    if auth.user is None:
        return None
    return Credentials(auth.user, _password(auth, registry))


def _password(auth: Auth, registry: str) -> Secret:
    if auth.password is not None:
        return auth.password
    if auth.password_env is not None:
        text = os.environ.get(auth.password_env, "")
        if not text:
            raise _denied(registry, f"environment variable {auth.password_env} is not set")
        return Secret(text)
    if auth.password_file is not None:
        text = _read(auth.password_file, registry).removesuffix("\n").removesuffix("\r")
        if not text:
            raise _denied(registry, f"{auth.password_file} is empty")
        return Secret(text)
    raise _denied(registry, "no password is configured")


def _docker_config() -> Path:
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path.home() / ".docker") / "config.json"


def _from_docker_config(path: Path, registry: str, ask: AskHelper) -> Credentials | None:
    """In Docker's order: the registry's own helper, the store of all credentials, the file."""
    text = _read(path, registry)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _denied(registry, f"{path} is not JSON") from error
    for _, helper in _entries(document, "credHelpers", registry):
        return ask(_helper_name(helper, path, registry), registry)
    store = document.get("credsStore") if isinstance(document, dict) else None
    if store:
        found = ask(_helper_name(store, path, registry), registry)
        if found is not None:
            return found
    for _, entry in _entries(document, "auths", registry):
        found = _from_entry(entry, path, registry)
        if found is not None:
            return found
    return None


def _entries(document: Any, name: str, registry: str) -> Iterator[tuple[str, Any]]:
    """Those of the registry: keys are `host[:port]`, with or without scheme and `/v1/`."""
    entries = document.get(name) if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        return
    for key, entry in entries.items():
        host, _, path = re.sub(r"^https?://", "", key).partition("/")
        with suppress(NameInvalid):
            if path.strip("/") in ("", "v1", "v2") and parse_registry(host) == registry:
                yield key, entry


def _from_entry(entry: Any, path: Path, registry: str) -> Credentials | None:
    if not isinstance(entry, dict):
        raise _denied(registry, f"{path} has something else than an entry for it")
    if entry.get("identitytoken"):
        raise _denied(registry, f"{path} holds an identity token for it, which is not supported")
    user, password = entry.get("username"), entry.get("password")
    if entry.get("auth"):
        try:
            pair = base64.b64decode(entry["auth"], validate=True).decode()
        except (binascii.Error, ValueError, TypeError):
            # The cause would show the bytes, which are the password.
            raise _denied(registry, f"{path} has an entry for it that is not base64") from None
        user, _, password = pair.partition(":")
    if not user or not password:
        return None
    # Docker pads passwords it encoded itself with NUL.
    return Credentials(str(user), Secret(str(password).rstrip("\0")))


def _helper_name(name: Any, path: Path, registry: str) -> str:
    if not isinstance(name, str) or not _HELPER_NAME.fullmatch(name):
        raise _denied(registry, f"{path} names no usable helper: {shorten(str(name), 40)}")
    return name


def ask_helper(name: str, registry: str) -> Credentials | None:
    """Run a helper; None if it has none. The server's name goes in by stdin, never as an argument.

    Raises UpstreamDenied.
    """
    program = f"docker-credential-{name}"
    server = _DOCKER_HUB_SERVER if registry == DOCKER_HUB else registry
    try:
        process = subprocess.Popen(  # noqa: S603 - the operator's program, its name is checked
            [program, "get"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # A group of its own: what the helper started dies with it and lets go of the pipe.
            start_new_session=True,
        )
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise _denied(registry, f"{program} cannot be run: {reason}") from error
    with process:
        try:
            output, _ = process.communicate(server.encode(), timeout=HELPER_TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise _denied(registry, f"{program} took longer than {HELPER_TIMEOUT:g} s") from None
    if process.returncode != 0:
        if _NOT_FOUND in output:
            return None
        raise _denied(registry, f"{program} failed with exit status {process.returncode}")
    return _from_helper(output, program, registry)


def _from_helper(output: bytes, program: str, registry: str) -> Credentials | None:
    try:
        answer = json.loads(output)
        user, password = answer["Username"], answer["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError):
        # The cause would show the output, which holds the secret.
        raise _denied(registry, f"{program} gave no Username and Secret") from None
    if user == _TOKEN_USER:
        raise _denied(registry, f"{program} gave an identity token, which is not supported")
    if not isinstance(user, str) or not isinstance(password, str) or not user or not password:
        return None
    return Credentials(user, Secret(password))


def _read(path: Path, registry: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise _denied(registry, f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _FILE_LIMIT:
        raise _denied(registry, f"{path} is larger than {_FILE_LIMIT} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _denied(registry, f"{path} is not UTF-8") from None


def _denied(registry: str, reason: str) -> UpstreamDenied:
    return UpstreamDenied(registry, f"no credentials: {reason}", status=401)
