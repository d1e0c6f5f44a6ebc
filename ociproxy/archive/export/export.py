"""Export: images of a store into an archive, which is one file or several volumes.

An archive is an OCI image layout in a GNU tar. Every blob is hashed as it is copied, and an export
that meets a damaged or a missing one leaves no file behind.

Tests: tests/archive/export/test_export.py, tests/archive/test_import_export.py,
tests/real/test_export.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ociproxy.archive.export.content import (
    DOCKER_NAME,
    Document,
    contents,
    docker_manifest,
    index,
    lock_of,
    marker,
    read_manifest,
)
from ociproxy.archive.export.output import STDOUT, Output, Written, open_output, write_small
from ociproxy.archive.export.selection import is_of_another_platform
from ociproxy.archive.export.split import Body, Part, parts_document, split
from ociproxy.archive.export.tar_writer import TarWriter
from ociproxy.archive.lock import LOCK_NAME, read_lock
from ociproxy.archive.volumes import stale_volumes, volume_paths
from ociproxy.errors import ConfigError, Incomplete, LayoutDamaged, LayoutInvalid, LockInvalid
from ociproxy.oci.digest import Digest
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ociproxy.archive.export.content import Content
    from ociproxy.archive.export.selection import Chosen
    from ociproxy.archive.lock import Lock
    from ociproxy.store.store import Store

_ZSTD: Final = ".zst"
_NAMED_AT_ONCE: Final = 20
"""Images that one warning names: a person reads it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the archive is written: `volume_size` in bytes, `since` the lock of what the receiver
    has."""

    flattened: bool = False
    digest_names: bool = False
    since: Lock | None = None
    volume_size: int | None = None
    zstd: bool = False


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. `contents` counts manifests and blobs; `omitted` is the size in bytes of
    blobs that were left out because the receiver has them."""

    files: tuple[Written, ...]
    lock: Lock
    contents: int
    omitted: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int:
        return sum(each.size for each in self.files)


def check_target(path: Path, shape: Shape) -> None:
    """Raises ConfigError for a file name that contradicts the shape."""
    if path == STDOUT:
        if shape.volume_size is not None:
            raise ConfigError("--volume-size needs a file name, for standard output is one file")
        return
    if shape.zstd and path.suffix != _ZSTD:
        raise ConfigError(f"with --zstd the name has to end in {_ZSTD}", file=str(path))
    if path.suffix == _ZSTD and not shape.zstd:
        raise ConfigError(f"a name that ends in {_ZSTD} needs --zstd", file=str(path))


