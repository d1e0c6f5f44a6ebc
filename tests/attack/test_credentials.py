"""An attacker wants the password, or the token, that the mirror holds."""

from __future__ import annotations

import base64
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attack.conftest import assert_quiet, refusal
from tests.fetch.peers import raw_server
from tests.images import image
from tests.parts.certificates import Authority
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth, TokenAuth
from tests.upstream_faults import Fault

MakeMirror = Callable[..., Mirror]
MakeUpstream = Callable[..., FakeUpstream]
DENIED = (403, "DENIED")
USER, PASSWORD = "ann", "pass-word-of-ann"
KNOWN = BasicAuth(USER, PASSWORD)
ENCODED = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
AUTH = {"user": USER, "password": PASSWORD}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def entry_of(upstream: FakeUpstream, authority: Authority | None = None) -> dict[str, object]:
    tls = {} if authority is None else {"tls": {"ca": str(authority.ca)}}
    return upstream_entry(upstream.url, auth=AUTH, **tls)


def told(upstream: FakeUpstream) -> list[str]:
    """The Authorization headers that this one has seen."""
    return [
        each.headers["Authorization"]
        for each in upstream.requests
        if "Authorization" in each.headers
    ]


def test_a_redirect_to_another_host_goes_without_them(
    mirror: MakeMirror, make_upstream: MakeUpstream
) -> None:
    upstream, elsewhere = make_upstream(auth=KNOWN), make_upstream()
    app = elsewhere.add("app", image("app"), tag="v1")
    upstream.add("app", app, tag="v1")
    upstream.fault("/blobs/", Fault(redirect=elsewhere.url))
    server = mirror({"upstreams": [entry_of(upstream)]})
    assert server.manifest(upstream.registry, "app", "v1").status == 200
    for blob in app.blobs:
        assert server.blob(upstream.registry, "app", blob.digest).body == blob.data
    assert f"Basic {ENCODED}" in told(upstream)
    assert elsewhere.count("/blobs/") > 0
    assert told(elsewhere) == []


def test_a_redirect_s_target_cannot_ask_for_them(
    mirror: MakeMirror, make_upstream: MakeUpstream
) -> None:
    upstream, thief = make_upstream(auth=KNOWN), make_upstream(auth=BasicAuth("no", "body"))
    upstream.add("app", image("app"), tag="v1")
    upstream.fault("/manifests/", Fault(redirect=thief.url))
    server = mirror({"upstreams": [entry_of(upstream)]})
    assert refusal(server.manifest(upstream.registry, "app", "v1")) == DENIED
    assert thief.count("/manifests/") == 1
    assert told(thief) == []


def test_they_do_not_fall_from_https_to_http(
    mirror: MakeMirror, make_upstream: MakeUpstream, authority: Authority
) -> None:
    plain = make_upstream(auth=KNOWN)
    upstream = make_upstream(auth=KNOWN, tls=authority.server_context())
    app = image("app")
    for each in (plain, upstream):
        each.add("app", app, tag="v1")
    upstream.fault("/manifests/", Fault(redirect=plain.url))
    server = mirror({"upstreams": [entry_of(upstream, authority)]})
    answer = server.manifest(upstream.registry, "app", "v1")
    assert refusal(answer) == DENIED
    assert "from HTTPS to plain HTTP" in answer.json()["errors"][0]["message"]
    assert plain.requests == []


def test_a_realm_over_plain_http_does_not_get_the_password_of_an_https_upstream(
    mirror: MakeMirror, make_upstream: MakeUpstream, authority: Authority
) -> None:
    thief = make_upstream(auth=TokenAuth(credentials=KNOWN))
    auth = TokenAuth(credentials=KNOWN, realm=f"{thief.url}/token")
    upstream = make_upstream(auth=auth, tls=authority.server_context())
    upstream.add("app", image("app"), tag="v1")
    server = mirror({"upstreams": [entry_of(upstream, authority)]})
    answer = server.manifest(upstream.registry, "app", "v1")
    assert refusal(answer) == DENIED
    assert thief.requests == []


