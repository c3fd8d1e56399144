"""An independent reader of TFRecord files."""

from collections.abc import Iterator

from imagefeed.dataset.records import FOOTER, HEADER, crc32c, masked


def read_frames(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields (offset of the frame, payload) for each record of a shard, after verifying both checksums of the frame.

    Raises ValueError at the first corrupt one.
    """
    at = 0
    while at < len(data):
        if at + HEADER.size > len(data):
            raise ValueError(f"byte {at}: the file ends inside a record header")
        length, crc = HEADER.unpack_from(data, at)
        if masked(crc32c(bytes(data[at : at + 8]))) != crc:
            raise ValueError(f"byte {at}: the checksum of a record's length does not match")
        end = at + HEADER.size + length
        if end + FOOTER.size > len(data):
            raise ValueError(f"byte {at}: the file ends inside a record")
        payload = data[at + HEADER.size : end]
        if masked(crc32c(bytes(payload))) != FOOTER.unpack_from(data, end)[0]:
            raise ValueError(f"byte {at}: the checksum of a record's data does not match")
        yield at, payload
        at = end + FOOTER.size
