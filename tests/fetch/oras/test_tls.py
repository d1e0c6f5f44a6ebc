"""TLS to an upstream, in every way a config can ask for it; finding out whether there is any."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ociproxy.config.settings import Tls, Upstream
from ociproxy.errors import UpstreamUnavailable, UpstreamUntrusted
from ociproxy.fetch.oras.session import _default_context, open_session, tls_context
from ociproxy.oci.reference import Reference
from tests.fetch.conftest import TIMEOUTS, OpenBackend
from tests.fetch.contract import digest, read_all, reference, repository
from tests.fetch.peers import raw_server
from tests.fetch.tls import Authority
from tests.images import image, random_blob
from tests.upstream import FakeUpstream
from tests.upstream_auth import TokenAuth
from tests.upstream_faults import Fault

# TLS


@pytest.fixture(params=["system", "given", "unverified"])
def trust(
    request: pytest.FixtureRequest, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Tls:
    """The three ways to look at a server's certificate."""
    if request.param == "system":
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        return Tls()
    return Tls(ca=authority.ca) if request.param == "given" else Tls(insecure_skip_verify=True)


def test_one_way_tls(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    authority: Authority,
    trust: Tls,
) -> None:
    upstream = make_upstream(tls=authority.server())
    top = upstream.add("team/app", image(), tag="v1").top
    blob = upstream.add_content("team/app", random_blob(300_000))
    backend = open_backend(upstream, tls=trust)
    assert backend.fetch_manifest(reference(upstream)).raw == top.data
    assert read_all(backend.open_blob(repository(upstream), digest(blob), start=7)) == blob.data[7:]


def test_abort_under_tls(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server())
    blob = upstream.add_content("team/app", random_blob(300_000))
    upstream.fault("/blobs/", Fault(stall_after=100_000))
    backend = open_backend(upstream, tls=Tls(ca=authority.ca), timeouts=replace(TIMEOUTS, stall=30))
    stream = backend.open_blob(repository(upstream), digest(blob))
    timer = threading.Timer(0.2, stream.abort)
    timer.start()
    started = time.monotonic()
    with pytest.raises(UpstreamUnavailable, match="aborted"):
        read_all(stream)
    timer.join()
    assert time.monotonic() - started < 2


def test_mutual_tls(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    authority: Authority,
    other_authority: Authority,
    trust: Tls,
) -> None:
    upstream = make_upstream(tls=authority.server(clients=other_authority))
    top = upstream.add("team/app", image(), tag="v1").top
    cert, key = other_authority.client()
    backend = open_backend(upstream, tls=replace(trust, cert=cert, key=key))
    assert backend.fetch_manifest(reference(upstream)).raw == top.data
    stranger, its_key = authority.client("stranger")
    for refused in (trust, replace(trust, cert=stranger, key=its_key)):
        with pytest.raises((UpstreamUntrusted, UpstreamUnavailable)):
            open_backend(upstream, tls=refused).fetch_manifest(reference(upstream))


