"""The walk over a tarball against Python's `tarfile`, beyond what that writes, and over damage."""

from __future__ import annotations

import gzip
import os
import re
import tarfile
from pathlib import Path

import pytest

from passl.data.tar_members import DIRECTORY, FILE, HARD_LINK, SPARSE, Member, TarError, TarWalk
from tests.data.tarballs import END, header, member, padded, with_checksum, write_tarball

LONG = "x" * 130
NAMES = [
    "a.jpg",
    "folder/b.jpg",
    "./dot/c.jpg",
    "deep/" * 20 + "d.jpg",
    f"long/{LONG}.jpg",
    f"{LONG}/{LONG}/{LONG}.jpg",
    "ünïcode/é.jpg",
    "raw/\udcff\udcfe.jpg",
    "exactly/" + "n" * 92,
    "space s/ .jpg",
]


def members(path: Path, content: bytes) -> list[Member]:
    path.write_bytes(content)
    return list(TarWalk(path))


@pytest.mark.smoke
@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_places_as_tarfile_reads_them(tmp_path, tar_format):
    names = [name for name in NAMES if tar_format != tarfile.USTAR_FORMAT or LONG not in name]
    files = {"folder": None} | {name: bytes([65 + i]) * (i * 200) for i, name in enumerate(names)}
    path = tmp_path / "x.tar"
    write_tarball(path, files, tar_format)
    with tarfile.open(path) as tar:
        expected = [(m.name, FILE if m.isreg() else DIRECTORY, m.offset_data, m.size if m.isreg() else 0) for m in tar]
    walk = TarWalk(path)
    assert [(found[0].rstrip("/"), *found[1:4]) for found in walk] == expected
    assert walk.has_end
    content = path.read_bytes()
    for found in TarWalk(path):
        if found.kind == FILE:
            assert content[found.start : found.start + found.size] == files[found.path]


def test_the_prefix_of_posix_is_read_and_gnu_s_times_in_its_place_are_not(tmp_path):
    block = bytearray(header("a.jpg"))
    assert block[257:263] == b"ustar "
    block[345:357] = b"14716350000\0"
    gnu = with_checksum(block)
    posix = header("p" * 60 + "/" + "q" * 60, tar_format=tarfile.USTAR_FORMAT)
    assert [found.path for found in members(tmp_path / "x.tar", gnu + posix + END)] == [
        "a.jpg",
        "p" * 60 + "/" + "q" * 60,
    ]


def test_global_headers_hold_until_another_and_local_ones_for_one_member(tmp_path):
    def pax(kind: bytes, **records: str) -> bytes:
        data = b"".join(b"%d %s=%s\n" % (len(k) + len(v) + 5, k.encode(), v.encode()) for k, v in records.items())
        return member("pax_header", data, kind)

    content = pax(b"g", comment="0123", path="all.jpg") + member("1.jpg") + pax(b"x", path="two.jpg") + member("2.jpg")
    found = members(tmp_path / "x.tar", content + member("3.jpg") + END)
    assert [each.path for each in found] == ["all.jpg", "two.jpg", "all.jpg"]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sizes_and_offsets_beyond_8_gib(tmp_path, tar_format):
    """GNU writes such sizes in base 256, POSIX in an extended header. The file on disk is a hole."""
    path, size = tmp_path / "x.tar", (9 << 30) + 7
    with path.open("wb") as file:
        file.write(header("huge.bin", size, tar_format=tar_format))
        start = file.tell()
        file.seek(start + size + -size % 512)
        file.write(member("behind.jpg", b"picture") + END)
    huge, behind = TarWalk(path)
    assert huge == ("huge.bin", FILE, start, size, "")
    assert behind.start > 9 << 30
    with path.open("rb") as file:
        file.seek(behind.start)
        assert file.read(behind.size) == b"picture"


def test_what_is_no_file_is_named_and_takes_no_bytes(tmp_path):
    content = (
        header("folder/", kind=b"5")
        + header("old folder/", kind=b"\0")
        + header("hard.jpg", kind=b"1", linkname="a.jpg")
        + header("soft.jpg", kind=b"2", linkname="a.jpg")
        + header("tty", kind=b"3")
        + header("pipe", kind=b"6")
        + member("volume", kind=b"V")
        + member("a.jpg", b"bytes", b"7")
        + END
    )
    found = members(tmp_path / "x.tar", content)
    kinds = [DIRECTORY, DIRECTORY, HARD_LINK, "symbolic link", "character device", "fifo", "volume label", FILE]
    assert [each.kind for each in found] == kinds
    assert found[2].link == "a.jpg"


def test_sparse_files_of_both_formats_and_their_maps_are_passed(tmp_path):
    block = bytearray(header("gnu", 512, b"S"))
    block[482] = 1
    more = bytearray(512)
    more[504] = 1
    gnu = with_checksum(block) + bytes(more) + bytes(512) + padded(b"data")
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n24 GNU.sparse.name=real\n"
    pax = member("PaxHeaders/x", records, b"x") + member("GNUSparseFile.0/real", b"1\n0\n4\ndata")
    found = members(tmp_path / "x.tar", gnu + pax + member("a.jpg", b"picture") + END)
    assert [(each.path, each.kind) for each in found] == [("gnu", SPARSE), ("real", SPARSE), ("a.jpg", FILE)]


