"""helm: a chart is pulled and shown through the mirror, without its upstream, and offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ociproxy import __version__
from tests.parts.registry import Registry
from tests.parts.tools import require_tool, run
from tests.server import ROOT, Mirror

UPSTREAM = "registry.example"
OURS = ROOT / "deploy/helm/ociproxy"
PACKED = f"ociproxy-{__version__}.tgz"


def test_a_chart_is_pulled_and_shown_through_the_mirror_without_the_upstream_and_offline(
    mirror: Callable[..., Mirror], tmp_path: Path
) -> None:
    program = require_tool("helm")

    def helm(*words: str | Path) -> str:
        return run(program, *words, env={"HOME": str(tmp_path)}, cwd=tmp_path).stdout.decode()

    helm("package", OURS)
    packed = (tmp_path / PACKED).read_bytes()
    with Registry(tmp_path / "registry") as registry:
        helm("push", PACKED, f"oci://{registry.name}/charts", "--plain-http")
        server = mirror({"upstreams": [{"name": UPSTREAM, "endpoint": registry.url}]})
        chart = f"oci://{server.registry}/{UPSTREAM}/charts/ociproxy"

        def look(name: str) -> None:
            """The newest by its tag, one by its version, one by a range, which reads the tags."""
            assert f"\nversion: {__version__}\n" in helm("show", "chart", chart, "--plain-http")
            for number, version in enumerate((__version__, ">=0.0.1-0")):
                folder = tmp_path / f"{name}-{number}"
                folder.mkdir()
                where = ("--plain-http", "--destination", folder)
                helm("pull", chart, "--version", version, *where)
                assert (folder / PACKED).read_bytes() == packed

        look("cold")
        registry.stop()
        look("warm")
        server.restart(args=["--offline"])
        look("offline")
