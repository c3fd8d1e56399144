"""Shards: TFRecord files of tf.train.Example, each with DALI's index beside it.

File format: https://www.tensorflow.org/tutorials/load_data/tfrecord (framing and masked CRC-32C) and
tensorflow/core/example/{example,feature}.proto (payload); byte for byte in docs/format.md.
"""

import contextlib
import functools
import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import atomic_file, write_atomically

# A row of SPLIT.index.npy: where the JPEG bytes of a record lie (not its TFRecord frame), and their CRC-32C.
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("crc32c", "<u4"), ("label", "<i4")])
HEADER = struct.Struct("<QI")  # payload length, masked CRC-32C of those 8 bytes
FOOTER = struct.Struct("<I")  # masked CRC-32C of the payload
NO_LABEL = -1  # of an image whose class is not known, as of a challenge's test images; its class name is empty


class Record(NamedTuple):
    """What one tf.train.Example holds. `label` is 0-based, unlike in TensorFlow's own ImageNet script."""

    jpeg: bytes
    label: int
    class_name: str
    filename: str
    height: int
    width: int


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of read-only `data`, unmasked."""
    return google_crc32c.value(np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data)


def masked(crc: int) -> int:
    """TFRecord's mask: rotate right by 15 bits, add a constant, so that CRCs of CRCs stay sound."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def shard_name(split: str, shard: int, shards: int) -> str:
    return f"{split}-{shard:05d}-of-{shards:05d}.tfrecord"


def index_name(shard: str) -> str:
    """DALI's index of a shard: train-00000-of-00313.tfrecord -> train-00000-of-00313.idx."""
    return shard.removesuffix(".tfrecord") + ".idx"


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _feature(key: str, value: bytes | int) -> bytes:
    """One entry of Features.feature: bytes become a bytes_list (field 1), integers a packed int64_list (field 3)."""
    if isinstance(value, bytes):
        feature = _field(1, _field(1, value))
    else:
        feature = _field(3, _field(1, _varint(value)))
    return _field(1, _field(1, key.encode()) + _field(2, feature))


def encode_example(record: Record) -> bytes:
    """The record as a serialised tf.train.Example; image/encoded comes last, so the JPEG bytes are its tail."""
    common = _common_features(record.height, record.width, record.label, record.class_name)
    filename = _feature("image/filename", os.fsencode(record.filename))
    return _field(1, common + filename + _feature("image/encoded", record.jpeg))


@functools.lru_cache(maxsize=1 << 12)  # images of a class share them: 15 us an image instead of 44
def _common_features(height: int, width: int, label: int, class_name: str) -> bytes:
    return b"".join(
        (
            _feature("image/height", height),
            _feature("image/width", width),
            _feature("image/channels", 3),
            _feature("image/colorspace", b"RGB"),
            _feature("image/format", b"JPEG"),
            _feature("image/class/label", label),
            _feature("image/class/synset", class_name.encode()),
        )
    )


def jpeg_of_example(data: memoryview, length: int, height: int, width: int, label: int, class_name: str) -> memoryview | None:
    """The `length` bytes of JPEG at the end of an example, if all before them is what `encode_example` writes for these values
    and some file name; else None. 5 us where `decode_example`, which says what it is instead, takes 90."""
    common = _common_features(height, width, label, class_name)
    start, tail = _example_prefix(len(data)), _encoded_prefix(length)
    named = len(data) - len(start) - len(common) - len(tail) - length
    head = start + common + _filename_prefix(named)
    if named < 0 or data[: len(head)] != head or data[len(data) - length - len(tail) : len(data) - length] != tail:
        return None
    return data[len(data) - length :]


@functools.lru_cache(maxsize=1 << 12)
def _example_prefix(size: int) -> bytes:
    """Tag and length of Example.features in an example of `size` bytes; nothing where there is none of that size."""
    for payload in range(max(0, size - 11), size):
        prefix = _varint(1 << 3 | 2) + _varint(payload)
        if len(prefix) + payload == size:
            return prefix
    return b""


@functools.lru_cache(maxsize=1 << 12)
def _encoded_prefix(length: int) -> bytes:
    return _feature("image/encoded", bytes(length))[: -length or None]


