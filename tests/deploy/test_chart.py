"""The Helm chart: what it renders for six uses, what it refuses, and what Kubernetes says to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from ociproxy import __version__
from ociproxy.cli.main import main
from tests.parts.tools import require_module, require_tool
from tools import chart

kubernetes_validate = require_module("kubernetes_validate")

VERSIONS = [f"1.{minor}" for minor in range(30, 38)]
USES = sorted(chart.value_files())
CUSTOM = "monitoring.coreos.com/v1"


@pytest.fixture(scope="module", autouse=True)
def _helm() -> None:
    require_tool("helm")


def documents(text: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(text) if each]


def expected(use: str) -> list[dict[str, Any]]:
    return documents((chart.EXPECTED / f"{use}.yaml").read_text(encoding="utf-8"))


def of_kind(use: str, kind: str, name: str = chart.NAME) -> dict[str, Any]:
    named = [(each["kind"], each["metadata"]["name"], each) for each in expected(use)]
    (found,) = (each for its_kind, its_name, each in named if (its_kind, its_name) == (kind, name))
    return found


def test_what_is_made_from_the_chart_is_what_the_chart_makes() -> None:
    stale = [
        str(path.relative_to(chart.CHECKOUT))
        for path, text in chart.made()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run `make chart`, and look at what it changed"


def test_there_are_six_uses() -> None:
    assert len(USES) == 6
    assert {path.stem for path in chart.EXPECTED.glob("*.yaml")} == set(USES)


@pytest.mark.parametrize("use", USES)
def test_helm_lint_has_nothing_to_say(use: str) -> None:
    values = chart.value_files()[use]
    said = chart.helm("lint", "--strict", chart.CHART, "--values", values).splitlines()
    # An icon is for catalogues of charts.
    assert said[1:-1] == ["[INFO] Chart.yaml: icon is recommended", ""]


@pytest.mark.parametrize("use", USES)
def test_kubernetes_knows_each_field(use: str) -> None:
    for each in expected(use):
        if each["apiVersion"] == CUSTOM:
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"replica": 3}, "additional properties 'replica' not allowed"),
        ({"config": {"upstream": []}}, "at '/config': additional properties 'upstream'"),
        ({"config": {"fetch": {"fills": "many"}}}, "/config/fetch/fills"),
        ({"config": {"serve": {"port": 5000}}}, r"config\.serve\.port: the chart sets it"),
        ({"config": {"serve": {"admin": {"port": 1}}}}, r"config\.serve\.admin\.port: the chart"),
        ({"config": {"store": {"path": "/data"}}}, r"config\.store\.path: the chart sets it"),
        (
            {
                "config": {
                    "upstreams": [{"name": "ghcr.io", "auth": {"user": "u", "password": "p"}}]
                }
            },
            "would be in a ConfigMap",
        ),
        (
            {
                "config": {
                    "upstreams": [
                        {
                            "name": "ghcr.io",
                            "endpoints": [
                                {"url": "https://e.example", "auth": {"user": "u", "password": "p"}}
                            ],
                        }
                    ]
                }
            },
            "would be in a ConfigMap",
        ),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"kind": "StatefulSet"}, "/kind"),
        ({"replicas": 2}, "ReadWriteMany"),
        ({"nodeConfig": {"enabled": True}}, "nodeConfig needs kind: DaemonSet"),
        ({"dashboard": {"enabled": True}}, r"need admin\.enabled"),
        (
            {
                "kind": "DaemonSet",
                "admin": {"enabled": True},
                "serviceMonitor": {"enabled": True},
            },
            "does not reach a node's loopback",
        ),
        (
            {
                "kind": "DaemonSet",
                "nodeConfig": {"enabled": True},
                "users": {"existingSecret": "users"},
            },
            "writes no passwords",
        ),
    ],
)
def test_values_that_would_not_work_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(chart.HelmRefused, match=words):
        chart.manifests(given)


@pytest.mark.parametrize("use", USES)
def test_the_config_file_that_a_pod_gets_is_one(use: str) -> None:
    """By the schema: the files that it names are in the pod alone."""
    data = of_kind(use, "ConfigMap")["data"]
    config = yaml.safe_load(data["ociproxy.yaml"])
    jsonschema.validate(config, chart.config_schema())


@pytest.mark.parametrize("use", USES)
def test_a_pod_has_no_rights_and_writes_to_its_store_alone(use: str) -> None:
    workload = next(each for each in expected(use) if each["kind"] in ("Deployment", "DaemonSet"))
    pod = workload["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
    assert writable - {"/etc/ociproxy/authorities"} == {"/var/lib/ociproxy", "/tmp"}
    volumes = {each["name"] for each in pod["volumes"]}
    mounted = [*pod.get("initContainers", []), container]
    assert volumes == {mount["name"] for each in mounted for mount in each["volumeMounts"]}


def test_a_secret_is_in_no_config_map() -> None:
    secret = of_kind("private", "Secret")["data"]["harbor"]
    text = str([each for each in expected("private") if each["kind"] != "Secret"])
    assert secret not in text
    assert "a trial" not in text


def test_a_node_is_told_by_the_products_own_command(tmp_path: Path) -> None:
    containers = of_kind("daemonset", "DaemonSet")["spec"]["template"]["spec"]["initContainers"]
    (command,) = (each["command"] for each in containers if each["name"] == "node-config")
    assert (command[0], command[-2:]) == ("ociproxy", ["--write", "/node"])
    done = CliRunner().invoke(main, [*command[1:-1], str(tmp_path)])
    assert done.exit_code == 0, done.output
    hosts = tmp_path / "etc/containerd/certs.d/_default/hosts.toml"
    assert '[host."http://127.0.0.1:8080"]' in hosts.read_text()


@pytest.mark.parametrize(
    "given", [{}, {"kind": "DaemonSet"}, {"kind": "DaemonSet", "nodeConfig": {"enabled": True}}]
)
def test_the_notes_say_the_three_next_steps(given: dict[str, Any]) -> None:
    notes = chart.notes(given)
    assert re.findall(r"^(\d)\. ", notes, re.MULTILINE) == ["1", "2", "3"]
    assert f"ociproxy {__version__} " in notes
    for words in re.findall(r"ociproxy (client-config \S+)", notes):
        assert CliRunner().invoke(main, [*words.split(), "--help"]).exit_code == 0
    assert not re.search(r"[{}]|<no value>", notes)


def test_every_value_of_the_chart_is_in_its_schema() -> None:
    text = (chart.CHART / "values.schema.json").read_text(encoding="utf-8")
    properties = yaml.safe_load(text)["properties"]
    given = chart.values(chart.CHART / "values.yaml")
    assert set(given) == set(properties) - {"global"}
    for name, value in given.items():
        inner = properties[name].get("properties")
        if isinstance(value, dict) and inner:
            assert set(inner) <= set(value), name


def test_the_plain_manifests_say_nothing_of_helm() -> None:
    for path in chart.PLAIN.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "helm.sh" not in text
        assert "managed-by" not in text
        assert documents(text)[0]["kind"] == "Namespace"
