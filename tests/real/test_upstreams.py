"""Every way of reaching an upstream that the configuration offers, against docker-registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.images import Image, multi_platform
from tests.parts.certificates import Authority
from tests.parts.registry import Registry
from tests.server import Mirror, upstream_entry

REPOSITORY, TAG = "team/app", "V1"
CREDENTIALS = ("ann", "p:w d")
TRUST = ("os store", "given ca", "unverified")


@pytest.fixture(scope="session")
def pushed() -> Image:
    return multi_platform("matrix", platforms=("linux/amd64", "linux/arm64"))


def assert_serves(server: Mirror, registry: Registry, pushed: Image) -> None:
    """The tag, every manifest and every blob, byte for byte; then again with the upstream gone."""
    for _ in ("running", "stopped"):
        top = server.manifest(registry.name, REPOSITORY, TAG)
        assert (top.status, top.body) == (200, pushed.top.data), server.log()
        assert top.digest == pushed.digest
        assert top.headers["content-type"] == pushed.top.media_type
        for child in pushed.manifests:
            assert server.manifest(registry.name, REPOSITORY, child.digest).body == child.data
        for blob in pushed.blobs:
            assert server.blob(registry.name, REPOSITORY, blob.digest).body == blob.data
            server.wait_for_file(f"blobs/{blob.encoded}")
        registry.stop()


def assert_refused(server: Mirror, registry: Registry, status: int) -> None:
    answer = server.manifest(registry.name, REPOSITORY, TAG)
    assert answer.status == status, server.log()
    assert answer.json()["errors"][0]["message"]
    assert "Traceback" not in server.log()


def trusting(
    trust: str, authority: Authority, *, client: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """The upstream's `tls` section and the server's environment."""
    tls: dict[str, Any] = {}
    if client:
        tls |= {"cert": str(authority.client_cert), "key": str(authority.client_key)}
    if trust == "given ca":
        tls["ca"] = str(authority.ca)
    if trust == "unverified":
        tls["insecure_skip_verify"] = True
    return tls, {"SSL_CERT_FILE": str(authority.ca)} if trust == "os store" else {}


def test_plain_http(tmp_path: Path, mirror: Callable[..., Mirror], pushed: Image) -> None:
    with Registry(tmp_path / "registry") as registry:
        registry.push(REPOSITORY, pushed, tag=TAG)
        server = mirror({"upstreams": [upstream_entry(registry.url)]})
        assert_serves(server, registry, pushed)


def test_basic_auth(tmp_path: Path, mirror: Callable[..., Mirror], pushed: Image) -> None:
    user, password = CREDENTIALS
    with Registry(tmp_path / "registry", credentials=CREDENTIALS) as registry:
        registry.push(REPOSITORY, pushed, tag=TAG)
        for auth in (None, {"user": user, "password": "wrong"}):
            entry = upstream_entry(registry.url, **({"auth": auth} if auth else {}))
            assert_refused(mirror({"upstreams": [entry]}), registry, 403)
        auth = {"user": user, "password": password}
        server = mirror({"upstreams": [upstream_entry(registry.url, auth=auth)]})
        assert_serves(server, registry, pushed)
        assert password not in server.log()


@pytest.mark.parametrize("client", [False, True], ids=["one-way", "mTLS"])
@pytest.mark.parametrize("trust", TRUST)
def test_https(
    trust: str,
    client: bool,
    tmp_path: Path,
    authority: Authority,
    mirror: Callable[..., Mirror],
    pushed: Image,
) -> None:
    with Registry(tmp_path / "registry", tls=authority, ask_client=client) as registry:
        registry.push(REPOSITORY, pushed, tag=TAG)
        tls, env = trusting(trust, authority, client=client)
        # The classic shape of the file, where HTTPS needs no saying.
        server = mirror([{"name": registry.name, "tls": tls}], env=env)
        assert_serves(server, registry, pushed)


def test_https_with_basic_auth(
    tmp_path: Path, authority: Authority, mirror: Callable[..., Mirror], pushed: Image
) -> None:
    user, password = CREDENTIALS
    with Registry(tmp_path / "registry", credentials=CREDENTIALS, tls=authority) as registry:
        registry.push(REPOSITORY, pushed, tag=TAG)
        entry = {
            "name": registry.name,
            "auth": {"user": user, "password": password},
            "tls": {"ca": str(authority.ca)},
        }
        assert_serves(mirror([entry]), registry, pushed)


def test_an_unknown_authority_is_refused(
    tmp_path: Path, authority: Authority, mirror: Callable[..., Mirror], pushed: Image
) -> None:
    stranger = Authority(tmp_path / "stranger")
    with Registry(tmp_path / "registry", tls=authority) as registry:
        registry.push(REPOSITORY, pushed, tag=TAG)
        assert_refused(mirror([{"name": registry.name}]), registry, 502)
        # A given CA replaces the OS store, even where that one would do.
        server = mirror(
            [{"name": registry.name, "tls": {"ca": str(stranger.ca)}}],
            env={"SSL_CERT_FILE": str(authority.ca)},
        )
        assert_refused(server, registry, 502)


def test_the_environment_of_a_library_decides_nothing(
    tmp_path: Path, authority: Authority, mirror: Callable[..., Mirror], pushed: Image
) -> None:
    """requests would put these variables above a given CA, and read ~/.netrc unasked."""
    stranger = Authority(tmp_path / "stranger")
    home = tmp_path / "home"
    home.mkdir()
    netrc = home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login ann password from-netrc\n", encoding="utf-8")
    env = {
        "REQUESTS_CA_BUNDLE": str(stranger.ca),
        "CURL_CA_BUNDLE": str(stranger.ca),
        "HOME": str(home),
        "NETRC": str(netrc),
    }
    credentials = ("ann", "from-netrc")
    with Registry(tmp_path / "open", tls=authority) as registry:
        registry.push(REPOSITORY, pushed, tag=TAG)
        entry = {"name": registry.name, "tls": {"ca": str(authority.ca)}}
        assert_serves(mirror([entry], env=env), registry, pushed)
    with Registry(tmp_path / "closed", tls=authority, credentials=credentials) as registry:
        entry = {"name": registry.name, "tls": {"ca": str(authority.ca)}}
        assert_refused(mirror([entry], env=env), registry, 403)


def test_a_missing_client_certificate_is_refused(
    tmp_path: Path, authority: Authority, mirror: Callable[..., Mirror], pushed: Image
) -> None:
    with Registry(tmp_path / "registry", tls=authority, ask_client=True) as registry:
        registry.push(REPOSITORY, pushed, tag=TAG)
        server = mirror([{"name": registry.name, "tls": {"ca": str(authority.ca)}}])
        assert_refused(server, registry, 502)
