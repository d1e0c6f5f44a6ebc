"""Environment variables that are wrong or misspelt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ociproxy.cli.main import main


def run(*words: str, **variables: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(words), env=dict(variables))
    return done.exit_code, done.output


def test_a_wrong_value_names_its_variable() -> None:
    code, said = run("serve", OCIPROXY_PORT="abc")
    assert code == 2
    assert "Invalid value for OCIPROXY_PORT (--port): 'abc' is not a valid integer" in said
    code, said = run("serve", "--port", "abc")
    assert "Invalid value for '--port'" in said
    assert "OCIPROXY" not in said


def test_a_service_of_kubernetes_is_explained() -> None:
    links = {
        "OCIPROXY_PORT": "tcp://10.96.0.10:8080",
        "OCIPROXY_SERVICE_HOST": "10.96.0.10",
        "OCIPROXY_PORT_8080_TCP_ADDR": "10.96.0.10",
    }
    code, said = run("serve", **links)
    assert code == 2
    assert "enableServiceLinks: false" in said
    assert "not known" not in said


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (
            "OCIPROXY_IMAGE_PAHT",
            "is not known; did you mean OCIPROXY_IMAGE_PATH?",
        ),
        ("OCIPROXY_UNHEARD_OF", "OCIPROXY_UNHEARD_OF is not known"),
        ("OCIPROXY_WORKERS", ""),
        ("OCIPROXY_QUAY_PASSWORD", ""),
    ],
)
def test_a_misspelt_variable_is_warned_of(tmp_path: Path, variable: str, expected: str) -> None:
    code, said = run("list", "--image-path", str(tmp_path / "none"), **{variable: "1"})
    assert code == 4
    assert expected in said
    assert ("not known" in said) == bool(expected)


LIST = """
import sys
from ociproxy.cli.main import main
try:
    main(["list"], standalone_mode=False)
finally:
    print(*(name for name in sys.modules if name.endswith("_command")))
"""


def test_a_variable_of_the_command_itself_loads_no_other_command(tmp_path: Path) -> None:
    """As containers are set up: each command would load all that the others need."""
    variables = {**os.environ, "OCIPROXY_IMAGE_PATH": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", LIST], env=variables, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["ociproxy.cli.list_command"]
