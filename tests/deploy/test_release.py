"""A release: the same bytes each time, a true bill of materials, and a wheel that installs."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tarfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from ociproxy import __version__
from tests.parts.tools import run
from tools import audit, cut, release

pytestmark = pytest.mark.timeout(300)

CHECKOUT = release.CHECKOUT
TIME = "1700000000"
SDIST, WHEEL = f"ociproxy-{__version__}.tar.gz", f"ociproxy-{__version__}-py3-none-any.whl"
BILL = f"ociproxy-{__version__}.cdx.json"


@dataclass(frozen=True)
class Built:
    first: Path
    second: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Two releases of what git knows of, from two folders, by users who have other habits."""
    if not (CHECKOUT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=CHECKOUT
    )
    names = [name for name in listed.stdout.decode().split("\0") if (CHECKOUT / name).is_file()]
    made = []
    for number, umask in enumerate(("022", "077")):
        folder = tmp_path_factory.mktemp(f"checkout-{number}")
        for name in names:
            if name:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(CHECKOUT / name, folder / name)
                os.utime(folder / name, (number, 1_000_000_000 + number))
        script = f'umask {umask} && exec "$0" -m tools.release dist'
        run(
            *("sh", "-c", script, sys.executable),
            cwd=folder,
            env={"SOURCE_DATE_EPOCH": TIME},
            limit=200,
        )
        made.append(folder / "dist")
    return Built(*made)


def test_two_builds_are_the_same_bytes(built: Built) -> None:
    sums = (built.first / release.SUMS).read_text(encoding="utf-8")
    assert sums == (built.second / release.SUMS).read_text(encoding="utf-8")
    assert re.findall(r"^[0-9a-f]{64}  (.+)$", sums, re.MULTILINE) == sorted([WHEEL, BILL, SDIST])
    run("sha256sum", "--check", "--strict", release.SUMS, cwd=built.first)


def test_the_sdist_has_what_installs_the_server(built: Built) -> None:
    with tarfile.open(built.first / SDIST) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    wanted = {
        "deploy/systemd/ociproxy.service",
        "deploy/helm/ociproxy/templates/workload.yaml",
        "deploy/kubernetes/daemonset.yaml",
        "deploy/compose.yaml",
        "docs/operations.md",
        "LICENSE",
    }
    assert wanted <= names
    assert not {name.partition("/")[0] for name in names} & {"tests", "bench", "tools", ".venv"}
    assert {member.mtime for member in members} == {int(TIME)}


def test_the_bill_of_materials_is_valid_and_names_each_pin(built: Built) -> None:
    text = (built.first / BILL).read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["version"] == __version__
    assert {each["name"]: each["version"] for each in bill["components"]} == pins()


def pins() -> dict[str, str]:
    text = release.LOCKED.read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def test_the_pins_are_what_we_depend_on() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = pins()
    for each in map(Requirement, project["dependencies"]):
        version = found.get(each.name.lower())
        assert version is not None, f"{each} is not pinned: run `make lock`"
        assert each.specifier.contains(version), f"{each} is pinned to {version}: run `make lock`"


@pytest.mark.network
@pytest.mark.parametrize("tool", ["pipx", "uv"])
def test_the_wheel_installs_as_a_program(built: Built, tmp_path: Path, tool: str) -> None:
    folder = tmp_path / "bin"
    env = {
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_BIN_DIR": str(folder),
        "PIPX_MAN_DIR": str(tmp_path / "man"),
        "UV_SYSTEM_CERTS": "1",
        "UV_TOOL_DIR": str(tmp_path / "tools"),
        "UV_TOOL_BIN_DIR": str(folder),
    }
    install = ["install", "--python", sys.executable]
    command = (
        [release.program("pipx"), *install]
        if tool == "pipx"
        else [release.program("uv"), "tool", *install]
    )
    run(*command, built.first / WHEEL, env=env, limit=200)
    done = run(folder / "ociproxy", "version", cwd=tmp_path)
    assert done.stdout.decode().strip() == __version__


def test_the_version_stands_in_one_place() -> None:
    """The chart's is made from there."""
    others = [CHECKOUT / "pyproject.toml", CHECKOUT / "Makefile", CHECKOUT / "README.md"]
    for folder in ("docs", "tools", "deploy/systemd"):
        others += [path for path in (CHECKOUT / folder).rglob("*") if path.is_file()]
    word = re.compile(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])")
    found = [
        path.name
        for path in others
        if path.suffix in {".toml", ".md", ".py", ".service", ".yml", ""}
        and word.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


CHANGES = (
    "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- More.\n\n## [0.1.0] - 2026-01-01\n\n- All.\n"
)


def test_a_cut_leaves_an_empty_part_for_what_comes_next() -> None:
    assert cut.cut(CHANGES, "0.2.0", "2026-12-01") == CHANGES.replace(
        "## [Unreleased]\n", "## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n"
    )


@pytest.mark.parametrize(
    ("changes", "version", "words"),
    [
        (CHANGES, "two", "not a version"),
        (CHANGES, "0.1.0", "has 0.1.0 already"),
        (CHANGES.replace("### Added\n\n- More.\n\n", ""), "0.2.0", "nothing that is unreleased"),
        ("# Changelog\n", "0.2.0", "no part"),
    ],
)
def test_a_cut_that_makes_no_sense_is_refused(changes: str, version: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cut.cut(changes, version, "2026-12-01")


def test_an_index_that_knows_of_no_vulnerabilities_at_all_is_no_audit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"name": "click", "version": "8.5.1", "vulns": []}
    assert audit.report([good]) == 0
    assert "no known vulnerability in 1" in capsys.readouterr().out
    unknown = {"name": "rich", "skip_reason": "Dependency not found on PyPI"}
    assert audit.report([good, unknown]) == 0
    assert "NOT AUDITED: the index says nothing about 1 of 2" in capsys.readouterr().out


def test_a_known_vulnerability_fails_the_audit(capsys: pytest.CaptureFixture[str]) -> None:
    flaw = {"id": "PYSEC-2026-1", "fix_versions": ["8.5.2"]}
    assert audit.report([{"name": "click", "version": "8.5.1", "vulns": [flaw]}]) == 1
    assert "click 8.5.1: PYSEC-2026-1, mended by 8.5.2" in capsys.readouterr().out
