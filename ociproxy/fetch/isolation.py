"""Isolation: stored content is served under a repository only if that repository has it.

One upstream with `isolation: repository` subjects all requests to it: its private content could
otherwise be had by digest under another repository. A manifest is allowed where the upstream has
once sent it for this repository. A blob is allowed where such a manifest refers to it, or where the
upstream says that this repository has it. Unlisted registries are refused altogether, in
`Upstreams.check_allowed`: their operators could claim to have any content.

Tests: tests/serve/test_isolation.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import BlobUnknown, StoreError
from ociproxy.store.membership import Membership

if TYPE_CHECKING:
    from ociproxy.fetch.upstreams.requests import Requests
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.fetch.upstreams.upstreams import Upstreams
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_CONSENTS: Final = 16_384
"""Blobs kept that an upstream said a repository has, though no stored manifest refers to them."""


class Isolation:
    """Made only where the configuration isolates repositories. Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        upstreams: Upstreams,
        requests: Requests,
        threads: StoreThreads,
    ) -> None:
        self._store = store
        self._upstreams = upstreams
        self._requests = requests
        self._threads = threads
        self._membership = Membership(store.refs, store.manifests)
        self._consents: BoundedCache[tuple[Repository, Digest], bool] = BoundedCache(_CONSENTS)

    async def check_allowed(self, repository: Repository, blob: Digest) -> None:
        """Returns where this repository has the blob, stored or not; may ask the upstream.

        Where the store cannot be read, the upstream is asked. Raises BlobUnknown, UpstreamError
        kinds, Busy; StoreError where no upstream may be asked.
        """
        found = self._membership.refers(repository, blob)
        try:
            if found is None:
                found = await self._threads.run(lambda: self._membership.read(repository, blob))
        except StoreError:
            if self._upstreams.offline:
                raise
        if found or self._consents.get((repository, blob)):
            return
        reason = f"no manifest of {repository} refers to it"
        self._upstreams.check_online(BlobUnknown, blob, reason)
        await self._requests.call(
            repository,
            ("blob", repository, blob),
            lambda backend: backend.stat_blob(repository, blob),
        )
        self._consents.put((repository, blob), True)
