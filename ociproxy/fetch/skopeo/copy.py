"""The images that skopeo is copying into the store: each once, however many clients wait for blobs.

One run of skopeo writes one image into an OCI layout in `pulls/` (see `image_layout`). Images that
share layers are copied one after the other. An image that another process copies is waited for.

Tests: tests/fetch/skopeo/test_backend.py.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Condition
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import (
    BlobTooLarge,
    BlobUnknown,
    DigestMismatch,
    IntegrityError,
    Interrupted,
    ManifestUnknown,
    OciProxyError,
    SizeMismatch,
    UpstreamUnavailable,
)
from ociproxy.fetch.skopeo.image_layout import ImageLayout
from ociproxy.metrics.counters import FILLS
from ociproxy.store.files import file_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Event

    from ociproxy.config.settings import Upstream
    from ociproxy.fetch.download.download import Download
    from ociproxy.fetch.skopeo.image_layout import Image
    from ociproxy.fetch.skopeo.process import Program, Run
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.room import Room
    from ociproxy.store.store import Store

_AT_ONCE: Final = 4
"""Runs at a time for one upstream: 24 connections, since each run fetches up to six layers."""
_LOOK: Final = 0.2
"""Seconds between looks at blobs that another copy or another process brings, and at `stopped`."""
_FLUSH_LIMIT: Final = 600.0
"""Seconds that skopeo may take to make an arrived layer durable: a huge one, on a slow disk."""


class Copy:
    """One image that is being copied. `error` is set before `done`."""

    def __init__(self, image: Image, room: Room) -> None:
        self.image = image
        self.room = room
        self.signs = 0
        """Changes while the copy gets on."""
        self.done = False
        self.error: OciProxyError | None = None

    def error_for(self, blob: Digest, upstream: str) -> OciProxyError:
        """The error for a caller who waits for `blob`, after the copy has ended without it. An
        error about another blob of the image says nothing about this one."""
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
    """The threads that run skopeo for one upstream. Thread-safe."""

    def __init__(
        self, upstream: Upstream, program: Program, store: Store, stopped: Event, *, blob_limit: int
    ) -> None:
        """A blob of more than `blob_limit` bytes is not fetched."""
        self._upstream = upstream
        self._program = program
        self._store = store
        self._stopped = stopped
        self._blob_limit = blob_limit
        self._changed = Condition()
        """Guards what follows; notified when a blob has come or a copy has ended."""
        self._running: dict[tuple[Repository, Digest], Copy] = {}
        self._coming: set[Digest] = set()
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="skopeo")

    def fetch(self, image: Image, download: Download) -> None:
        """Return when the download's blob, which is of this image, is in the store. Raises the
        error that ended the copy, or UpstreamUnavailable once the download is told to stop."""
        blob = download.digest
        copy: Copy | None = None
        with self._changed:
            while self._store.blobs.find_size(blob) is None:
                if download.stopped.is_set() or self._stopped.is_set():
                    raise self._shutting_down()
                copy = copy or self._join(image, download.room)
                if copy.done:
                    raise copy.error_for(blob, self._upstream.name)
                download.copied = copy.signs
                self._changed.wait(_LOOK)
        FILLS.add()

    def close(self, last: Callable[[], None]) -> None:
        """Returns without waiting; the caller has set the `stopped` given to `__init__`. `last`
        runs in one of these threads, since it may block."""
        with self._changed:
            self._changed.notify_all()
        with suppress(RuntimeError):  # closed before
            self._threads.submit(last)
        self._threads.shutdown(wait=False)

    def _join(self, image: Image, room: Room) -> Copy:
        """The running copy of this image, else a new one; the caller holds `_changed`."""
        copy = self._running.get(image.key)
        if copy is None:
            copy = Copy(image, room)
            try:
                self._threads.submit(self._run, copy)
            except RuntimeError as exc:
                raise self._shutting_down() from exc
            self._running[image.key] = copy
        return copy

    def _run(self, copy: Copy) -> None:
        """A copy from its first step to its last, in one of the threads."""
        claimed: set[Digest] = set()
        try:
            claimed = self._claim(copy)
            if claimed:
                self._copy_alone(copy)
        except OciProxyError as exc:
            copy.error = exc
        except Exception as exc:  # noqa: BLE001 a thread's end: logged, and raised by `fetch`
            log.failure("skopeo failed", exc, digest=copy.image.descriptor.digest)
            name = type(exc).__name__
            copy.error = Interrupted(self._upstream.name, f"broken ({name})")
        finally:
            with self._changed:
                self._coming -= claimed
                del self._running[copy.image.key]
                copy.done = True
                self._changed.notify_all()

    def _claim(self, copy: Copy) -> set[Digest]:
        """The blobs that this copy fetches. Waits while another copy fetches one of them: images
        that share layers must not fetch them twice."""
        with self._changed:
            while True:
                missing = set(copy.image.missing(self._store))
                copy.signs += 1  # the copy that is waited for has its own limits
                if self._stopped.is_set():
                    raise self._shutting_down()
                if self._coming.isdisjoint(missing):
                    self._coming |= missing
                    return missing
                self._changed.wait(_LOOK)

    def _copy_alone(self, copy: Copy) -> None:
        """Copy in a workspace that one process at a time can have."""
        image, staging = copy.image, self._store.staging
        name = owned = f"skopeo-{file_name(image.descriptor.digest)}"
        stopped = 0
        limit = self._upstream.timeouts.stall
        silence = staging.silence_of(owned, limit)
        while (workspace := staging.workspace(owned)) is None:
            # Another process copies the image. Its blobs are found in the store.
            if not image.missing(self._store):
                return
            if silence.is_long():
                stopped += 1
                log.event(
                    logging.WARNING, "copying process stopped", digest=image.descriptor.digest
                )
                owned = f"{name}.{stopped}"
                silence = staging.silence_of(owned, limit)
                continue
            copy.signs += 1
            if self._stopped.wait(_LOOK):
                raise self._shutting_down()
        with workspace:
            self._copy(copy, ImageLayout(image, workspace.path / "layout", self._store))

    def _copy(self, copy: Copy, layout: ImageLayout) -> None:
        image, began = copy.image, time.monotonic()
        # A process that died may have left whole layers, and damaged ones.
        with suppress(IntegrityError):
            self._collect(copy, layout)
        missing = image.missing(self._store)
        if not missing:
            return
        copy.room.check(sum(blob.size for blob in missing.values()))
        for blob in missing.values():
            if blob.size > self._blob_limit:
                raise BlobTooLarge(self._upstream.name, blob.digest, self._blob_limit)
        layout.prepare()
        digest = image.descriptor.digest
        source = f"docker://{self._program.name_of(image.repository)}@{digest}"
        unknown = ManifestUnknown(f"{image.repository}@{digest}", "unknown to the upstream")
        options = ("--preserve-digests", "--remove-signatures", "--quiet")
        try:
            # skopeo takes what stands behind a colon for a tag, and a path may have one: so it
            # runs in the folder, and the name is enough.
            folder, target = layout.path.parent, f"oci:{layout.path.name}"
            copying = (image.repository, "copy", *options, source, target)
            with self._program.start(*copying, folder=folder) as run:
                self._watch(run, copy, layout)
                run.check(unknown)
        finally:
            self._collect(copy, layout)
        layout.publish(self._upstream.name)
        log.event(
            logging.INFO,
            "copied",
            digest=digest,
            upstream=self._upstream.name,
            blobs=len(missing),
            seconds=time.monotonic() - began,
        )

    def _watch(self, run: Run, copy: Copy, layout: ImageLayout) -> None:
        """Collect blobs until the run ends. Raises UpstreamUnavailable for a run that brings
        nothing for too long, and SizeMismatch for one that brings more than the image has."""
        image, timeouts = copy.image, self._upstream.timeouts
        limit = timeouts.connect + timeouts.headers
        state: object = None
        seen = time.monotonic()
        sizes = {blob.size for blob in image.blobs if blob.size}
        largest = max(sizes, default=0)
        while run.pump():
            self._collect(copy, layout)
            arriving = layout.arriving()
            if (most := max(arriving.values(), default=0)) > largest:
                raise SizeMismatch(f"a blob of {image.descriptor.digest}", largest, most)
            now = time.monotonic()
            fresh = (len(image.missing(self._store)), sorted(arriving.items()))
            if fresh != state:
                if state is not None:
                    limit = timeouts.stall
                state, seen = fresh, now
                copy.signs += 1
            flushing = any(size in sizes for size in arriving.values()) and not run.is_stopped
            copy.signs += flushing
            if now - seen > (max(limit, _FLUSH_LIMIT) if flushing else limit):
                raise run.timed_out(limit, "without data")

    def _collect(self, copy: Copy, layout: ImageLayout) -> None:
        if layout.collect(copy.room, self._stopped):
            with self._changed:
                self._changed.notify_all()

    def _shutting_down(self) -> Interrupted:
        return Interrupted(self._upstream.name, "shutting down")
