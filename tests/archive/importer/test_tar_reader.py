"""Reading a tar that may be anything: what is whole comes out, what is hostile is refused."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ociproxy.archive.importer.decompress import ArchiveStream
from ociproxy.archive.importer.tar_reader import members
from ociproxy.errors import LayoutDamaged, LayoutInvalid
from tests.layouts import tar_bytes

FILES = [("a", b"first"), ("dir/b", bytes(1000)), ("c" * 150, b""), ("d", b"x" * 512)]


class Bytes(io.FileIO):
    """Bytes as an unbuffered file."""

    def __init__(self, data: bytes) -> None:
        descriptor = os.memfd_create("test")
        super().__init__(descriptor, "r+b")
        self.write(data)
        self.seek(0)


def read(data: bytes, *, max_size: int = 2**40) -> list[tuple[str, bytes | str]]:
    """Every member read to its end; links with their targets."""
    with Bytes(data) as file:
        return [
            (member.name, member.link or member.read(2**30))
            for member in members(ArchiveStream(file, "x.tar", max_size=max_size))
        ]


def skim(data: bytes) -> list[str]:
    """Every name, nothing read."""
    with Bytes(data) as file:
        return [member.name for member in members(ArchiveStream(file, "x.tar"))]


def entry(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", size: int = 0) -> bytes:
    """A header by itself, in GNU format."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: Iterable[tuple[str, str]]) -> bytes:
    body = b""
    for key, value in records:
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        body += str(length).encode() + rest
    return entry("pax", tarfile.XHDTYPE, size=len(body)) + padded(body)


END = bytes(1024)


@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"]
)
def test_members_come_in_order(pack: object) -> None:
    data = pack(tar_bytes(FILES))  # type: ignore[operator]
    assert read(data) == FILES
    assert skim(data) == [name for name, _ in FILES]


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_in_every_format(style: int) -> None:
    name = "/".join(["folder" * 5] * 5) + "/file"
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=style) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.mtime = 3, 1.5  # pax writes fractions
        if style != tarfile.PAX_FORMAT:
            info.mtime = 1
        tar.addfile(info, io.BytesIO(b"abc"))
    assert read(made.getvalue()) == [(name, b"abc")]


def test_a_pipe_is_read_as_a_file_is() -> None:
    reading, writing = os.pipe()
    data = tar_bytes(FILES)

    def write() -> None:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data)

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reading, "rb", buffering=0) as file:
        assert [m.name for m in members(ArchiveStream(file, "-"))] == [name for name, _ in FILES]
    thread.join()


def test_dot_slash_and_folders_are_left_out() -> None:
    data = entry("./", tarfile.DIRTYPE) + entry("./a/", tarfile.DIRTYPE) + entry("./a/b") + END
    assert read(data) == [("a/b", b"")]


def test_links_are_handed_on() -> None:
    data = entry("a/x", tarfile.SYMTYPE, link="../b") + entry("y", tarfile.LNKTYPE, link="b") + END
    assert read(data) == [("a/x", "../b"), ("y", "/b")]


@pytest.mark.parametrize("kind", [b"3", b"4", b"6", b"S", b"V", b"M", b"Z"])
def test_devices_and_other_oddities_are_refused(kind: bytes) -> None:
    with pytest.raises(LayoutInvalid, match="nothing that belongs"):
        read(entry("odd", kind) + END)


@pytest.mark.parametrize("name", ["/etc/passwd", "..", "a/../../b", "../x", "a/.."])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_names_that_lead_out_are_refused(name: str, kind: bytes) -> None:
    with pytest.raises(LayoutInvalid, match="leads out"):
        read(entry(name, kind, link="x") + END)


def test_a_name_in_a_pax_header_is_checked_too() -> None:
    with pytest.raises(LayoutInvalid, match="leads out"):
        read(pax([("path", "/etc/passwd")]) + entry("good") + END)


def test_a_pax_size_is_believed_only_where_the_header_has_none() -> None:
    assert read(pax([("size", "3")]) + entry("a") + padded(b"abc") + END) == [("a", b"abc")]
    with pytest.raises(LayoutInvalid, match="two sizes"):
        read(pax([("size", "1024")]) + entry("a", size=3) + padded(b"abc") + END)
    with pytest.raises(LayoutInvalid, match="two sizes"):
        read(pax([("size", "-5")]) + entry("a") + END)


@pytest.mark.parametrize("key", ["GNU.sparse.major", "GNU.sparse.map"])
def test_sparse_members_are_refused(key: str) -> None:
    with pytest.raises(LayoutInvalid, match="sparse"):
        read(pax([(key, "1")]) + entry("a") + END)


def test_a_size_for_all_members_is_refused() -> None:
    head = bytearray(pax([("size", "3")]))
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XGLTYPE, 9
    head[:512] = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(LayoutInvalid, match="all its members"):
        read(bytes(head) + entry("a") + END)


