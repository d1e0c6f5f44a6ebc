"""Imports point one way, third-party libraries stay behind their fence, files keep one subject, and
each has tests that a reader finds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).parent.parent / "ociproxy"
CHECKOUT = PACKAGE.parent
MAX_LINES = 350
MAX_ARROWS = 50
"""Pairs of parts of which one imports the other: a reader must be able to keep them in mind."""
RIDDLES = re.compile(r"whoever|nobody|somebody|anybody", re.IGNORECASE)
"""Words that hide who acts: a client, a reader, an upstream, a worker, an operator, a caller."""
MAX_RIDDLES = 10
TESTS = re.compile(r"\bTests: ([^:]+?)\.\s*\Z")

# From the composition root down. A part imports itself and parts of lower tiers, nothing else.
TIERS: tuple[frozenset[str], ...] = (
    frozenset({"cli"}),
    frozenset({"serve"}),
    frozenset({"load"}),
    frozenset({"fetch", "archive"}),
    frozenset({"store"}),
    frozenset({"config"}),
    frozenset({"oci"}),
    frozenset({"errors"}),
)
# Leaves import nothing else of ours; all parts but errors may import them.
LEAVES = frozenset({"bounded", "clock", "log", "metrics"})

# Library -> modules that may import it. A library that is not here has no place in the product.
FENCE: dict[str, tuple[str, ...]] = {
    "aiohttp": ("serve", "serve.*"),
    "bcrypt": ("serve.*",),
    "jinja2": ("serve.admin.*",),
    "multidict": ("serve", "serve.*"),
    "yarl": ("serve", "serve.*"),
    "click": ("cli", "cli.*"),
    "oras": ("fetch.oras", "fetch.oras.*"),
    "prometheus_client": ("serve.admin.*",),
    "requests": ("fetch.oras", "fetch.oras.*"),
    "rich": ("cli", "cli.*"),
    "tenacity": ("fetch.*",),
    "urllib3": ("fetch.oras", "fetch.oras.*"),
    "yaml": ("config.*", "load.kubernetes"),
    "zstandard": ("archive.*",),
}


def part_of(module: str) -> str:
    """The part a module below ociproxy belongs to: `store.blobs` -> `store`."""
    return module.partition(".")[0]


def allowed_parts(part: str) -> frozenset[str] | None:
    """What `part` may import of ours; None when the tables do not know it."""
    if part == "__main__":
        return frozenset({"cli"})
    if part in LEAVES:
        return frozenset({part})
    for position, tier in enumerate(TIERS):
        if part in tier:
            lower = frozenset[str]().union(*TIERS[position + 1 :])
            leaves = LEAVES if part != "errors" else frozenset[str]()
            return lower | leaves | {part}
    return None


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import, wherever it stands; a relative one starts with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module != "ociproxy":
                yield node.lineno, module
                continue
            for alias in node.names:
                if alias.name != "__version__":
                    yield node.lineno, f"ociproxy.{alias.name}"


def import_violation(importer: str, imported: str) -> str | None:
    top, _, rest = imported.partition(".")
    if not top:
        return "relative import"
    if top == "ociproxy":
        if not rest:
            return None
        allowed = allowed_parts(part_of(importer))
        if allowed is None:
            return f"ociproxy.{importer} has no place in the tiers"
        return None if part_of(rest) in allowed else f"imports {imported} against the direction"
    if top in sys.stdlib_module_names or top == "_typeshed":  # for type checkers only
        return None
    if any(fnmatchcase(importer, pattern) for pattern in FENCE.get(top, ())):
        return None
    return f"imports {imported} outside its fence"


def init_violation(tree: ast.Module, *, top: bool) -> str | None:
    """`__init__` files are empty; the top one holds the version, for one place to have it."""
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        is_version = (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "__version__"
        )
        if not (top and (is_docstring or is_future or is_version)):
            return "__init__ is not empty"
    return None


def violations(package: Path) -> list[str]:
    """Every broken rule below `package` as `file:line: what`."""
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path))
        lines = text.count("\n")
        if lines > MAX_LINES:
            found.append(f"{relative}:{lines}: over {MAX_LINES} lines, so it has two subjects")
        if path.name == "__init__.py":
            broken = init_violation(tree, top=len(relative.parts) == 1)
            if broken:
                found.append(f"{relative}:1: {broken}")
            continue
        importer = ".".join(relative.with_suffix("").parts)
        if allowed_parts(part_of(importer)) is None:
            found.append(f"{relative}:1: {importer} has no place in the tiers")
        for line, imported in imported_modules(tree):
            broken = import_violation(importer, imported)
            if broken:
                found.append(f"{relative}:{line}: {broken}")
    return found


def test_product_keeps_the_rules() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("store/blobs.py", "from ociproxy.serve.api import make_app", "against the direction"),
        ("store/blobs.py", "from ociproxy import fetch", "against the direction"),
        ("store/blobs.py", "def f():\n    import ociproxy.cli.main", "against the direction"),
        ("oci/manifest.py", "from ociproxy.config.settings import Config", "against the direction"),
        ("config/file.py", "from ociproxy.store.blobs import Blobs", "against the direction"),
        ("log.py", "from ociproxy.errors import OciProxyError", "against the direction"),
        ("errors.py", "from ociproxy.oci.digest import Digest", "against the direction"),
        ("store/blobs.py", "from . import manifests", "relative import"),
        ("fetch/pull.py", "from aiohttp import web", "outside its fence"),
        ("fetch/pull.py", "if True:\n    import requests", "outside its fence"),
        ("fetch/pull.py", "import numpy", "outside its fence"),
        ("serve/app.py", "import yaml", "outside its fence"),
        ("helpers.py", "", "no place in the tiers"),
        ("store/__init__.py", "from ociproxy.store.blobs import Blobs", "not empty"),
        ("__init__.py", "import os", "not empty"),
        ("serve/app.py", "x = 1\n" * (MAX_LINES + 1), "two subjects"),
    ],
)
def test_broken_rule_is_found(tmp_path: Path, file: str, source: str, expected: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", '"""Doc."""\n\n__version__ = "1"\n'),
        ("__main__.py", "from ociproxy.cli.main import main"),
        ("cli/main.py", "import click\nimport rich.table\nfrom ociproxy import __version__"),
        ("serve/app.py", "from aiohttp import web\nfrom ociproxy.fetch.pull import Puller"),
        ("fetch/oras/backend.py", "import oras.provider\nimport urllib3, requests"),
        ("fetch/upstream.py", "import tenacity\nfrom ociproxy.config.settings import Config"),
        ("config/file.py", "import yaml\nfrom ociproxy.config.settings import Config"),
        ("store/blobs.py", "from ociproxy.log import logger\nfrom ociproxy.store.stage import S"),
    ],
)
def test_rightful_import_is_left_alone(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []


def modules(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Dotted name below `package` and tree of each file that is no `__init__`."""
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py":
            name = ".".join(path.relative_to(package).with_suffix("").parts)
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported_of_ours(tree: ast.Module, known: frozenset[str]) -> set[str]:
    """The modules among `known` that the tree imports, as a whole or a name of theirs."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {
        name.removeprefix("ociproxy.") for name in found if name.startswith("ociproxy.")
    } & known


def circles(package: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others, to run or for type
    checkers: a reader has to keep all of a group in mind at once."""
    trees = dict(modules(package))
    known = frozenset(trees)
    graph = {name: imported_of_ours(tree, known) for name, tree in trees.items()}
    reached: dict[str, set[str]] = {}
    for name in graph:
        seen: set[str] = set()
        waiting = list(graph[name])
        while waiting:
            each = waiting.pop()
            if each not in seen:
                seen.add(each)
                waiting += graph[each]
        reached[name] = seen
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return sorted(map(list, groups))


