"""Real clients at a closed door: HTTPS with an own CA, client certificates, a password."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import Image
from tests.parts.certificates import Authority
from tests.parts.clients import Skopeo
from tests.parts.containerd import Containerd
from tests.parts.registry import Registry
from tests.parts.tools import require_tool, run
from tests.real.conftest import TAG
from tests.server import Mirror

MirrorFactory = Callable[..., Mirror]
NAME = "registry.example"
USER, PASSWORD = "node", "pass:word"


@pytest.fixture
def closed(
    registry: Registry, mirror: MirrorFactory, authority: Authority, tmp_path: Path
) -> Mirror:
    """A server that wants all of it, in front of a registry called `NAME`."""
    users = tmp_path / "users"
    run(require_tool("htpasswd"), "-cbB", users, USER, PASSWORD)
    tls = {"cert": str(authority.cert), "key": str(authority.key), "client_ca": str(authority.ca)}
    serve = {"tls": tls, "auth": {"htpasswd": str(users)}, "networks": ["127.0.0.0/8"]}
    config = {"upstreams": [{"name": NAME, "endpoint": registry.url}], "serve": serve}
    return mirror(config, tls=authority.client_context(certificate=True))


@pytest.fixture
def certificates(authority: Authority, tmp_path: Path) -> Path:
    """As skopeo and podman want them: ca.crt, client.cert and client.key in one folder."""
    folder = tmp_path / "certs"
    folder.mkdir()
    for name, file in (
        ("ca.crt", authority.ca),
        ("client.cert", authority.client_cert),
        ("client.key", authority.client_key),
    ):
        (folder / name).write_bytes(file.read_bytes())
    return folder


def hosts_lines(authority: Authority, credentials: str = f"{USER}:{PASSWORD}") -> list[str]:
    basic = base64.b64encode(credentials.encode()).decode()
    return [
        f'  ca = "{authority.ca}"',
        f'  client = [["{authority.client_cert}", "{authority.client_key}"]]',
        '  [host."{url}".header]',
        f'    authorization = "Basic {basic}"',
    ]


def use(containerd: Containerd, server: Mirror, lines: list[str]) -> None:
    containerd.use_mirror(server.url, *(line.replace("{url}", server.url) for line in lines))


def test_containerd_pulls_through_all_of_it(
    closed: Mirror, containerd: Containerd, authority: Authority, held: dict[str, Image]
) -> None:
    use(containerd, closed, hosts_lines(authority))
    for repository, each in held.items():
        assert containerd.pull(f"{NAME}/{repository}:{TAG}", all_platforms=True) == each.digest
        assert containerd.holds(each)
    assert PASSWORD not in closed.log()


def without_certificate(authority: Authority) -> list[str]:
    return [line for line in hosts_lines(authority) if "client =" not in line]


def without_authority(authority: Authority) -> list[str]:
    return [line for line in hosts_lines(authority) if "ca =" not in line]


def with_wrong_password(authority: Authority) -> list[str]:
    return hosts_lines(authority, f"{USER}:wrong")


@pytest.mark.parametrize("lines", [without_certificate, without_authority, with_wrong_password])
def test_containerd_without_one_of_them_gets_nothing(
    closed: Mirror,
    containerd: Containerd,
    authority: Authority,
    registry: Registry,
    held: dict[str, Image],
    lines: Callable[[Authority], list[str]],
) -> None:
    use(containerd, closed, lines(authority))
    before = registry.log()
    # There is no registry of this name to fall back to.
    with pytest.raises(AssertionError, match="exit 1"):
        containerd.pull(f"{NAME}/{next(iter(held))}:{TAG}")
    assert registry.log() == before


def test_skopeo_through_all_of_it(
    closed: Mirror, skopeo: Skopeo, certificates: Path, held: dict[str, Image], tmp_path: Path
) -> None:
    authfile = tmp_path / "auth.json"
    secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    authfile.write_text(f'{{"auths": {{"{closed.registry}": {{"auth": "{secret}"}}}}}}')
    how = [f"--cert-dir={certificates}", f"--authfile={authfile}"]
    for repository, each in held.items():
        reference = f"{closed.registry}/{NAME}/{repository}:{TAG}"
        assert skopeo.raw_manifest(reference, *how) == each.top.data


def test_skopeo_hears_what_is_missing(
    closed: Mirror, skopeo: Skopeo, certificates: Path, held: dict[str, Image]
) -> None:
    reference = f"{closed.registry}/{NAME}/{next(iter(held))}:{TAG}"
    with pytest.raises(AssertionError, match=r"(?i)unauthorized|authentication required"):
        skopeo.raw_manifest(reference, f"--cert-dir={certificates}", "--no-creds")
    (certificates / "client.cert").unlink()
    (certificates / "client.key").unlink()
    # asyncio closes the connection before the alert is out: the log is what says why.
    with pytest.raises(
        AssertionError, match=r"EOF|reset|closed idle connection|certificate required"
    ):
        skopeo.raw_manifest(reference, f"--cert-dir={certificates}", "--no-creds")
    closed.wait_for_log("peer did not return a certificate")
    (certificates / "ca.crt").unlink()
    with pytest.raises(AssertionError, match="unknown authority"):
        skopeo.raw_manifest(reference, f"--cert-dir={certificates}", "--no-creds")
