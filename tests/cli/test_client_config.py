"""`client-config` and `config`: each printed file is valid and says what it must."""

from __future__ import annotations

import json
import resource
import signal
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from ociproxy.cli.client_config import client_config
from ociproxy.cli.config_command import config
from ociproxy.cli.main import main
from ociproxy.config.file import schema

URL = "http://mirror.example:8080"
HOST = {"capabilities": ["pull", "resolve"], "dial_timeout": "1s"}


def run(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def printed(*arguments: str) -> list[tuple[str, str]]:
    """Path and text of each file in the output: a file starts with a comment that is its path."""
    result = run(client_config, *arguments)
    assert result.exit_code == 0, result.output
    files: list[tuple[str, str]] = []
    for line in result.stdout.splitlines():
        if line.startswith("# /"):
            files.append((line.removeprefix("# "), ""))
        elif not line.startswith("#"):
            path, text = files[-1]
            files[-1] = (path, f"{text}{line}\n")
    return files


def test_containerd_mirrors_every_registry() -> None:
    hosts, one, two = printed("containerd", "--mirror", URL)
    assert hosts[0] == "/etc/containerd/certs.d/_default/hosts.toml"
    # No `server`: containerd falls back to the image's own registry.
    assert tomllib.loads(hosts[1]) == {"host": {URL: HOST}}
    for (path, text), version, plugin in (
        (one, 2, "io.containerd.grpc.v1.cri"),
        (two, 3, "io.containerd.cri.v1.images"),
    ):
        assert path == f"/etc/containerd/config.toml (containerd {version - 1}.x)"
        assert tomllib.loads(text) == {
            "version": version,
            "plugins": {plugin: {"registry": {"config_path": "/etc/containerd/certs.d"}}},
        }


def test_mirror_is_this_machine_unless_given() -> None:
    (_, text), *_ = printed("containerd")
    assert list(tomllib.loads(text)["host"]) == ["http://127.0.0.1:8080"]


def test_a_block_copied_with_its_heading_still_parses() -> None:
    for block in run(client_config, "containerd").stdout.split("\n# /"):
        tomllib.loads(f"# /{block}")


def test_referrers_come_from_the_mirror_only_on_demand() -> None:
    """containerd before 2.2 drops a file that has a capability which it does not know."""
    said = run(client_config, "containerd", "--mirror", URL, "--referrers").stdout
    (_, hosts), *_ = printed("containerd", "--mirror", URL, "--referrers")
    assert tomllib.loads(hosts)["host"][URL]["capabilities"] == ["pull", "resolve", "referrers"]
    assert "# For containerd 2.2 and newer" in said
    assert "referrers" not in run(client_config, "containerd").stdout


def test_docker_29_mirrors_every_registry_and_older_ones_docker_hub() -> None:
    hosts, daemon = printed("docker", "--mirror", URL)
    assert hosts[0] == "/etc/docker/certs.d/_default/hosts.toml"
    assert tomllib.loads(hosts[1]) == {"host": {URL: HOST}}
    assert daemon[0] == "/etc/docker/daemon.json"
    assert json.loads(daemon[1]) == {"registry-mirrors": [URL]}
    new, old = run(client_config, "docker").stdout.split("# /etc/docker/daemon.json")
    assert "Docker 29 and newer with the containerd image store" in new
    assert "every registry" in new
    assert "before 29" in old
    assert "only docker.io" in old


def test_docker_29_at_a_closed_door() -> None:
    (_, text), _ = printed("docker", "--mirror", HTTPS, *DOOR)
    host = tomllib.loads(text)["host"][HTTPS]
    assert host["ca"] == "/pki/ca.pem"
    assert host["header"] == {"authorization": "Basic <base64 of node:PASSWORD>"}


HTTPS = "https://mirror.example:8443"
DOOR = (
    "--ca",
    "/pki/ca.pem",
    "--cert",
    "/pki/node.pem",
    "--key",
    "/pki/node.key",
    "--user",
    "node",
)


def test_containerd_at_a_closed_door() -> None:
    (_, text), *_ = printed("containerd", "--mirror", HTTPS, *DOOR)
    assert tomllib.loads(text)["host"][HTTPS] == {
        **HOST,
        "ca": "/pki/ca.pem",
        "client": [["/pki/node.pem", "/pki/node.key"]],
        "header": {"authorization": "Basic <base64 of node:PASSWORD>"},
    }
    said = run(client_config, "containerd", "--mirror", HTTPS, *DOOR).stdout
    assert "#   printf 'node:PASSWORD' | base64 -w0\n" in said


def test_k3s_at_a_closed_door() -> None:
    ((_, text),) = printed("k3s", "--mirror", HTTPS, *DOOR)
    assert yaml.safe_load(text)["configs"] == {
        "mirror.example:8443": {
            "auth": {"username": "node", "password": "<password of node>"},
            "tls": {
                "ca_file": "/pki/ca.pem",
                "cert_file": "/pki/node.pem",
                "key_file": "/pki/node.key",
            },
        }
    }


@pytest.mark.parametrize(
    ("client", "folder"), [("docker", "/etc/docker"), ("podman", "/etc/containers")]
)
def test_files_that_a_client_takes_from_a_folder(client: str, folder: str) -> None:
    said = run(client_config, client, "--mirror", HTTPS, *DOOR).stdout
    for file, name in (
        ("ca.pem", "ca.crt"),
        ("node.pem", "client.cert"),
        ("node.key", "client.key"),
    ):
        assert f"# Copy /pki/{file} to {folder}/certs.d/mirror.example:8443/{name}\n" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--mirror", HTTPS, "--cert", "/pki/node.pem"), "--cert and --key go together"),
        (("--user", "ann:secret"), "--user is a name without a colon"),
        (("--ca", "/pki/ca.pem"), "--ca and --cert need a --mirror that is https://"),
        (("--user", 'a"b'), "must not have quotes"),
    ],
)
def test_a_door_that_cannot_be(arguments: tuple[str, ...], expected: str) -> None:
    result = run(client_config, "containerd", *arguments)
    assert result.exit_code == 2
    assert expected in result.output


