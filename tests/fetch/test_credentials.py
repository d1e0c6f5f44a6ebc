"""Where an upstream's credentials come from, with helpers that really run."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from ociproxy.config.settings import Auth, Secret
from ociproxy.errors import UpstreamDenied
from ociproxy.fetch import credential_helper
from ociproxy.fetch.credential_helper import run_helper
from ociproxy.fetch.credentials import Credentials
from ociproxy.fetch.credentials import credentials_for as credentials_by

EXPECTED = Credentials("me", Secret("s3cret"))

MakeHelper = Callable[[str, str], None]


def credentials_for(auth: Auth, registry: str, repository: str = "") -> Credentials | None:
    return credentials_by(auth, registry, run_helper, repository)


# Answers the one server it knows, as helpers do, and writes down how it was asked.
def knows(server: str, log: Path, user: str = "me") -> str:
    answer = json.dumps({"ServerURL": server, "Username": user, "Secret": "s3cret"})
    return (
        f'asked=$(cat); echo "$* $asked" >> {log}\n'
        f"if [ \"$asked\" = '{server}' ]; then echo '{answer}'; exit 0; fi\n"
        "echo 'credentials not found in native keychain'; exit 1"
    )


def docker_config(path: Path, **document: object) -> Auth:
    path.write_text(json.dumps(document))
    return Auth(docker_config=path)


def encoded(pair: str) -> dict[str, str]:
    return {"auth": base64.b64encode(pair.encode()).decode()}


def test_password_in_the_configuration() -> None:
    assert credentials_for(Auth(user="me", password=Secret("s3cret")), "quay.io") == EXPECTED


def test_password_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    auth = Auth(user="me", password_env="TOKEN")
    with pytest.raises(UpstreamDenied, match="environment variable TOKEN is not set"):
        credentials_for(auth, "quay.io")
    monkeypatch.setenv("TOKEN", "s3cret")
    assert credentials_for(auth, "quay.io") == EXPECTED


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number which no user has."""

    def no_user(number: int) -> NoReturn:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_user)
    with pytest.raises(UpstreamDenied, match="finds no home directory; set DOCKER_CONFIG"):
        credentials_for(Auth(docker_config=True), "quay.io")


def test_password_file_is_read_anew_each_time(tmp_path: Path) -> None:
    file = tmp_path / "password"
    auth = Auth(user="me", password_file=file)
    for content in ("old\n", "s3cret", "s3cret\r\n"):
        file.write_bytes(content.encode())
        found = credentials_for(auth, "quay.io")
        assert found == Credentials("me", Secret(content.strip()))


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), (b"\n", "is empty"), (b"\xff", "not UTF-8")]
)
def test_password_file_that_holds_no_password(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UpstreamDenied, match=reason):
        credentials_for(Auth(user="me", password_file=file), "quay.io")


@pytest.mark.parametrize(
    ("registry", "server"),
    [("quay.io", "quay.io"), ("docker.io", "https://index.docker.io/v1/"), ("a:1", "a:1")],
)
def test_helper_is_asked_by_stdin(
    make_helper: MakeHelper, tmp_path: Path, registry: str, server: str
) -> None:
    log = tmp_path / "log"
    make_helper("fake", knows(server, log))
    assert credentials_for(Auth(helper="fake"), registry) == EXPECTED
    assert log.read_text() == f"get {server}\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'credentials not found in native keychain'; exit 1", "has no credentials for it"),
        ("echo s3cret; exit 3", "failed with exit status 3"),
        ("echo s3cret", "gave no Username and Secret"),
        ("echo '[\"s3cret\"]'", "gave no Username and Secret"),
        ('echo \'{"Username": "<token>", "Secret": "s3cret"}\'', "identity token"),
        ("exit 0", "gave no Username and Secret"),
    ],
)
def test_helper_that_fails_is_told_without_its_output(
    make_helper: MakeHelper, script: str, reason: str
) -> None:
    make_helper("fake", script)
    with pytest.raises(UpstreamDenied, match=reason) as caught:
        credentials_for(Auth(helper="fake"), "quay.io")
    assert "s3cret" not in str(caught.value)
    assert "docker-credential-fake" in str(caught.value)
    assert caught.value.__cause__ is None


def test_helper_that_is_not_installed() -> None:
    with pytest.raises(UpstreamDenied, match="docker-credential-nope cannot be run: No such file"):
        credentials_for(Auth(helper="nope"), "quay.io")


def test_helper_that_hangs_is_ended_with_what_it_started(
    make_helper: MakeHelper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credential_helper, "_RUN_LIMIT", 0.3)
    child = tmp_path / "child"
    # The child keeps the pipe open after the helper itself has ended.
    make_helper("slow", f"sleep 60 & echo $! > {child}")
    started = time.monotonic()
    with pytest.raises(UpstreamDenied, match=r"took longer than 0\.3 s"):
        credentials_for(Auth(helper="slow"), "quay.io")
    assert time.monotonic() - started < 5
    assert not running(int(child.read_text()))


