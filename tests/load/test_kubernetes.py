"""The images in Kubernetes manifests, and where they stand."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from ociproxy.cli.sources import read_wanted
from ociproxy.load.kubernetes import Findings, find_images
from tests.images import image
from tests.load.loading import Load
from tests.upstream import FakeUpstream

MANIFESTS = """\
# rendered
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {image: "not this one"}}
spec:
  template:
    metadata:
      name: pod
    spec:
      initContainers:
        - name: init
          image: busybox:1.36
      containers:
        - {name: a, image: "quay.io/team/web:v1"}
        - name: b
          image: &shared registry.k8s.io/pause:3.10
          env: [{name: X, value: "image: no"}]
      ephemeralContainers:
        - image: *shared
      volumes:
        - name: data
          image: {reference: "quay.io/team/data:v2", pullPolicy: IfNotPresent}
---
kind: CronJob
metadata: {name: nightly}
apiVersion: batch/v1
spec: {jobTemplate: {spec: {template: {spec: {containers: [{image: alpine}]}}}}}
---
apiVersion: v1
kind: List
items:
  - apiVersion: v1
    kind: Pod
    metadata: {name: one}
    spec: {containers: [{name: c, image: "ghcr.io/x/one:1"}]}
  - apiVersion: monitoring.coreos.com/v1
    kind: Prometheus
    metadata: {name: prom}
    spec:
      image: quay.io/prometheus/prometheus:v2.53.0
      thanos:
        image: {registry: quay.io, repository: thanos/thanos, tag: v0.35.1}
      logo:
        image: logo
      empty: {image: ""}
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.example.com}
spec: {versions: [{schema: {properties: {image: {type: string, description: "an image"}}}}]}
"""


def found(text: str) -> Findings:
    return find_images(dedent(text), "m.yaml")


def test_every_image_is_found_with_its_owner_and_line() -> None:
    findings = found(MANIFESTS)
    assert findings.problems == []
    assert [(str(each.reference), each.line, each.owner) for each in findings.images] == [
        ("docker.io/library/busybox:1.36", 13, "Deployment/web"),
        ("quay.io/team/web:v1", 15, "Deployment/web"),
        ("registry.k8s.io/pause:3.10", 17, "Deployment/web"),
        ("quay.io/team/data:v2", 23, "Deployment/web"),
        ("docker.io/library/alpine:latest", 28, "CronJob/nightly"),
        ("ghcr.io/x/one:1", 36, "Pod/one"),
        ("quay.io/thanos/thanos:v0.35.1", 43, "Prometheus/prom"),
        ("quay.io/prometheus/prometheus:v2.53.0", 41, "Prometheus/prom"),
    ]
    assert [line.split(": image")[0] for line in findings.passed_over] == [
        "m.yaml:5: Deployment/web",
        "m.yaml:45: Prometheus/prom",
    ]


def test_container_whose_image_is_none_is_a_problem() -> None:
    findings = found(
        """\
        apiVersion: v1
        kind: Pod
        metadata: {name: raw}
        spec:
          containers:
            - image: "{{ .Values.image }}"
            - image: "good:1"
        """
    )
    assert [str(problem).split(": invalid")[0] for problem in findings.problems] == [
        "m.yaml:6: Pod/raw"
    ]
    assert [str(each.reference) for each in findings.images] == ["docker.io/library/good:1"]


def test_workflows_and_injected_containers() -> None:
    findings = found(
        """\
        apiVersion: argoproj.io/v1alpha1
        kind: Workflow
        metadata: {name: "w\\e[31mx"}
        spec:
          templates:
            - container: {image: alpine}
            - script: {image: "{{inputs.parameters.image}}"}
          containers: [{image: auto}]
          image: {repository: nginx}
        """
    )
    assert findings.problems == []
    names = [(str(each.reference), each.owner) for each in findings.images]
    assert names == [
        ("docker.io/library/alpine:latest", "Workflow/w[31mx"),
        ("docker.io/library/nginx:latest", "Workflow/w[31mx"),
    ]
    assert [note.split(": ")[0] for note in findings.passed_over] == ["m.yaml:7", "m.yaml:8"]


def test_ids_of_images_on_a_node_are_passed_over_and_said() -> None:
    id_ = "sha256:" + "0a" * 32
    findings = found(
        f"""\
        apiVersion: v1
        kind: List
        items:
        - apiVersion: v1
          kind: Pod
          metadata: {{name: web}}
          spec:
            containers:
            - image: quay.io/team/web:v1
            - image: {id_}
          status:
            containerStatuses:
            - image: {id_}
              imageID: quay.io/team/web@{id_}
            - image: {id_.removeprefix("sha256:")}
            - image: quay.io/team/web:v1
        """
    )
    assert findings.problems == []
    assert {str(each.reference) for each in findings.images} == {"quay.io/team/web:v1"}
    assert [line.split(": image")[0] for line in findings.passed_over] == [
        "m.yaml:10: Pod/web",
        "m.yaml:13: Pod/web",
        "m.yaml:15: Pod/web",
    ]
    assert all("the id of an image on a node" in line for line in findings.passed_over)


MENTIONS = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: operator}
spec:
  template:
    spec:
      containers:
      - image: quay.io/team/operator:v1
        command: [/bin/operator, --listen=:8080, "--url=https://quay.io/v2/x:1"]
        args:
        - --reloader=quay.io/team/reloader:v2
        - --sidecar-image
        - team/sidecar:v3
        - --volume=team/data:v9
        env:
        - {name: RELATED_IMAGE_PROXY, value: team/proxy:v4}
        - {name: HELPER, value: "docker://10.0.0.1:5000/helper@DIGEST"}
        - {name: PATH, value: "/usr/bin:/bin"}
        - {name: SELF, value: quay.io/team/operator:v1}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data:
  config.yaml: |
    injector:
      image: team/injected:v5
    hub: {"proxy": "registry.example/proxy:v6"}
  plain: text
  image: quay.io/team/named:v7
---
apiVersion: v1
kind: Secret
metadata: {name: not-looked-at}
data: {x: "registry.example/secret:v1", image: "registry.example/secret:v2"}
""".replace("DIGEST", "sha256:" + "0a" * 32)


