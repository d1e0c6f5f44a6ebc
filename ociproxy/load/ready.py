"""`ready`: whether images would come up if no upstream could be asked.

The store alone answers, by the rules of a server that is offline, and no use is recorded. What an
image consists of says `read_contents`, as for `list`; which platforms it may lack says `Wanted`, as
for `load`.

Tests: tests/cli/test_ready_command.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ociproxy.errors import StoreError
from ociproxy.oci.descriptor import MalformedManifest
from ociproxy.oci.image import is_attestation, lacking_in, platforms_of
from ociproxy.oci.manifest import Index
from ociproxy.oci.reference import DEFAULT_TAG, referrers_tag, signature_tags
from ociproxy.store.files import file_name
from ociproxy.store.image import Missing, read_contents
from ociproxy.store.inventory import is_only_named
from ociproxy.store.look import Look, is_lost
from ociproxy.store.recent import RecentFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ociproxy.config.settings import Config
    from ociproxy.load.imagelist import Wanted
    from ociproxy.oci.descriptor import Descriptor
    from ociproxy.oci.digest import Digest
    from ociproxy.oci.platform import Platform
    from ociproxy.oci.reference import Reference
    from ociproxy.store.image import ImageContents
    from ociproxy.store.store import Store


@dataclass(frozen=True, slots=True)
class ReadyPlatform:
    """A platform of an image, None where nothing names it, and what is missing of it."""

    platform: Platform | None
    missing: tuple[Missing, ...]


@dataclass(slots=True)
class Readiness:
    """What is stored of one image of a list. `refusal` is why a client would get nothing of it, or
    not all that was asked for. A sparse index is ready for the platforms that were asked for."""

    wanted: Wanted
    digest: Digest | None = None
    refusal: str | None = None
    platforms: list[ReadyPlatform] = field(default_factory=list)
    lacking: tuple[Platform, ...] = ()
    """Wanted platforms that the image does not offer, and may lack."""
    size: int = 0
    """Bytes of all that is stored of it."""
    referrers: set[Digest] = field(default_factory=set)
    """Stored manifests that refer to the image, where they were asked for."""

    @property
    def ready(self) -> bool:
        return self.refusal is None and not self.missing

    @property
    def missing(self) -> tuple[Missing, ...]:
        """Of all platforms; what several of them miss stands there once."""
        found = {each.descriptor.digest: each for p in self.platforms for each in p.missing}
        return tuple(found.values())


class _Refused(Exception):
    """Nothing of an image would come up, and why."""


class ReadyCheck:
    """One run over images, one after the other. With `referrers` an image is ready only with all
    that is known to refer to it, which must be at least one signature, SBOM or attestation."""

    def __init__(self, store: Store, config: Config, *, referrers: bool) -> None:
        self._store = store
        self._config = config
        self._isolated = config.isolated
        self._referrers = referrers
        self._look = Look(store)
        self._recent = RecentFiles()
        self._contents: dict[Digest, int] = {}
        """Bytes of each manifest and blob that is stored of the image that is looked at."""

    def check(self, wanted: Wanted) -> Readiness:
        """Blocks: what came of the image a moment ago is on the disk when this returns. Raises
        StoreError."""
        found = Readiness(wanted)
        self._contents.clear()
        try:
            self._check(found)
            if self._referrers and not found.referrers:
                raise _Refused("no signature, SBOM or attestation of it is stored")
        except _Refused as exc:
            found.refusal = str(exc)
        except StoreError as exc:
            if not is_lost(exc):
                raise
            found.refusal = f"{exc.path} cannot be read: {exc.reason}"
        found.size = sum(self._contents.values())
        self._recent.flush(self._files(wanted.reference))
        return found

    def _check(self, found: Readiness) -> None:
        wanted = found.wanted
        top = self._top(wanted.reference)
        found.digest = top.digest
        index = self._index(top)
        if index is None:
            self._add(found, top, None, None)
            (only,) = found.platforms
            if only.platform is not None:
                itself = Index((top._replace(platform=only.platform),))
                found.lacking = lacking_in(itself, wanted.platforms)
                if wanted.strict:
                    _refuse(found.lacking, itself)
            return
        found.lacking = lacking_in(index, wanted.platforms)
        if wanted.refuses(found.lacking):
            _refuse(found.lacking, index)
        everything = platforms_of(child.platform for child in index.children)
        for platform in wanted.platforms or everything or (None,):
            if platform not in found.lacking:
                self._add(found, top, platform, index)

    def _top(self, reference: Reference) -> Descriptor:
        """What the server would answer the reference with."""
        repository = reference.repository
        rule = self._config.repository_refusal(repository)
        if rule is not None:
            raise _Refused(rule)
        refs, manifests = self._store.refs, self._store.manifests
        if reference.digest is None:
            record = refs.find_tag(repository, reference.tag or DEFAULT_TAG)
            if record is None:
                raise _Refused("the tag is not stored")
            top = record.descriptor
            if is_only_named(self._store, repository, top):
                raise _Refused(f"the tag is known, but not its manifest {top.digest}")
        else:
            holder = manifests.find(reference.digest, use=False)
            own = refs.find_manifest(repository, reference.digest)
            if holder is None:
                raise _Refused("the manifest is not stored")
            top = own or holder.descriptor
        if self._isolated and refs.find_manifest(repository, top.digest) is None:
            raise _Refused("stored under another repository only, and repositories are isolated")
        return top

    def _index(self, top: Descriptor) -> Index | None:
        """The index of images that a top manifest is. What is wrong with it says the walk."""
        seen = self._look.manifest(top)
        try:
            manifest = None if seen is None else seen.manifest
        except MalformedManifest:
            return None
        return manifest if isinstance(manifest, Index) and manifest.children else None

    def _add(
        self, found: Readiness, top: Descriptor, platform: Platform | None, index: Index | None
    ) -> None:
        """Add one platform of the index, or the image without one."""
        contents = self._read(found, top, (platform,) if platform else ())
        missing = dict(contents.missing)
        if platform is None:
            # A sparse index is complete, but here all that it lists was asked for.
            missing |= {
                child.digest: Missing(child, "manifest not stored")
                for child in contents.unstored.values()
                if not is_attestation(child)
            }
        if self._referrers:
            missing |= {e.descriptor.digest: e for e in self._missing_referrers(found, contents)}
            listed = () if index is None else index.children
            found.referrers |= {
                child.digest
                for child in listed
                if is_attestation(child) and child.digest in contents.manifests
            }
        if index is None:
            platform = contents.images[0].platform if contents.images else None
        found.platforms.append(ReadyPlatform(platform, tuple(missing.values())))

    def _read(
        self, found: Readiness, top: Descriptor, platforms: tuple[Platform, ...]
    ) -> ImageContents:
        """What is stored for these platforms; what isolation withholds is missing."""
        contents = read_contents(
            self._store,
            found.wanted.reference.repository,
            top,
            platforms,
            referrers=self._referrers,
            isolated=self._isolated,
            look=self._look,
        )
        self._contents |= {each.digest: each.size for each in contents.manifests.values()}
        self._contents |= contents.blobs
        return contents

    def _missing_referrers(self, found: Readiness, contents: ImageContents) -> Iterator[Missing]:
        """What is known to refer to the contents and is not stored. Counts what is stored."""
        refs, repository = self._store.refs, found.wanted.reference.repository
        found.referrers |= contents.referrers.keys()
        for each in contents.unstored_attestations:
            yield Missing(each, "attestation not stored")
        for subject in list(contents.manifests):
            for referrer in refs.referrers(repository, subject):
                if referrer.digest not in contents.manifests.keys() | contents.unstored.keys():
                    yield Missing(referrer, "referrer not stored")
            listing = referrers_tag(subject)
            for tag in (listing, *signature_tags(subject)):
                record = refs.find_tag(repository, tag)
                if record is not None:
                    tagged = self._read(found, record.descriptor, ())
                    yield from tagged.missing.values()
                    for each in tagged.unstored.values():
                        yield Missing(each, "referrer not stored")
                    if tag != listing:
                        found.referrers.add(record.descriptor.digest)

    def _files(self, reference: Reference) -> Iterator[Path]:
        """All files that may have to do with the image, of which some do not exist."""
        records = self._store.refs.folder(reference.repository)
        for digest in self._contents:
            yield self._store.blobs.path(digest)
            yield records / "_manifests" / str(digest)
            for folder in self._store.manifests.folders:
                yield folder / file_name(digest)
        if reference.digest is None:
            yield records / "_tags" / (reference.tag or DEFAULT_TAG)


def _refuse(lacking: tuple[Platform, ...], index: Index) -> None:
    """In the words of a load that fails for the same reason."""
    if lacking:
        has = ", ".join(map(str, platforms_of(child.platform for child in index.children)))
        raise _Refused(f"lacks {', '.join(map(str, lacking))}; it has {has or 'none'}")
