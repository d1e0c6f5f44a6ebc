"""Isolation: what is stored is served under a repository only if that repository has it.

One upstream with `isolation: repository` is enough for every request to be judged: what is private
there could otherwise be had by its digest under another name. A manifest has to have come, once,
from the upstream for this repository; a blob has to be one that such a manifest refers to, or one
that the upstream says this repository has. Registries that nobody listed are not served at all
then: whoever runs one could claim to have anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import BlobUnknown
from ociproxy.store.membership import Membership

if TYPE_CHECKING:
    from ociproxy.fetch.upstreams.requests import Requests
    from ociproxy.fetch.upstreams.threads import StoreThreads
    from ociproxy.fetch.upstreams.upstreams import Upstreams
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_CONSENTS: Final = 16_384
"""Blobs that upstreams said a repository has, and that no manifest here refers to."""


class Isolation:
    """Belongs to one event loop."""

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

    def has_manifest(self, repository: Repository, digest: Digest) -> bool:
        """Whether a stored manifest may be served under this repository without asking."""
        return self._store.refs.find_manifest(repository, digest) is not None

    async def check_allowed(self, repository: Repository, blob: Digest) -> None:
        """Returns where a blob may be served under this repository, stored or not.

        Raises BlobUnknown, or what the upstream's refusal to say so is, or StoreError.
        """
        found = self._membership.refers(repository, blob)
        if found is None:
            found = await self._threads.run(lambda: self._membership.read(repository, blob))
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
