"""`why` on the admin listener: what the command says, by the configuration that the server runs
with, and with what its workers do now.

It reads the records of many tags: one explanation at a time, in a thread that serves no client.

Tests: tests/serve/admin/test_page.py.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ociproxy.errors import Busy, DigestInvalid, NameInvalid
from ociproxy.fetch.upstreams.threads import take_error
from ociproxy.load.imagelist import parse_reference
from ociproxy.load.server_view import ServerView
from ociproxy.load.why import explain, pins_of
from ociproxy.load.why_text import document, lines
from ociproxy.serve.errors import RequestInvalid
from ociproxy.serve.live import alive

if TYPE_CHECKING:
    from ociproxy.config.settings import Config
    from ociproxy.metrics.tally import Tally
    from ociproxy.store.store import Store

_WAITING: Final = 8
"""Explanations that are asked for at once; further ones are refused."""
_TIME_LIMIT: Final = 20.0
"""Seconds that a client waits for one: the disk may hang."""
_LOOKED_AT: Final = 20_000
"""Tags of the store, and manifests of the repository, that one looks at: about a second of the
processor, which clients need."""
_LONGEST: Final = 1000
"""Characters of a reference."""


@dataclass(frozen=True, slots=True)
class Explained:
    reference: str
    lines: list[tuple[str, list[str]]]
    """The screen of the command: each name with its texts."""
    document: dict[str, Any]
    """What the command prints with `--json`."""


class Explainer:
    """Belongs to one event loop."""

    def __init__(self, config: Config, store: Store, tally: Tally) -> None:
        self._config = config
        self._store = store
        self._tally = tally
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="why")
        self._waiting = 0

    def use(self, config: Config) -> None:
        self._config = config

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def explain(self, text: str) -> Explained:
        """Raises RequestInvalid, Busy, or what the store and the lists of the configuration
        raise."""
        if self._waiting >= _WAITING:
            raise Busy("other references are being explained: try again")
        loop = asyncio.get_running_loop()
        explaining = loop.run_in_executor(self._thread, self._explain, text[:_LONGEST])
        self._waiting += 1
        explaining.add_done_callback(self._ended)
        # Not `wait_for`: where the disk hangs, what is given up waits for it all the same.
        done, _ = await asyncio.wait({explaining}, timeout=_TIME_LIMIT)
        if not done:
            raise Busy(f"not explained within {_TIME_LIMIT:g} s: the disk may hang")
        return explaining.result()

    def _ended(self, explaining: asyncio.Future[Explained]) -> None:
        self._waiting -= 1
        take_error(explaining)

    def _explain(self, text: str) -> Explained:
        try:
            reference = parse_reference(text.strip())
        except (NameInvalid, DigestInvalid) as exc:
            raise RequestInvalid(f"not a reference: {exc}", status=400) from exc
        store, config = self._store, self._config
        found = explain(store, config, reference, now=time.time(), most=_LOOKED_AT)
        pins = pins_of(found, store, config)
        view = ServerView.of("", alive(self._tally), found.reference)
        shown: list[tuple[str, list[str]]] = []
        for name, said in lines(found, pins, view):
            if name:
                shown.append((name, [said]))
            else:
                shown[-1][1].append(said)
        return Explained(str(found.reference), shown, document(found, pins, view))
