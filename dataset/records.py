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
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from imagefeed.dataset.files import atomic_file, write_atomically

# A row of SPLIT.index.npy: where the JPEG bytes of a record lie (not its TFRecord frame), their CRC-32C, and the label.
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("crc32c", "<u4"), ("label", "<i4")])
HEADER = struct.Struct("<QI")  # payload length, masked CRC-32C of those 8 bytes
FOOTER = struct.Struct("<I")  # masked CRC-32C of the payload
NO_LABEL = -1  # of an image of unknown class, such as a challenge's test image; its class name is empty


class Record(NamedTuple):
    """The content of a tf.train.Example. `label` is 0-based, unlike in TensorFlow's own ImageNet script."""

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


def _tag(number: int, size: int) -> bytes:
    """What stands before the `size` bytes of a length-delimited protobuf field."""
    return bytes((number << 3 | 2,)) + _varint(size)


def _field(number: int, payload: bytes) -> bytes:
    return _tag(number, len(payload)) + payload


def _integer(key: str, value: int) -> bytes:
    """An entry of Features.feature with a packed int64_list."""
    return _field(1, _field(1, key.encode()) + _field(2, _field(3, _field(1, _varint(value)))))


@functools.lru_cache(maxsize=1 << 12)
def _bytes_tag(key: str, size: int) -> bytes:
    """What stands before the `size` bytes of an entry of Features.feature with a bytes_list."""
    value = _tag(1, size)
    values = _tag(1, len(value) + size) + value
    entry = _field(1, key.encode()) + _tag(2, len(values) + size) + values
    return _tag(1, len(entry) + size) + entry


@functools.lru_cache(maxsize=1 << 12)  # the images of a class share them: 15 us an image instead of 44
def _common_features(height: int, width: int, label: int, class_name: str) -> bytes:
    return b"".join(
        (
            _integer("image/height", height),
            _integer("image/width", width),
            _integer("image/channels", 3),
            _bytes_tag("image/colorspace", 3) + b"RGB",
            _bytes_tag("image/format", 4) + b"JPEG",
            _integer("image/class/label", label),
            _bytes_tag("image/class/synset", len(class_name.encode())) + class_name.encode(),
        )
    )


def encode_feature(key: str, value: "str | np.ndarray | np.generic") -> bytes:
    """An entry of Features.feature with the text, or with whole numbers as an int64_list and others as a float_list."""
    if isinstance(value, str):
        return _bytes_tag(key, len(value.encode())) + value.encode()
    whole = value.dtype.kind == "i"
    packed = b"".join(map(_varint, value.reshape(-1).tolist())) if whole else value.astype("<f4").tobytes()
    return _field(1, _field(1, key.encode()) + _field(2, _field(3 if whole else 2, _field(1, packed))))


def _head(length: int, label: int, class_name: str, filename: bytes, height: int, width: int, more: bytes) -> bytes:
    """Everything before the `length` bytes of JPEG that end an example."""
    features = (
        _common_features(height, width, label, class_name)
        + _bytes_tag("image/filename", len(filename))
        + filename
        + more
        + _bytes_tag("image/encoded", length)
    )
    return _tag(1, len(features) + length) + features


def encode_example(record: Record, more: bytes = b"") -> bytes:
    """The record as a serialized tf.train.Example, with `more` features. image/encoded comes last, so the JPEG is its tail."""
    jpeg, label, class_name, filename, height, width = record
    return _head(len(jpeg), label, class_name, os.fsencode(filename), height, width, more) + jpeg


def jpeg_of_example(data: memoryview, length: int, height: int, width: int, label: int, class_name: str) -> memoryview | None:
    """The `length` bytes of JPEG that end an example, or None unless everything before them is what `encode_example` writes for
    these values and any file name. Takes 4 us; `decode_example`, which tells what is wrong, takes 90."""
    common, tail = _common_features(height, width, label, class_name), _bytes_tag("image/encoded", length)
    start = 2  # where Example.features begins
    while start < min(len(data), 8) and data[start - 1] > 0x7F:
        start += 1
    end = len(data) - length - len(tail)
    filename_tag = _filename_tag(end - start - len(common))
    head = _tag(1, len(data) - start) + common + filename_tag
    if not filename_tag or data[: len(head)] != head or data[end : end + len(tail)] != tail:
        return None
    return data[len(data) - length :]


def filename_before(head: bytes, length: int) -> str:
    """The file name of an example, from all that stands before its `length` bytes of JPEG; raises ValueError if that is not what
    `encode_example` writes. Takes 3 us."""
    key, end = b"image/filename", len(head) - len(_bytes_tag("image/encoded", length))
    begin = head.find(key)
    while begin >= 0:  # a class may be named so
        begin += len(key)
        for size in range(max(end - begin - 12, 0), end - begin):  # the tags between the key and the name have at most 12 bytes
            if head.endswith(_bytes_tag("image/filename", size), 0, end - size):
                return os.fsdecode(head[end - size : end])
        begin = head.find(key, begin)
    raise ValueError("not a record of this format")


@functools.lru_cache(maxsize=1 << 12)
def _filename_tag(size: int) -> bytes:
    """What stands before the name if that makes an entry of `size` bytes."""
    tags = ((name, _bytes_tag("image/filename", name)) for name in range(max(0, size - 64), size))
    return next((tag for name, tag in tags if len(tag) + name == size), b"")


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message; raises IndexError or ValueError on corrupt bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 64, 7):
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a varint of more than 64 bits")

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            size = varint()
            if at + size > len(data):
                raise ValueError("a field that runs past the end")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {tag & 7}, which tf.train.Example does not use here")


def decode_example(data: bytes) -> Record:
    """The inverse of `encode_example`; raises ValueError on anything that is not one of our records."""
    found: dict[str, Any] = {}
    try:
        for _, features in _fields(memoryview(data)):
            for _, entry in _fields(features):
                parts: dict[int, Any] = dict(_fields(entry))
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

    def append(self, record: Record, more: bytes = b"") -> None:
        payload = encode_example(record, more)
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
