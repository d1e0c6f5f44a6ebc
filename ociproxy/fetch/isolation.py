"""Isolation: stored content is served under a repository only if that repository has it.

One upstream with `isolation: repository` subjects all requests to it: its private content could
otherwise be had by digest under another repository. A manifest is allowed where the upstream has
once sent it for this repository, or a bundle has it for this repository. A blob is allowed where
such a manifest refers to it, in a bundle only if the blob came with it; or where the upstream says
that this repository has it. Unlisted registries are refused altogether, in
`Upstreams.check_allowed`: their operators could claim to have any content.

Tests: tests/serve/test_isolation.py.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import BlobUnknown, StoreError
from ociproxy.fetch.upstreams.threads import take_error
from ociproxy.store.membership import Membership

if TYPE_CHECKING:
    from ociproxy.fetch.upstreams.requests import Requests
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.fetch.upstreams.upstreams import Upstreams
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_CONSENTS: Final = 16_384
"""Blobs kept that a bundle has for a repository, or that an upstream said it has though no stored
manifest refers to them."""


class Isolation:
    """Made only where the configuration isolates repositories. Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        upstreams: Upstreams,
        requests: Requests,
        threads: StoreThreads,
        verifiers: StoreThreads,
    ) -> None:
        self._store = store
        self._upstreams = upstreams
        self._requests = requests
        self._threads = threads
        self._verifiers = verifiers
        self._membership = Membership(store.refs, store.manifests, store.below)
        self._looking: dict[tuple[Repository, Digest], asyncio.Task[bool]] = {}
        self._consents: BoundedCache[tuple[Repository, Digest], bool] = BoundedCache(_CONSENTS)

    async def check_allowed(self, repository: Repository, blob: Digest) -> None:
        """Returns where this repository has the blob, stored or not; may ask the upstream.

        Where the store cannot be read, the upstream is asked. Raises BlobUnknown, UpstreamError
        kinds, Busy; StoreError where no upstream may be asked.
        """
        if self._consents.get((repository, blob)):
            return
        found: bool | None = None
        try:
            # First: `refers` asks the disk, and the event loop must not hang with it.
            self._threads.check_answers()
            found = self._membership.refers(repository, blob)
            if found is None:
                found = await self._threads.run(lambda: self._membership.read(repository, blob))
        except StoreError:
            if self._upstreams.offline:
                raise
        if found:
            return
        if self._store.below and await self._is_carried(repository, blob):
            self._consents.put((repository, blob), True)
            return
        reason = f"no manifest of {repository} refers to it"
        self._upstreams.check_online(BlobUnknown, blob, reason)
        await self._requests.call(
            repository,
            ("blob", repository, blob),
            lambda backend: backend.stat_blob(repository, blob),
        )
        self._consents.put((repository, blob), True)

    async def _is_carried(self, repository: Repository, blob: Digest) -> bool:
        """One look for all clients that wait for it: it may hash the blob."""
        looking = self._looking.get((repository, blob))
        if looking is None:
            look = partial(self._membership.is_carried, repository, blob)
            looking = asyncio.create_task(self._verifiers.run(look))
            self._looking[repository, blob] = looking
            looking.add_done_callback(partial(self._looked, (repository, blob)))
        return await asyncio.shield(looking)

    def _looked(self, key: tuple[Repository, Digest], looking: asyncio.Task[bool]) -> None:
        del self._looking[key]
        take_error(looking)