@functools.lru_cache(maxsize=1 << 12)
def _filename_prefix(size: int) -> bytes:
    """What stands before the name in the feature image/filename that takes `size` bytes with it."""
    for length in range(max(0, size - 64), size):
        feature = _feature("image/filename", bytes(length))
        if len(feature) == size:
            return feature[: -length or None]
    return b""


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The (number, value) pairs of a protobuf message; raises IndexError or ValueError on corrupt bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a varint of more than 64 bits")

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            size = varint()
            if at + size > len(data):
                raise ValueError("a field that runs over the end")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {tag & 7}, which tf.train.Example does not use here")


def decode_example(data: bytes) -> Record:
    """The inverse of `encode_example`; raises ValueError on anything that is not one of our records."""
    found: dict[str, bytes | int] = {}
    try:
        for _, features in _fields(memoryview(data)):
            for _, entry in _fields(features):
                parts = dict(_fields(entry))
                ((kind, values),) = _fields(parts[2])
                ((_, value),) = _fields(values)
                if kind == 3:
                    if not isinstance(value, int):
                        value = dict(_fields(memoryview(b"\x08" + bytes(value))))[1]
                    value -= value >> 63 << 64  # int64: NO_LABEL is negative
                found[bytes(parts[1]).decode()] = value if isinstance(value, int) else bytes(value)
        return Record(
            found["image/encoded"],
            found["image/class/label"],
            found["image/class/synset"].decode(),
            os.fsdecode(found["image/filename"]),
            found["image/height"],
            found["image/width"],
        )
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a record of this format ({error!r})") from error


class ShardWriter:
    """A context manager that writes a shard and DALI's index of it; an exception inside leaves nothing behind.

    At the end both files are whole, synced and have their final names. Afterwards `rows` holds a list of INDEX_DTYPE tuples,
    `sha256` the hex digest of the shard and `bytes_written` its size.
    """

    def __init__(self, path: Path, shard: int):
        self.path = path
        self.shard = shard
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.bytes_written = 0
        self.sha256 = ""
        self._frames: list[str] = []
        self._hash = hashlib.sha256()
        self._stack = contextlib.ExitStack()

    def append(self, record: Record) -> None:
        payload = encode_example(record)
        length = struct.pack("<Q", len(payload))
        start = self.bytes_written
        for piece in (length, FOOTER.pack(masked(crc32c(length))), payload, FOOTER.pack(masked(crc32c(payload)))):
            self._file.write(piece)
            self._hash.update(piece)
            self.bytes_written += len(piece)
        offset = self.bytes_written - FOOTER.size - len(record.jpeg)
        self.rows.append((self.shard, offset, len(record.jpeg), crc32c(record.jpeg), record.label))
        self._frames.append(f"{start} {self.bytes_written - start}\n")

    def __enter__(self) -> "ShardWriter":
        self._file = self._stack.enter_context(atomic_file(self.path))
        self._stack.push(self._write_index)
        return self

    def _write_index(self, kind: type | None, *_: object) -> None:
        if kind is None:
            write_atomically(self.path.with_name(index_name(self.path.name)), "".join(self._frames).encode())
            self.sha256 = self._hash.hexdigest()

    def __exit__(self, *raised) -> None:
        self._stack.__exit__(*raised)


def read_frames(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(offset of the frame, payload) for each record of a shard; raises UserError at the first one that is corrupt.

    Both checksums of a frame are verified before its payload is handed out.
    """
    at = 0
    while at < len(data):
        if at + HEADER.size > len(data):
            raise UserError(f"byte {at}: the file ends inside a record header")
        length, crc = HEADER.unpack_from(data, at)
        if masked(crc32c(bytes(data[at : at + 8]))) != crc:
            raise UserError(f"byte {at}: the checksum of a record's length does not match")
        end = at + HEADER.size + length
        if end + FOOTER.size > len(data):
            raise UserError(f"byte {at}: the file ends inside a record")
        payload = data[at + HEADER.size : end]
        if masked(crc32c(bytes(payload))) != FOOTER.unpack_from(data, end)[0]:
            raise UserError(f"byte {at}: the checksum of a record's data does not match")
        yield at, payload
        at = end + FOOTER.size