def running(pid: int) -> bool:
    """Whether the process ends within a second is all that is asked; a zombie has ended."""
    for _ in range(20):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("key", "registry"),
    [
        ("quay.io", "quay.io"),
        ("https://quay.io", "quay.io"),
        ("https://quay.io/v2/", "quay.io"),
        ("quay.io/", "quay.io"),
        ("http://quay.io/some/path/", "quay.io"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
        ("localhost:5000", "localhost:5000"),
    ],
)
def test_docker_config_auths(tmp_path: Path, key: str, registry: str) -> None:
    auth = docker_config(tmp_path / "config.json", auths={key: encoded("me:s3cret")})
    assert credentials_for(auth, registry) == EXPECTED
    assert credentials_for(auth, "ghcr.io") is None


def test_docker_config_of_one_repository_is_not_the_registrys(tmp_path: Path) -> None:
    auth = docker_config(tmp_path / "c", auths={"quay.io/team/": encoded("me:s3cret")})
    assert credentials_for(auth, "quay.io") is None
    assert credentials_for(auth, "quay.io", "teams/app") is None
    assert credentials_for(auth, "quay.io", "team/app") == EXPECTED
    assert credentials_for(auth, "quay.io", "team") == EXPECTED


def test_docker_config_with_a_key_for_a_repository_takes_the_narrowest(tmp_path: Path) -> None:
    auth = docker_config(
        tmp_path / "config.json",
        auths={
            "https://quay.io/v1/": encoded("spelling:x"),
            "quay.io": encoded("registry:x"),
            "quay.io/team": encoded("team:x"),
            "quay.io/team/app": encoded("app:x"),
        },
    )
    users = [
        found.user
        for name in ("other/app", "team/other", "team/app", "team/app/part", "team/application")
        if (found := credentials_for(auth, "quay.io", name)) is not None
    ]
    assert users == ["registry", "team", "app", "app", "team"]


def test_docker_config_whose_base64_has_line_breaks(tmp_path: Path) -> None:
    user, password = "robot", "p" * 80
    text = base64.encodebytes(f"{user}:{password}".encode()).decode().replace("\n", "\r\n", 1)
    assert text.count("\n") == 2
    auth = docker_config(tmp_path / "c", auths={"quay.io": {"auth": text}})
    assert credentials_for(auth, "quay.io") == Credentials(user, Secret(password))


def test_docker_config_in_its_usual_places(
    clean_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auth = Auth(docker_config=True)
    with pytest.raises(UpstreamDenied, match=r"\.docker/config\.json cannot be read"):
        credentials_for(auth, "quay.io")
    (clean_environment / ".docker").mkdir()
    docker_config(
        clean_environment / ".docker" / "config.json", auths={"quay.io": encoded("home:x")}
    )
    found = credentials_for(auth, "quay.io")
    assert found is not None
    assert found.user == "home"
    docker_config(tmp_path / "config.json", auths={"quay.io": encoded("me:s3cret")})
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert credentials_for(auth, "quay.io") == EXPECTED


def test_docker_config_asks_the_registrys_helper_before_the_store(
    make_helper: MakeHelper, tmp_path: Path
) -> None:
    make_helper("one", knows("quay.io", tmp_path / "one"))
    make_helper("all", knows("ghcr.io", tmp_path / "all"))
    auth = docker_config(
        tmp_path / "config.json",
        credHelpers={"quay.io": "one"},
        credsStore="all",
        auths={"quay.io": encoded("wrong:x"), "gcr.io": encoded("me:s3cret")},
    )
    assert credentials_for(auth, "quay.io") == EXPECTED
    assert credentials_for(auth, "ghcr.io") == EXPECTED
    assert credentials_for(auth, "gcr.io") == EXPECTED
    assert credentials_for(auth, "nvcr.io") is None
    assert (tmp_path / "one").read_text() == "get quay.io\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("s3cret", "is not JSON"),
        ('{"auths": {"quay.io": {"auth": "s3cret!"}}}', "not base64"),
        ('{"auths": {"quay.io": {"auth": 5}}}', "not base64"),
        ('{"auths": {"quay.io": "s3cret"}}', "something else than an entry"),
        ('{"auths": {"quay.io": {"identitytoken": "s3cret"}}}', "identity token"),
        ('{"credsStore": "../s3"}', "names no usable helper"),
        ('{"credsStore": ["x"]}', "names no usable helper"),
    ],
)
def test_docker_config_that_is_broken(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(UpstreamDenied, match=reason) as caught:
        credentials_for(Auth(docker_config=file), "quay.io")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"auths": []}', '{"auths": {"quay.io": {}}}'])
def test_docker_config_without_an_entry_is_anonymous(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    assert credentials_for(Auth(docker_config=file), "quay.io") is None
