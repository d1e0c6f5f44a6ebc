"""The unit under a real systemd: it starts, reloads, serves, is watched and stops."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
import yaml

from tests.images import Image
from tests.parts.registry import Registry
from tests.parts.systemd import UNITS, Systemd
from tests.parts.tools import require_tool
from tests.real.conftest import TAG
from tests.server import ROOT, free_port, upstream_entry

pytestmark = pytest.mark.timeout(180)

UNIT = ROOT / "deploy/systemd/ociproxy.service"
CONFIG = "/etc/ociproxy.yaml"
PROGRAM = "/opt/ociproxy/bin/ociproxy"
PASSWORD = "/run/credentials/ociproxy.service/hub"
CREDENTIAL = "[Service]\nLoadCredential=hub:/etc/ociproxy/hub\n"
IMPATIENT = "[Service]\nWatchdogSec=3\n"


class Service:
    """The unit as it stands, with the settings that an operator gives it."""

    def __init__(self, systemd: Systemd) -> None:
        self.systemd = systemd
        self.port, self.admin_port = free_port(), free_port()

    def install(self, config: dict[str, object], **variables: object) -> None:
        told = {"CONFIG_PATH": CONFIG, "PORT": self.port, "ADMIN_PORT": self.admin_port}
        lines = [f"OCIPROXY_{name}={value}\n" for name, value in {**told, **variables}.items()]
        self.systemd.write("/etc/default/ociproxy", "".join(lines))
        self.configure(config)
        self.systemd.write(f"{UNITS}/{UNIT.name}", UNIT.read_text(encoding="utf-8"))

    def configure(self, config: dict[str, object]) -> None:
        self.systemd.write(CONFIG, yaml.safe_dump({"serve": {"host": "127.0.0.1"}, **config}))

    def get(self, path: str, port: int = 0) -> bytes:
        with urlopen(f"http://127.0.0.1:{port or self.port}{path}", timeout=30) as answer:
            body: bytes = answer.read()
        return body

    def metrics(self) -> str:
        return self.get("/metrics", self.admin_port).decode()

    def ctl(self, verb: str) -> None:
        self.systemd.run("systemctl", verb, "ociproxy")


def beside_the_service(*words: str) -> str:
    """The unit that systemd-run makes of the options in docs/operations.md: it speaks to systemd by
    D-Bus, which is not here."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    _, _, section = text.partition("## Commands beside the service\n")
    settings = "\n".join(re.findall(r"--property=([^\s`]+)", section.partition("\n## ")[0]))
    return f"[Service]\nType=oneshot\n{settings}\nExecStart={PROGRAM} {' '.join(words)}\n"


@pytest.fixture(scope="module")
def systemd() -> Iterator[Systemd]:
    with Systemd() as started:
        yield started


@pytest.fixture
def service(systemd: Systemd) -> Iterator[Service]:
    made = Service(systemd)
    yield made
    systemd.run("systemctl", "stop", "ociproxy", check=False)
    systemd.run("rm", "-rf", "/var/lib/private/ociproxy", f"{UNITS}/{UNIT.name}.d")
    systemd.run("systemctl", "reset-failed", "ociproxy", check=False)


def assert_serves(service: Service, registry: Registry, held: Image, repository: str) -> None:
    """Asks for all of an image: the upstream is asked for what is not stored."""
    namespace = f"?ns={registry.name}"
    assert service.get(f"/v2/{repository}/manifests/{TAG}{namespace}") == held.top.data
    for each in (*held.manifests, *held.blobs):
        kind = "manifests" if each in held.manifests else "blobs"
        assert service.get(f"/v2/{repository}/{kind}/{each.digest}{namespace}") == each.data


