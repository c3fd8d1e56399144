"""Shards: what they hold, byte for byte, and what happens to a corrupt one."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagefeed.dataset.records import (
    INDEX_DTYPE,
    Record,
    ShardWriter,
    crc32c,
    decode_example,
    encode_example,
    encode_feature,
    jpeg_of_example,
    masked,
)
from tests.examples import parse_example
from tests.frames import read_frames

RECORDS = [
    Record(b"\xff\xd8 some bytes \xff\xd9", 0, "n01440764", "train/n01440764/a.JPEG", 256, 256),
    Record(bytes(range(256)) * 200, 999, "cröss wörd", "val/\udcff.JPEG", 256, 400),
]


def slow_crc32c(data: bytes) -> int:
    """CRC-32C bit by bit from its polynomial (RFC 3720, appendix B.4), to check the library by."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def write(path, records=RECORDS):
    with ShardWriter(path, 3) as writer:
        for record in records:
            writer.append(record)
    return writer


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_survives_the_way_through_an_example(record):
    assert decode_example(encode_example(record)) == record


def test_a_shard_is_framed_as_tfrecord_demands(tmp_path):
    """Length, its masked CRC-32C, payload, its masked CRC-32C: computed here from the polynomial."""
    write(tmp_path / "s.tfrecord")
    expected = b""
    for record in RECORDS:
        payload = encode_example(record)
        for piece in (struct.pack("<Q", len(payload)), payload):
            crc = slow_crc32c(piece)
            expected += piece + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
    assert (tmp_path / "s.tfrecord").read_bytes() == expected