def test_k3s_mirrors_every_registry() -> None:
    ((path, text),) = printed("k3s", "--mirror", URL)
    assert path == "/etc/rancher/k3s/registries.yaml"
    assert yaml.safe_load(text) == {"mirrors": {"*": {"endpoint": [URL]}}}


@pytest.mark.parametrize("client", ["podman", "crio"])
def test_containers_tools_mirror_by_path_prefix(client: str) -> None:
    ((path, text),) = printed(
        client, "--mirror", URL, "--registry", "index.docker.io", "--registry", "quay.io"
    )
    assert path == "/etc/containers/registries.conf.d/50-ociproxy.conf"
    assert tomllib.loads(text) == {
        "registry": [
            {
                "prefix": registry,
                "location": registry,
                "mirror": [{"location": f"mirror.example:8080/{registry}", "insecure": True}],
            }
            for registry in ("docker.io", "quay.io")
        ]
    }


def test_https_mirror_is_verified_by_podman() -> None:
    ((_, text),) = printed("podman", "--mirror", "https://mirror.example", "--registry", "quay.io")
    mirror: dict[str, Any] = tomllib.loads(text)["registry"][0]["mirror"][0]
    assert mirror == {"location": "mirror.example/quay.io"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("containerd", "--mirror", "mirror:8080"),
        ("containerd", "--mirror", "ftp://mirror"),
        ("containerd", "--mirror", "http://u:p@mirror"),
        ("containerd", "--mirror", 'http://m"]'),
        ("containerd", "--mirror", "http://mirror/path"),
        ("containerd", "--mirror", "http://mirror?x"),
        ("podman", "--registry", "a b"),
    ],
)
def test_wrong_options_are_one_clear_line(arguments: tuple[str, ...]) -> None:
    result = run(client_config, *arguments)
    assert result.exit_code == 2
    assert "Error: Invalid value for" in result.stderr


