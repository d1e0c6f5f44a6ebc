"""Challenges, tokens and passwords: who gets which, and who does not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ociproxy.config.settings import Auth, Secret, Tls
from ociproxy.errors import (
    ManifestUnknown,
    OciProxyError,
    UpstreamDenied,
    UpstreamForbidden,
    UpstreamRateLimited,
    UpstreamUnavailable,
)
from tests.fetch.conftest import OpenBackend
from tests.fetch.contract import digest, read_all, reference, repository
from tests.fetch.tls import Authority
from tests.images import image, random_blob
from tests.upstream import FakeUpstream
from tests.upstream_auth import BasicAuth, TokenAuth
from tests.upstream_faults import HTML, Fault, too_many_requests

ALICE = BasicAuth("alice", "wonder:land")
ALICE_AUTH = Auth(user="alice", password=Secret("wonder:land"))


def authorizations(upstream: FakeUpstream, path: str = "/v2/") -> list[str]:
    return [request.headers.get("Authorization", "") for request in upstream.seen(path)]


# Tokens


def test_docker_config_with_an_entry_for_each_repository(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, tmp_path: Path
) -> None:
    upstream = make_upstream(auth=TokenAuth())
    upstream.protect("team/one", BasicAuth("one", "1"))
    upstream.protect("team/two", BasicAuth("two", "2"))
    file = tmp_path / "config.json"
    auths = {
        f"{upstream.registry}/team/{user}": {"username": user, "password": password}
        for user, password in (("one", "1"), ("two", "2"))
    }
    file.write_text(json.dumps({"auths": auths}))
    backend = open_backend(upstream, auth=Auth(docker_config=file))
    for name in ("team/one", "team/two"):
        upstream.add(name, image(), tag="v1")
        backend.fetch_manifest(reference(upstream, f"{name}:v1"))


@pytest.mark.parametrize("answer_as", ["token", "access_token"])
@pytest.mark.parametrize("say_expires_in", [True, False])
def test_anonymous_token_is_asked_for_once(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    answer_as: str,
    say_expires_in: bool,
) -> None:
    auth = TokenAuth(answer_as=answer_as, say_expires_in=say_expires_in)  # type: ignore[arg-type]
    upstream = make_upstream(auth=auth)
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream)
    for _ in range(3):
        backend.resolve(reference(upstream))
        backend.fetch_manifest(reference(upstream))
    assert [request.status for request in upstream.seen("/v2/")] == [401] + [200] * 6
    (asked,) = upstream.seen("/token")
    assert "Authorization" not in asked.headers
    assert "scope=repository%3Ateam%2Fapp%3Apull" in asked.query.replace(":", "%3A").replace(
        "/", "%2F"
    )


def test_each_repository_has_a_token_of_its_own(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=TokenAuth())
    backend = open_backend(upstream)
    for name in ("team/one", "team/two"):
        upstream.add(name, image(), tag="v1")
    for _ in range(2):
        for name in ("team/one", "team/two"):
            backend.fetch_manifest(reference(upstream, f"{name}:v1"))
    for name, other in (("team/one", "team.two"), ("team/two", "team.one")):
        assert not any(other in sent for sent in authorizations(upstream, name))
    assert upstream.count("/token") == 2


def test_token_for_the_password(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=TokenAuth(credentials=ALICE))
    upstream.add("team/app", image(), tag="v1")
    open_backend(upstream, auth=ALICE_AUTH).fetch_manifest(reference(upstream))
    assert not any(sent.startswith("Basic") for sent in authorizations(upstream))
    with pytest.raises(UpstreamDenied) as caught:
        open_backend(upstream).fetch_manifest(reference(upstream))
    assert caught.value.status == 401
    assert str(caught.value).endswith("; it was asked without credentials")
    wrong = Auth(user="alice", password=Secret("no"))
    with pytest.raises(UpstreamDenied, match="; it does not accept the mirror's credentials"):
        open_backend(upstream, auth=wrong).fetch_manifest(reference(upstream))


def test_token_that_expires_between_requests(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    auth = TokenAuth()
    upstream = make_upstream(auth=auth)
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream)
    backend.fetch_manifest(reference(upstream))
    auth.expire_all()
    backend.fetch_manifest(reference(upstream))
    assert [request.status for request in upstream.seen("/v2/")] == [401, 200, 401, 200]
    assert upstream.count("/token") == 2


def test_token_is_renewed_before_it_expires(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=TokenAuth(expires_in=1))
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream)
    backend.fetch_manifest(reference(upstream))
    time.sleep(0.9)
    backend.fetch_manifest(reference(upstream))
    assert [request.status for request in upstream.seen("/v2/")] == [401, 200, 200]
    assert upstream.count("/token") == 2


@pytest.mark.parametrize("life", ["9" * 400, "1e999", "NaN"])
def test_token_that_lives_for_no_time_of_a_clock(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, life: str
) -> None:
    upstream = make_upstream(auth=TokenAuth())
    upstream.add("team/app", image(), tag="v1")
    upstream.fault("/token", Fault(body=b'{"token": "x", "expires_in": %s}' % life.encode()))
    with pytest.raises(UpstreamDenied):
        open_backend(upstream).fetch_manifest(reference(upstream))


def test_token_nobody_accepts_is_asked_for_once(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=TokenAuth(expires_in=0))
    upstream.add("team/app", image(), tag="v1")
    with pytest.raises(UpstreamDenied):
        open_backend(upstream).fetch_manifest(reference(upstream))
    assert (upstream.count("/v2/"), upstream.count("/token")) == (2, 1)


def test_forbidden_with_a_fresh_token_is_final(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    upstream.add("team/app", image(), tag="v1")
    upstream.protect("team/app", TokenAuth())
    backend = open_backend(upstream)
    backend.fetch_manifest(reference(upstream))
    upstream.fail_next(1, 403, path="/manifests/")
    backend.fetch_manifest(reference(upstream))
    assert [request.status for request in upstream.seen("/v2/")] == [401, 200, 403, 200]
    upstream.fault("/manifests/", Fault(status=403))
    with pytest.raises(UpstreamDenied) as caught:
        backend.fetch_manifest(reference(upstream))
    assert caught.value.status == 403
    assert upstream.count("/v2/") == 6


def test_threads_wait_for_one_token(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=TokenAuth())
    upstream.add("team/app", image(), tag="v1")
    upstream.fault("/token", Fault(delay=0.2))
    backend = open_backend(upstream)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(backend.resolve, [reference(upstream)] * 12))
    assert len(found) == 12
    assert upstream.count("/token") == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(status=500), UpstreamUnavailable),
        (Fault(status=403), UpstreamDenied),
        (too_many_requests("9"), UpstreamRateLimited),
        (Fault(drop=True), UpstreamUnavailable),
        (Fault(redirect="ftp://example.org"), UpstreamForbidden),
        (Fault(body=b'{"token": "SECRET\\nREST"}'), UpstreamUnavailable),
        (Fault(body=b'{"token": "a\\n X-Injected: 1"}'), UpstreamUnavailable),
    ],
)
def test_realm_in_trouble(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    fault: Fault,
    error: type[OciProxyError],
) -> None:
    upstream = make_upstream(auth=TokenAuth())
    upstream.add("team/app", image(), tag="v1")
    upstream.fault("/token", fault)
    with pytest.raises(error):
        open_backend(upstream).fetch_manifest(reference(upstream))


@pytest.mark.parametrize(
    ("realm", "error"),
    [
        ("", UpstreamDenied),
        ("/token", UpstreamDenied),
        ("file:///etc/passwd", UpstreamDenied),
        ("{url}/v2/", UpstreamUnavailable),
        ("{url}/v2/page/manifests/v1", UpstreamUnavailable),
    ],
)
def test_realm_that_is_none(
    upstream: FakeUpstream, open_backend: OpenBackend, realm: str, error: type[OciProxyError]
) -> None:
    upstream.add("page", image(), tag="v1")
    upstream.fault("/v2/page/", HTML)
    upstream.add("team/app", image(), tag="v1")
    realm = realm.format(url=upstream.url) or " "
    upstream.protect("team/app", TokenAuth(realm=realm))
    with pytest.raises(error):
        open_backend(upstream).fetch_manifest(reference(upstream))


def test_realm_keeps_its_own_query(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream()
    upstream.protect("team/app", TokenAuth(realm=f"{upstream.url}/token?account=x&a=b"))
    upstream.add("team/app", image(), tag="v1")
    open_backend(upstream).fetch_manifest(reference(upstream))
    (asked,) = upstream.seen("/token")
    assert asked.query.startswith("account=x&a=b&service=fake.example&scope=")


def test_scope_where_the_challenge_names_none(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    challenge = f'Bearer realm="{upstream.url}/token",service="s"'
    upstream.fault("/manifests/", Fault(status=401, headers={"WWW-Authenticate": challenge}))
    for changes in ({}, {"endpoint": f"{upstream.url}/hub"}):
        with pytest.raises(OciProxyError):
            open_backend(upstream, **changes).fetch_manifest(reference(upstream))
    scopes = [request.query.partition("scope=")[2] for request in upstream.seen("/token")]
    assert scopes == ["repository:team/app:pull", "repository:hub/team/app:pull"]


# Passwords


def test_basic(make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend) -> None:
    upstream = make_upstream(auth=ALICE)
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, auth=ALICE_AUTH)
    for _ in range(2):
        backend.fetch_manifest(reference(upstream))
    assert [request.status for request in upstream.requests] == [401, 200, 200]


def test_basic_that_is_not_accepted_is_sent_once(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=ALICE)
    wrong = open_backend(upstream, auth=Auth(user="alice", password=Secret("no")))
    for requests in (2, 3):
        with pytest.raises(UpstreamDenied) as caught:
            wrong.fetch_manifest(reference(upstream))
        assert "no" not in str(caught.value).split()
        assert upstream.count() == requests
    with pytest.raises(UpstreamDenied):
        open_backend(upstream).fetch_manifest(reference(upstream))


def test_rotated_password_is_found(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, tmp_path: Path
) -> None:
    upstream = make_upstream(auth=ALICE)
    upstream.add("team/app", image(), tag="v1")
    file = tmp_path / "password"
    file.write_text("old\n")
    backend = open_backend(upstream, auth=Auth(user="alice", password_file=file))
    with pytest.raises(UpstreamDenied):
        backend.fetch_manifest(reference(upstream))
    file.write_text("wonder:land\n")
    backend.fetch_manifest(reference(upstream))


@pytest.fixture
def rotating(make_helper: Callable[[str, str], None], tmp_path: Path) -> Path:
    """A helper `fake`, for alice; the file that holds the password it gives."""
    password = tmp_path / "password"
    answer = '"{\\"Username\\": \\"alice\\", \\"Secret\\": \\"$(cat ' + f"{password}" + ')\\"}"'
    make_helper("fake", f"echo run >> {tmp_path}/runs; echo {answer}")
    return password


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("scheme", ["basic", "bearer"])
def test_what_a_helper_said_is_replaced_when_it_is_refused(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    rotating: Path,
    scheme: str,
    status: int,
) -> None:
    """As with ECR, whose password is good for 12 hours; it answers 403 after that."""
    old, new = BasicAuth("alice", "old"), BasicAuth("alice", "new")
    tokens = TokenAuth(credentials=old)
    rotating.write_text("old")
    upstream = make_upstream(auth=old if scheme == "basic" else tokens)
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, auth=Auth(helper="fake", lifetime=3600.0))
    backend.fetch_manifest(reference(upstream))
    rotating.write_text("new")
    if scheme == "basic":
        upstream.protect("team/app", new)
    tokens.credentials = new
    tokens.expire_all()
    if status == 403 and scheme == "basic":
        upstream.fault("/manifests/", Fault(status=403), times=1)
    for _ in range(3):
        backend.fetch_manifest(reference(upstream))
    assert (rotating.parent / "runs").read_text() == "run\nrun\n"


def test_a_helper_whose_answers_are_refused_is_not_run_for_every_request(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, rotating: Path
) -> None:
    rotating.write_text("wrong")
    upstream = make_upstream(auth=BasicAuth("alice", "right"))
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, auth=Auth(helper="fake", lifetime=3600.0))
    for _ in range(5):
        with pytest.raises(UpstreamDenied):
            backend.fetch_manifest(reference(upstream))
    assert (rotating.parent / "runs").read_text() == "run\nrun\n"


def test_netrc_is_never_read(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    clean_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    netrc = clean_environment / ".netrc"
    netrc.write_text("default login eve password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    storage = make_upstream(host="127.0.0.2")
    blob = storage.add_content("team/app", random_blob(10))
    upstream = make_upstream(auth=TokenAuth())
    upstream.add_content("team/app", blob)
    upstream.fault("/blobs/", Fault(redirect=storage.url))
    read_all(open_backend(upstream).open_blob(repository(upstream), digest(blob)))
    sent = authorizations(upstream, "") + authorizations(storage, "")
    assert not any(each.startswith("Basic") for each in sent)


@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.0.1"])
@pytest.mark.parametrize("auth", [ALICE, TokenAuth(credentials=ALICE)])
def test_redirect_to_another_host_or_port_takes_nothing_along(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    auth: BasicAuth | TokenAuth,
    host: str,
) -> None:
    upstream, storage = make_upstream(), make_upstream(host=host)
    blob = storage.add_content("team/app", random_blob(10))
    upstream.add("team/app", image(), tag="v1")
    upstream.protect("team/app", auth)
    upstream.fault("/blobs/", Fault(redirect=storage.url))
    backend = open_backend(upstream, auth=ALICE_AUTH)
    backend.fetch_manifest(reference(upstream))
    read_all(backend.open_blob(repository(upstream), digest(blob)))
    assert authorizations(upstream)[-1]
    assert authorizations(storage) == [""]


@pytest.mark.parametrize("auth", [ALICE, TokenAuth(credentials=ALICE)])
def test_a_redirects_target_that_wants_a_password_is_not_given_it(
    make_upstream: Callable[..., FakeUpstream],
    open_backend: OpenBackend,
    auth: BasicAuth | TokenAuth,
) -> None:
    upstream = make_upstream()
    storage = make_upstream(host="127.0.0.2", auth=auth)
    blob = storage.add_content("team/app", random_blob(10))
    upstream.fault("/blobs/", Fault(redirect=storage.url))
    with pytest.raises(UpstreamDenied):
        open_backend(upstream, auth=ALICE_AUTH).open_blob(repository(upstream), digest(blob))
    assert set(authorizations(storage, "")) == {""}


def test_a_blob_in_another_registry_is_fetched_with_an_anonymous_token_of_that_one(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    issuer = TokenAuth()
    upstream = make_upstream(auth=ALICE)
    storage = make_upstream(host="127.0.0.2", auth=issuer)
    blobs = [storage.add_content("team/app", random_blob(1000, seed=each)) for each in "abc"]
    upstream.fault("/blobs/", Fault(redirect=storage.url))
    backend = open_backend(upstream, auth=ALICE_AUTH)
    for blob in blobs:
        stream = backend.open_blob(repository(upstream), digest(blob), start=100)
        assert read_all(stream) == blob.data[100:]
    assert backend.stat_blob(repository(upstream), digest(blobs[0])) == 1000
    assert storage.count("/token") == 1
    # Neither registry sees what the other one gave out.
    tokens = {f"Bearer {token}" for _, token in issuer.issued}
    assert set(authorizations(storage, "")) == {"", *tokens}
    assert not tokens & set(authorizations(upstream, ""))
    issuer.expire_all()
    assert read_all(backend.open_blob(repository(upstream), digest(blobs[0]))) == blobs[0].data
    assert storage.count("/token") == 2


# Challenges that are hard to find


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_the_password_is_used_where_v2_alone_challenges(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, status: int
) -> None:
    upstream = make_upstream(auth=TokenAuth(credentials=ALICE, silent=status))
    held = upstream.add("team/app", image(), tag="v1")
    upstream.add("team/other", image(), tag="v1")
    backend = open_backend(upstream, auth=ALICE_AUTH)
    for name in ("team/app:v1", "team/other:v1"):
        backend.resolve(reference(upstream, name))
        backend.fetch_manifest(reference(upstream, name))
    blob = held.blobs[0]
    assert read_all(backend.open_blob(repository(upstream), digest(blob))) == blob.data
    backend.fetch_listing(repository(upstream), "tags/list", "")
    with pytest.raises(ManifestUnknown):
        backend.resolve(reference(upstream, "team/app:v2"))
    assert sum(request.path == "/v2/" for request in upstream.requests) == 1
    assert upstream.count("/token") == 2


def test_without_credentials_an_unknown_tag_is_asked_for_once(
    upstream: FakeUpstream, open_backend: OpenBackend
) -> None:
    with pytest.raises(ManifestUnknown):
        open_backend(upstream).fetch_manifest(reference(upstream))
    assert [request.path for request in upstream.requests] == ["/v2/team/app/manifests/v1"]


def test_lists_and_manifests_asked_at_once_get_tokens_of_their_own_scopes(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=TokenAuth(list_action="metadata_read"))
    upstream.add("team/app", image(), tag="v1")
    upstream.fault("/token", Fault(delay=0.2))
    backend = open_backend(upstream)

    def ask(number: int) -> object:
        if number % 2:
            return backend.fetch_listing(repository(upstream), "tags/list", "")
        return backend.fetch_manifest(reference(upstream))

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(ask, range(128)))
    assert upstream.count("/token") == 2


def test_https_upstream_with_a_plain_realm_gets_no_password(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    realm = make_upstream(host="127.0.0.2")
    upstream = make_upstream(
        tls=authority.server(), auth=TokenAuth(realm=f"{realm.url}/token", credentials=ALICE)
    )
    upstream.add("team/app", image(), tag="v1")
    secure = {"scheme": "https", "tls": Tls(ca=authority.ca)}
    with pytest.raises(UpstreamForbidden, match="plain HTTP"):
        open_backend(upstream, auth=ALICE_AUTH, **secure).fetch_manifest(reference(upstream))
    assert realm.count() == 0


def test_realm_on_another_host_over_https_gets_the_password(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend, authority: Authority
) -> None:
    auth = TokenAuth(credentials=ALICE)
    realm = make_upstream(tls=authority.server(), auth=auth, host="127.0.0.1")
    auth.realm = f"{realm.url}/token"
    upstream = make_upstream(tls=authority.server(), auth=auth)
    upstream.add("team/app", image(), tag="v1")
    backend = open_backend(upstream, auth=ALICE_AUTH, scheme="https", tls=Tls(ca=authority.ca))
    backend.fetch_manifest(reference(upstream))
    assert [each.partition(" ")[0] for each in authorizations(realm, "/token")] == ["Basic"]


def test_auto_never_sends_the_password_over_plain_http(
    make_upstream: Callable[..., FakeUpstream], open_backend: OpenBackend
) -> None:
    upstream = make_upstream(auth=ALICE)
    backend = open_backend(upstream, auth=ALICE_AUTH, scheme="auto")
    with pytest.raises(UpstreamDenied):
        backend.fetch_manifest(reference(upstream))
    assert set(authorizations(upstream, "")) == {""}


def test_cookies_are_not_kept(upstream: FakeUpstream, open_backend: OpenBackend) -> None:
    upstream.add("team/app", image(), tag="v1")
    upstream.fault("/manifests/", Fault(headers={"Set-Cookie": "session=1; Path=/"}))
    backend = open_backend(upstream)
    for _ in range(2):
        backend.fetch_manifest(reference(upstream))
    assert not any("Cookie" in request.headers for request in upstream.requests)