# --- damage ---------------------------------------------------------------------------------------------------------


WHOLE = member("a.jpg", b"1" * 600) + member("b.jpg", b"2" * 600) + END
FIRST = len(member("a.jpg", b"1" * 600))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            FIRST + 512 + 599,
            r"cut off: at offset 1536, behind 'a.jpg': 'b.jpg' needs 600 bytes at 2048, and the file ends",
        ),
        (FIRST + 100, r"cut off: at offset 1536, behind 'a.jpg': a header goes on, and the file ends at 1636"),
        (700, r"cut off: at offset 0: 'a.jpg' needs 600 bytes at 512"),
    ],
)
def test_a_cut_is_named_with_its_member_and_offset(tmp_path, size, message):
    with pytest.raises(TarError, match=message):
        members(tmp_path / "x.tar", WHOLE[:size])


def test_a_cut_inside_a_long_name(tmp_path):
    with pytest.raises(TarError, match="cut off: at offset 0: an extended header needs 135 bytes at 512"):
        members(tmp_path / "x.tar", header(f"{LONG}.jpg")[:600])


def test_a_missing_end_is_noticed_and_padding_may_lack(tmp_path):
    path = tmp_path / "x.tar"
    for content in (WHOLE[: 2 * FIRST], WHOLE[: FIRST + 512 + 600]):
        path.write_bytes(content)
        walk = TarWalk(path)
        assert len(list(walk)) == 2
        assert not walk.has_end


def test_a_damaged_header_is_an_error_not_the_end(tmp_path):
    damaged = bytearray(WHOLE)
    damaged[FIRST + 3] ^= 1
    with pytest.raises(TarError, match="damaged: no header at offset 1536, behind 'a.jpg'"):
        members(tmp_path / "x.tar", bytes(damaged))


def test_a_size_that_is_no_number(tmp_path):
    block = bytearray(header("a.jpg"))
    block[124:136] = b"99999999999\0"
    with pytest.raises(TarError, match="damaged: 'a.jpg' at offset 0 has a size that is no number"):
        members(tmp_path / "x.tar", with_checksum(block) + END)


@pytest.mark.parametrize("records", [b"5 a=\nrubbish", b"99 path=a\n", b"x path=a\n", b"0 path=a\n"])
def test_extended_headers_that_make_no_sense(tmp_path, records):
    with pytest.raises(TarError, match="damaged: the extended header at offset 0: "):
        members(tmp_path / "x.tar", member("x", records, b"x") + END)


def test_an_extended_header_may_not_fill_the_memory(tmp_path):
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(header("x", 1 << 33, b"L"))
        file.truncate(1 << 34)
    with pytest.raises(TarError, match="damaged: an extended header of 8589934592 bytes at offset 0"):
        list(TarWalk(path))


@pytest.mark.parametrize("zeros", [512, 1024, 10240])
def test_tarballs_joined_with_cat(tmp_path, zeros):
    first = member("a.jpg", b"1" * 600)
    content = first + bytes(zeros) + member("b.jpg", b"2") + END
    message = (
        f"the archive ends at offset {len(first)}, and another one follows at {len(first) + zeros}: .*--ignore_zeros"
    )
    with pytest.raises(TarError, match=message):
        members(tmp_path / "x.tar", content)
    assert [found.path for found in TarWalk(tmp_path / "x.tar", ignore_zeros=True)] == ["a.jpg", "b.jpg"]


def test_rubbish_behind_the_end_is_none_of_the_archive(tmp_path):
    assert len(members(tmp_path / "x.tar", WHOLE + b"signature" * 100)) == 2


def test_what_is_no_tarball_says_what_to_type(tmp_path):
    path = tmp_path / "x y.tar.gz"
    with pytest.raises(TarError, match=re.escape("is compressed (gzip); ") + r".*: gunzip --keep '.*/x y.tar.gz'"):
        members(path, gzip.compress(WHOLE))
    for magic, command in ((b"BZh9", "bunzip2"), (b"\xfd7zXZ\0", "unxz"), (b"\x28\xb5\x2f\xfd", "unzstd")):
        with pytest.raises(TarError, match=command):
            members(path, magic + bytes(1000))
    with pytest.raises(TarError, match="is a zip file: unpack it, and pack it again with tar -cf"):
        members(path, b"PK\x03\x04" + bytes(1000))
    with pytest.raises(TarError, match=r"x y.tar.gz is not a tarball$"):
        members(path, b"\x89PNG" + bytes(1000))
    with pytest.raises(TarError, match=r"is empty \(0 bytes\)"):
        members(path, b"")
    with pytest.raises(IsADirectoryError, match="is a folder, not a tarball"):
        TarWalk(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.tar"):
        TarWalk(tmp_path / "missing.tar")


def test_volumes_are_refused(tmp_path):
    with pytest.raises(TarError, match="'a.jpg' at offset 0 continues a file of another volume"):
        members(tmp_path / "x.tar", member("a.jpg", b"", b"M") + END)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(TarError, match="x.tar is a pipe or a device; .* must be a file"):
        TarWalk(tmp_path / "x.tar")
