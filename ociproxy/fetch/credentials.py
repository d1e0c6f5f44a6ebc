"""User and password of an upstream, read anew at each call from where its `auth` section says.

A rotated password is therefore used without a restart. A file or variable that cannot be read
raises UpstreamDenied: the upstream is not asked. No message holds any part of a secret.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ociproxy.config.settings import Secret
from ociproxy.errors import NameInvalid, UpstreamDenied, shorten
from ociproxy.oci.reference import parse_registry

if TYPE_CHECKING:
    from ociproxy.config.settings import Auth

_HELPER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE_LIMIT: Final = 1024 * 1024
"""Bytes: many times a real file, and little enough to hold in memory."""


@dataclass(frozen=True, slots=True)
class Credentials:
    user: str
    password: Secret


CallHelper = Callable[[str, str], Credentials | None]
"""Takes a helper's name and a registry: `run_helper`, or a method that keeps its answers."""


def credentials_for(
    auth: Auth, registry: str, call_helper: CallHelper, repository: str = ""
) -> Credentials | None:
    """None without a user, or where Docker's file has none. Docker's file may have credentials for
    some repositories of a registry alone. Raises UpstreamDenied."""
    if auth.helper is not None:
        found = call_helper(auth.helper, registry)
        if found is None:
            raise no_credentials(
                registry, f"docker-credential-{auth.helper} has no credentials for it"
            )
        return found
    if auth.docker_config:
        path = _docker_config(registry) if auth.docker_config is True else auth.docker_config
        return _from_docker_config(path, registry, call_helper, repository)
    if auth.user is None:
        return None
    return Credentials(auth.user, _password(auth, registry))


def _password(auth: Auth, registry: str) -> Secret:
    if auth.password is not None:
        return auth.password
    if auth.password_env is not None:
        text = os.environ.get(auth.password_env, "")
        if not text:
            raise no_credentials(registry, f"environment variable {auth.password_env} is not set")
        return Secret(text)
    if auth.password_file is not None:
        text = _read(auth.password_file, registry).removesuffix("\n").removesuffix("\r")
        if not text:
            raise no_credentials(registry, f"{auth.password_file} is empty")
        return Secret(text)
    raise no_credentials(registry, "no password is configured")


def _docker_config(registry: str) -> Path:
    """Docker's own place of the file."""
    try:
        return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")
    except RuntimeError:
        reason = "docker_config: true finds no home directory; set DOCKER_CONFIG, or give the path"
        raise no_credentials(registry, reason) from None


def _from_docker_config(
    path: Path, registry: str, call_helper: CallHelper, repository: str
) -> Credentials | None:
    """In Docker's order: the registry's own helper, the helper for all registries, the file."""
    text = _read(path, registry)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise no_credentials(registry, f"{path} is not JSON") from error
    for helper in _entries(document, "credHelpers", registry):
        return call_helper(_helper_name(helper, path, registry), registry)
    store = document.get("credsStore") if isinstance(document, dict) else None
    if store:
        found = call_helper(_helper_name(store, path, registry), registry)
        if found is not None:
            return found
    for entry in _entries(document, "auths", registry, repository):
        found = _from_entry(entry, path, registry)
        if found is not None:
            return found
    return None


def _entries(document: Any, name: str, registry: str, repository: str = "") -> Iterator[Any]:
    """The entries that apply, as containers/image chooses them: those for the longest part of the
    repository's name first, then those for the registry, its plain name before other spellings."""
    entries = document.get(name) if isinstance(document, dict) else None
    if not isinstance(entries, dict):
        return
    found: list[tuple[int, bool, Any]] = []
    for key, entry in entries.items():
        path = _path_of(key, registry)
        if path is not None and f"{repository}/".startswith(path):
            found.append((len(path), key == registry, entry))
    # Stable: of several spellings the first in the file.
    for _, _, entry in sorted(found, key=lambda each: each[:2], reverse=True):
        yield entry


def _path_of(key: str, registry: str) -> str | None:
    """The part of the registry that a key is for: a path with a slash at its end, empty for all of
    it. None if the key is another registry's. With a scheme, Docker and containers/image look at
    the host alone; `/v1/` and `/v2/` are the API's."""
    plain = re.sub(r"^https?://", "", key)
    host, _, path = plain.partition("/")
    path = path.strip("/")
    with suppress(NameInvalid):
        if parse_registry(host) == registry:
            return "" if plain != key or path in ("", "v1", "v2") else f"{path}/"
    return None


def _from_entry(entry: Any, path: Path, registry: str) -> Credentials | None:
    if not isinstance(entry, dict):
        raise no_credentials(registry, f"{path} has something else than an entry for it")
    if entry.get("identitytoken"):
        raise no_credentials(
            registry, f"{path} holds an identity token for it, which is not supported"
        )
    user, password = entry.get("username"), entry.get("password")
    if entry.get("auth"):
        try:
            # `base64` without -w 0 breaks lines, which Docker passes over.
            text = entry["auth"].replace("\n", "").replace("\r", "")
            pair = base64.b64decode(text, validate=True).decode()
        except (binascii.Error, ValueError, TypeError, AttributeError):
            # The cause would show the bytes, which are the password.
            raise no_credentials(
                registry, f"{path} has an entry for it that is not base64"
            ) from None
        user, _, password = pair.partition(":")
    if not user or not password:
        return None
    # Docker pads the passwords that it encodes with NUL.
    return Credentials(str(user), Secret(str(password).rstrip("\0")))


def _helper_name(name: Any, path: Path, registry: str) -> str:
    if not isinstance(name, str) or not _HELPER_NAME.fullmatch(name):
        raise no_credentials(registry, f"{path} names no usable helper: {shorten(str(name), 40)}")
    return name


def _read(path: Path, registry: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise no_credentials(registry, f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _FILE_LIMIT:
        raise no_credentials(registry, f"{path} is larger than {_FILE_LIMIT} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise no_credentials(registry, f"{path} is not UTF-8") from None


def no_credentials(registry: str, reason: str) -> UpstreamDenied:
    """The error of an upstream that is not asked, since its credentials cannot be had."""
    return UpstreamDenied(registry, f"no credentials: {reason}", status=401)
