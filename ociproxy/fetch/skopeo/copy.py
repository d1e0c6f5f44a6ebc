"""BlobIndex that skopeo is copying into the store: each once, however many of its blobs are waited
for.

One run writes one image into an OCI layout in `pulls/`. Blobs that are stored are in the layout
before it starts, as hard links, so that it does not fetch them. Each layer goes to the store as
soon as it is whole; the Extractor takes the rest, and publishes the image when all of it is there.
"""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Condition, Event
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import (
    BlobTooLarge,
    BlobUnknown,
    DigestMismatch,
    IntegrityError,
    LayoutInvalid,
    ManifestUnknown,
    OciProxyError,
    SizeMismatch,
    UpstreamUnavailable,
)
from ociproxy.oci.layout import LayoutDirectory, blob_path
from ociproxy.store.extract import Extractor
from ociproxy.store.files import file_name, store_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ociproxy.config.settings import Upstream
    from ociproxy.fetch.skopeo.backend import Image
    from ociproxy.fetch.skopeo.process import Program, Run
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.store import Store

_AT_ONCE: Final = 4
"""Runs at a time for one upstream; each fetches up to six layers at once."""
_LOOK: Final = 0.2
"""Seconds between looks at what other copies or other processes have brought, and at whether the
caller was stopped."""
_FLUSH_LIMIT: Final = 600.0
"""Seconds that skopeo may take to make a layer durable that has arrived."""
_TEMPORARY: Final = "oci-put-blob*"
"""skopeo's name for a blob that is arriving."""