def test_write_puts_the_files_below_a_directory(tmp_path: Path) -> None:
    result = run(client_config, "containerd", "--write", str(tmp_path))
    folder = tmp_path / "etc" / "containerd"
    written = [
        folder / "certs.d" / "_default" / "hosts.toml",
        folder / "config.toml.containerd-1.x",
        folder / "config.toml.containerd-2.x",
    ]
    assert result.stdout.splitlines() == [str(path) for path in written]
    for path in written:
        tomllib.loads(path.read_text())


def test_write_leaves_a_file_as_it_was_if_the_disk_is_full(tmp_path: Path) -> None:
    """A node must never see half of its registries.yaml."""
    target = tmp_path / "etc" / "rancher" / "k3s" / "registries.yaml"
    target.parent.mkdir(parents=True)
    target.write_text("mirrors: {}\n")
    target.chmod(0o600)
    limit, before = 20, resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel sends a signal, too, to a process that writes past its limit.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = run(main, "client-config", "k3s", "--write", str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert result.exit_code == 4
    assert target.read_text() == "mirrors: {}\n"
    assert [each.name for each in target.parent.iterdir()] == [target.name]


def test_write_keeps_a_file_that_only_root_may_read_so(tmp_path: Path) -> None:
    target = tmp_path / "etc" / "rancher" / "k3s" / "registries.yaml"
    target.parent.mkdir(parents=True)
    target.touch(0o600)
    assert run(client_config, "k3s", "--write", str(tmp_path)).exit_code == 0
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("client", "path", "placeholder"),
    [
        ("k3s", "etc/rancher/k3s/registries.yaml", "<password of node>"),
        ("containerd", "etc/containerd/certs.d/_default/hosts.toml", "<base64 of node:PASSWORD>"),
        ("docker", "etc/docker/certs.d/_default/hosts.toml", "<base64 of node:PASSWORD>"),
    ],
)
def test_a_written_file_with_a_password_has_its_comments_and_is_for_root_alone(
    tmp_path: Path, client: str, path: str, placeholder: str
) -> None:
    target = tmp_path / path
    target.parent.mkdir(parents=True)
    target.touch(0o644)
    result = run(client_config, client, "--user", "node", "--write", str(tmp_path))
    assert result.exit_code == 0
    assert target.stat().st_mode & 0o777 == 0o600
    comments = [line for line in target.read_text().splitlines() if line.startswith("# ")]
    assert any(placeholder in line for line in comments)
    printed_text = run(client_config, client, "--user", "node").stdout
    assert "\n".join(comments) in printed_text
    if client == "docker":
        json.loads((tmp_path / "etc/docker/daemon.json").read_text())
        assert "# Merge into what is there" in result.stderr


def test_write_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "etc").touch()
    result = run(main, "client-config", "k3s", "--write", str(tmp_path))
    assert result.exit_code == 4
    assert result.stderr.startswith("Error: cannot write ")


def test_check_counts_upstreams(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("- name: quay.io\n- name: docker.io\n")
    result = run(config, "check", str(file))
    assert (result.exit_code, result.stdout) == (0, f"{file}: ok, 2 upstreams\n")


def test_check_shows_every_problem(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("- nme: quay.io\n- name: docker.io\n  tls: {ca: nope}\n")
    result = run(config, "check", str(file))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"{file}:1: [0].nme: unknown key (did you mean name?)",
        f"{file}:1: [0].name: is required",
        f"{file}:3: [1].tls.ca: no such file: {tmp_path / 'nope'}",
    ]


def test_check_of_a_file_that_is_not_there() -> None:
    result = run(config, "check", "/nope.yaml")
    assert result.exit_code == 2
    assert result.stderr == "/nope.yaml: cannot be read: No such file or directory\n"


def test_schema_is_printed() -> None:
    assert json.loads(run(config, "schema").stdout) == schema()