@pytest.mark.parametrize(
    "realm", ["file:///etc/passwd", "ftp://127.0.0.1/token", "/token", "", "//x"]
)
def test_a_realm_that_is_no_web_address_gets_nothing(
    mirror: MakeMirror, make_upstream: MakeUpstream, realm: str
) -> None:
    upstream = make_upstream(auth=TokenAuth(credentials=KNOWN, realm=realm or " "))
    server = mirror({"upstreams": [entry_of(upstream)]})
    assert refusal(server.manifest(upstream.registry, "app", "v1")) == DENIED
    assert told(upstream) == []
    assert_quiet(server)


def test_a_realm_that_redirects_does_not_pass_the_password_on(
    mirror: MakeMirror, make_upstream: MakeUpstream
) -> None:
    thief = make_upstream(auth=TokenAuth())
    upstream = make_upstream(auth=TokenAuth(credentials=KNOWN))
    upstream.fault("/token", Fault(redirect=thief.url))
    server = mirror({"upstreams": [entry_of(upstream)]})
    server.manifest(upstream.registry, "app", "v1")
    assert thief.count("/token") == 1
    assert told(thief) == []


def test_one_upstream_s_password_is_not_another_s(
    mirror: MakeMirror, make_upstream: MakeUpstream
) -> None:
    """Neither a second listed upstream, nor one that claims the first one's realm, gets it."""
    first = make_upstream(auth=TokenAuth(credentials=KNOWN))
    second = make_upstream(auth=TokenAuth(realm=f"{first.url}/token"))
    second.add("app", image("app"), tag="v1")
    server = mirror({"upstreams": [entry_of(first), upstream_entry(second.url)]})
    assert refusal(server.manifest(second.registry, "app", "v1")) == DENIED
    assert told(first) == []
    assert told(second) == []


