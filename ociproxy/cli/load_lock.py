"""`load --lock FILE`: one load writes the digests of its tags, the next obeys them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ociproxy.archive.lock import Lock, LockedImage, read_lock_file
from ociproxy.load.imagelist import ImageListInvalid, Wanted, pinned
from ociproxy.load.progress import Watcher
from ociproxy.oci.reference import Reference

if TYPE_CHECKING:
    from pathlib import Path

    from ociproxy.errors import OciProxyError, UpstreamError
    from ociproxy.load.progress import Result
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.platform import Platform


class LockWriter(Watcher):
    """Collects the images that were loaded or found, with the sizes of their contents, and passes
    all that it hears to `next_watcher`."""

    def __init__(self, next_watcher: Watcher) -> None:
        self._next = next_watcher
        self._images: list[LockedImage] = []
        self._contents: dict[Digest, int] = {}

    def loaded(self, result: Result) -> None:
        # Found is as good as loaded: a lock says what the upstream has, whatever the store has.
        image = result.image
        reference = image.reference
        # What the registry withholds is at no place that the lock could name.
        complete = not result.withheld
        self._images.append(
            LockedImage(_by_tag(reference), image.top.descriptor, image.platforms, complete)
        )
        # Tags of signatures and the like, which an export names as images, too.
        self._images += [
            LockedImage(Reference(reference.repository, tag), descriptor)
            for tag, descriptor in image.tags.items()
            if tag != reference.tag
        ]
        for digest, holder in image.manifests.items():
            self._contents[digest] = len(holder.raw)
        for digest, blob in image.blobs.items():
            self._contents[digest] = blob.size
        self._next.loaded(result)

    def failed(self, wanted: Wanted, error: OciProxyError) -> None:
        self._next.failed(wanted, error)

    def waiting(self, error: UpstreamError, seconds: float) -> None:
        self._next.waiting(error, seconds)

    def encode(self) -> bytes:
        return Lock(tuple(self._images), self._contents).encode()


def obey(
    path: Path, wanted: list[Wanted], platforms: tuple[Platform, ...] | None, *, everything: bool
) -> list[Wanted]:
    """The images with the digests that the lock has for them. With `everything` all images of the
    lock, for `platforms` or else for the platforms of the lock.

    Raises LockInvalid, or ImageListInvalid with every image that the lock lacks.
    """
    lock = read_lock_file(path)
    if everything:
        wanted = [
            Wanted(each.reference, each.platforms if platforms is None else platforms, str(path))
            for each in lock.images
        ]
    locked = {
        _by_tag(each.reference): replace(each.reference, digest=each.descriptor.digest)
        for each in lock.images
    }
    found, problems = pinned(wanted, locked)
    if problems:
        raise ImageListInvalid(problems)
    return found


def _by_tag(reference: Reference) -> Reference:
    return replace(reference, digest=None) if reference.tag else reference