@pytest.mark.parametrize("size", [-1, -(2**40)])
def test_a_negative_size_is_refused(size: int) -> None:
    with pytest.raises(LayoutInvalid, match="negative"):
        read(entry("a", size=size) + END)


def test_a_huge_header_is_refused() -> None:
    with pytest.raises(LayoutInvalid, match="header of"):
        read(entry("x", tarfile.GNUTYPE_LONGNAME, size=2**33) + END)


def test_headers_without_end_are_refused() -> None:
    with pytest.raises(LayoutInvalid, match="more than 8 headers"):
        read(pax([("comment", "x")]) * 20 + entry("a") + END)


@pytest.mark.parametrize("body", [b"5 a", b"99 a=b\n", b"x a=b\n", b"0 a=b\n", b"6 a=b ", b"\n"])
def test_a_broken_pax_header_is_refused(body: bytes) -> None:
    data = entry("pax", tarfile.XHDTYPE, size=len(body)) + padded(body) + entry("a") + END
    with pytest.raises(LayoutInvalid, match="pax header"):
        read(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"x" * 5000, gzip.compress(b"hello")],
    ids=["empty", "json", "noise", "gzip"],
)
def test_what_is_no_tar_is_refused(data: bytes) -> None:
    with pytest.raises(LayoutInvalid, match="neither a tar"):
        read(data)


@pytest.mark.parametrize(
    ("head", "name"), [(b"BZh9", "bzip2"), (b"\xfd7zXZ\0\0\0", "xz"), (b"\x04\x22\x4d\x18", "lz4")]
)
def test_another_compression_is_named(head: bytes, name: str) -> None:
    with pytest.raises(LayoutInvalid, match=f"packed with {name}"):
        read(head + bytes(100))


def test_every_cut_is_noticed_and_what_came_before_is_whole() -> None:
    whole = tar_bytes(FILES)
    for cut in range(1, len(whole) - 10240 + 5 * 512, 64):
        with Bytes(whole[:cut]) as file:
            got = []
            with pytest.raises(LayoutInvalid):  # noqa: PT012 what came before counts
                for member in members(ArchiveStream(file, "x.tar")):
                    raw = member.read(2**20)
                    if len(raw) == member.size:
                        got.append((member.name, raw))
            assert got == FILES[: len(got)]
            if read_end(whole) <= cut:
                break


def read_end(data: bytes) -> int:
    """Where the end mark has begun."""
    with Bytes(data) as file:
        stream = ArchiveStream(file, "x")
        list(members(stream))
        return stream.offset


def test_garbage_in_the_middle_is_damage() -> None:
    data = bytearray(tar_bytes(FILES))
    data[1024:1100] = b"\xff" * 76
    with pytest.raises(LayoutDamaged, match="from byte 1024"):
        read(bytes(data))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_damaged_compression_is_damage(pack: object) -> None:
    text = b" ".join(b"%d" % n for n in range(50_000))
    packed = bytearray(pack(tar_bytes([("a", text), *FILES])))  # type: ignore[operator]
    with pytest.raises(LayoutInvalid):
        read(bytes(packed[: len(packed) // 2]))
    packed[len(packed) // 2 :] = b"\xff" * (len(packed) // 2)
    with pytest.raises(LayoutInvalid):
        read(bytes(packed))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_bomb_is_refused_before_it_is_large(pack: object) -> None:
    size = 400 * 1024 * 1024
    bomb = pack(entry("a", size=size) + bytes(size))  # type: ignore[operator]
    with Bytes(bomb) as file:
        stream = ArchiveStream(file, "x.tar")
        with pytest.raises(LayoutInvalid, match="refused as a bomb"):
            list(members(stream))
        assert stream.offset < 300 * 1024 * 1024


def test_a_zstd_window_has_a_limit() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    packer = zstandard.ZstdCompressor(compression_params=parameters)
    made = io.BytesIO()
    with packer.stream_writer(made, closefd=False) as out:
        out.write(tar_bytes(FILES))
    with pytest.raises(LayoutDamaged, match="memory"):
        read(made.getvalue())


def test_the_size_in_all_has_a_limit() -> None:
    with pytest.raises(LayoutInvalid, match="max-size"):
        read(tar_bytes(FILES), max_size=2000)


@given(st.binary(max_size=3000))
def test_no_bytes_make_another_error(data: bytes) -> None:
    with contextlib.suppress(LayoutInvalid):
        read(data)


@given(st.data())
def test_no_flipped_bytes_make_another_error(data: st.DataObject) -> None:
    raw = bytearray(pax([("path", "p"), ("size", "5")]) + tar_bytes(FILES)[:4096])
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(LayoutInvalid):
        read(bytes(raw))


@given(st.text(min_size=1, max_size=200))
def test_any_name_comes_out_as_it_is_or_is_refused(name: str) -> None:
    try:
        raw = tar_bytes([(name, b"x")])
    except (ValueError, UnicodeError):
        return
    try:
        found = read(raw)
    except LayoutInvalid:
        return
    for clean, _ in found:
        assert not clean.startswith("/")
        assert ".." not in Path(clean).parts
