"""One blob on its way into the store: who fetches it, what has arrived, whether it is right.

A backend brings the blob, in a thread that the download keeps until it ends. With the HTTP backend
the process that holds the lock on the file in `pulls/` is the leader: it writes and hashes. Other
processes follow: they read the leader's file and journal. skopeo puts whole blobs into the store.
`Fill` is the same download as the readers in the event loop see it.

Tests: tests/fetch/download/test_fill.py, tests/serve/test_fills.py.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from math import inf
from threading import Event
from typing import TYPE_CHECKING, Final

from ociproxy import log
from ociproxy.errors import (
    BlobTooLarge,
    DigestMismatch,
    Interrupted,
    OciProxyError,
    SizeMismatch,
    StoreError,
    StoreFull,
)
from ociproxy.fetch.download.assembly import Assembly, State
from ociproxy.store.files import Silence, store_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ociproxy.config.settings import Fetch
    from ociproxy.fetch.download.assembly import Fetcher, Segment
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.reference import Repository
    from ociproxy.store.hashing import InOrderHasher
    from ociproxy.store.ingest import Ingest
    from ociproxy.store.room import Room
    from ociproxy.store.store import Store

_FOLLOW_INTERVAL: Final = 0.02
"""Seconds between a follower's looks at the leader's journal."""
_UNSIZED_WAIT: Final = 2.0
"""Seconds after which readers get the bytes of a blob whose size nothing tells. Most have all
arrived by then, and are answered with their length."""
_WORTH_A_THREAD: Final = 1024 * 1024
"""Bytes from which a blob has a hashing thread: waking one up takes longer than hashing less."""


class Download:
    """Any thread may read the public attributes. `run` is called once, in a thread of its own."""

    def __init__(
        self,
        repository: Repository,
        digest: Digest,
        store: Store,
        limits: Fetch,
        *,
        partition: str,
        expected_size: int | None,
        believes: bool,
        spawn: Callable[[Callable[[], None]], Future[None]],
        room: Room | None = None,
    ) -> None:
        """`partition` is who may share the bytes before they are verified (`Config.partition`).
        `believes` is whether the size that a stored manifest claims is looked up, and what another
        process has not verified yet is read: not by the second try after wrong bytes. `spawn`
        runs one more connection in a thread."""
        self.notify: Callable[[], None] = lambda: None
        """Tells the readers of news: the fill sets it."""
        self.digest = digest
        self.limits = limits
        self.spawn = spawn
        self.stopped = Event()
        self.doubted = False
        """Readers do not hear the size until the bytes are verified. That is so for a blob of 0
        bytes, and where two signs say "this is a page" (`learn_size`)."""
        self.bytes_fetched = 0
        """Bytes that the upstream has sent for this download, those it sent twice included."""
        self.bytes_resumed = 0
        self.answered = False
        """Whether the upstream has begun to send the blob to this process, not to another one."""
        self.copied = 0
        """Changes while a copy by skopeo gets on."""
        self.assembly = Assembly(
            digest, repository.registry, size=expected_size, segment=limits.segment
        )
        self.repository = repository
        self._partition = partition
        self._subject = "blob"
        self._leaders_stopped = 0
        self._store = store
        self.room = room or store.room
        self._believes = believes
        self._began = inf
        self._fetcher: Fetcher | None = None

    # For readers

    @property
    def state(self) -> State:
        return self.assembly.state

    @property
    def size(self) -> int | None:
        return self.assembly.size

    @property
    def is_arriving(self) -> bool:
        """Whether it waits for bytes of an upstream or of a leader. False before it has its turn,
        for a copy by skopeo, which tells no bytes before its end, and once all bytes are here."""
        return self.assembly.has_file and self.state < State.WHOLE

    @property
    def signs(self) -> tuple[object, ...] | None:
        """Changes while the download gets on, here or in the process that it follows. None where
        only the disk is waited for."""
        if self.state is State.VERIFIED:
            return None
        hasher = self.assembly.hasher
        hashed = 0 if hasher is None else hasher.position
        return self.state, self.assembly.bytes_here, hashed, self.copied

    def want(self, offset: int) -> None:
        """A reader waits for the byte at offset: it is fetched first."""
        needs_help, fetcher = self.assembly.want(offset), self._fetcher
        if needs_help and fetcher is not None:
            fetcher.help()

    def duplicate_file(self) -> int:
        """A file descriptor of the bytes that are available; the caller closes it."""
        file = self.assembly.duplicate_file()
        if file is not None:
            return file
        path = self._store.blobs.path(self.digest)
        with store_errors(path):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    # For the owner

    def run(self, fetch: Callable[..., None]) -> None:
        """Return when the blob is verified, and in the store: but where `room` has none, and for a
        relay. `fetch` is `Backend.fetch_blob`. Raises what ended the download."""
        self._began = time.monotonic()
        self.room.check(self.size or 0)
        fetch(self, tries=self.limits.retries, answered=self._hear)
        if self.state is not State.VERIFIED and not self._take_committed():
            raise self._interrupted("the blob has gone from the store again")

    def abort(self) -> None:
        """Stop soon; what has arrived stays in `pulls/`."""
        self.stopped.set()
        fetcher = self._fetcher
        if fetcher is not None:
            fetcher.abort()

    def close(self) -> None:
        """After `run`."""
        self.assembly.close()

    def _hear(self) -> None:
        self.answered = True

    # For backends

    def learn_size(self, size: int, *, told: bool = True, encoding: str = "") -> None:
        """What the upstream says of the blob; with `told` False what is claimed of it. Raises
        BlobTooLarge or SizeMismatch."""
        self.check_limit(size)
        self._subject = f"blob sent as {encoding!r}" if encoding else "blob"
        odd = (size <= _WORTH_A_THREAD, self.size not in (None, size), bool(encoding))
        self.doubted = self.doubted or size == 0 or sum(odd) > 1
        self.room.wait_for_disk(partial(self.assembly.learn_size, told=told), size, self.stopped)
        self._reach(State.ARRIVING)
        self._start_hasher()

    def claimed_size(self) -> int | None:
        """What is known of the size where the upstream does not tell it: what the caller or the
        journal knew, else what a recent manifest of the repository claims. Raises StoreError."""
        if self.size is None and self._believes:
            return self._store.claimed_size(self.repository, self.digest)
        return self.size

    def check_limit(self, size: int) -> None:
        """`size` is the least that it has. Raises BlobTooLarge above `fetch.blob_limit` bytes."""
        if size > self.limits.blob_limit:
            raise BlobTooLarge(self.repository.registry, self.digest, self.limits.blob_limit)

    def put(self, segment: Segment, data: bytes) -> None:
        """Write the next bytes of a segment, tell the readers, hash. Raises StoreError or
        BlobTooLarge."""
        start = segment.start
        self.check_limit(start + len(data))
        self.assembly.put(segment, data)
        self.tell_arrival()
        self.notify()
        self.assembly.hash(start, data)

    def tell_arrival(self) -> None:
        """Some bytes are here. Readers get them after a while, though nothing tells the size."""
        if self.state is State.STARTING and time.monotonic() - self._began > _UNSIZED_WAIT:
            self._reach(State.ARRIVING)

    def lead(self, fetcher: Fetcher) -> None:
        """Fetch the blob, or follow the process that does; return when it is in the store.

        A second call goes on with what the first one brought. Raises what `fetcher` raises,
        IntegrityError kinds, StoreError or Interrupted.
        """
        while True:
            ingest = self.assembly.led or self._store.staging.lead(self.digest, self._name)
            if self._follow() if ingest is None else self._fetch(ingest, fetcher):
                return

    # Leading and following

    def _follow(self) -> bool:
        """Another process leads: read along until it is done (True), or gone or stopped (False)."""
        ingest = self._store.staging.follow(self.digest, self._name)
        if ingest is None:
            return self._store.blobs.find_size(self.digest) is not None
        silence = Silence(ingest.file, self.limits.timeouts.stall)
        adopted = False
        try:
            while not self.stopped.wait(_FOLLOW_INTERVAL):
                led = ingest.is_led()
                if self._store.blobs.find_size(self.digest) is not None:
                    return self._take_committed()
                if not adopted and self._believes:
                    ingest.refresh()
                    adopted = self.assembly.adopt(ingest)
                if adopted:
                    self.assembly.refresh()
                    if ingest.size is not None:
                        self._reach(State.ARRIVING)
                    elif ingest.ranges.total:
                        self.tell_arrival()
                if not led:
                    return False
                if silence.is_long():
                    self._leaders_stopped += 1
                    log.event(logging.WARNING, "leader stopped", digest=self.digest)
                    return False
        finally:
            if not adopted:
                ingest.close()
        raise self._interrupted("shutting down")

    def _fetch(self, ingest: Ingest, fetcher: Fetcher) -> bool:
        """This process leads. False where it has to look for a leader anew."""
        if ingest is not self.assembly.led and not self._begin(ingest):
            return self._take_committed()
        began = time.monotonic()
        hasher = self.assembly.begin_hashing(ingest)
        self._fetcher = fetcher
        if self.stopped.is_set():
            fetcher.abort()
        try:
            self._start_hasher()
            fetcher.run()
            self._reach(State.WHOLE)
            self._verify(hasher)
        except OciProxyError as exc:
            wrong = isinstance(exc, (DigestMismatch, StoreError, BlobTooLarge))
            # Of two sizes either may be wrong: what has arrived is kept until it was hashed. A full
            # disk says nothing of it, but needs no copy of what a stopped leader has brought.
            kept = isinstance(exc, StoreFull) and not self._leaders_stopped
            if ingest.ranges.total == 0 or (wrong and not kept):
                ingest.discard()
                self.close()  # a later call must not go on with a file that is gone
            else:
                # Here, for it is the event loop that closes the file.
                ingest.flush()
            raise
        finally:
            self._fetcher = None
            hasher.stop()
        self._reach(State.VERIFIED)
        ingest.set_size(hasher.position)  # an earlier leader may not have known it
        refused = self.room.keep(ingest, self._store.blobs.commit, hasher.position, self.stopped)
        log.event(
            logging.INFO if refused is None else logging.WARNING,
            "filled",
            digest=self.digest,
            upstream=self.repository.registry,
            bytes=self.size,
            resumed=self.bytes_resumed or None,
            kept=None if ingest.is_kept and refused is None else False,
            seconds=time.monotonic() - began,
            reason=refused,
        )
        return True

    def _begin(self, ingest: Ingest) -> bool:
        """Take over what arrived before; False where the file is of no use."""
        if self._store.blobs.find_size(self.digest) is not None:
            # Another process has committed it since. Not emptied: followers read the file.
            ingest.discard()
            ingest.close()
            return False
        try:
            self.assembly.resume(ingest)
        except OciProxyError:
            ingest.close()
            raise
        self.bytes_resumed = ingest.ranges.total
        return True

    def _take_committed(self) -> bool:
        """The blob is in the store: readers go on there. False where it is not."""
        if (size := self._store.blobs.find_size(self.digest)) is None:
            return False
        self.assembly.leave_to_store(size)
        self._reach(State.VERIFIED)
        return True

    @property
    def _name(self) -> str:
        """The partition, or a part of it: a leader that was stopped keeps its file locked."""
        stopped = self._leaders_stopped
        return f"{self._partition}#{stopped}" if stopped else self._partition

    def _start_hasher(self) -> None:
        hasher = self.assembly.hasher
        if hasher is not None and (self.size or 0) > _WORTH_A_THREAD:
            hasher.start()

    def _verify(self, hasher: InOrderHasher) -> None:
        actual = hasher.digest()
        if actual != self.digest:
            raise DigestMismatch(self._subject, self.digest, actual)
        if hasher.position != self.size:
            raise SizeMismatch(f"blob {self.digest}", self.size, hasher.position)

    def _reach(self, state: State) -> None:
        self.assembly.state = max(self.state, state)
        self.notify()

    def _interrupted(self, reason: str) -> Interrupted:
        return Interrupted(self.repository.registry, reason)
