"""The page as a browser without scripts reads it."""

from __future__ import annotations

import asyncio
import html
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from click.testing import CliRunner

from ociproxy.cli.main import main
from ociproxy.config.settings import Config
from ociproxy.metrics.tally import Tally
from ociproxy.serve.admin.explaining import Explainer
from ociproxy.serve.admin.history import History, Sample, plot
from ociproxy.serve.admin.page import Page
from ociproxy.serve.admin.render import read_all
from ociproxy.serve.admin.sources import Sources
from ociproxy.serve.admin.survey import Findings, Held, Images, Surveyor
from ociproxy.store.store import Store
from tests.images import artifact, image, index, multi_platform
from tests.server import Mirror, upstream_entry
from tests.upstream import FakeUpstream
from tests.upstream_faults import Fault


def test_why_says_on_the_page_what_the_command_says(
    mirror: Callable[..., Mirror], upstream: FakeUpstream
) -> None:
    app = upstream.add("app", image("app"), tag="1")
    config = {"upstreams": [upstream_entry(upstream.url)], "store": {"pins": ["*/app:*"]}}
    server = mirror(config, admin=True)
    name = f"{upstream.registry}/app:1"
    layer = f"{upstream.registry}/app@{app.layers[0].digest}"
    assert server.manifest(upstream.registry, "app", "1").status == 200
    assert server.blob(upstream.registry, "app", app.layers[0].digest).status == 200
    assert server.get(f"/v2/app/tags/list?ns={upstream.registry}").status == 200
    server.wait_for(lambda: layer[:-52] in view(server, "/log"), "the requests told of")

    # A link leads there from each line that names an image or its content, and from the image.
    links = re.findall(r'href="(/why[^"]+)"', view(server, "/log"))
    assert {unquote(each).partition("=")[2] for each in links} == {name, layer}
    (from_image,) = re.findall(r'href="(/why\?[^"]+)"', view(server, f"/image?reference={name}"))
    assert from_image in links

    url = f"http://127.0.0.1:{server.admin_port}"
    where = ["--image-path", str(server.store), "--config-path", str(server.config_path)]
    for reference in (name, layer, f"{upstream.registry}/absent:2"):
        words = ["why", reference, *where, "--server", url]
        answer = server.admin(f"/api/why?reference={reference}")
        assert answer.status == 200
        told = answer.json()
        command = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
        told["server"]["upstream"] = command["server"]["upstream"] = told["server"]["url"] = None
        command["server"]["url"] = None
        assert told == command
        page = html.unescape(re.sub(r"<[^>]*>", "", view(server, f"/why?reference={reference}")))
        printed = CliRunner().invoke(main, words).stdout.splitlines()
        assert len(printed) > 4
        assert [line for line in printed if line[12:] not in page] == []
    assert server.admin(f"/api/why?reference={layer}").json()["state"] == "blob"
    # A name as docker knows it, typed into the form.
    assert "docker.io/library/nginx:1.27" in view(server, "/why?reference=nginx%3A1.27")

    assert '<form role="search" action="/why">' in view(server, "/why")
    for path in ("/why", "/api/why"):
        refused = server.admin(f"{path}?reference=%3Cscript%3E")
        assert (refused.status, b"<script>" in refused.body) == (400, path == "/api/why")
        assert b"not a reference" in refused.body
    # The configuration that the server runs with decides, and not one that it has not read yet.
    server.write_config({**config, "store": {"pins": [{"list": "/nonexistent"}]}})
    assert b"by store.pins" in server.admin(f"/why?reference={name}").body


def test_a_pull_is_on_every_view(mirror: Callable[..., Mirror], upstream: FakeUpstream) -> None:
    app = upstream.add("app", multi_platform(platforms=("linux/amd64", "linux/arm64")), tag="1")
    signature = upstream.add("app", artifact(app.top))
    odd = upstream.add("odd", index({"linux/<b>\ud800": image("odd")}), tag="1")
    big, slow = (each.digest for each in app.blobs if each.media_type.endswith("gzip"))
    config = {
        "upstreams": [upstream_entry(upstream.url)],
        "store": {"pins": [f"{upstream.registry}/app:*"]},
    }
    server = mirror(config, admin=True)
    for reference in ("1", app.manifests[0].digest, signature.top.digest):
        assert server.manifest(upstream.registry, "app", reference).status == 200
    for reference in ("1", odd.manifests[0].digest):
        assert server.manifest(upstream.registry, "odd", reference).status == 200
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

    # A platform that is no Unicode hides no other image, and is text.
    assert "linux/&lt;b&gt;?" in view(server, "/contents?q=odd")
    for path in ("/image", "/why"):
        view(server, f"{path}?reference={upstream.registry}/odd:1")

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
    config, store, tally = Config(), Store(tmp_path / "store"), Tally(1)
    explainer = Explainer(config, store, tally)
    page = Page(config, Sources(store, tally, surveyor, History(), explainer))
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


async def test_the_images_are_searched_outside_the_event_loop(tmp_path: Path) -> None:
    class Noting(Images):
        def matching(self, text: str) -> Sequence[int]:
            threads.append(threading.get_ident())
            return super().matching(text)

    threads: list[int] = []
    surveyor = Surveyor(lambda *_: [], Config(), Tally(1))
    surveyor.contents = Findings(time.time(), images=Noting(), whole=True)
    config, store, tally = Config(), Store(tmp_path / "store"), Tally(1)
    explainer = Explainer(config, store, tally)
    page = Page(config, Sources(store, tally, surveyor, History(), explainer))
    await asyncio.get_running_loop().run_in_executor(None, read_all)
    await page.answer(make_mocked_request("GET", "/contents?q=app"))
    assert len(threads) == 1
    assert threads != [threading.get_ident()]


def many(count: int) -> Images:
    found = Images()
    for number in range(count):
        told = {
            "reference": f"registry.example/app-{number}:1",
            "platforms": [{"platform": "linux/amd64", "complete": True}],
            "complete": True,
            "size": 1000,
            "shared": 0,
            "lastUsed": "2026-01-01T00:00:00Z",
            "pinned": False,
        }
        assert found.add(f"registry.example/app-{number}:1", json.dumps(told).encode())
    return found


def test_the_plots_show_what_changed_between_two_samples() -> None:
    history = History()
    for at, answers, hits, stored in ((0, 0, 0, None), (300, 10, 5, 100.0), (600, 20, 15, 300.0)):
        history.add(Sample(at, answers, hits, 0, 0, stored))
    assert history.hit_ratios() == [(300, 0.5), (600, 1.0)]
    assert plot(history.hit_ratios(), 1.0) == "0.0,60.0 600.0,2.0"
    assert history.sizes() == [(300, 100.0), (600, 300.0)]
    assert plot(history.sizes()[:1], 300.0) == ""
