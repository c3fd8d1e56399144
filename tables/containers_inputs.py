"""What docs/containers.md stores: ten records of 20,000 bytes, one of which gets a bit flipped."""

import struct
from pathlib import Path

from tables import containers_tars
from tables.common import INPUTS

RECORDS, LENGTH, FLIPPED = 10, 20_000, 5


def payload(n):
    """(LENGTH,) bytes that do not compress, the same everywhere."""
    state, out = n + 1, []
    for _ in range(LENGTH // 4):
        state = state * 1664525 + 1013904223 & 0xFFFFFFFF
        out.append(state)
    return struct.pack(f"<{len(out)}I", *out)


def flip(folder, needle=None):
    """Flips a bit in the middle of record 5, wherever it is stored in the files of the folder."""
    needle = needle or payload(FLIPPED)[9000:9050]
    for path in sorted(Path(folder).rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        at = data.find(needle)
        if at >= 0:
            path.write_bytes(data[: at + 20] + bytes([data[at + 20] ^ 1]) + data[at + 21 :])
            return
    raise AssertionError("the record is not stored as it is")


def read_all(read):
    """The cell of a function that returns all records as bytes."""
    try:
        records = list(read())
    except Exception as error:
        return f"error: {type(error).__name__}"
    changed = [n for n, record in enumerate(records) if bytes(record) != payload(n)]
    if len(records) != RECORDS:
        return f"{len(records)} of {RECORDS} records, no error"
    return f"record {changed[0]} comes changed, no error" if changed == [FLIPPED] else f"{changed}"


def write_inputs():
    """x.tfrecord, with right checksums and the byte flipped, and the tars."""
    import google_crc32c

    def masked(data):
        value = google_crc32c.value(data)
        return struct.pack("<I", (value >> 15 | value << 17) + 0xA282EAD8 & 0xFFFFFFFF)

    def field(number, data):
        """A length-delimited field of a protobuf message."""
        length, size = b"", len(data)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    with open(INPUTS / "x.tfrecord", "wb") as file:
        for n in range(RECORDS):
            feature = field(1, field(1, payload(n)))  # Feature.bytes_list.value
            data = field(1, field(1, field(1, b"x") + field(2, feature)))  # Example.features.feature["x"]
            head = struct.pack("<Q", len(data))
            file.write(head + masked(head) + data + masked(data))
    flip(INPUTS)
    containers_tars.write_tars()
