"""The skopeo backend: an upstream registry asked by a subprocess, image by image.

Manifests come from `skopeo inspect --raw`, which gives the exact bytes, and blobs by copying the
image that names them. `skopeo copy --all` is never used: into a layout it converts Docker's types,
and with `--preserve-digests` it refuses Docker's lists (tests/fetch/test_skopeo_backend.py).

What skopeo cannot do: HEAD (a tag is looked up by a GET, which costs a pull), ranges, the referrers
API (its absence sends the caller to the fallback tag), repository names with capitals.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
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
from ociproxy.fetch.skopeo.process import Program
from ociproxy.fetch.tags import TagsQuery, page_of_tags
from ociproxy.fetch.verify import media_type_in, verify_manifest
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.manifest import MANIFEST_MAX_SIZE, ImageManifest
from ociproxy.store.manifests import with_media_type

if TYPE_CHECKING:
    from ociproxy.config.settings import Fetch, Upstream
    from ociproxy.fetch.download.download import Download
    from ociproxy.fetch.upstreams.health import Quota
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.manifest import ManifestHolder
    from ociproxy.oci.reference import Reference, Repository
    from ociproxy.store.store import Store

_RECENT: Final = 4 * MANIFEST_MAX_SIZE
"""Bytes of manifests kept for a client that resolves a tag and then asks by digest."""
_KNOWN: Final = 16_384
"""Blobs of any image that are kept in memory. The others are looked up in the store."""
_SEARCHED: Final = 4096
"""Stored manifests of a repository that one look-up of a blob reads at most."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image manifest of a repository, and the blobs that a registry holds for it."""

    repository: Repository
    descriptor: Descriptor
    blobs: tuple[Descriptor, ...]

    @property
    def key(self) -> tuple[Repository, Digest]:
        return self.repository, self.descriptor.digest

    def find(self, digest: Digest) -> Descriptor | None:
        return next((blob for blob in self.blobs if blob.digest == digest), None)


class BlobIndex:
    """Which image a blob is copied with: skopeo copies images and cannot ask for a blob.

    Thread-safe. Two threads that look for the same blob may both read the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._of: BoundedCache[tuple[Repository, Digest], Image] = BoundedCache(_KNOWN)

    def learn(self, repository: Repository, holder: ManifestHolder) -> None:
        """Remember the blobs of a manifest that the upstream has just sent, or that is stored."""
        try:
            manifest = holder.manifest
        except MalformedManifest:
            return
        if isinstance(manifest, ImageManifest):
            image = Image(repository, holder.descriptor, manifest.blobs)
            for blob in image.blobs:
                self._of.put((repository, blob.digest), image)

    def find(self, repository: Repository, digest: Digest) -> Image | None:
        """The image of this repository that has this blob. Raises StoreError."""
        known = self._of.get((repository, digest))
        if known is not None:
            return known
        for each in self._store.refs.manifests(repository)[:_SEARCHED]:
            described = self._store.refs.find_manifest(repository, each)
            holder = self._store.manifests.find(each, use=False)
            if holder is not None:
                self.learn(repository, with_media_type(holder, described))
                found = self._of.get((repository, digest))
                if found is not None:
                    return found
        return None


class SkopeoBackend:
    """A `Backend` for one upstream, which fetches into this store."""

    def __init__(self, upstream: Upstream, fetch: Fetch, store: Store) -> None:
        """Raises UpstreamUntrusted if the upstream's certificate files cannot be used, or
        StoreError."""
        self._name = upstream.name
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
        """skopeo does not pass on what the upstream says."""
        return None

    def resolve(self, reference: Reference) -> Descriptor:
        """A GET: skopeo asks for no heads. The bytes are kept for a moment."""
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
        """What the manifest says; the upstream is not asked."""
        return self._find(repository, digest)[1]

    def fetch_blob(
        self, repository: Repository, digest: Digest, download: Download, *, tries: int
    ) -> None:
        """With the image that names the blob; the other blobs of that image come too."""
        image, size = self._find(repository, digest)
        download.learn_size(size)
        attempts = retrying(
            tries=tries,
            wait_max=download.limits.retry_wait_max,
            sleep=download.wait,
        )
        attempts(self._jobs.bring, image, digest, download.stopped)
        download.bytes_fetched += size

    def fetch_listing(self, repository: Repository, path: str, query: str) -> Listing:
        """All tags, of which `n` and `last` choose a page."""
        unknown = NameUnknown(str(repository), f"the upstream has no {path}")
        if path != "tags/list":
            raise NameUnknown(str(repository), f"skopeo does not ask for {path}")
        self._check_name(repository)
        run = self._program.ask(
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
        """Ends what is running, without waiting for it."""
        self._stopped.set()
        self._jobs.close(self._workspace.remove)

    def _fetch(self, reference: Reference) -> ManifestHolder:
        repository = reference.repository
        self._check_name(repository)
        # By tag where there is one: with a digest beside it, the two have to agree.
        which = f":{reference.tag}" if reference.tag else f"@{reference.digest}"
        run = self._program.ask(
            "inspect",
            "--raw",
            f"docker://{self._program.name_of(repository)}{which}",
            output_limit=MANIFEST_MAX_SIZE,
            unknown=ManifestUnknown(reference, "unknown to the upstream"),
        )
        holder = verify_manifest(
            bytes(run.stdout),
            media_type_in(run.said.content_type),
            upstream=self._name,
            expected=reference.digest,
            subject=reference,
        )
        self._blobs.learn(repository, holder)
        return holder

    def _find(self, repository: Repository, digest: Digest) -> tuple[Image, int]:
        """The image a blob comes with, and the blob's size in bytes."""
        image = self._blobs.find(repository, digest)
        blob = None if image is None else image.find(digest)
        if image is None or blob is None:
            reason = f"skopeo copies images, and no manifest pulled from {repository} names it"
            raise BlobUnknown(digest, reason)
        return image, blob.size

    def _check_name(self, repository: Repository) -> None:
        if repository.name != repository.name.lower():
            raise NameUnknown(str(repository), "skopeo accepts no capitals in repository names")