def test_text_that_looks_like_an_image_is_found_with_its_place() -> None:
    found_there = found(MENTIONS).mentions
    assert [(str(each.reference), each.line, each.owner) for each in found_there] == [
        ("quay.io/team/reloader:v2", 11, "Deployment/operator, args"),
        ("docker.io/team/sidecar:v3", 13, "Deployment/operator, args"),
        ("docker.io/team/proxy:v4", 16, "Deployment/operator, env"),
        (f"10.0.0.1:5000/helper@sha256:{'0a' * 32}", 17, "Deployment/operator, env"),
        ("quay.io/team/operator:v1", 19, "Deployment/operator, env"),
        ("docker.io/team/injected:v5", 27, "ConfigMap/settings, data"),
        ("registry.example/proxy:v6", 28, "ConfigMap/settings, data"),
        ("quay.io/team/named:v7", 30, "ConfigMap/settings, data"),
    ]


def test_what_looks_like_an_image_is_noted_unless_it_is_wanted(tmp_path: Path) -> None:
    manifest, listed, notes = tmp_path / "m.yaml", tmp_path / "list", list[str]()
    manifest.write_text(MENTIONS)
    listed.write_text("quay.io/team/reloader:v2\nteam/proxy:v4\nteam/sidecar:v3\n")
    wanted = read_wanted([str(listed)], [str(manifest)], (), note=notes.append)
    assert len(wanted) == 4
    assert notes == [
        f"{manifest}:17: Deployment/operator, env: 10.0.0.1:5000/helper@sha256:{'0a' * 32} "
        "looks like an image, left out",
        f"{manifest}:27: ConfigMap/settings, data: docker.io/team/injected:v5 "
        "looks like an image, left out",
        f"{manifest}:28: ConfigMap/settings, data: registry.example/proxy:v6 "
        "looks like an image, left out",
        f"{manifest}:30: ConfigMap/settings, data: quay.io/team/named:v7 "
        "looks like an image, left out",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [\n", 3),
        ("a: 1\n  b: 2\n", 2),
        ("ok: 1\n---\n\tx: y\n", 3),
        ("a: 1\nb: \x01\n", 2),
    ],
)
def test_broken_yaml_is_one_problem_with_its_line(text: str, line: int) -> None:
    (problem,) = found(text).problems
    assert str(problem).startswith(f"m.yaml:{line}: not valid YAML")
    assert "\n" not in str(problem)


@pytest.mark.parametrize(
    "text", ["", "---\n---\n", "- a\n- b\n", "text", "? [a, b]\n: {image: x}\n"]
)
def test_what_holds_no_image_holds_none(text: str) -> None:
    assert found(text).images == []


def test_nesting_and_aliases_cost_nothing() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"a{n}: &a{n} [*a, *a, *a, *a]\n" for n in range(1000))
    assert found(bomb) == Findings()
    assert found("[" * 200 + "]" * 200) == Findings()
    (problem,) = found("---\n" + "- " * 100_000 + "x\n").problems
    assert str(problem) == "m.yaml:2: nested deeper than 256 levels"
    assert len(found("[" * 200_000).problems) == 1


def test_load_takes_the_images_of_manifests(
    tmp_path: Path, upstream: FakeUpstream, load: Load
) -> None:
    app = upstream.add("team/app", image("app"), tag="v1")
    pod = tmp_path / "pod.yaml"
    pod.write_text(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  containers:\n"
        f"    - image: {upstream.registry}/team/app:v1\n"
        f"    - image: {upstream.registry}/team/gone:v1\n"
    )
    done = load.run("--kubernetes", str(pod))
    assert done.code == 3
    assert f"({pod}:7 (Pod/p))" in done.stderr
    assert load.has(app)
    text = pod.read_text().replace("team/gone", "team//gone")
    bad = load.run("--kubernetes", "-", stdin=text)
    assert bad.code == 2
    assert "standard input:7: Pod/p: invalid name" in bad.stderr
