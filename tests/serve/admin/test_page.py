"""The page as a browser without scripts reads it."""

from __future__ import annotations

import asyncio
import http.client
import re
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from ociproxy.config.settings import Config
from ociproxy.metrics.tally import Tally
from ociproxy.serve.admin.history import History, Sample, plot
from ociproxy.serve.admin.page import Page
from ociproxy.serve.admin.render import read_all
from ociproxy.serve.admin.survey import Findings, Held, Surveyor
from ociproxy.store.store import Store
from tests.images import artifact, multi_platform
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault


def test_a_pull_is_on_every_view(mirror: Callable[..., Mirror], upstream: FakeUpstream) -> None:
    app = upstream.add("app", multi_platform(platforms=("linux/amd64", "linux/arm64")), tag="1")
    signature = upstream.add("app", artifact(app.top))
    big, slow = (each.digest for each in app.blobs if each.media_type.endswith("gzip"))
    config = {
        "upstreams": [upstream_entry(upstream.url)],
        "store": {"pins": [f"{upstream.registry}/app:*"]},
    }
    server = mirror(config, admin=True)
    for reference in ("1", app.manifests[0].digest, signature.top.digest):
        assert server.manifest(upstream.registry, "app", reference).status == 200
    assert server.blob(upstream.registry, "app", big).status == 200
    assert server.get("/v2/%3Cscript%3Ealert(1)%3C/script%3E").status == 404
    upstream.fault(slow, Fault(stall_after=10))

    with closing(server.connect()) as pulling:
        pulling.request("GET", f"/v2/app/blobs/{slow}?ns={upstream.registry}")
        server.wait_for(lambda: slow[7:19] in view(server, "/"), "the pull on the page")
        now = view(server, "/")
        assert re.search(r"10 B of 1\d\.\d kB", now)
        assert upstream.registry in now
        assert "127.0.0.1" in now
        upstream.release()
        upstream.heal()
        pulling.getresponse().read()

    log = view(server, "/log")
    assert f"{upstream.registry}/app:1" in log
    assert "&lt;script&gt;" in log
    assert "<script>alert" not in log

    name = f"{upstream.registry}/app:1"
    server.wait_for(lambda: name in view(server, "/contents"), "the image listed", limit=60)
    listed = view(server, "/contents?q=APP%3A1")
    assert "linux/amd64" in listed
    assert "pinned" in listed
    assert "No reference has that." in view(server, "/contents?q=nothing+of+this")
    one = view(server, f"/image?reference={name}")
    assert app.top.digest in one
    assert signature.top.digest in one
    assert f"docker pull {server.registry}/{name}" in one
    assert server.admin(f"/image?reference={name}x").status == 404
    assert server.admin("/image?reference=%00").status == 404

    server.wait_for(
        lambda: "manifest</td>" in view(server, "/store"), "the store counted", limit=60
    )
    with closing(http.client.HTTPConnection(server.host, server.admin_port)) as listening:
        listening.request("GET", "/events?view=log")
        answer = listening.getresponse()
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.readline().startswith(b"data: <section")


def view(server: Mirror, path: str) -> str:
    answer = server.admin(path)
    assert answer.status == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    text = answer.body.decode()
    # Nothing of another host, and no style or script within the document.
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", text)
    assert not re.search(r"<style|style=|onclick=|<script(?! src=\"/live.js\")", text)
    return text


async def test_ten_thousand_images_are_listed_page_by_page(tmp_path: Path) -> None:
    surveyor = Surveyor(lambda *_: [], Config(), Tally(1))
    surveyor.contents = Findings(time.time(), {"blob": Held(1, 1)}, images=many(10_000), whole=True)
    page = Page(Config(), Store(tmp_path / "store"), Tally(1), surveyor, History())
    await asyncio.get_running_loop().run_in_executor(None, read_all)
    texts = []
    began = time.process_time()
    for path in ("/contents", "/contents?page=100", "/contents?q=app-77&page=2"):
        response = await page.answer(make_mocked_request("GET", path))
        assert isinstance(response, web.Response)
        assert response.text is not None
        texts.append(response.text)
    assert time.process_time() - began < 2
    assert [text.count("<tr><td") for text in texts] == [100, 100, 11]
    assert "10000 images" in texts[0]
    assert "app-9999:1" in texts[1]
    assert "Page 2 of 2" in texts[2]


def many(count: int) -> list[dict[str, object]]:
    return [
        {
            "reference": f"registry.example/app-{number}:1",
            "platforms": [{"platform": "linux/amd64", "complete": True}],
            "complete": True,
            "size": 1000,
            "shared": 0,
            "lastUsed": "2026-01-01T00:00:00Z",
            "pinned": False,
        }
        for number in range(count)
    ]


def test_the_plots_show_what_changed_between_two_samples() -> None:
    history = History()
    for at, answers, hits, stored in ((0, 0, 0, None), (300, 10, 5, 100.0), (600, 20, 15, 300.0)):
        history.add(Sample(at, answers, hits, 0, 0, stored))
    assert history.hit_ratios() == [(300, 0.5), (600, 1.0)]
    assert plot(history.hit_ratios(), 1.0) == "0.0,60.0 600.0,2.0"
    assert history.sizes() == [(300, 100.0), (600, 300.0)]
    assert plot(history.sizes()[:1], 300.0) == ""
