"""Tar archives are listed as the standard library lists them, and corrupt ones are refused in one sentence."""

import contextlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.sources.tar import BLOCK, MAX_EXTENSION, Member, list_members

GIB = 1 << 30
NAMES = (
    "n01440764_1.JPEG",
    "train/n01440764/b.JPEG",
    "x" * 100,
    "d" * 120 + "/" + "e" * 90,
    "Grüße/日本.JPEG",
    "long/" + "y" * 300,
    "spaces and\nlines.JPEG",
)


def listed(data: bytes) -> list[Member]:
    return list_members(lambda size, at: data[at : at + size], 0, len(data), "x.tar")


def entry(name: str, data: bytes = b"", format: int = tarfile.GNU_FORMAT, **fields) -> bytes:
    """Header and padded data of one member; `fields` are those of tarfile.TarInfo, a false size among them."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(format, errors="surrogateescape") + data + bytes(-len(data) % BLOCK)


def signed(header: bytearray) -> bytes:
    """The header with its checksum corrected."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:BLOCK])
    return bytes(header)


END = bytes(2 * BLOCK)
TYPES = (tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
ANY = settings(max_examples=60, derandomize=True, deadline=None)
AT = st.integers(0, 1 << 16)
# A part of a path: no slash, no zero byte, not hidden.
PARTS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=120)
PATHS = st.lists(PARTS.filter(lambda part: not part.startswith(".")), min_size=1, max_size=4).map("/".join)


@st.composite
def archives(draw) -> bytes:
    """An archive with any combination of members that tarfile writes."""
    format, out = draw(st.sampled_from(FORMATS)), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for _ in range(draw(st.integers(0, 6))):
            info = tarfile.TarInfo(draw(PATHS))
            info.type = draw(st.sampled_from(TYPES))
            info.linkname = draw(PATHS) if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = draw(st.integers(0, 1500)) if info.type == tarfile.REGTYPE else 0
            info.mtime = draw(st.sampled_from([0, 1, 1.5]) if format == tarfile.PAX_FORMAT else st.just(1))
            with contextlib.suppress(ValueError):  # ustar holds no longer names
                tar.addfile(info, io.BytesIO(b"x" * info.size))
    return out.getvalue()


@ANY
@given(archives())
def test_members_equal_those_of_the_standard_library(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = [info for info in tar if not info.isdir()]
    expected = [(info.name, info.offset_data, info.size if info.isreg() else 0, info.isreg()) for info in found]
    assert [(member.name, member.offset, member.size, not member.odd) for member in listed(data)] == expected


@ANY
@given(archives(), st.lists(st.tuples(AT, st.binary(min_size=1, max_size=20)), max_size=3), AT)
def test_a_corrupt_archive_is_listed_within_its_bounds_or_refused(data, changes, cut):
    """Bytes overwritten at random, and the end cut off, never lead to another exception or out of the archive."""
    changed = bytearray(data)
    for at, new in changes:
        changed[at % len(data) : at % len(data) + len(new)] = new
    changed = bytes(changed[: cut % (len(data) + 1) or None])
    with contextlib.suppress(UserError):
        assert all(BLOCK <= member.offset <= member.offset + member.size <= len(changed) for member in listed(changed))


@pytest.mark.parametrize("format", FORMATS)
def test_long_and_foreign_names_are_listed(format):
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or len(name) < 250]  # ustar holds no longer ones
    assert [member.name for member in listed(b"".join(entry(name, format=format) for name in names) + END)] == names


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_more_than_8_gib(format):
    header = entry("big", format=format, size=9 * GIB)
    after = len(header) + 9 * GIB
    last = entry("last", b"x") + END

    def read(size: int, at: int) -> bytes:
        return last[at - after :][:size] if at >= after else header[at : at + size]

    found = list_members(read, 0, after + len(last), "x.tar")
    assert found == [Member("big", len(header), 9 * GIB), Member("last", after + BLOCK, 1)]


def test_headers_of_old_tars():
    """V7 tar of 1979 wrote no magic number, and some tars summed headers as signed bytes."""
    v7 = bytearray(entry("old.JPEG", b"abc"))
    v7[156:BLOCK] = bytes(BLOCK - 156)
    sun = bytearray(entry("gr\udcfc.JPEG", b"abc"))
    unsigned = int(bytes(sun[148:154]), 8)
    sun[148:156] = b"%06o\0 " % (unsigned - 256)
    assert [member.name for member in listed(signed(v7) + bytes(sun) + END)] == ["old.JPEG", "gr\udcfc.JPEG"]


