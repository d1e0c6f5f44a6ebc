"""`ociproxy client-config CLIENT`: the exact files that make a client pull through this mirror."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click

from ociproxy.cli.terminal import output_errors, write_file
from ociproxy.errors import NameInvalid
from ociproxy.oci.reference import parse_registry

# Podman and CRI-O cannot mirror all registries with one entry: each is named.
_REGISTRIES: Final = ("docker.io", "gcr.io", "ghcr.io", "quay.io", "registry.k8s.io")
_DIAL_TIMEOUT: Final = "1s"
"""Until a client takes the mirror for dead and asks the image's own registry."""


@dataclass(frozen=True, slots=True)
class ClientFile:
    """A file on the client's machine. A `part` is to be merged into the file of that path. A
    `secret` is for a password: its owner alone may read it."""

    path: str
    text: str
    notes: tuple[str, ...] = ()
    part: str = ""
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Mirror:
    """The URL by which clients reach this server, the CA of its certificate, and their credentials.

    The files are on the clients' machines: this command does not read them.
    """

    scheme: str
    host: str
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}"

    def copies(self, folder: str) -> tuple[str, ...]:
        """Notes on the files that Docker and Podman read from a folder named after the server."""
        names = ((self.ca, "ca.crt"), (self.cert, "client.cert"), (self.key, "client.key"))
        return tuple(f"Copy {file} to {folder}/{self.host}/{name}" for file, name in names if file)


def _mirror(ctx: click.Context, param: click.Parameter, value: str) -> Mirror:
    wanted = "must be http://HOST[:PORT] or https://HOST[:PORT]"
    try:
        parts = urlsplit(value)
        parse_registry(parts.netloc)
    except (ValueError, NameInvalid) as error:
        raise click.BadParameter(wanted, ctx, param) from error
    more = parts.path.strip("/") or parts.query or parts.fragment
    if more or parts.scheme not in ("http", "https"):
        raise click.BadParameter(wanted, ctx, param)
    return Mirror(parts.scheme, parts.netloc)


def _parsed(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(parse_registry(registry) for registry in value))
    except NameInvalid as error:
        raise click.BadParameter(str(error), ctx, param) from error


def _common(command: Callable[..., None]) -> Callable[..., None]:
    mirror = click.option(
        "--mirror",
        metavar="URL",
        callback=_mirror,
        default="http://127.0.0.1:8080",
        show_default=True,
        show_envvar=True,
        help="Where clients reach this server.",
    )
    write = click.option(
        "--write",
        "folder",
        type=click.Path(file_okay=False, path_type=Path),
        help="Write the files below this directory instead of printing them.",
    )
    access = [
        click.option("--ca", metavar="FILE", default="", help="CA of its certificate."),
        click.option("--cert", metavar="FILE", default="", help="Client certificate it wants."),
        click.option("--key", metavar="FILE", default="", help="Key of the client certificate."),
        click.option("--user", metavar="NAME", default="", help="User name it wants."),
    ]

    @functools.wraps(command)
    def with_all(mirror: Mirror, ca: str, cert: str, key: str, user: str, **more: object) -> None:
        if bool(cert) != bool(key):
            raise click.UsageError("--cert and --key go together")
        if ":" in user:
            raise click.UsageError("--user is a name without a colon: the files say the password")
        if mirror.scheme == "http" and (ca or cert):
            raise click.UsageError("--ca and --cert need a --mirror that is https://")
        if any(character in text for text in (ca, cert, key, user) for character in '"\\\n'):
            raise click.UsageError("a file or user name must not have quotes or backslashes")
        command(dataclasses.replace(mirror, ca=ca, cert=cert, key=key, user=user), **more)

    complete: Callable[..., None] = with_all
    for option in (*reversed(access), write, mirror):
        complete = option(complete)
    return complete


def _registries(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--registry",
        "registries",
        metavar="REGISTRY",
        callback=_parsed,
        multiple=True,
        default=_REGISTRIES,
        show_default=True,
        help="Registry to mirror; repeat for more.",
    )(command)


@click.group("client-config")
def client_config() -> None:
    """Print the exact files that make a client use this mirror."""


