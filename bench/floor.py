"""`python -m bench.floor PORT UPSTREAM FOLDER`: the least that a mirror on these libraries does.

An aiohttp handler has a thread ask by oras-py, hash the manifest and write one file; then it
answers. No configuration, look-up, record, lock, flush, metric or log line: what ociproxy takes
beyond this is its own, and what this takes is the libraries'.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiohttp import web
from oras.provider import Registry
from requests.adapters import HTTPAdapter

THREADS = 32
"""As many as the benchmark has connections."""


class Floor:
    def __init__(self, upstream: str, folder: Path) -> None:
        self._upstream = upstream
        self._folder = folder
        self._threads = ThreadPoolExecutor(THREADS)
        self._numbers = itertools.count()
        registry = Registry(insecure=True)
        registry.session.mount("http://", HTTPAdapter(pool_maxsize=THREADS))
        # Without the decorator, which retries.
        self._request = Registry.do_request.__wrapped__
        self._registry = registry

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v2/":
            return web.Response(body=b"{}")
        loop = asyncio.get_running_loop()
        body, digest = await loop.run_in_executor(self._threads, self._fetch, request.path)
        headers = {
            "Content-Type": "application/vnd.oci.image.manifest.v1+json",
            "Docker-Content-Digest": f"sha256:{digest}",
        }
        return web.Response(body=body, headers=headers)

    def _fetch(self, path: str) -> tuple[bytes, str]:
        url = f"http://{self._upstream}{path}"
        body: bytes = self._request(self._registry, url, "GET", headers={"Accept": "*/*"}).content
        digest = hashlib.sha256(body).hexdigest()
        partial = self._folder / f".{os.getpid()}-{next(self._numbers)}"
        partial.write_bytes(body)
        partial.rename(self._folder / digest)
        return body, digest


async def serve(port: int, floor: Floor) -> None:
    runner = web.ServerRunner(web.Server(floor.answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), Floor(sys.argv[2], Path(sys.argv[3]))))
