"""`make chart`: what is made from the chart, and what the chart has from elsewhere.

The chart takes the schema of the config file, the alerts and the dashboard. The plain manifests and
the expected output of the tests are what Helm makes of it. A test compares each with what is in the
repository.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from ociproxy import __version__
from ociproxy.config.file import schema

CHECKOUT: Final = Path(__file__).parent.parent
CHART: Final = CHECKOUT / "deploy/helm/ociproxy"
EXPECTED: Final = CHECKOUT / "tests/deploy/expected"
PLAIN: Final = CHECKOUT / "deploy/kubernetes"
COPIES: Final = {
    CHECKOUT / "deploy/prometheus/alerts.yaml": CHART / "files/alerts.yaml",
    CHECKOUT / "deploy/grafana/ociproxy.json": CHART / "files/ociproxy.json",
}
NAME: Final = "ociproxy"
OF_HELM: Final = re.compile(r"^ *(?:helm\.sh/|app\.kubernetes\.io/managed-by: ).*\n", re.MULTILINE)
PLAIN_HEAD: Final = """\
# Made from the Helm chart by `make chart`: change that. {what}
# Set the image, and what else is yours, then: kubectl apply -f {file}
---
apiVersion: v1
kind: Namespace
metadata:
  name: ociproxy
  labels:
    pod-security.kubernetes.io/enforce: {security}
"""


class HelmRefused(Exception):
    """Values that the schema or a template of the chart refuses, or no helm."""


def value_files() -> dict[str, Path]:
    """By name; each is a use of the chart, and has an expected output."""
    return {path.stem.removesuffix("-values"): path for path in sorted(CHART.glob("ci/*.yaml"))}


def values(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found or {}


def helm(*words: str | Path, given: Mapping[str, Any] | None = None) -> str:
    """What `helm` prints, with these values. Raises `HelmRefused` with what it said."""
    folders = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    program = shutil.which("helm", path=os.pathsep.join(folders))
    if program is None:
        raise HelmRefused(f"no helm: {CHECKOUT / 'tools/helm.txt'} says which")
    if given is not None:
        words = (*words, "--values", "-")
    done = subprocess.run(
        [program, *words],
        input=yaml.safe_dump(given) if given else "",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise HelmRefused(done.stdout + done.stderr)
    return done.stdout


def manifests(given: Mapping[str, Any]) -> str:
    """One text, with a line that names the template before each part."""
    text = helm("template", NAME, CHART, "--namespace", NAME, given=given)
    return re.sub(r"\n+---\n", "\n---\n", text)  # not all versions of Helm part them alike


def notes(given: Mapping[str, Any]) -> str:
    """What an operator reads who installs the chart."""
    installed = helm("install", NAME, CHART, "--namespace", NAME, "--dry-run=client", given=given)
    return installed.partition("\nNOTES:\n")[2]


def plain(kind: str) -> str:
    given = values(value_files()["daemonset" if kind == "DaemonSet" else "default"])
    given = {**given, "persistence": {"keep": False}}
    text = OF_HELM.sub("", manifests(given))
    on_nodes = kind == "DaemonSet"
    what = "One mirror on each node, on its loopback." if on_nodes else "One mirror for a cluster."
    security = "privileged # for the node's network and folder" if on_nodes else "restricted"
    return PLAIN_HEAD.format(what=what, file=f"{kind.lower()}.yaml", security=security) + text


def config_schema() -> dict[str, Any]:
    """Of a config file that is a mapping."""
    (found,) = (each for each in schema()["anyOf"] if each["type"] == "object")
    return dict(found)


def made() -> Iterator[tuple[Path, str]]:
    """Each file that is made, with its content, in the order in which they build on each other."""
    for source, copy in COPIES.items():
        if source.exists():
            yield copy, source.read_text(encoding="utf-8")
    path = CHART / "values.schema.json"
    values_schema = json.loads(path.read_text(encoding="utf-8"))
    values_schema["$defs"]["config"] = config_schema()
    yield path, json.dumps(values_schema, indent=1) + "\n"
    path = CHART / "Chart.yaml"
    text = re.sub(r"(?m)^version: .*$", f"version: {__version__}", path.read_text(encoding="utf-8"))
    yield path, re.sub(r"(?m)^appVersion: .*$", f'appVersion: "{__version__}"', text)
    for name, path in value_files().items():
        yield EXPECTED / f"{name}.yaml", manifests(values(path))
    for kind in ("Deployment", "DaemonSet"):
        yield PLAIN / f"{kind.lower()}.yaml", plain(kind)


def main() -> None:
    try:
        for path, text in made():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                print(path.relative_to(CHECKOUT), file=sys.stderr)
    except HelmRefused as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main()
