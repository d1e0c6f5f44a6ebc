"""What a user can meet is written down, and what is written down exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from ociproxy.cli.main import main
from ociproxy.config.kinds import Duration, Number, Size
from ociproxy.config.table import ROOT
from ociproxy.errors import OciProxyError
from ociproxy.metrics.counters import COUNTERS, HISTOGRAMS
from ociproxy.serve.admin.exposition import GAUGES
from ociproxy.serve.errors import STATUS
from tests.config.test_config import keys

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).parent.parent
DOCUMENTS = sorted([*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md")])
ROW = re.compile(r"^\| *(?P<first>[^|]*?) *\| *(?P<second>[^|]*?) *\|", re.MULTILINE)


def rows(name: str) -> set[tuple[str, str]]:
    """The first two cells of every table row in docs/."""
    text = (CHECKOUT / "docs" / name).read_text(encoding="utf-8")
    return {(row["first"], row["second"]) for row in ROW.finditer(text)}


def commands(
    command: click.Command, context: click.Context, path: str
) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            if not found.hidden:
                yield from commands(found, context, f"{path} {name}")


def all_commands() -> list[tuple[str, click.Command]]:
    with click.Context(main, info_name="ociproxy") as context:
        return list(commands(main, context, "ociproxy"))


def errors(base: type[OciProxyError] = OciProxyError) -> Iterator[type[OciProxyError]]:
    yield base
    for error in base.__subclasses__():
        yield from errors(error)


def mentions(word: str) -> re.Pattern[str]:
    """`--port` is not mentioned by `--port-range`."""
    return re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")


def test_every_option_is_documented() -> None:
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    missing = [
        f"{path} {option}"
        for path, command in all_commands()
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--") and not mentions(option).search(text)
    ]
    assert missing == []


def test_every_option_of_serve_has_a_row_with_its_variable() -> None:
    (serve,) = (command for path, command in all_commands() if path == "ociproxy serve")
    documented = {
        (first.split()[0].strip("`"), second)
        for first, second in rows("operations.md")
        if first.startswith("`--")
    }
    expected = {
        (max(parameter.opts, key=len), f"`{variable(parameter)}`")
        for parameter in serve.params
        if isinstance(parameter, click.Option) and not parameter.hidden
    }
    assert documented == expected


def variable(option: click.Option) -> str:
    names = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    return names[0] if names else f"OCIPROXY_{(option.name or '').upper()}"


def test_every_command_is_in_the_readme() -> None:
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    leaves = [path for path, command in all_commands() if not isinstance(command, click.Group)]
    missing = [path for path in leaves if not mentions(path).search(readme)]
    assert missing == []


def test_no_document_names_a_command_that_does_not_exist() -> None:
    known = {path for path, _ in all_commands()}
    groups = {path for path, command in all_commands() if isinstance(command, click.Group)}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for first, second in re.findall(r"`ociproxy ([a-z-]+)(?: ([a-z0-9-]+))?", text):
            path = f"ociproxy {first}"
            assert path in known, document.name
            if path in groups and second:
                assert f"{path} {second}" in known, document.name


def test_every_error_has_a_row_with_its_status_and_code() -> None:
    documented = rows("http-api.md")
    missing = [
        f"{error.__name__}: {status} {code}"
        for error, (status, code) in STATUS.items()
        if (str(status), code or "") not in documented
    ]
    assert missing == []


def test_every_exit_code_has_a_row() -> None:
    documented = {first for first, _ in rows("operations.md")}
    missing = [error.__name__ for error in errors() if str(error.exit_code) not in documented]
    assert missing == []


def limits() -> Iterator[tuple[str, str]]:
    """Each key whose value bounds something, with its default: a size, a duration or a number of
    things, which a port is not. What is inherited, or repeated for endpoints, has one row."""
    for path, key, default in keys(ROOT):
        repeated = key.inherited or ".endpoints[]" in path
        if (
            isinstance(key.kind, Duration | Size | Number)
            and not path.endswith(".port")
            and not repeated
        ):
            yield path, f"`{default}`" if default != "" else ""


@pytest.mark.parametrize(("path", "default"), [*limits()])
def test_every_limit_has_a_row_that_says_what_happens_at_it(path: str, default: str) -> None:
    found = dict(row for row in rows("operations.md") if row[0] == f"`{path}`")
    assert list(found) == [f"`{path}`"]
    assert default in found[f"`{path}`"]


def test_every_metric_is_documented_and_no_other() -> None:
    text = (CHECKOUT / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = re.findall(
        r"^\| `(ociproxy_\w+)` \| (\w+) \| ([^|]*?) ?\| ([^|]+) \|$", text, re.MULTILINE
    )
    there = [
        (f"{name}_total" if kind == "counter" else name, kind, labels, meaning)
        for kind, metrics in (("counter", COUNTERS), ("histogram", HISTOGRAMS), ("gauge", GAUGES))
        for name, labels, meaning in (
            (each.name, ", ".join(f"`{label}`" for label in each.labels), each.meaning)
            for each in metrics
        )
    ]
    assert sorted(documented) == sorted(there)


def test_every_make_target_exists() -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE))
        assert named <= targets, document.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#?)([^)]*)\)", text):
        linked = document.parent / target if target else document
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{target}#{anchor}"


def slug(heading: str) -> str:
    """How GitHub names a heading in a link."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_each_quirk_of_a_registry_names_tests_that_there_are() -> None:
    text = (CHECKOUT / "docs" / "interop.md").read_text(encoding="utf-8")
    section = text.partition("## Registries\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[-1] for line in section.splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(\w+)`", row) for row in rows]
    assert rows
    assert all(named)
    sources = [path.read_text(encoding="utf-8") for path in (CHECKOUT / "tests").rglob("*.py")]
    there = set(re.findall(r"def test_(\w+)\(", "\n".join(sources)))
    assert {name for names in named for name in names} <= there