@client_config.command("containerd", short_help="Everything that containerd pulls.")
@_common
@click.option(
    "--referrers",
    is_flag=True,
    help="Signatures and SBOMs from the mirror too: for containerd 2.2 and newer only.",
)
def containerd(mirror: Mirror, folder: Path | None, referrers: bool) -> None:
    """Everything that containerd pulls, for Kubernetes and for nerdctl."""
    _give(containerd_files(mirror, referrers=referrers), folder)


@client_config.command("docker", short_help="Everything that Docker 29 pulls; else Docker Hub.")
@_common
def docker(mirror: Mirror, folder: Path | None) -> None:
    """Everything that Docker 29 pulls with the containerd image store.

    Older ones, and those with another image store, have mirrors for Docker Hub only.
    """
    _give(docker_files(mirror), folder)


@client_config.command("podman", short_help="What Podman, Buildah and Skopeo pull.")
@_common
@_registries
def podman(mirror: Mirror, folder: Path | None, registries: tuple[str, ...]) -> None:
    """What Podman, Buildah and Skopeo pull from the registries named."""
    _give(containers_files(mirror, registries, "Read at each pull: nothing to restart."), folder)


@client_config.command("crio", short_help="What CRI-O pulls.")
@_common
@_registries
def crio(mirror: Mirror, folder: Path | None, registries: tuple[str, ...]) -> None:
    """What CRI-O pulls from the registries named."""
    _give(containers_files(mirror, registries, "Then: systemctl reload crio"), folder)


@client_config.command("k3s", short_help="Everything that k3s and RKE2 pull.")
@_common
def k3s(mirror: Mirror, folder: Path | None) -> None:
    """Everything that k3s pulls; RKE2 reads the same file in /etc/rancher/rke2."""
    _give(k3s_files(mirror), folder)


def containerd_files(mirror: Mirror, *, referrers: bool = False) -> tuple[ClientFile, ...]:
    """With `referrers`, containerd before 2.2 refuses to read the file."""
    notes = [
        "For every registry without a directory of its own beside _default.",
        "Read at each pull: nothing to restart.",
    ]
    if referrers:
        notes.append("For containerd 2.2 and newer: an older one ignores all of this file.")
    hosts = _hosts(mirror, referrers=referrers)
    notes += _password_notes(mirror)
    path, secret = "/etc/containerd/certs.d/_default/hosts.toml", bool(mirror.user)
    return (
        ClientFile(path, hosts, tuple(notes), secret=secret),
        _config_path(2, "containerd 1.x", "io.containerd.grpc.v1.cri"),
        _config_path(3, "containerd 2.x", "io.containerd.cri.v1.images"),
    )


def _config_path(version: int, part: str, plugin: str) -> ClientFile:
    text = (
        f"version = {version}\n\n"
        f'[plugins."{plugin}".registry]\n'
        '  config_path = "/etc/containerd/certs.d"\n'
    )
    notes = ("Merge into what is there, then: systemctl restart containerd",)
    return ClientFile("/etc/containerd/config.toml", text, notes, part)


def _hosts(mirror: Mirror, *, referrers: bool) -> str:
    """A hosts.toml for all registries."""
    capabilities = ["pull", "resolve", *(["referrers"] if referrers else [])]
    # Without a line `server`, the client asks the image's own registry if the mirror fails.
    text = f'[host."{mirror.url}"]\n  capabilities = {json.dumps(capabilities)}\n'
    # Without it a dead mirror costs up to 30 s a blob. containerd 1.x ignores keys that it does
    # not know.
    text += f'  dial_timeout = "{_DIAL_TIMEOUT}"\n'
    if mirror.ca:
        text += f'  ca = "{mirror.ca}"\n'
    if mirror.cert:
        text += f'  client = [["{mirror.cert}", "{mirror.key}"]]\n'
    if mirror.user:
        credentials = f"Basic {_credentials(mirror)}"
        text += f'  [host."{mirror.url}".header]\n    authorization = "{credentials}"\n'
    return text


def _credentials(mirror: Mirror) -> str:
    """A placeholder that is no base64: no client takes it for credentials."""
    return f"<base64 of {mirror.user}:PASSWORD>"


def _password_notes(mirror: Mirror) -> tuple[str, ...]:
    if not mirror.user:
        return ()
    return (
        f"Put what this prints in the place of {_credentials(mirror)}:",
        f"  printf '{mirror.user}:PASSWORD' | base64 -w0",
        "It is a password: the file is for root alone to read.",
    )


