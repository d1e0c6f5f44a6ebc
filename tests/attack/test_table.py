"""docs/security.md lists the attack cases, and lists no case that does not exist."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

from ociproxy.config.file import parse_config
from tests.parts.certificates import Authority

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "security.md"
ROW = re.compile(r"^\| [^|]+ \| [^|]+ \| `(?P<case>\w+)` \|$", re.MULTILINE)


def cases() -> set[str]:
    return {
        node.name.removeprefix("test_")
        for path in HERE.glob("test_*.py")
        if path != Path(__file__)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_attack_case_is_documented_and_nothing_else() -> None:
    rows = ROW.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert sorted(rows) == sorted(cases())


def test_the_closed_configuration_is_one(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    _, _, rest = DOCUMENT.read_text(encoding="utf-8").partition("## Running closed")
    example = textwrap.dedent(rest.partition("```yaml\n")[2].partition("```")[0])
    bcrypt = "$2y$05$" + "." * 53
    files = {
        "ca.pem": authority.ca.read_text(encoding="ascii"),
        "tls.crt": authority.cert.read_text(encoding="ascii"),
        "tls.key": authority.key.read_text(encoding="ascii"),
        "users": f"node:{bcrypt}\n",
    }
    for path in re.findall(r"/(?:etc|run)/[\w./-]+", example):
        there = tmp_path / Path(path).name
        there.write_text(files.get(there.name, "password"), encoding="ascii")
        example = example.replace(path, str(there))
    config = parse_config(example, "security.md")
    assert config.fetch.unlisted.policy == "deny"
    assert config.serve.default_upstream == ""
    assert set(config.upstreams) == {"docker.io", "registry.k8s.io", "harbor.example.com"}
