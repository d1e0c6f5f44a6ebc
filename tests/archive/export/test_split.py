"""Splitting an archive into volumes: the size that is named is enough, and too many are refused."""

from __future__ import annotations

import pytest

from ociproxy.archive.export.content import Content
from ociproxy.archive.export.split import split
from ociproxy.errors import ConfigError, VolumeTooSmall
from ociproxy.oci.digest import Digest


@pytest.mark.parametrize("size", [985_000, 999_500, 1_003_000])
@pytest.mark.parametrize(("count", "limit"), [(79, 100), (79, 600_000), (600, 100)])
def test_the_size_that_is_named_is_enough(size: int, count: int, limit: int) -> None:
    """Also where it takes a digit more than the one that was given, or makes too many volumes."""
    contents = [Content(Digest.of(b"%d" % n), size, 4) for n in range(count)]
    with pytest.raises(VolumeTooSmall) as caught:
        split([], contents, limit, set_id=Digest.of(b"set"))
    parts = split([], contents, caught.value.needed, set_id=Digest.of(b"set"))
    assert [each for part in parts for each in part.contents] == contents


def test_more_volumes_than_can_be_handled_are_refused() -> None:
    contents = [Content(Digest.of(b"%d" % n), 1_000_000, 4) for n in range(600)]
    with pytest.raises(ConfigError, match="makes 600 volumes, more than 500"):
        split([], contents, 1_200_000, set_id=Digest.of(b"set"))
