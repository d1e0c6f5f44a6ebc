"""The documentation as a site, and what else in deploy/ a person reads."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from ociproxy.config.local_settings import Serve
from tests.parts.tools import run
from tools import site

COMPOSE = site.CHECKOUT / "deploy/compose.yaml"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the site is made of."""
    for name in (*site.PARTS, "tools", "bench"):
        path = site.CHECKOUT / name
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, tmp_path / name, ignore=ignore)
        else:
            shutil.copy(path, tmp_path)
    return tmp_path


def test_the_site_builds_and_asks_no_other_host(checkout: Path) -> None:
    run(sys.executable, "-m", "tools.site", cwd=checkout)
    pages = list((checkout / "site").rglob("*.html"))
    assert {"index.html", "operations.html", "configuration.html"} <= {page.name for page in pages}
    loaded = re.compile(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=\"?(https?:[^\" >]+)")
    for page in pages:
        assert loaded.findall(page.read_text(encoding="utf-8")) == [], page.name


def test_links_that_lead_nowhere_fail_the_site(checkout: Path) -> None:
    with (checkout / "docs/store.md").open("a", encoding="utf-8") as page:
        page.write("\n[a file](nowhere.md) and [a heading](operations.md#nowhere)\n")
    done = run(sys.executable, "-m", "tools.site", cwd=checkout, check=False)
    assert done.returncode != 0
    said = done.stderr.decode()
    assert "nowhere.md" in said
    assert "'operations.md#nowhere'" in said


def test_compose_runs_the_image_closed_and_lets_it_stop() -> None:
    service = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]["ociproxy"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert int(service["stop_grace_period"].removesuffix("s")) > Serve().shutdown_grace