@pytest.mark.parametrize("hops", [3, 40], ids=["a chain", "a loop"])
def test_redirects_end(mirror: MakeMirror, make_upstream: MakeUpstream, hops: int) -> None:
    upstreams = [make_upstream(auth=None) for _ in range(3)]
    for each, following in zip(upstreams, [*upstreams[1:], upstreams[0]], strict=True):
        each.fault("/manifests/", Fault(redirect=following.url), times=hops // 3)
    upstreams[0].add("app", image("app"), tag="v1")
    server = mirror({"upstreams": [upstream_entry(upstreams[0].url)]})
    answer = server.manifest(upstreams[0].registry, "app", "v1")
    if hops == 3:
        assert answer.status == 200
    else:
        assert refusal(answer) == (502, "UNKNOWN")
        assert "redirects in circles" in answer.json()["errors"][0]["message"]
        assert sum(each.count() for each in upstreams) <= 12


@pytest.mark.parametrize("level", ["trace", "info"])
@pytest.mark.parametrize("style", ["text", "json"])
def test_no_log_line_error_or_process_list_shows_them(
    mirror: MakeMirror, make_upstream: MakeUpstream, tmp_path: Path, level: str, style: str
) -> None:
    tokens = TokenAuth(credentials=KNOWN)
    good, wrong = make_upstream(auth=tokens), make_upstream(auth=BasicAuth("x", "y"))
    good.add("app", image("app"), tag="v1")
    wrong.fault("/quoting/", Fault(status=403, body=None))
    secret_file = tmp_path / "secret"
    secret_file.write_text(PASSWORD, encoding="utf-8")
    helper = tmp_path / "bin" / "docker-credential-spy"
    helper.parent.mkdir()
    seen = tmp_path / "seen"
    helper.write_text(
        f"#!/bin/sh\ncat /proc/$PPID/cmdline /proc/$$/cmdline > {seen}\n"
        f'printf \'{{"Username":"{USER}","Secret":"{PASSWORD}"}}\'\n',
        encoding="utf-8",
    )
    helper.chmod(0o755)
    third = make_upstream(auth=BasicAuth("x", "y"))
    config = {
        "log": {"level": level, "format": style},
        "upstreams": [
            entry_of(good),
            upstream_entry(wrong.url, auth={"user": USER, "password_file": str(secret_file)}),
            upstream_entry(third.url, auth={"helper": "spy"}),
        ],
    }
    path = f"{helper.parent}:{os.environ['PATH']}"
    server = mirror(config, env={"PATH": path})
    answers = [
        server.manifest(good.registry, "app", "v1"),
        server.manifest(good.registry, "app", "missing"),
        server.manifest(wrong.registry, "app", "v1"),
        server.manifest(third.registry, "app", "v1"),
    ]
    assert [answer.status for answer in answers] == [200, 404, 403, 403], server.log()
    assert server.process is not None
    shown = [
        server.log(),
        seen.read_text(encoding="utf-8"),
        Path(f"/proc/{server.process.pid}/cmdline").read_text(encoding="utf-8"),
        *(f"{answer.headers}{answer.body!r}" for answer in answers),
        *(str(file) for file in server.store.rglob("*")),
    ]
    for file in server.store.rglob("*"):
        if file.is_file():
            shown.append(file.read_text(encoding="latin-1"))
    issued = [token for _, token in tokens.issued]
    assert issued
    for text in shown:
        for secret in (PASSWORD, ENCODED, *issued):
            assert secret not in text
    assert told(third)  # the helper's answer was used
    assert_quiet(server)


def test_a_signed_url_is_not_shown(mirror: MakeMirror, make_upstream: MakeUpstream) -> None:
    """Neither where the storage refuses it, nor where it answers what is hardly HTTP."""
    asked: list[bytes] = []

    def refuse(client: socket.socket) -> None:
        asked.append(client.recv(65536))
        client.sendall(b"HTTP/1.1 403 No\r\nno header\r\nX: s3cr3t\r\nContent-Length: 0\r\n\r\n")

    upstream, storage = make_upstream(), make_upstream()
    app = upstream.add("app", image("app"), tag="v1")
    storage.fault("", Fault(status=403))
    server = mirror({"upstreams": [upstream_entry(upstream.url)], "log": {"level": "trace"}})
    with raw_server(refuse) as name:
        for place, blob in zip((storage.url, f"http://{name}"), app.blobs, strict=True):
            signed = f"{place}/signed?X-Amz-Signature=s3cr3t&path="
            upstream.fault("/blobs/", Fault(redirect=signed))
            answer = server.blob(upstream.registry, "app", blob.digest)
            assert answer.status in (403, 502)
            assert b"s3cr3t" not in answer.body
    assert storage.requests != []
    assert b"s3cr3t" in asked[0]
    assert "s3cr3t" not in server.log()
    assert_quiet(server)


def test_a_url_with_a_password_is_refused_or_masked(mirror: MakeMirror, tmp_path: Path) -> None:
    """In `endpoint` it would end in messages; a broken file must not show secrets either."""
    entry = {"name": "registry.example", "endpoint": f"https://{USER}:{PASSWORD}@127.0.0.1:1"}
    for config in (
        {"upstreams": [entry]},
        {
            "upstreams": [
                {"name": "registry.example", "auth": {"user": USER, "password": [PASSWORD]}}
            ]
        },
        {"upstreams": [{"name": "registry.example", "auth": {"passwort": PASSWORD}}]},
        {"upstreams": [{"name": "registry.example", "auth": PASSWORD}]},
    ):
        with pytest.raises(AssertionError, match="ended with 2") as refused:
            mirror(config)
        assert PASSWORD not in str(refused.value)


def test_a_core_file_is_not_written(mirror: MakeMirror, make_upstream: MakeUpstream) -> None:
    """The memory of a crashed server holds passwords: nothing of it may be left on a disk."""
    server = mirror({"upstreams": [entry_of(make_upstream(auth=KNOWN))]})
    assert server.process is not None
    limits = Path(f"/proc/{server.process.pid}/limits").read_text(encoding="ascii")
    found = re.search(r"Max core file size +(\S+) +(\S+)", limits)
    assert found is not None
    assert found.groups() == ("0", "0")
