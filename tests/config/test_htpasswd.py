"""The htpasswd file: which lines are users, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociproxy.config.file import ConfigFileInvalid, parse_config
from ociproxy.config.htpasswd import read_htpasswd
from ociproxy.errors import ConfigError

HASH = "$2y$05$" + "a" * 53


def written(folder: Path, text: str) -> Path:
    path = folder / "users"
    path.write_text(text, encoding="utf-8")
    return path


def test_users_comments_and_empty_lines(tmp_path: Path) -> None:
    text = f"# people\n\nalice:{HASH}\r\n  bob:{HASH.replace('2y', '2b')}  \nzoë:{HASH}"
    users = read_htpasswd(written(tmp_path, text))
    assert list(users) == [b"alice", b"bob", "zoë".encode()]
    assert users[b"alice"] == HASH.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"alice:{HASH}\nbob\n", ":2: not USER:HASH"),
        (f":{HASH}", ":1: not USER:HASH"),
        ("alice:s3cret", ":1: not a bcrypt hash: make it with htpasswd -B"),
        ("alice:$apr1$rsE.a$kQq7WlHsZzKxXr0.S3cret", ":1: not a bcrypt hash"),
        ("alice:{SHA}S3cret=", ":1: not a bcrypt hash"),
        (f"alice:{HASH}s3cret", ":1: not a bcrypt hash"),
        (f"alice:{HASH.replace('$05$', '$31$')}", ":1: a bcrypt cost of 31: it must be 4 to 15"),
        (f"alice:{HASH}\n\nalice:{HASH}", ":3: a user that an earlier line has"),
        ("# nobody\n", ": no user in it"),
        ("x" * (1 << 20) + "y", ": larger than 1048576 bytes"),
    ],
)
def test_a_wrong_line_is_named_and_not_repeated(tmp_path: Path, text: str, expected: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_htpasswd(path)
    assert f"{path}{expected}" in str(caught.value)
    assert "s3cret" not in str(caught.value).lower()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_htpasswd(tmp_path)


def test_the_configuration_names_key_and_line(tmp_path: Path) -> None:
    path = written(tmp_path, "alice:s3cret")
    with pytest.raises(ConfigFileInvalid) as caught:
        parse_config(f"serve:\n  auth:\n    htpasswd: {path}\n", "config.yaml")
    assert str(caught.value) == (
        f"config.yaml:3: serve.auth.htpasswd: {path}:1: not a bcrypt hash: make it with htpasswd -B"
    )
