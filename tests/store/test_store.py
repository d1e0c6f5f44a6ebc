"""Opening a store: its format version, and what a folder that is no store is told. A config."""

from __future__ import annotations

from pathlib import Path

import pytest

from ociproxy.errors import StoreError
from ociproxy.oci.digest import Digest
from ociproxy.store.files import is_sealed
from ociproxy.store.store import Store, open_existing


def test_a_new_store_is_opened_again_and_holds_no_leftovers(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.check_writable()
    store.check_room()
    assert (store.root / "store.json").read_text() == '{"version": 1}\n'
    assert list(open_existing(store.root).staging.root.iterdir()) == []


def test_looking_at_a_folder_makes_no_store_of_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        open_existing(tmp_path / "missing")
    with pytest.raises(StoreError, match=r"has no store\.json"):
        open_existing(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [('{"version": 2}', "format version 2"), ("{}", "not a format version"), ("", "not a format")],
)
def test_a_store_of_another_format_is_left_alone(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(StoreError, match=reason):
        Store(tmp_path)
    assert (tmp_path / "store.json").read_text() == text


def test_a_config_is_committed_as_any_blob_is(tmp_path: Path) -> None:
    store, raw = Store(tmp_path), b"{}"
    digest = Digest.of(raw)
    store.commit_config(digest, raw)
    path = store.blobs.path(digest)
    assert path.read_bytes() == raw
    assert is_sealed(path.stat(), path.name)
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(store.staging.root.iterdir()) == []
