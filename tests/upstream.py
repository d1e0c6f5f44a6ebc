"""FakeUpstream: a registry on a real socket that does what it is told, wrong things included.

It runs in a thread and an event loop of its own, so it serves plain tests, async tests and
subprocesses alike, and a test that blocks does not stop it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from collections.abc import Coroutine
from typing import Self, TypeVar

from aiohttp import web

from tests.images import OCI_INDEX, Content, Image, Json
from tests.upstream_auth import Auth, TokenAuth
from tests.upstream_faults import Fault, Request, close, error, send

T = TypeVar("T")
NAME = r"{name:[^?]+?}"
GOOD = Fault()
ENTRY = web.RequestKey("entry", Request)
FAULT = web.RequestKey("fault", Fault)


class FakeUpstream:
    """`with FakeUpstream() as upstream: upstream.add("team/app", image(), tag="v1")`."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        auth: Auth | None = None,
        referrers: bool = True,
    ) -> None:
        self.requests: list[Request] = []
        self._host, self._tls, self._auth = host, tls, auth
        self._auth_of: dict[str, Auth] = {}
        self._has_referrers = referrers
        self._content: dict[str, Content] = {}
        self._repositories: dict[str, set[str]] = {}
        self._tags: dict[str, dict[str, str]] = {}
        self._queued: list[tuple[str, str, Fault]] = []
        self._permanent: list[tuple[str, str, Fault]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake upstream")
        self._released = asyncio.Event()
        self._protocols: list[web.RequestHandler] = []
        self._listener: asyncio.Server | None = None
        self._port = 0
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.1)

    # Life

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen(0))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._run(self._stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    def stop_listening(self) -> None:
        """From here on connections are refused, and open ones are closed."""
        self._run(self._stop())

    def listen_again(self) -> None:
        """On the port it had: the upstream is back."""
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.1)
        self._run(self._listen(self._port))

    @property
    def registry(self) -> str:
        """Its name in references: host:port."""
        return f"{self._host}:{self._port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.registry}"

    # What it holds

    def add(self, repository: str, image: Image, *, tag: str | None = None) -> Image:
        for each in image.all_content():
            self.add_content(repository, each)
        if tag is not None:
            self._tags.setdefault(repository, {})[tag] = image.digest
        return image

    def add_content(self, repository: str, content: Content) -> Content:
        self._content[content.digest] = content
        self._repositories.setdefault(repository, set()).add(content.digest)
        return content

    def remove_tag(self, repository: str, tag: str) -> None:
        del self._tags[repository][tag]

    def remove(self, repository: str, digest: str) -> None:
        self._repositories[repository].discard(digest)

    # What it does wrong

    def fault(self, path: str, fault: Fault, *, times: int | None = None, method: str = "") -> None:
        """For requests whose path contains `path`: for the next `times` of them, or for good.

        The oldest queued fault goes first, then the newest permanent one.
        """
        if times is None:
            self._permanent.insert(0, (method, path, fault))
        else:
            self._queued.extend([(method, path, fault)] * times)

    def fail_next(self, times: int, status: int, *, path: str = "", method: str = "") -> None:
        self.fault(path, Fault(status=status), times=times, method=method)

    def heal(self) -> None:
        self._queued.clear()
        self._permanent.clear()
        self.release()

    def release(self) -> None:
        """Let go of what stalls or waits now; later stalls stall again."""
        self._loop.call_soon_threadsafe(self._release)

    def protect(self, repository: str, auth: Auth) -> None:
        """Ask for this on one repository; `auth=` of the constructor is for all others."""
        self._auth_of[repository] = auth

    # What it saw

    def seen(self, path: str = "", method: str = "") -> list[Request]:
        return [r for r in list(self.requests) if path in r.path and method in ("", r.method)]

    def count(self, path: str = "", method: str = "") -> int:
        return len(self.seen(path, method))

    def bytes_sent(self, path: str = "") -> int:
        return sum(request.sent for request in self.seen(path))

    # The server

    def _application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/token", self._token)
        app.router.add_get("/v2/", self._base)
        app.router.add_get(f"/v2/{NAME}/manifests/{{reference}}", self._manifest)
        app.router.add_get(f"/v2/{NAME}/blobs/{{digest}}", self._blob)
        app.router.add_get(f"/v2/{NAME}/tags/list", self._tag_list)
        app.router.add_get(f"/v2/{NAME}/referrers/{{digest}}", self._referrers)
        app.middlewares.append(self._middleware)
        return app

    @web.middleware
    async def _middleware(self, request: web.Request, handler: object) -> web.StreamResponse:
        entry = Request(request.method, request.path, request.query_string, dict(request.headers))
        entry.raw_query = request.rel_url.raw_query_string
        entry.certificate = bool(request.get_extra_info("peercert"))
        self.requests.append(entry)
        request[ENTRY], request[FAULT] = entry, self._fault_for(entry)
        response: web.StreamResponse
        try:
            response = await self._answer(request, handler)
        except web.HTTPException as exc:
            entry.status, entry.done = exc.status, True  # no such route
            raise
        except (ConnectionError, asyncio.CancelledError):
            entry.done = True  # the client has left
            raise
        entry.status = entry.status or response.status
        entry.done = True
        return response

    async def _answer(self, request: web.Request, handler: object) -> web.StreamResponse:
        assert callable(handler)
        fault = request[FAULT]
        if fault.delay:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._released.wait(), fault.delay)
        if fault.drop:
            close(request)
            return web.Response()
        if request.path != "/token" and (denied := self._challenge(request)) is not None:
            return denied
        if fault.redirect is not None:
            return web.Response(status=307, headers={"Location": fault.redirect + request.path_qs})
        if fault.status is not None and fault.body is None:
            return error(fault.status, fault.code, fault)
        response: web.StreamResponse = await handler(request)
        return response

    def _challenge(self, request: web.Request) -> web.Response | None:
        repository = request.match_info.get("name", "")
        auth = self._auth_of.get(repository, self._auth)
        challenge = auth.challenge(request, repository) if auth else None
        if challenge is None:
            return None
        if isinstance(auth, TokenAuth) and auth.silent is not None and repository:
            return error(auth.silent, "UNKNOWN")
        response = error(401, "UNAUTHORIZED")
        response.headers["WWW-Authenticate"] = challenge
        return response

    async def _base(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({})

    async def _token(self, request: web.Request) -> web.StreamResponse:
        """A token of whoever protects the repository, or of all repositories."""
        name = request.query.get("scope", "").removeprefix("repository:").rpartition(":")[0]
        auth = self._auth_of.get(name, self._auth)
        if not isinstance(auth, TokenAuth):
            return error(404, "UNSUPPORTED")
        said = request[FAULT].body
        return auth.issue(request) if said is None else web.Response(body=said)

    async def _manifest(self, request: web.Request) -> web.StreamResponse:
        name, reference = request.match_info["name"], request.match_info["reference"]
        digest = reference if ":" in reference else self._tags.get(name, {}).get(reference, "")
        if digest not in self._repositories.get(name, ()):
            return error(404, "MANIFEST_UNKNOWN")
        return await self._send(request, self._content[digest])

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        name, digest = request.match_info["name"], request.match_info["digest"]
        if digest not in self._repositories.get(name, ()):
            return error(404, "BLOB_UNKNOWN")
        return await self._send(request, self._content[digest], "application/octet-stream")

    async def _send(
        self, request: web.Request, content: Content, media_type: str | None = None
    ) -> web.StreamResponse:
        fault = request[FAULT]
        digest = content.digest if fault.digest_header is None else fault.digest_header
        headers = {"Content-Type": fault.content_type or media_type or content.media_type}
        if digest:
            headers["Docker-Content-Digest"] = digest
        headers.update(fault.headers)
        data = content.data if fault.body is None else fault.body
        return await send(request, request[ENTRY], data, headers, fault, self._released)

    async def _tag_list(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in self._repositories:
            return error(404, "NAME_UNKNOWN")
        tags = sorted(self._tags.get(name, {}))
        tags = [tag for tag in tags if tag > request.query.get("last", "")]
        page = tags[: int(request.query.get("n", len(tags)))]
        response = web.json_response({"name": name, "tags": page})
        if page and page != tags:
            link = f"/v2/{name}/tags/list?n={len(page)}&last={page[-1]}"
            response.headers["Link"] = f'<{link}>; rel="next"'
        response.headers.update(request[FAULT].headers)
        return response

    async def _referrers(self, request: web.Request) -> web.StreamResponse:
        if not self._has_referrers:
            return error(404, "UNSUPPORTED")
        fault = request[FAULT]
        if fault.body is not None:
            return web.Response(body=fault.body, headers={"Content-Type": fault.content_type or ""})
        found = self._referrers_of(request.match_info["name"], request.match_info["digest"])
        wanted = request.query.get("artifactType")
        headers = {} if wanted is None else {"OCI-Filters-Applied": "artifactType"}
        headers.update(fault.headers)
        found = [each for each in found if wanted in (None, each["artifactType"])]
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}
        body = json.dumps(document).encode()
        return web.Response(body=body, content_type=OCI_INDEX, headers=headers)

    def _referrers_of(self, name: str, subject: str) -> list[Json]:
        found = []
        for digest in sorted(self._repositories.get(name, ())):
            content = self._content[digest]
            if not content.media_type.endswith("manifest.v1+json"):
                continue
            manifest = content.json()
            if manifest.get("subject", {}).get("digest") == subject:
                extra = {key: manifest[key] for key in ("artifactType", "annotations")}
                found.append(content.descriptor(**extra))
        return found

    def _fault_for(self, entry: Request) -> Fault:
        for at, (method, path, fault) in enumerate(self._queued):
            if path in entry.path and method in ("", entry.method):
                del self._queued[at]
                return fault
        for method, path, fault in self._permanent:
            if path in entry.path and method in ("", entry.method):
                return fault
        return GOOD

    def _release(self) -> None:
        self._released.set()
        # Handlers hold the old event: the next stall waits for the next release.
        self._released = asyncio.Event()

    async def _listen(self, port: int) -> None:
        await self._runner.setup()
        self._listener = await self._loop.create_server(
            self._protocol, self._host, port, ssl=self._tls
        )
        self._port = self._listener.sockets[0].getsockname()[1]

    def _protocol(self) -> web.RequestHandler:
        # aiohttp forgets a connection that is made while it shuts down: here each is known.
        assert self._runner.server is not None
        protocol = self._runner.server()
        self._protocols.append(protocol)
        return protocol

    async def _stop(self) -> None:
        self._release()
        if self._listener is None:
            return  # it was stopped before
        self._listener.close()
        self._listener = None
        await self._runner.cleanup()
        # One that was accepted just before is made in the loop's next rounds.
        await asyncio.sleep(0.01)
        for protocol in self._protocols:
            if protocol.transport is not None:
                # asyncio's own complaint about one whose connection is lost already.
                with contextlib.suppress(AttributeError):
                    protocol.transport.abort()
        await asyncio.sleep(0)

    def _run(self, work: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)
