"""Export: images of a store into one file, or several, that carries them where no network goes.

The file is an OCI image layout in a plain GNU tar. Every byte of it is hashed as it is written;
a wrong one, or a missing one, leaves nothing behind.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ociproxy.archive.export.content import (
    DOCKER_NAME,
    LOCK_NAME,
    Document,
    contents,
    docker_manifest,
    index,
    lock_of,
    marker,
    read_manifest,
)
from ociproxy.archive.export.output import STDOUT, Output, Written, open_output, write_small
from ociproxy.archive.export.tar_writer import TarWriter
from ociproxy.archive.export.volume_writer import (
    Body,
    Part,
    other_volumes,
    parts_document,
    split,
    volume_path,
)
from ociproxy.errors import ConfigError, Incomplete
from ociproxy.oci.digest import Digest
from ociproxy.store.files import store_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ociproxy.archive.export.content import Content
    from ociproxy.archive.export.selection import Chosen
    from ociproxy.archive.lock import Lock
    from ociproxy.store.store import Store

CHECKSUM_SUFFIX: Final = ".sha256"
ZSTD_SUFFIX: Final = ".zst"


@dataclass(frozen=True, slots=True)
class Shape:
    """How the archive is written: `volume_size` in bytes, `since` what the receiver has."""

    flattened: bool = False
    digest_names: bool = False
    since: Lock | None = None
    volume_size: int | None = None
    zstd: bool = False


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. `omitted` are the bytes that the receiver has already."""

    files: tuple[Written, ...]
    lock: Lock
    contents: int
    omitted: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int:
        return sum(each.size for each in self.files)


def check_target(path: Path, shape: Shape) -> None:
    """Raises ConfigError for a name that does not go with the shape."""
    if path == STDOUT:
        if shape.volume_size is not None:
            raise ConfigError("volumes need a file name, standard output is one", key="FILE")
        return
    if shape.zstd != (path.suffix == ZSTD_SUFFIX):
        raise ConfigError(
            f"{path}: a name ends in {ZSTD_SUFFIX} exactly where --zstd is given; readers go by it",
            key="FILE",
        )


def export(
    store: Store,
    chosen: Sequence[Chosen],
    path: Path,
    shape: Shape,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Exported:
    """Write the images; `progress` is told of bytes as they are written.

    Raises OutputError, IntegrityError kinds for content that is not what it is called, StoreError
    or ManifestUnknown for what is gone meanwhile, VolumeTooSmall.
    """
    held = contents(chosen)
    lock, held = _without_base(lock_of(chosen, held), held, shape.since)
    documents = _documents(store, chosen, lock, shape)
    if shape.volume_size is None:
        files = [_write_one(store, Part(documents, tuple(held)), path, shape, progress)]
    else:
        files = _write_volumes(store, documents, held, lock, path, shape, progress)
    if path != STDOUT:
        # Since the archive has its name there is none, rather than that of an older archive.
        lines = [f"{each.digest.encoded}  {each.path.name}\n" for each in files]
        write_small(_checksum(path), "".join(lines).encode())
    return Exported(
        files=tuple(files),
        lock=lock,
        contents=len(held),
        omitted=sum(lock.contents[digest] for digest in lock.omitted),
        warnings=tuple(_warnings(chosen, documents, shape)),
    )


def size_of(chosen: Sequence[Chosen], shape: Shape) -> int:
    """Bytes of content that the export will write."""
    held = contents(chosen)
    _, held = _without_base(lock_of(chosen, held), held, shape.since)
    return sum(each.size for each in held)


def _without_base(lock: Lock, held: list[Content], base: Lock | None) -> tuple[Lock, list[Content]]:
    """A delta leaves out blobs, not manifests: those are small, and say what there is to have."""
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


def _write_one(
    store: Store, part: Part, path: Path, shape: Shape, progress: Callable[[int], None]
) -> Written:
    with open_output(path, zstd=shape.zstd) as output:
        tar = TarWriter(output)
        _write_part(store, part, tar, progress)
        tar.finish()
        written = output.finish()
        if path != STDOUT:
            _checksum(path).unlink(missing_ok=True)
        output.commit()
    return written


def _write_volumes(
    store: Store,
    documents: tuple[Document, ...],
    held: Sequence[Content],
    lock: Lock,
    path: Path,
    shape: Shape,
    progress: Callable[[int], None],
) -> list[Written]:
    assert shape.volume_size is not None  # noqa: S101 the caller's branch
    set_id = Digest.of(lock.encode() + str(shape.volume_size).encode())
    parts = split(documents, held, shape.volume_size, set_id=set_id)
    names = [volume_path(path, number, len(parts)) for number in range(1, len(parts) + 1)]
    with ExitStack() as stack:
        opened: list[Output] = []
        bodies = []
        for name, part in zip(names, parts, strict=True):
            output = stack.enter_context(open_output(name, zstd=shape.zstd))
            opened.append(output)
            _write_part(store, part, TarWriter(output), progress)
            bodies.append(Body(part.size, output.peek()))
        last = parts_document(set_id, bodies)
        written = []
        for output in opened:
            tar = TarWriter(output)
            tar.add(last.name, last.data)
            tar.finish()
            written.append(output.finish())
        for stale in other_volumes(path, names):
            stale.unlink(missing_ok=True)
        _checksum(path).unlink(missing_ok=True)
        for output in opened:
            output.commit()
    return written


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM_SUFFIX)


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
    if shape.flattened and any(
        digest.algorithm != "sha256"
        for each in chosen
        for digest in (*each.contents.manifests, *each.contents.blobs)
    ):
        found.append("containerd does not find content that is named by sha512")
    return found
