"""The skopeo backend: an upstream registry asked by a subprocess, image by image.

Manifests come from `skopeo inspect --raw`, which gives the exact bytes. Blobs come by copying the
image that names them. `skopeo copy --all` is never used: into a layout it converts Docker's types,
and with `--preserve-digests` it refuses Docker's lists.

skopeo has no HEAD, so looking up a tag costs a pull. It has no ranges, no referrers API (the caller
then asks for the fallback tag), and accepts no capitals in repository names.
"""

from __future__ import annotations

import json
import uuid
from threading import Event
from typing import TYPE_CHECKING, Final

from ociproxy.bounded import BoundedCache
from ociproxy.errors import (
    BlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    StoreError,
    UpstreamError,
)
from ociproxy.fetch.backend import Listing
from ociproxy.fetch.retry import retrying
from ociproxy.fetch.skopeo.copy import CopyJobs
from ociproxy.fetch.skopeo.image_layout import BlobIndex
from ociproxy.fetch.skopeo.process import Program
from ociproxy.fetch.tags import TagsQuery, page_of_tags
from ociproxy.metrics.counters import UPSTREAM_BYTES
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, media_type_in, verify_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ociproxy.config.settings import Fetch, Upstream
    from ociproxy.fetch.backend import Quota
    from ociproxy.fetch.download.download import Download
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Reference, Repository
    from ociproxy.store.store import Store

_RECENT: Final = 4 * MANIFEST_MAX_SIZE
"""Bytes of manifests kept for clients that resolve a tag and then ask by digest: four or more."""


class SkopeoBackend:
    """A `Backend` for one upstream and one store."""

    def __init__(self, upstream: Upstream, fetch: Fetch, store: Store) -> None:
        """Raises StoreError, or UpstreamUntrusted for certificate files that cannot be used."""
        self._name = upstream.name
        self._label = upstream.label
        self._store = store
        workspace = store.staging.workspace(f"skopeo-{uuid.uuid4()}")
        if workspace is None:
            raise StoreError(store.staging.root, "no place for skopeo's settings")
        self._workspace = workspace
        self._stopped = Event()
        try:
            self._program = Program(upstream, workspace.path, self._stopped)
        except UpstreamError:
            workspace.remove()
            raise
        self._blobs = BlobIndex(store)
        self._jobs = CopyJobs(
            upstream, self._program, store, self._stopped, blob_limit=fetch.blob_limit
        )
        self._recent: BoundedCache[tuple[Repository, Digest], ManifestHolder] = BoundedCache(
            _RECENT
        )

    @property
    def quota(self) -> Quota | None:
        """None: skopeo shows no response headers."""
        return None

    def resolve(self, reference: Reference) -> Descriptor:
        """By a GET, whose bytes are kept for the request by digest that mostly follows."""
        holder = self._fetch(reference)
        key = (reference.repository, holder.descriptor.digest)
        self._recent.put(key, holder, len(holder.raw))
        return holder.descriptor

    def fetch_manifest(self, reference: Reference) -> ManifestHolder:
        if reference.digest is not None and reference.tag is None:
            recent = self._recent.get((reference.repository, reference.digest))
            if recent is not None:
                return recent
        return self._fetch(reference)

    def stat_blob(self, repository: Repository, digest: Digest) -> int:
        """From the manifest; the upstream is not asked."""
        return self._blobs.get(repository, digest)[1]

    def fetch_blob(self, download: Download, *, tries: int, answered: Callable[[], None]) -> None:
        """By copying an image that has the blob; the other blobs of that image come too."""
        image, size = self._blobs.get(download.repository, download.digest)
        download.learn_size(size)
        attempts = retrying(
            tries=tries, wait_max=download.limits.retry_wait_max, stopped=download.stopped
        )
        attempts(self._jobs.fetch, image, download)
        answered()
        download.bytes_fetched += size
        UPSTREAM_BYTES.add(self._label, by=size)

    def fetch_config(self, image: Reference, config: Descriptor) -> bytes:
        """By a command of its own, which asks for the manifest once more."""
        self._check_name(image.repository)
        run = self._program.call(
            image.repository,
            "inspect",
            "--config",
            "--raw",
            f"docker://{self._program.name_of(image.repository)}@{image.digest}",
            output_limit=MANIFEST_MAX_SIZE,
            unknown=BlobUnknown(config.digest, "unknown to the upstream"),
        )
        raw = bytes(run.stdout)
        config.verify(raw, "blob")
        return raw

    def refusals(
        self, repository: Repository, manifests: Iterable[ManifestHolder], blobs: Iterable[Digest]
    ) -> dict[Digest, BlobUnknown]:
        for holder in manifests:  # the store of a caller may have had them
            self._blobs.learn(repository, holder)
        refused: dict[Digest, BlobUnknown] = {}
        for digest in blobs:
            try:
                self._blobs.get(repository, digest)
            except BlobUnknown as exc:
                refused[digest] = exc
        return refused

    def fetch_listing(self, repository: Repository, path: str, query: str) -> Listing:
        """`tags/list` only: skopeo gets all tags, of which `n` and `last` choose a page."""
        unknown = NameUnknown(str(repository), f"the upstream has no {path}")
        if path != "tags/list":
            raise NameUnknown(str(repository), f"skopeo does not ask for {path}")
        self._check_name(repository)
        run = self._program.call(
            repository,
            "list-tags",
            f"docker://{self._program.name_of(repository)}",
            output_limit=MANIFEST_MAX_SIZE,
            unknown=unknown,
        )
        try:
            tags = json.loads(run.stdout)["Tags"] or ()
        except (ValueError, LookupError, TypeError) as exc:
            raise ManifestInvalid(self._name, f"skopeo gives no list of {path}") from exc
        return page_of_tags(repository, sorted(set(tags)), TagsQuery.parse(query))

    def close(self) -> None:
        """End the running programs, without waiting for their end."""
        self._stopped.set()
        self._jobs.close(self._workspace.remove)

    def _fetch(self, reference: Reference) -> ManifestHolder:
        repository = reference.repository
        self._check_name(repository)
        # By tag if the reference has one: a digest beside it must then agree with the answer.
        which = f":{reference.tag}" if reference.tag else f"@{reference.digest}"
        run = self._program.call(
            repository,
            "inspect",
            "--raw",
            f"docker://{self._program.name_of(repository)}{which}",
            output_limit=MANIFEST_MAX_SIZE,
            unknown=ManifestUnknown(reference, "unknown to the upstream"),
        )
        UPSTREAM_BYTES.add(self._label, by=len(run.stdout))
        holder = verify_manifest(
            bytes(run.stdout),
            media_type_in(run.stderr.content_type),
            upstream=self._name,
            expected=reference.digest,
            subject=reference,
        )
        self._blobs.learn(repository, holder)
        return holder

    def _check_name(self, repository: Repository) -> None:
        if repository.name != repository.name.lower():
            raise NameUnknown(str(repository), "skopeo accepts no capitals in repository names")