def test_an_archive_without_an_end_mark_ends_with_its_last_member():
    assert listed(entry("a", b"x")) == [Member("a", BLOCK, 1)]
    assert listed(entry("a", b"x" * BLOCK) + END + b"ignored") == [Member("a", BLOCK, BLOCK)]
    assert listed(END) == []


@pytest.mark.parametrize("padding", [3 * BLOCK, 10240, 1 << 20])
def test_archives_joined_by_cat_are_all_read(padding):
    first = entry("a/1.jpg", b"one").ljust(padding, b"\0")
    joined = first + entry("b/2.jpg", b"two") + bytes(10240)
    assert [(member.name, joined[member.offset :][: member.size]) for member in listed(joined)] == [
        ("a/1.jpg", b"one"),
        ("b/2.jpg", b"two"),
    ]
    assert [member.name for member in listed(first + b"what is no archive")] == ["a/1.jpg"]
    with pytest.raises(UserError, match="corrupt at byte"):
        listed(first + entry("b/2.jpg").replace(b"b/2", b"b/3"))


def test_hidden_files_are_left_out_and_paths_are_normalized():
    data = entry("./a/._x.JPEG", b"x") + entry(".DS_Store") + entry("./a/x.JPEG", b"x") + entry("/etc//./y", b"x") + END
    assert [(member.name, member.odd) for member in listed(data)] == [("a/x.JPEG", ""), ("etc/y", "")]


@pytest.mark.parametrize(
    ("member", "name", "odd"),
    [
        (entry("l", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "l", "a symbolic link"),
        (entry("l", type=tarfile.LNKTYPE, linkname="../x"), "l", "a hard link to no earlier member"),
        (entry("d", type=tarfile.CHRTYPE), "d", "a device"),
        (entry("d", type=tarfile.BLKTYPE), "d", "a device"),
        (entry("p", type=tarfile.FIFOTYPE), "p", "a named pipe"),
        (entry("../../etc/passwd", b"x"), "../../etc/passwd", "a path that leaves the archive"),
        (entry("a/../../b", b"x"), "a/../../b", "a path that leaves the archive"),
        (entry("s", b"x" * 600, type=tarfile.GNUTYPE_SPARSE), "s", "a sparse file"),
        (
            entry("s", b"x", tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "real"}),
            "real",
            "a sparse file",
        ),
        (entry("m", b"x", type=b"M"), "m", "an entry of type b'M'"),
    ],
)
def test_members_that_are_not_regular_files_are_named_and_the_next_is_found(member, name, odd):
    found = listed(member + entry("next", b"abc") + END)
    assert [(member.name, member.odd) for member in found] == [(name, odd), ("next", "")]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("first", "link", "target"),
    [
        ("a/1.JPEG", "b/2.JPEG", "a/1.JPEG"),
        ("./a/1.JPEG", "a/2.JPEG", "a/1.JPEG"),  # GNU tar leaves ./ out of targets with --transform
        ("a/1.JPEG", "./a/2.JPEG", "./a/1.JPEG"),
        ("d" * 90 + "/" + "e" * 90, "d" * 90 + "/" + "f" * 90, "d" * 90 + "/" + "e" * 90),
        ("a/.hidden.JPEG", "a/2.JPEG", "a/.hidden.JPEG"),
    ],
)
def test_a_hard_link_is_the_last_earlier_member_of_that_name(first, link, target, format):
    if format == tarfile.USTAR_FORMAT and len(target) > 100:
        pytest.skip("ustar holds no longer targets")
    links = [entry(name, type=tarfile.LNKTYPE, linkname=to, format=format) for name, to in ((link, target), ("again", link))]
    found = listed(entry(first, b"old") + entry(first, b"new!", format=format) + b"".join(links) + entry(first, b"late") + END)
    place = len(entry(first, b"old")) + len(entry(first, b"new!", format=format)) - BLOCK
    assert [(name, at, size, odd) for name, at, size, odd, _ in found if name in (link.removeprefix("./"), "again")] == [
        (link.removeprefix("./"), place, 4, ""),
        ("again", place, 4, ""),
    ]


def test_small_contents_are_read_with_their_headers():
    reads = []

    def read(size: int, at: int) -> bytes:
        reads.append(at)
        return data[at : at + size]

    entries = [entry(f"{key}.{suffix}", content) for key in range(9) for suffix, content in (("jpg", bytes(9999)), ("cls", b"7"))]
    data = b"".join([*entries, entry("long.json", b"x" * 5000), entry("huge.json", b"x" * 100_000)]) + END
    found = list_members(read, 0, len(data), "x.tar", (".cls", ".json"))
    assert [member.content for member in found] == [b"", b"7"] * 9 + [b"x" * 5000, b""]
    assert len(reads) == 9 + 1 + 2 + 1 + 1  # a pair each, the first image's header, the long content, two headers, the end