def docker_files(mirror: Mirror) -> tuple[ClientFile, ...]:
    """The hosts.toml of the containerd image store, and what any Docker obeys for docker.io."""
    hosts_notes = (
        "For Docker 29 and newer with the containerd image store, as fresh installs have it",
        "(docker info: driver-type io.containerd.snapshotter.v1): every registry without a",
        "directory of its own beside _default. Read at each pull: nothing to restart.",
        *_password_notes(mirror),
    )
    text = json.dumps({"registry-mirrors": [mirror.url]}, indent=2) + "\n"
    notes = (
        "For Docker with any other image store, and before 29. Docker 29 with the containerd",
        "image store ignores registry-mirrors where it has the file above.",
        *mirror.copies("/etc/docker/certs.d"),
        *(
            ["Docker shows no password to such a mirror: let it in by certificate."]
            if mirror.user
            else ()
        ),
        "It mirrors only docker.io: other registries are pulled directly.",
        "The mirror's serve.default_upstream has to be docker.io, as it is unless set.",
        "Merge into what is there, then: systemctl reload docker",
    )
    return (
        ClientFile(
            "/etc/docker/certs.d/_default/hosts.toml",
            _hosts(mirror, referrers=False),
            hosts_notes,
            secret=bool(mirror.user),
        ),
        ClientFile("/etc/docker/daemon.json", text, notes),
    )


def containers_files(
    mirror: Mirror, registries: Iterable[str], note: str
) -> tuple[ClientFile, ...]:
    # The first part of the path is the image's registry; `insecure` allows plain HTTP.
    insecure = "insecure = true\n" if mirror.scheme == "http" else ""
    text = "\n".join(
        f'[[registry]]\nprefix = "{registry}"\nlocation = "{registry}"\n\n'
        f'[[registry.mirror]]\nlocation = "{mirror.host}/{registry}"\n{insecure}'
        for registry in registries
    )
    path = "/etc/containers/registries.conf.d/50-ociproxy.conf"
    notes = [*mirror.copies("/etc/containers/certs.d")]
    if mirror.user:
        notes.append(f"Log in: podman login --username {mirror.user} {mirror.host}")
        notes.append("CRI-O takes what that wrote from its global_auth_file.")
    notes += ["Only the registries named here are mirrored.", note]
    return (ClientFile(path, text, tuple(notes)),)


def k3s_files(mirror: Mirror) -> tuple[ClientFile, ...]:
    text = f'mirrors:\n  "*":\n    endpoint:\n      - "{mirror.url}"\n'
    password = f"<password of {mirror.user}>"
    auth = f'    auth: {{username: "{mirror.user}", password: "{password}"}}\n'
    auth = auth if mirror.user else ""
    files = {"ca_file": mirror.ca, "cert_file": mirror.cert, "key_file": mirror.key}
    tls = ", ".join(f'{key}: "{file}"' for key, file in files.items() if file)
    if auth or tls:
        text += f'configs:\n  "{mirror.host}":\n{auth}'
        text += f"    tls: {{{tls}}}\n" if tls else ""
    notes = ["On each node, then: systemctl restart k3s (k3s-agent)"]
    if mirror.user:
        notes.append(f"Put the password in the place of {password}: only root may read the file.")
    path = "/etc/rancher/k3s/registries.yaml"
    return (ClientFile(path, text, tuple(notes), secret=bool(mirror.user)),)


def _give(files: Iterable[ClientFile], folder: Path | None) -> None:
    if folder is None:
        click.echo("\n".join(_printed(file) for file in files), nl=False)
        return
    for file in files:
        # Parts for several versions have the same path: the version makes the names differ.
        suffix = f".{file.part.replace(' ', '-')}" if file.part else ""
        target = folder / f"{file.path.lstrip('/')}{suffix}"
        with output_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        has_comments = not file.path.endswith(".json")
        text = f"{_notes(file)}{file.text}" if has_comments else file.text
        write_file(target, text.encode(), secret=file.secret)
        click.echo(str(target))
        if not has_comments:
            click.echo(_notes(file), err=True, nl=False)


def _printed(file: ClientFile) -> str:
    part = f" ({file.part})" if file.part else ""
    return f"# {file.path}{part}\n{_notes(file)}{file.text}"


def _notes(file: ClientFile) -> str:
    return "".join(f"# {note}\n" for note in file.notes)
