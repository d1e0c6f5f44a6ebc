"""`check --repair`: what a check found to be damaged or missing is fetched again, by digest, and
records that lead nowhere are removed.

Damaged files are in `quarantine/` by then. Nothing there is deleted, and a reference whose manifest
is there stays, unless its upstream says that it has no such manifest. A kill at any time leaves a
store that the next repair finds broken in the same places, or in fewer.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from ociproxy.clock import SystemClock
from ociproxy.errors import (
    Busy,
    DigestInvalid,
    ManifestUnknown,
    OciProxyError,
    StoreError,
)
from ociproxy.fetch.retry import ImageRetry, Progress
from ociproxy.load.image import all_of
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.digest import Digest
from ociproxy.oci.image import MAX_DEPTH
from ociproxy.oci.manifest import referrer_descriptor
from ociproxy.oci.reference import Reference
from ociproxy.store.files import make_folder, store_errors
from ociproxy.store.image import read_contents
from ociproxy.store.records import Record, RecordFiles

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

    from ociproxy.config.settings import Config
    from ociproxy.errors import UpstreamError
    from ociproxy.fetch.engine import Engine
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.reference import Repository
    from ociproxy.store.check import BrokenImage, Findings

    Work = Callable[[Repository, Progress], Awaitable[None]]

_BATCH: Final = 256
"""Records that are removed at once: publishers wait meanwhile, some milliseconds."""
_OFFLINE: Final = "no upstream may be asked"


class Watcher:
    """Hears what becomes of each finding; this base class ignores it."""

    def fetched(self, image: BrokenImage) -> None:
        """All that the image needs is stored again."""

    def failed(self, image: BrokenImage, reason: str) -> None:
        """The image is still broken."""

    def removed(self, record: Record) -> None:
        """A record that led nowhere is gone."""

    def set_aside(self, record: Record) -> None:
        """A damaged record is in `quarantine/`, or was written anew."""

    def busy(self, count: int, error: Busy) -> None:
        """So many records stay, for another process removes just now."""

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        """An upstream is asked again in so many seconds."""


class Repair:
    """Belongs to one event loop. Asks no upstream where the engine is offline."""

    def __init__(self, engine: Engine, config: Config, watcher: Watcher) -> None:
        self._engine = engine
        self._store = engine.store
        self._records = RecordFiles(engine.store.refs)
        self._watcher = watcher
        self._clock = SystemClock()
        self._jobs = config.load.jobs
        self._slots = asyncio.Semaphore(config.fetch.fills)
        self._retry = ImageRetry(
            config.load.pull_timeout,
            wait_max=config.fetch.retry_wait_max,
            clock=self._clock,
            waiting=watcher.waiting,
        )
        self._nowhere: list[Record] = []
        """Records of references whose manifest cannot come back."""

    async def run(self, findings: Findings) -> None:
        """Repair what can be repaired; the failure of one image stops no other. Raises
        StoreError."""
        turn = iter(findings.broken)
        await all_of(self._work(turn) for _ in range(min(self._jobs, len(findings.broken))))
        records = [*findings.damaged_records, *findings.nowhere, *self._nowhere]
        for first in range(0, len(records), _BATCH):
            batch = records[first : first + _BATCH]
            try:
                gone = await self._engine.threads.run(partial(self._remove, batch))
            except Busy as exc:
                self._watcher.busy(len(records) - first, exc)
                return
            for record in gone:
                if record.digest is None:
                    self._watcher.set_aside(record)
                else:
                    self._watcher.removed(record)

    async def _work(self, turn: Iterator[BrokenImage]) -> None:
        for image in turn:
            failures = {} if self._engine.upstreams.offline else await self._fetch(image)
            manifests, blobs = await self._engine.threads.run(partial(self._lacking, image))
            lacking = [*manifests, *(blob.digest for blob in blobs)]
            if not lacking:
                self._watcher.fetched(image)
            elif self._leads_nowhere(image.top, failures.get(image.top)):
                self._nowhere += await self._engine.threads.run(partial(self._records_of, image))
            else:
                errors = [failures[digest] for digest in lacking if digest in failures]
                self._watcher.failed(image, str(errors[0]) if errors else _OFFLINE)

    async def _fetch(self, image: BrokenImage) -> dict[Digest, OciProxyError]:
        """Fetch what an image lacks, level by level: a manifest says what else it needs. Returns
        what could not be fetched."""
        repository = image.reference.repository
        progress = Progress(self._clock.monotonic())
        failures: dict[Digest, OciProxyError] = {}

        async def attempt(digest: Digest, work: Work) -> None:
            try:
                await work(repository, progress)
            except StoreError:
                raise
            except OciProxyError as exc:
                failures[digest] = exc

        for _ in range(MAX_DEPTH + 2):
            manifests, blobs = await self._engine.threads.run(partial(self._lacking, image))
            works: dict[Digest, Work] = {
                each: partial(self._fetch_manifest, each) for each in manifests
            }
            works |= {each.digest: partial(self._fetch_blob, each) for each in blobs}
            new = works.keys() - failures.keys()
            await all_of(attempt(digest, works[digest]) for digest in new)
            if not new:
                break
        return failures

    def _lacking(self, image: BrokenImage) -> tuple[list[Digest], list[Descriptor]]:
        """Manifests and blobs. Runs in a thread. Raises StoreError.

        An index without any of its platforms lacks all of them, and only those were stored once
        that are in `quarantine/` or that the repository has a record of.
        """
        top, repository = self._top(image), image.reference.repository
        if top is None:
            return [], []  # another process has removed the reference, or moved the tag
        contents = read_contents(self._store, repository, top)
        missing = contents.missing.values()
        manifests = {each.descriptor.digest for each in missing if not each.is_blob}
        manifests |= set(filter(self._store.is_quarantined, contents.unstored))
        were_stored = {each for each in manifests if self._was_stored(repository, each)}
        blobs = [each.descriptor for each in missing if each.is_blob]
        return sorted(were_stored or manifests, key=str), blobs

    def _was_stored(self, repository: Repository, digest: Digest) -> bool:
        recorded = self._store.refs.find_manifest(repository, digest) is not None
        return recorded or self._store.is_quarantined(digest)

    def _top(self, image: BrokenImage) -> Descriptor | None:
        found = self._store.refs.find(image.reference)
        return found if found is not None and found.digest == image.top else None

    async def _fetch_manifest(
        self, digest: Digest, repository: Repository, progress: Progress
    ) -> None:
        reference = Reference(repository, digest=digest)
        holder = await self._retry.run(
            repository.registry,
            progress,
            lambda: self._engine.requests.call(
                repository, ("load", reference), lambda backend: backend.fetch_manifest(reference)
            ),
        )
        await self._engine.threads.run(lambda: self._store.commit_manifest(repository, holder))

    async def _fetch_blob(
        self, blob: Descriptor, repository: Repository, progress: Progress
    ) -> None:
        def received(size: int, _: bool) -> None:
            if size:
                progress.when = self._clock.monotonic()

        async def work() -> None:
            async with self._slots:
                await self._engine.blobs.ensure(repository, blob, received, missing=False)

        await self._retry.run(repository.registry, progress, work)

    def _leads_nowhere(self, digest: Digest, error: OciProxyError | None) -> bool:
        """Whether a manifest is not stored and cannot come back."""
        if self._is_stored(digest):
            return False
        if isinstance(error, ManifestUnknown):
            return True
        return self._engine.upstreams.offline and not self._store.is_quarantined(digest)

    def _records_of(self, image: BrokenImage) -> Sequence[Record]:
        """Of the reference: its tag, and that the repository has the manifest."""
        repository = image.reference.repository
        return [
            record
            for record in self._records.of(repository)
            if record.digest == image.top and record.tag in (None, image.reference.tag)
        ]

    def _remove(self, records: Sequence[Record]) -> list[Record]:
        """Remove those that are still wrong while no other process publishes, and return them. A
        damaged one moves to `quarantine/`, and is written anew if its name says of which manifest
        it was. Runs in a thread. Raises Busy or StoreError."""
        gone = []
        folder = self._store.quarantine
        with self._store.removals.remover() as remover, remover.batch():
            for record in records:
                if not self._records.still_says(record):
                    continue
                if record.digest is None:
                    with store_errors(record.path):
                        make_folder(folder)
                        record.path.replace(folder / _unique(record.path))
                    self._write_anew(record)
                elif self._is_stored(record.digest) or not remover.take(record.path):
                    continue
                gone.append(record)
        return gone

    def _write_anew(self, record: Record) -> None:
        if record.tag is not None:
            return
        with suppress(DigestInvalid, MalformedManifest):
            holder = self._store.manifests.find(Digest.parse(record.path.name), use=False)
            if holder is not None and record.repository is not None:
                self._store.refs.put_manifest(record.repository, holder.descriptor)
            elif holder is not None:
                subject = Digest.parse(record.path.parent.name)
                self._store.refs.put_referrer(subject, referrer_descriptor(holder))

    def _is_stored(self, digest: Digest) -> bool:
        return self._store.manifests.find(digest, use=False) is not None


def _unique(path: Path) -> str:
    """A name in `quarantine/`: many repositories have the same tags."""
    return f"{path.name}-{Digest.of(str(path).encode()).encoded[:16]}"