def test_known_checksum():
    """RFC 3720, appendix B.4: 32 bytes of zeros."""
    assert crc32c(bytes(32)) == 0x8A9136AA == slow_crc32c(bytes(32))
    assert masked(0x8A9136AA) == (((0x8A9136AA >> 15) | (0x8A9136AA << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


def test_the_index_points_at_the_jpeg_bytes(tmp_path):
    writer = write(tmp_path / "s.tfrecord")
    data = (tmp_path / "s.tfrecord").read_bytes()
    rows = np.array(writer.rows, INDEX_DTYPE)
    for row, record in zip(rows, RECORDS):
        stored = data[row["offset"] : row["offset"] + row["length"]]
        assert (stored, row["label"], row["shard"]) == (record.jpeg, record.label, 3)
        assert row["crc32c"] == slow_crc32c(record.jpeg)
    assert (writer.bytes_written, writer.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_dalis_index_has_offset_and_size_of_every_frame(tmp_path):
    write(tmp_path / "s.tfrecord")
    data = (tmp_path / "s.tfrecord").read_bytes()
    frames = [tuple(map(int, line.split())) for line in (tmp_path / "s.idx").read_text().splitlines()]
    assert [offset for offset, _ in frames] == [at for at, _ in read_frames(memoryview(data))]
    assert sum(size for _, size in frames) == len(data)


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "s.tfrecord", 0) as writer:
        writer.append(RECORDS[0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_any_flipped_bit_of_a_shard_is_noticed(tmp_path):
    write(tmp_path / "s.tfrecord", RECORDS[:1])
    data = bytearray((tmp_path / "s.tfrecord").read_bytes())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="^byte 0: "):
            list(read_frames(memoryview(data)))
        data[bit // 8] ^= 1 << bit % 8
    assert len(list(read_frames(memoryview(data)))) == 1


@pytest.mark.parametrize("length", [1, 11, 20, -1])
def test_a_shortened_shard_is_noticed(tmp_path, length):
    write(tmp_path / "s.tfrecord", RECORDS[:1])
    data = (tmp_path / "s.tfrecord").read_bytes()[:length]
    with pytest.raises(ValueError, match="ends inside a record"):
        list(read_frames(memoryview(data)))


def test_damaged_examples_are_refused_as_such():
    """Every truncation of a payload raises ValueError, whatever it cuts."""
    payload = encode_example(RECORDS[0])
    for end in range(len(payload)):
        with pytest.raises(ValueError):
            decode_example(payload[:end])


def test_an_independent_protobuf_reader_reads_an_example():
    found = parse_example(encode_example(RECORDS[0]))
    assert found["image/encoded"] == [RECORDS[0].jpeg]
    assert found["image/class/label"] == [0]
    assert found["image/class/synset"] == [b"n01440764"]
    assert found["image/filename"] == [b"train/n01440764/a.JPEG"]
    assert [found[f"image/{name}"][0] for name in ("height", "width", "channels")] == [256, 256, 3]
    assert (found["image/format"], found["image/colorspace"]) == ([b"JPEG"], [b"RGB"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("é", ["é".encode()]),
        ("", [b""]),
        (np.int64(-3), [-3]),
        (np.float64(0.5), [0.5]),
        (np.array([1, 2**40]), [1, 2**40]),
        (np.array([0.5, -1]), [0.5, -1]),
        (np.array([], np.int64), []),
    ],
)
def test_a_further_feature_is_read_beside_the_others(value, expected):
    example = encode_example(RECORDS[0], encode_feature("extra", value))
    assert example.endswith(RECORDS[0].jpeg)
    assert parse_example(example) == parse_example(encode_example(RECORDS[0])) | {"extra": expected}


@pytest.mark.parametrize("name", ["", "a", "n01440764/n01440764_10026.JPEG", "x" * 100, "x" * 127, "y" * 128, "z" * 20_000])
@pytest.mark.parametrize("length", [1, 127, 128, 22_000])
def test_the_jpeg_of_an_example_is_found_where_all_else_is_as_it_should(name, length):
    jpeg = bytes(range(256)) * 100
    record = Record(jpeg[:length], 7, "n01440764", name, 256, 256)
    example = memoryview(encode_example(record))
    assert jpeg_of_example(example, length, 256, 256, 7, "n01440764") == record.jpeg
    for wrong in ((length - 1, 256, 256, 7, "n01440764"), (length, 255, 256, 7, "n01440764"), (length, 256, 256, 6, "n01440764")):
        assert jpeg_of_example(example, *wrong) is None
    assert jpeg_of_example(example, length, 256, 256, 7, "n01440765") is None
    changed = bytearray(example)
    for at in range(len(changed) - length):
        changed[at] ^= 4
        found = jpeg_of_example(memoryview(changed), length, 256, 256, 7, "n01440764")
        # The name may be any; nothing else.
        assert found is None or len(decode_example(bytes(changed)).filename)
        changed[at] ^= 4
        if at > 400:
            break


PROPERTY = settings(max_examples=60, derandomize=True, deadline=None)
NAMES = st.binary(max_size=300).filter(lambda name: b"\0" not in name).map(lambda name: name.decode("utf-8", "surrogateescape"))
ANY_RECORD = st.builds(
    Record,
    jpeg=st.binary(min_size=1, max_size=20_000),
    label=st.integers(-1, 2**31 - 1),
    class_name=st.text(max_size=50),
    filename=NAMES,
    height=st.integers(1, 65500),
    width=st.integers(1, 65500),
)


@PROPERTY
@given(record=ANY_RECORD)
def test_any_record_survives_the_way_through_an_example(record):
    example = encode_example(record)
    assert decode_example(example) == record
    jpeg, label, class_name, _, height, width = record
    assert jpeg_of_example(memoryview(example), len(jpeg), height, width, label, class_name) == jpeg


@PROPERTY
@given(records=st.lists(ANY_RECORD, max_size=4), data=st.data())
def test_any_records_are_found_by_the_index_and_any_changed_byte_by_a_checksum(records, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "s.tfrecord"
    rows = np.array(write(path, records).rows, INDEX_DTYPE)
    shard = path.read_bytes()
    for row, record in zip(rows, records, strict=True):
        jpeg = shard[row["offset"] : row["offset"] + row["length"]]
        assert (jpeg, row["crc32c"], row["label"], row["shard"]) == (record.jpeg, crc32c(record.jpeg), record.label, 3)
    frames = [tuple(map(int, line.split())) for line in path.with_suffix(".idx").read_text().splitlines()]
    assert [(at, len(payload) + 16) for at, payload in read_frames(memoryview(shard))] == frames
    if records:
        changed = bytearray(shard)
        changed[data.draw(st.integers(0, len(shard) - 1))] ^= data.draw(st.integers(1, 255))
        with pytest.raises(ValueError, match="^byte "):
            list(read_frames(memoryview(changed)))


@PROPERTY
@given(payload=st.binary(max_size=300), at=st.integers(0, 10_000), change=st.integers(1, 255))
def test_any_bytes_are_decoded_or_refused_as_no_record(payload, at, change):
    changed = bytearray(encode_example(RECORDS[0]))
    changed[at % len(changed)] ^= change
    for data in (payload, bytes(changed)):
        try:
            decode_example(data)
        except ValueError as error:
            assert "\n" not in str(error)