def test_a_sparse_map_of_many_blocks_is_skipped():
    header = bytearray(entry("s", type=tarfile.GNUTYPE_SPARSE, size=BLOCK))
    header[482] = 1
    more = bytearray(BLOCK)
    more[504] = 1
    data = signed(header) + bytes(more) + bytes(BLOCK) + b"x" * BLOCK + entry("next", b"abc") + END
    assert [member.name for member in listed(data)] == ["s", "next"]
    endless = signed(header) + bytes(more) * 50
    with pytest.raises(UserError, match="truncated"):
        listed(endless)


def test_a_thousand_headers_that_announce_headers_end():
    """Each announces a name for the next. The standard library recurses here until Python gives up."""
    data = entry("././@LongLink", b"name\0", type=tarfile.GNUTYPE_LONGNAME) * 2000 + entry("short", b"x") + END
    assert [member.name for member in listed(data)] == ["name"]


@pytest.mark.parametrize(
    "records",
    [b"5\n", b"0 path=x\n", b"-7 path=x\n", b"99999999 path=x\n", b"9 size=-5\n", b"12 size=1e99\n", b"\xff\xfe", b"7 path\n"],
)
def test_corrupt_pax_records_are_ignored(records):
    """A negative size makes some versions of the standard library loop forever (CVE-2025-8194)."""
    found = listed(entry("x", records, type=tarfile.XHDTYPE) + entry("name", b"abc") + entry("next") + END)
    assert [(member.name, member.size) for member in found] == [("name", 3), ("next", 0)]


def test_an_absurd_size_in_a_pax_record_means_a_truncated_archive():
    record = b"27 size=99999999999999999\n"
    with pytest.raises(UserError, match="x.tar: truncated, because its member at byte 1536 exceeds its end; download it again"):
        listed(entry("x", b"%d%s" % (len(record), record[2:]), type=tarfile.XHDTYPE) + entry("name", b"abc") + END)


@pytest.mark.parametrize("cut", [1, 300, BLOCK + 1, BLOCK + 600])
def test_a_truncated_archive_is_refused(cut):
    data = entry("first", b"x" * 10) + entry("second", b"x" * 700)
    with pytest.raises(UserError, match="x.tar: truncated"):
        listed(data[: 2 * BLOCK + cut])


def test_a_corrupt_header_is_not_the_end():
    """The standard library takes it for the end of the archive and silently loses the images after it."""
    data = bytearray(entry("first", b"x") + entry("second", b"x") + entry("third", b"x") + END)
    data[2 * BLOCK + 5] ^= 1
    with pytest.raises(UserError, match="x.tar: corrupt at byte 1024, where a member's header should be"):
        listed(bytes(data))
    data[2 * BLOCK : 2 * BLOCK + 124] = bytes(124)
    with pytest.raises(UserError, match="corrupt at byte 1024"):
        listed(bytes(data))


@pytest.mark.parametrize("field", [b"-0000000001\0", b"\xff" * 12, b"12345678 9x\0", b"\x81" + bytes(11)])
def test_an_invalid_size_is_refused(field):
    header = bytearray(entry("x"))
    header[124:136] = field
    with pytest.raises(UserError, match="x.tar: not a tar archive"):
        listed(signed(header) + END)


def test_headers_of_gigabytes_are_not_read():
    reads = []

    def read(size: int, at: int) -> bytes:
        reads.append(size)
        return header[at : at + size]

    header = entry("x", type=tarfile.XHDTYPE, size=100 * GIB)
    with pytest.raises(UserError, match="a header of 107374182400 bytes at byte 512"):
        list_members(read, 0, 200 * GIB, "x.tar")
    assert max(reads) <= MAX_EXTENSION


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1f\x8b\x08" + bytes(600), "x.tar: compressed .gzip., so its images cannot be read in place"),
        (b"BZh9" + bytes(600), "compressed .bzip2."),
        (b"\xfd7zXZ\0" + bytes(600), "compressed .xz."),
        (b"<html>not found</html>" + bytes(600), "x.tar: not a tar archive; download it again"),
        (b"short", "truncated"),
        (b"", "the archive is empty"),
    ],
)
def test_other_files_are_refused(data, message):
    with pytest.raises(UserError, match=message):
        listed(data)
