"""The page: what the server does now, what it holds, and its last requests, as HTML.

All of it is written here and works without scripts; a script of a few lines replaces the live part
of a view once a second. Nothing comes from other hosts.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from ociproxy.errors import DigestInvalid, NameInvalid, OciProxyError, StoreError
from ociproxy.oci.reference import Reference
from ociproxy.serve.admin.history import Sample, plot
from ociproxy.serve.admin.render import HEADERS, encoded, html, static, template
from ociproxy.serve.admin.survey import Images
from ociproxy.serve.errors import Unsupported, status_and_code
from ociproxy.serve.exchange import RECENT
from ociproxy.serve.live import alive
from ociproxy.store.image import read_contents
from ociproxy.store.pruning.removed import read_removed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ociproxy.config.settings import Config
    from ociproxy.serve.admin.sources import Sources
    from ociproxy.store.pruning.removed import RemovedImage

_PATHS: Final = {"/": "now", "/contents": "contents", "/store": "store", "/log": "log"}
_STREAM: Final = 600.0
"""Seconds of a live view; then the browser asks again."""
_PER_PAGE: Final = 100
"""Images of one page of the list."""
_SHOWN: Final = 500
"""Manifests, layers and referrers of one image that are shown, of each."""


class Page:
    """Belongs to one event loop."""

    def __init__(self, config: Config, sources: Sources) -> None:
        self.config = config
        self._sources = sources
        self._rates: dict[int, tuple[float, int, float]] = {}

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Raises Unsupported for a path that is none of the page's."""
        path = request.path
        file = static(path)
        if file is not None:
            return file
        if path == "/events":
            return await self._stream(request)
        if path == "/image":
            values = await self._in_thread(self._image, request)
            return html("image", values)
        if path == "/why":
            return await self._why(request.rel_url.query.get("reference", ""))
        view = _PATHS.get(path)
        if view is None:
            raise Unsupported("no such path on the admin listener", status=404)
        return html(view, await self._values(view, request))

    async def _why(self, reference: str) -> web.Response:
        values: dict[str, Any] = {"asked": reference, "explained": None, "problem": ""}
        status = 200
        try:
            if reference.strip():
                values["explained"] = await self._sources.explainer.explain(reference)
        except OciProxyError as exc:
            values["problem"], status = str(exc), status_and_code(exc)[0]
        return html("why", values, status=status)

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        """Server-sent events: the live part of a view, whenever it changes."""
        view = request.rel_url.query.get("view", "")
        if view not in ("now", "store", "log"):
            raise Unsupported("view is now, store or log", status=404)
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        live = template(f"_{view}")
        last, end = "", time.monotonic() + _STREAM
        with suppress(ConnectionError):
            while time.monotonic() < end:
                text = live.render(await self._values(view, request))
                if text != last:
                    last = text
                    data = "".join(f"data: {line}\n" for line in text.splitlines())
                    await response.write(encoded(f"{data}\n"))
                else:
                    await response.write(b":\n\n")  # tells that the browser has gone
                await asyncio.sleep(1)
            await response.write_eof()
        return response

    async def _values(self, view: str, request: web.BaseRequest) -> dict[str, Any]:
        match view:
            case "now":
                return self._now()
            case "log":
                return self._log()
            case "store":
                return await self._in_thread(self._stored)
            case _:
                return await self._in_thread(self._contents, request.rel_url.query)

    async def _in_thread(self, work: Any, *arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = await asyncio.get_running_loop().run_in_executor(
            None, work, *arguments
        )
        return found

    def _now(self) -> dict[str, Any]:
        states = alive(self._sources.tally)
        fills = {fill["digest"]: fill for state in states for fill in state["filling"]}
        sending = [self._pull(pull, fills) for state in states for pull in state["sending"]]
        going = {pull["id"] for pull in sending}
        self._rates = {key: value for key, value in self._rates.items() if key in going}
        upstreams: dict[str, dict[str, Any]] = {}
        for each in (upstream for state in states for upstream in state["upstreams"]):
            known = upstreams.setdefault(each["registry"], each)
            if each["seconds"] > known["seconds"]:
                upstreams[each["registry"]] = each
        return {
            "sending": sorted(sending, key=lambda pull: (pull["name"], pull["client"] or "")),
            "fills": sorted(fills.values(), key=lambda fill: fill["repository"]),
            "upstreams": [upstreams[name] for name in sorted(upstreams)],
            "workers": len(states),
            "connections": sum(state["connections"] for state in states),
            "queued": sum(state["fills"]["queued"] for state in states),
            "totals": Sample.of(self._sources.tally.totals(), None),
        }

    def _pull(self, pull: dict[str, Any], fills: Mapping[str, Any]) -> dict[str, Any]:
        """With its rate over the last seconds, and the time that is left by it."""
        name, _, digest = pull["name"].partition("@")
        now = time.monotonic()
        sent, size = pull["sent"], pull["size"]
        began, first, rate = self._rates.setdefault(pull["id"], (now, sent, 0.0))
        if now - began >= 2:
            rate = (sent - first) / (now - began)
            self._rates[pull["id"]] = (now, sent, rate)
        cache = pull["cache"]
        how = "from the store"
        if "collapsed" in cache:
            how = "follows a download"
        elif "fwd=miss" in cache:
            how = "downloads"
        left = (size - sent) / rate if rate and size else None
        return {**pull, "name": name, "digest": digest, "rate": rate, "how": how, "left": left}

    def _log(self) -> dict[str, Any]:
        recent = [tuple(each) for state in alive(self._sources.tally) for each in state["recent"]]
        newest = sorted(recent, key=lambda each: each[0], reverse=True)
        return {"requests": [(_explainable(each[2]), *each) for each in newest[:RECENT]]}

    def _contents(self, query: Mapping[str, str]) -> dict[str, Any]:
        self._sources.surveyor.ask()
        found = self._sources.surveyor.contents
        wanted = query.get("q", "").strip()[:200]
        images = Images() if found is None or found.images is None else found.images
        matching = images.matching(wanted)
        page = query.get("page", "1")
        number = int(page) if page.isascii() and page.isdecimal() and len(page) < 6 else 1
        pages = max(1, -(-len(matching) // _PER_PAGE))
        number = min(max(1, number), pages)
        return {
            "survey": found,
            "looking": self._sources.surveyor.is_looking,
            "q": wanted,
            "count": len(images),
            "matching": len(matching),
            "images": [
                images[each] for each in matching[(number - 1) * _PER_PAGE : number * _PER_PAGE]
            ],
            "page": number,
            "pages": pages,
        }

    def _stored(self) -> dict[str, Any]:
        survey, disk = self._sources.surveyor.held, None
        removed: list[RemovedImage] = []
        with suppress(OSError):
            disk = shutil.disk_usage(self._sources.store.root)
        with suppress(StoreError):
            removed = read_removed(self._sources.store)
        ratios, sizes = self._sources.history.hit_ratios(), self._sources.history.sizes()
        largest = max((size for _, size in sizes), default=0.0)
        return {
            "root": self._sources.store.root,
            "survey": survey,
            "removed": removed[::-1],
            "disk": disk,
            "total": sum(each.bytes for each in survey.held.values()) if survey else 0,
            "totals": Sample.of(self._sources.tally.totals(), None),
            "ratios": plot(ratios, 1.0),
            "sizes": plot(sizes, largest * 1.1),
            "largest": largest * 1.1,
            "since": sizes[0][0] if sizes else None,
        }

    def _image(self, request: web.BaseRequest) -> dict[str, Any]:
        """Blocks. Raises OciProxyError."""
        text = request.rel_url.query.get("reference", "")
        try:
            reference = Reference.parse(text[:1000])
        except NameInvalid as exc:
            raise Unsupported(f"not a reference: {exc}", status=404) from exc
        descriptor = self._sources.store.refs.find(reference)
        if descriptor is None:
            raise Unsupported(f"{reference} is not stored", status=404)
        contents = read_contents(
            self._sources.store, reference.repository, descriptor, referrers=True
        )
        host = request.host.rpartition(":")[0] if ":" in request.host else request.host
        ports = [state["port"] for state in alive(self._sources.tally)]
        mirror = f"{host}:{ports[0] if ports else self.config.serve.port}"
        plain = self.config.serve.tls is None
        return {
            "reference": reference,
            "top": descriptor,
            "contents": contents,
            "manifests": list(contents.manifests.values())[:_SHOWN],
            "blobs": list(contents.blobs.items())[:_SHOWN],
            "referrers": list(contents.referrers.values())[:_SHOWN],
            "missing": list(contents.missing.values())[:_SHOWN],
            "commands": _commands(mirror, reference, plain=plain),
        }


def _commands(mirror: str, reference: Reference, *, plain: bool) -> dict[str, str]:
    """How each client pulls the image through this server."""
    name = f"{mirror}/{reference}"
    return {
        "docker": f"docker pull {name}",
        "podman": f"podman pull {'--tls-verify=false ' if plain else ''}{name}",
        "skopeo": f"skopeo inspect {'--tls-verify=false ' if plain else ''}docker://{name}",
        "crane": f"crane manifest {'--insecure ' if plain else ''}{name}",
        "containerd": f"ctr images pull {'--plain-http ' if plain else ''}{name}",
        "kubelet": f"crictl pull {reference}  # with hosts.toml by ociproxy client-config",
    }


def _explainable(name: str) -> bool:
    """Whether a request of the log named what `why` can explain: `NAME:list` asked for tags."""
    try:
        return not name.endswith(":list") and bool(Reference.parse(name))
    except (NameInvalid, DigestInvalid):
        return False