class Copy:
    """One image on its way. `error` is set before `done`."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.done = False
        self.error: OciProxyError | None = None

    def error_for(self, blob: Digest, upstream: str) -> OciProxyError:
        """What its end means for one who waits for this blob: that another blob is unknown, or
        wrong, says nothing about this one."""
        error = self.error
        if error is None:
            return UpstreamUnavailable(upstream, f"skopeo has left out blob {blob}")
        culprit = None
        if isinstance(error, BlobUnknown | BlobTooLarge):
            culprit = error.digest
        elif isinstance(error, DigestMismatch):
            culprit = error.expected
        if culprit in (None, blob):
            return error.with_traceback(None)
        return UpstreamUnavailable(upstream, f"its image cannot be copied: {error}")


class CopyJobs:
    """Owns the threads that run skopeo; `close` ends them soon."""

    def __init__(
        self,
        upstream: Upstream,
        program: Program,
        store: Store,
        stopped: Event,
        *,
        blob_limit: int,
    ) -> None:
        self.changed = Condition()
        """Notified whenever a blob has come, or a copy has ended."""
        self._upstream = upstream
        self._program = program
        self._store = store
        self._stopped = stopped
        self._blob_limit = blob_limit
        self._running: dict[tuple[Repository, Digest], Copy] = {}
        self._coming: set[Digest] = set()
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="skopeo")

    def bring(self, image: Image, blob: Digest, stopped: Event) -> None:
        """Return when this blob of the image is in the store. Raises what ended the copy, or
        UpstreamUnavailable once `stopped` is set."""
        copy: Copy | None = None
        with self.changed:
            while self._store.blobs.find_size(blob) is None:
                if stopped.is_set() or self._stopped.is_set():
                    raise self._unavailable("shutting down")
                copy = copy or self._join(image)
                if copy.done:
                    raise copy.error_for(blob, self._upstream.name)
                self.changed.wait(_LOOK)

    def _join(self, image: Image) -> Copy:
        """The copy of this image that is running, else a new one. Raises UpstreamUnavailable."""
        with self.changed:
            copy = self._running.get(image.key)
            if copy is None:
                copy = Copy(image)
                try:
                    self._threads.submit(self._run, copy)
                except RuntimeError as exc:
                    raise self._unavailable("shutting down") from exc
                self._running[image.key] = copy
            return copy

    def close(self, last: Callable[[], None]) -> None:
        """Returns without waiting; the caller has set `stopped`. `last` runs in a thread of here,
        for it may block."""
        with self.changed:
            self.changed.notify_all()
        with suppress(RuntimeError):  # closed before
            self._threads.submit(last)
        self._threads.shutdown(wait=False)

    def _run(self, copy: Copy) -> None:
        claimed: set[Digest] = set()
        try:
            claimed = self._claim(copy.image)
            if claimed:
                self._bring(copy.image)
        except OciProxyError as exc:
            copy.error = exc
        except Exception as exc:  # noqa: BLE001 a thread's end: reported, and told to who waits
            log.failure("skopeo failed", exc, digest=copy.image.descriptor.digest)
            copy.error = self._unavailable(f"broken ({type(exc).__name__})")
        finally:
            with self.changed:
                self._coming -= claimed
                del self._running[copy.image.key]
                copy.done = True
                self.changed.notify_all()

    def _claim(self, image: Image) -> set[Digest]:
        """What this copy will fetch. Waits while another copy is bringing any of it, so that
        images that share layers do not fetch them twice."""
        with self.changed:
            while True:
                missing = set(self._missing(image))
                if self._stopped.is_set():
                    raise self._unavailable("shutting down")
                if self._coming.isdisjoint(missing):
                    self._coming |= missing
                    return missing
                self.changed.wait(_LOOK)

    def _bring(self, image: Image) -> None:
        name = f"skopeo-{file_name(image.descriptor.digest)}"
        while (workspace := self._store.staging.workspace(name)) is None:
            # Another process copies it: what it brings is found in the store.
            if not self._missing(image):
                return
            if self._stopped.wait(_LOOK):
                raise self._unavailable("shutting down")
        with workspace:
            self._copy(image, workspace.path)

    def _copy(self, image: Image, folder: Path) -> None:
        digest = image.descriptor.digest
        began = time.monotonic()
        layout = folder / "layout"
        # Layers that a process had got before it died, unless they died with it.
        with suppress(IntegrityError):
            self._collect(image, layout)
        with store_errors(folder):
            if layout.exists():
                shutil.rmtree(layout)
        missing = self._missing(image)
        if not missing:
            return
        for blob in missing.values():
            if blob.size > self._blob_limit:
                raise BlobTooLarge(self._upstream.name, blob.digest, self._blob_limit)
        self._link_stored(image, layout)
        source = f"docker://{self._program.name_of(image.repository)}@{digest}"
        options = ("--preserve-digests", "--remove-signatures", "--quiet")
        unknown = ManifestUnknown(f"{image.repository}@{digest}", "unknown to the upstream")
        try:
            with self._program.start("copy", *options, source, f"oci:{layout}") as run:
                self._follow(run, image, layout)
                run.check(unknown)
        finally:
            self._collect(image, layout)
        self._extract(image, layout)
        log.event(
            logging.INFO,
            "copied",
            digest=digest,
            upstream=self._upstream.name,
            blobs=len(missing),
            seconds=time.monotonic() - began,
        )

    def _follow(self, run: Run, image: Image, layout: Path) -> None:
        """Until it ends; a run that brings nothing for too long is ended."""
        timeouts = self._upstream.timeouts
        limit = timeouts.connect + timeouts.headers
        state: object = None
        seen = time.monotonic()
        sizes = {blob.size for blob in image.blobs if blob.size}
        largest = max(sizes, default=0)
        while run.pump():
            self._collect(image, layout)
            arriving = _arriving(layout)
            if (most := max(arriving.values(), default=0)) > largest:
                raise SizeMismatch(f"a blob of {image.descriptor.digest}", largest, most)
            now = time.monotonic()
            fresh = (len(self._missing(image)), sorted(arriving.items()))
            if fresh != state:
                if state is not None:
                    limit = timeouts.stall
                state, seen = fresh, now
            flushing = any(size in sizes for size in arriving.values())
            if now - seen > (max(limit, _FLUSH_LIMIT) if flushing else limit):
                raise run.timed_out(limit, "without data")

    def _collect(self, image: Image, layout: Path) -> None:
        """Put into the store what has come. skopeo names a blob when all of it is there."""
        for blob in self._missing(image).values():
            path = layout / blob_path(blob.digest)
            if path.is_file():
                # The layout keeps the file: skopeo looks there for a layer that occurs twice.
                self._store.blobs.adopt(path, blob)
                with self.changed:
                    self.changed.notify_all()

    def _link_stored(self, image: Image, layout: Path) -> None:
        for blob in image.blobs:
            link = layout / blob_path(blob.digest)
            with store_errors(link):
                link.parent.mkdir(parents=True, exist_ok=True)
            if self._store.blobs.find_size(blob.digest) == blob.size:
                # Where links are forbidden it is fetched again.
                with suppress(OSError):
                    link.hardlink_to(self._store.blobs.path(blob.digest))

    def _extract(self, image: Image, layout: Path) -> None:
        """Verify the layout as a whole, and publish the image. Raises DigestMismatch where skopeo
        has changed the manifest."""
        directory = LayoutDirectory(layout)
        try:
            (named,) = directory.images()
        except (LayoutInvalid, ValueError) as exc:
            reason = f"skopeo wrote no layout of one image: {exc}"
            raise self._unavailable(reason) from exc
        top, written = image.descriptor, named.descriptor
        if written.digest != top.digest:
            raise DigestMismatch(f"manifest {top.digest} by skopeo", top.digest, written.digest)
        with Extractor(self._store) as extractor:
            extractor.take_layout(directory, top)
            extractor.drain()
            examined = extractor.examine(top)
            if not examined.complete:
                raise self._unavailable(f"skopeo left {'; '.join(map(str, examined.problems))}")
            extractor.publish(image.repository, examined)

    def _missing(self, image: Image) -> dict[Digest, Descriptor]:
        find_size = self._store.blobs.find_size
        return {blob.digest: blob for blob in image.blobs if find_size(blob.digest) is None}

    def _unavailable(self, reason: str) -> UpstreamUnavailable:
        return UpstreamUnavailable(self._upstream.name, reason)


def _arriving(layout: Path) -> dict[str, int]:
    """Bytes of each blob that skopeo is writing."""
    sizes = {}
    for path in layout.glob(_TEMPORARY):
        with suppress(OSError):
            sizes[path.name] = path.stat().st_size
    return sizes