def test_the_unit_serves_when_started_reloads_and_stops(
    service: Service, registry: Registry, held: dict[str, Image]
) -> None:
    """The sandbox leaves room for all that a server does, child processes too."""
    require_tool("skopeo")
    systemd = service.systemd
    systemd.write("/etc/ociproxy/hub", "a password")
    systemd.write(f"{UNITS}/{UNIT.name}.d/credential.conf", CREDENTIAL)
    service.install({"fetch": {"unlisted": "deny"}, "store": {"scrub": "1d"}})
    service.ctl("start")
    # Ready is when it serves: no waiting here.
    assert service.get("/readyz")
    assert service.get("/", service.admin_port)
    assert systemd.show("ociproxy", "ActiveState", "StatusErrno") == ["active", "0"]
    (pid,) = systemd.show("ociproxy", "MainPID")
    rights = systemd.run("cat", f"/proc/{pid}/status").stdout.decode()
    assert re.search(r"^CapBnd:\t0+$", rights, re.MULTILINE)
    assert re.search(r"^Seccomp:\t2$", rights, re.MULTILINE)
    assert not re.search(r"^Uid:\t0", rights, re.MULTILINE)

    # Reloading is over when systemctl returns, or the log says so a little later.
    for backend, (repository, each) in zip(("oras", "skopeo"), held.items(), strict=False):
        auth = {"user": "mirror", "password_file": PASSWORD}
        entry = upstream_entry(registry.url, backend=backend, auth=auth)
        service.configure({"upstreams": [entry]})
        before = systemd.journal("ociproxy").count("configuration reloaded")
        service.ctl("reload")
        end = time.monotonic() + 10
        while systemd.journal("ociproxy").count("configuration reloaded") == before:
            assert time.monotonic() < end, systemd.journal("ociproxy")
        assert systemd.show("ociproxy", "ActiveState", "MainPID") == ["active", pid]
        assert_serves(service, registry, each, repository)

    # A child process has looked through the store, and the counters are in shared memory.
    end = time.monotonic() + 20
    while "\nociproxy_store_survey_timestamp_seconds " not in (told := service.metrics()):
        assert time.monotonic() < end, told
    assert re.search(r'^ociproxy_requests_total\{kind="blob",.*status="2xx"\} ', told, re.MULTILINE)

    beside = beside_the_service("list", "--format=json")
    systemd.write(f"{UNITS}/ociproxy-command.service", beside)
    systemd.run("systemctl", "start", "ociproxy-command")
    listed = json.loads(systemd.journal("ociproxy-command"))
    assert len(listed) == 2, listed

    service.ctl("stop")
    ended = systemd.show("ociproxy", "ActiveState", "Result", "ExecMainStatus")
    assert ended == ["inactive", "success", "0"], systemd.journal("ociproxy")
    said = systemd.journal("ociproxy")
    assert "Traceback" not in said
    assert not re.search(r"\b(WARN|ERROR)\b", said), said

    # What the operator has to mend is not tried again and again.
    systemd.write(CONFIG, "serve: {prot: 80}\n")
    assert systemd.run("systemctl", "start", "ociproxy", check=False).returncode != 0
    assert systemd.show("ociproxy", "ActiveState", "NRestarts") == ["failed", "0"]
    assert f"Error: {CONFIG}:1: serve.prot: unknown key" in systemd.journal("ociproxy")


def has_a_new_process(systemd: Systemd, old: str) -> bool:
    state, pid = systemd.show("ociproxy", "ActiveState", "MainPID")
    return state == "active" and pid != old


def test_a_stuck_server_is_started_anew_with_all_its_workers(service: Service) -> None:
    systemd = service.systemd
    service.install({}, WORKERS=2)
    systemd.write(f"{UNITS}/{UNIT.name}.d/impatient.conf", IMPATIENT)
    systemd.run("systemctl", "daemon-reload")
    service.ctl("start")
    (pid,) = systemd.show("ociproxy", "MainPID")
    systemd.run("kill", "-STOP", pid)
    end = time.monotonic() + 30
    while not has_a_new_process(systemd, pid):
        assert time.monotonic() < end, systemd.journal("ociproxy")
        time.sleep(0.1)
    assert service.get("/readyz")
    assert "Watchdog timeout" in systemd.console

    (pid,) = systemd.show("ociproxy", "MainPID")
    worker = systemd.run("cat", f"/proc/{pid}/task/{pid}/children").stdout.split()[0].decode()
    systemd.run("kill", "-KILL", worker)
    end = time.monotonic() + 10
    while "worker died" not in systemd.journal("ociproxy", "--priority=err"):
        assert time.monotonic() < end, systemd.journal("ociproxy")
    assert "listening" not in systemd.journal("ociproxy", "--priority=err")
    assert systemd.show("ociproxy", "ActiveState", "MainPID") == ["active", pid]
