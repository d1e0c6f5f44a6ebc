"""Which images are signatures and the like of others, by their tags.

cosign and registries without the referrers API give what refers to a manifest a tag that has the
digest of its subject. Such an image goes and stays with its subject. What the referrers API lists
is a part of its subject's image already.
Tests: tests/cli/test_prune_signatures.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ociproxy.oci.reference import subject_prefix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ociproxy.oci.reference import Reference, Repository
    from ociproxy.store.pruning.survey import SurveyedImage


def subjects_of(images: Sequence[SurveyedImage]) -> dict[Reference, list[SurveyedImage]]:
    """Of each image with such a tag, the stored images that have its subject. One without any is
    left out: it is an image as any other."""
    signatures: dict[Repository, list[tuple[str, SurveyedImage]]] = {}
    for image in images:
        subject = subject_prefix(image.reference.tag or "")
        if subject is not None:
            # Such a name begins with the digits of the tag, of which a sha512 has not all.
            algorithm, digits = subject
            prefix = "" if algorithm == "sha256" else f"{algorithm}-"
            named = (f"{prefix}{digits}", image)
            signatures.setdefault(image.reference.repository, []).append(named)
    found: dict[Reference, list[SurveyedImage]] = {}
    for image in images:
        for name, signature in signatures.get(image.reference.repository, ()):
            if image is not signature and _has(image, name):
                found.setdefault(signature.reference, []).append(image)
    return found


def _has(image: SurveyedImage, name: str) -> bool:
    needed = image.needs.manifests
    return name in needed or (
        name.startswith("sha512-") and any(each.startswith(name) for each in needed)
    )