def arrows(package: Path) -> set[tuple[str, str]]:
    """Each part with each other part that it imports, for type checkers or to run."""
    trees = dict(modules(package))
    known = frozenset(trees)
    return {
        (part_of(name), part_of(other))
        for name, tree in trees.items()
        for other in imported_of_ours(tree, known)
        if part_of(name) != part_of(other)
    }


def untested(package: Path, checkout: Path) -> list[str]:
    """Modules that have no test file of their name at the mirrored path, and whose docstring ends
    with no `Tests: path, path.` of files or folders that exist."""
    found = []
    for name, tree in modules(package):
        *folders, stem = name.split(".")
        if (checkout / "tests" / Path(*folders) / f"test_{stem}.py").exists():
            continue
        named = TESTS.search(ast.get_docstring(tree) or "")
        if named is None:
            found.append(f"{name}: no test file of its name, and no line `Tests: ...`")
            continue
        found += [
            f"{name}: there is no {path}"
            for path in re.split(r",\s+", named[1])
            if not (checkout / path).exists()
        ]
    return found


def test_no_module_leads_back_to_itself() -> None:
    assert circles(PACKAGE) == []


def test_a_circle_is_found_of_types_too(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from ociproxy.b import B")
    (tmp_path / "b.py").write_text("def f():\n    from ociproxy import c")
    (tmp_path / "c.py").write_text("import ociproxy.a")
    (tmp_path / "d.py").write_text("if TYPE_CHECKING:\n    from ociproxy.e import E")
    (tmp_path / "e.py").write_text("from ociproxy.d import D")
    assert circles(tmp_path) == [["a", "b", "c"], ["d", "e"]]


def test_parts_have_few_arrows_between_them() -> None:
    found = arrows(PACKAGE)
    assert len(found) <= MAX_ARROWS, sorted(found)


def test_each_module_says_or_shows_where_its_tests_are() -> None:
    assert untested(PACKAGE, CHECKOUT) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Doc.\n\nMore.\nTests: tests/test_a.py, tests/b.\n"""', []),
        ('"""Doc. Tests: tests/test_a.py,\ntests/b.\n"""', []),
        ('"""Doc."""', ["store.x: no test file of its name, and no line `Tests: ...`"]),
        ('"""Doc. Tests: tests/test_c.py."""', ["store.x: there is no tests/test_c.py"]),
    ],
)
def test_missing_tests_are_found(tmp_path: Path, source: str, expected: list[str]) -> None:
    package, tests = tmp_path / "ociproxy", tmp_path / "tests"
    for folder in (package / "store", tests / "b", tests / "store"):
        folder.mkdir(parents=True)
    for file in (tests / "test_a.py", tests / "store" / "test_y.py", package / "store" / "y.py"):
        file.touch()
    (package / "store" / "x.py").write_text(source)
    assert untested(package, tmp_path) == expected


def test_prose_names_who_acts() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if RIDDLES.search(line)
    ]
    assert len(found) <= MAX_RIDDLES, "\n".join(found)


def loaded_with(*commands: str) -> set[str]:
    modules = ", ".join(["sys", "ociproxy.cli.main", *(f"ociproxy.cli.{c}" for c in commands)])
    done = subprocess.run(
        [sys.executable, "-c", f"import {modules}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(done.stdout.split())


def test_a_server_does_not_load_what_only_other_commands_use() -> None:
    loaded = loaded_with("serve_command")
    assert "aiohttp" in loaded
    assert not {"rich", "ociproxy.cli.list_command"} & loaded


def test_archives_are_not_kept_waiting_for_what_terminals_and_config_files_need() -> None:
    loaded = loaded_with("import_command", "export_command", "diff_command")
    assert "ociproxy.archive.export.export" in loaded
    assert loaded & {"rich.console", "yaml", "ssl", "asyncio"} == set()


def test_a_load_does_not_wait_for_what_it_does_not_use() -> None:
    loaded = loaded_with("load_command")
    assert "oras.provider" in loaded
    unused = {"referencing"}  # which jsonschema imports first
    unused |= {"chardet", "charset_normalizer", "importlib.metadata", "decimal", "difflib"}
    unused |= {"yaml", "ociproxy.load.plan"}
    assert not unused & loaded