def export(
    store: Store,
    chosen: Sequence[Chosen],
    path: Path,
    shape: Shape,
    *,
    force: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Exported:
    """Write the images; `progress` is called with the size in bytes of each manifest and blob. An
    archive of other content, and another file, are overwritten only with `force`.

    Raises ConfigError for such a file; OutputError, VolumeTooSmall or StoreError;
    DigestMismatch or SizeMismatch for a damaged blob; Incomplete or ManifestUnknown for a blob or
    manifest that is gone since it was chosen.
    """
    lock, held = _plan(chosen, shape)
    documents = _documents(store, chosen, lock, shape)
    set_id = None
    parts = {path: Part(documents, tuple(held))}
    if shape.volume_size is not None:
        set_id = Digest.of(lock.encode() + str(shape.volume_size).encode())
        volumes = split(documents, held, shape.volume_size, set_id=set_id)
        parts = dict(zip(volume_paths(path, len(volumes)), volumes, strict=True))
    if path != STDOUT and not force:
        for name in parts:
            _check_overwritten(name, lock)
    files = _write(store, parts, path, shape, set_id, progress)
    if path != STDOUT:
        lines = [f"{each.digest.encoded}  {each.path.name}\n" for each in files]
        write_small(_checksum(path), "".join(lines).encode())
    return Exported(
        files=tuple(files),
        lock=lock,
        contents=len(held),
        omitted=sum(lock.contents[digest] for digest in lock.omitted),
        warnings=tuple(_warnings(chosen, documents, shape)),
    )


def _check_overwritten(path: Path, lock: Lock) -> None:
    """Raises ConfigError if the file is no archive, such as a list of images that was meant for
    --list; or one of other content than this lock's, for a delta may need it."""
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        if read_lock(path).digest == lock.digest:
            return
        reason = "is an archive of other content, which a delta may need"
    except (LockInvalid, LayoutDamaged):
        return  # no archive of ours, a later volume, or cut off: nothing builds on it
    except LayoutInvalid:
        reason = "is no archive"
    raise ConfigError(
        f"{reason}: name another file, or say --force to overwrite this one", file=str(path)
    )


def size_of(chosen: Sequence[Chosen], shape: Shape) -> int:
    """Bytes of the manifests and blobs that the export will write."""
    return sum(each.size for each in _plan(chosen, shape)[1])


def _plan(chosen: Sequence[Chosen], shape: Shape) -> tuple[Lock, list[Content]]:
    """The lock, and what goes into the archive. A delta leaves out blobs, but no manifests: they
    are small, and an import needs them to tell which blobs belong to an image."""
    held = contents(chosen)
    lock, base = lock_of(chosen, held), shape.since
    if base is None:
        return lock, held
    omitted = {
        each.digest for each in held if not each.is_manifest and each.digest in base.contents
    }
    delta = replace(lock, base=base.digest, omitted=frozenset(omitted))
    return delta, [each for each in held if each.digest not in omitted]


def _documents(
    store: Store, chosen: Sequence[Chosen], lock: Lock, shape: Shape
) -> tuple[Document, ...]:
    docker = docker_manifest(store, chosen) if shape.flattened else None
    return (
        marker(),
        index(chosen, digest_names=shape.digest_names),
        Document(LOCK_NAME, lock.encode()),
        *((docker,) if docker is not None else ()),
    )


def _write(
    store: Store,
    parts: dict[Path, Part],
    path: Path,
    shape: Shape,
    set_id: Digest | None,
    progress: Callable[[int], None],
) -> list[Written]:
    """Write each part under its name; with a `set_id` they are the volumes of this set. All files
    get their names at the end, or none does."""
    with ExitStack() as stack:
        outputs: list[Output] = []
        bodies: list[Body] = []
        for name, part in parts.items():
            output = stack.enter_context(open_output(name, zstd=shape.zstd))
            outputs.append(output)
            _write_part(store, part, TarWriter(output), progress)
            if set_id is not None:
                bodies.append(Body(part.size, output.tar_digest()))
        written = []
        for output in outputs:
            tar = TarWriter(output)
            if set_id is not None:
                last = parts_document(set_id, bodies)
                tar.add(last.name, last.data)
            tar.finish()
            written.append(output.finish())
        if set_id is not None:
            for stale in stale_volumes(path, list(parts)):
                stale.unlink(missing_ok=True)
        if path != STDOUT:
            # No checksum at all, if the export is killed now, rather than that of an older archive.
            _checksum(path).unlink(missing_ok=True)
        for output in outputs:
            output.commit()
    return written


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _write_part(store: Store, part: Part, tar: TarWriter, progress: Callable[[int], None]) -> None:
    for document in part.documents:
        tar.add(document.name, document.data)
    for content in part.contents:
        if content.is_manifest:
            tar.add(content.name, read_manifest(store, content.digest))
        else:
            _add_blob(store, content, tar)
        progress(content.size)


def _add_blob(store: Store, content: Content, tar: TarWriter) -> None:
    path = store.blobs.path(content.digest)
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError as exc:
        raise Incomplete(
            {str(content.digest): ["its bytes: the blob is gone since the export began"]},
            "export again",
        ) from exc
    with store_errors(path), file:
        tar.add_file(content.name, file, content.digest, content.size)


def _warnings(chosen: Sequence[Chosen], documents: Sequence[Document], shape: Shape) -> list[str]:
    found = []
    other = [each for each in chosen if is_of_another_platform(each)]
    if other:
        names = ", ".join(
            f"{each.reference} ({', '.join(map(str, each.contents.platforms))})"
            for each in other[:_NAMED_AT_ONCE]
        )
        more = f" and {len(other) - _NAMED_AT_ONCE} more" if len(other) > _NAMED_AT_ONCE else ""
        found.append(f"taken though they are for another platform: {names}{more}")
    flattened = sum(each.flattened_from is not None for each in chosen)
    if flattened:
        found.append(
            f"taken out of their index: {flattened} of {len(chosen)} images; their tags stand for "
            "the manifest of the platform, whose digest is not the one upstream has for the tag"
        )
    if any(each.name == DOCKER_NAME for each in documents):
        found.append(
            "tools that read manifest.json, Docker's classic store and podman with several images, "
            "make digests anew"
        )
    elif shape.flattened and all(each.contents.complete for each in chosen):
        found.append(
            "not all of it can be run, such as signatures: Docker's classic store cannot read it, "
            "and `ctr images import` ends with an error unless it is given --no-unpack; "
            "--no-referrers leaves signatures out"
        )
    if shape.flattened and any(
        digest.algorithm != "sha256"
        for each in chosen
        for digest in (*each.contents.manifests, *each.contents.blobs)
    ):
        found.append("containerd does not find content that is named by sha512")
    return found