def test_a_client_certificate_is_shown_to_the_upstream_and_its_token_service_alone(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    optional = authority.server("127.0.0.1", "127.0.0.2", clients=authority)
    optional.verify_mode = ssl.CERT_OPTIONAL
    tokens, storage_tokens = TokenAuth(), TokenAuth()
    realm = make_upstream(tls=optional, auth=tokens)
    other_realm = make_upstream(host="127.0.0.2", tls=optional, auth=storage_tokens)
    tokens.realm, storage_tokens.realm = f"{realm.url}/token", f"{other_realm.url}/token"
    upstream = make_upstream(tls=authority.server(clients=authority), auth=tokens)
    storage = make_upstream(tls=optional, auth=storage_tokens)
    blob = storage.add_content("team/app", random_blob(1000))
    upstream.add("team/app", image(), tag="v1")
    upstream.fault("/blobs/", Fault(redirect=storage.url))
    cert, key = authority.client()
    backend = open_backend(upstream, tls=Tls(ca=authority.ca, cert=cert, key=key))
    backend.fetch_manifest(reference(upstream))
    assert read_all(backend.open_blob(repository(upstream), digest(blob))) == blob.data
    shown = {
        name: {request.certificate for request in server.requests}
        for name, server in (
            ("upstream", upstream),
            ("its token service", realm),
            ("storage", storage),
            ("the storage's token service", other_realm),
        )
    }
    assert shown == {
        "upstream": {True},
        "its token service": {True},
        "storage": {False},
        "the storage's token service": {False},
    }


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_missing_client_certificate_is_said(
    open_backend: OpenBackend,
    authority: Authority,
    other_authority: Authority,
    version: ssl.TLSVersion,
) -> None:
    context = authority.server(clients=other_authority)
    context.minimum_version = context.maximum_version = version

    def handshake(client: socket.socket) -> None:
        secure = context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        with contextlib.suppress(ssl.SSLError):
            secure.do_handshake()
        # Closing with unread bytes resets the connection, and a reset can overtake the alert.
        with socket.socket(fileno=secure.detach()) as bare:
            bare.shutdown(socket.SHUT_WR)
            while bare.recv(4096):
                pass

    with raw_server(handshake) as name:
        backend = open_backend(name, tls=Tls(ca=authority.ca))
        with pytest.raises(UpstreamUntrusted, match="client certificate"):
            backend.fetch_manifest(Reference.parse(f"{name}/team/app:v1"))


def test_unknown_authority(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    authority: Authority,
    other_authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream = make_upstream(tls=authority.server())
    # What requests would look into, and we do not.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.ca))
    monkeypatch.setenv("CURL_CA_BUNDLE", str(authority.ca))
    for tls in (Tls(), Tls(ca=other_authority.ca)):
        with pytest.raises(UpstreamUntrusted, match="certificate verify failed"):
            open_backend(upstream, tls=tls).fetch_manifest(reference(upstream))
    # A given authority replaces the system's.
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    with pytest.raises(UpstreamUntrusted):
        open_backend(upstream, tls=Tls(ca=other_authority.ca)).resolve(reference(upstream))
    assert upstream.count() == 0


def test_no_other_certificate_is_trusted_after_a_request(
    make_upstream: Callable[..., FakeUpstream],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    upstream = make_upstream(tls=authority.server())
    session = open_session(Upstream(name=upstream.registry), connections=1)
    assert session.get(f"{upstream.url}/v2/").status_code == 200
    context = session.get_adapter(upstream.url)._context()  # type: ignore[attr-defined]
    assert len(context.get_ca_certs()) == 1
    session.close()


def test_the_trust_store_is_not_read_for_plain_http_until_a_redirect_needs_it(
    make_upstream: Callable[..., FakeUpstream],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    plain, secure = make_upstream(), make_upstream(tls=authority.server())
    _default_context.cache_clear()
    session = open_session(Upstream(name=plain.registry, scheme="http"), connections=1)
    assert session.get(f"{plain.url}/v2/").status_code == 200
    assert _default_context.cache_info().currsize == 0
    assert session.get(f"{secure.url}/v2/").status_code == 200
    assert _default_context.cache_info().currsize == 1
    session.close()


def test_certificate_of_another_name(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server("registry.example"))
    with pytest.raises(UpstreamUntrusted, match="certificate verify failed: IP address mismatch"):
        open_backend(upstream, tls=Tls(ca=authority.ca)).fetch_manifest(reference(upstream))


def test_plain_http_where_tls_is_configured(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    with pytest.raises(
        UpstreamUnavailable,
        match="TLS failed: wrong version number; plain HTTP needs `scheme: http`",
    ) as caught:
        open_backend(upstream, scheme="https").fetch_manifest(reference(upstream))
    assert caught.value.unreachable


def test_certificate_files_that_are_none(tmp_path: Path, authority: Authority) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    cert, _ = authority.client("a")
    _, other_key = authority.client("b")
    for tls in (
        Tls(ca=nonsense),
        Tls(ca=tmp_path / "missing.pem"),
        Tls(cert=nonsense, key=nonsense),
        Tls(cert=cert, key=other_key),
    ):
        with pytest.raises(UpstreamUntrusted, match=re.escape(str(tls.ca or tls.cert))):
            tls_context(tls, "registry.example")


# Scheme


def test_auto_finds_https(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server())
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, scheme="auto", tls=Tls(ca=authority.ca))
    backend.fetch_manifest(reference(upstream))
    upstream.stop_listening()
    with pytest.raises(UpstreamUnavailable):
        backend.fetch_manifest(reference(upstream))


def test_auto_does_not_fall_back_from_a_bad_certificate(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server())
    with pytest.raises(UpstreamUntrusted):
        open_backend(upstream, scheme="auto").fetch_manifest(reference(upstream))


def test_auto_does_not_fall_back_from_a_late_answer(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    upstream = make_upstream(tls=authority.server())
    upstream.fault("", Fault(delay=20))
    timeouts = replace(TIMEOUTS, headers=0.3)
    backend = open_backend(upstream, scheme="auto", tls=Tls(ca=authority.ca), timeouts=timeouts)
    with pytest.raises(UpstreamUnavailable, match="waiting for headers"):
        backend.fetch_manifest(reference(upstream))
    assert upstream.count() == 1


def test_auto_finds_plain_http_once(upstream: FakeUpstream, open_backend: OpenBackend) -> None:
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, scheme="auto")
    for _ in range(2):
        backend.fetch_manifest(reference(upstream))
    assert [request.path for request in upstream.requests].count("/v2/") == 1


def test_auto_looks_again_where_nothing_answered(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, scheme="auto")
    upstream.stop_listening()
    with pytest.raises(UpstreamUnavailable, match="connection refused"):
        backend.fetch_manifest(reference(upstream))
    upstream.listen_again()
    backend.fetch_manifest(reference(upstream))
