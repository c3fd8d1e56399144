"""Reads records by id: `Dataset` as images, `RecordReader` as bytes, fast."""

import contextlib
import numbers
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from imagefeed.dataset.blockcache import BlockCache
from imagefeed.dataset.columns import NUMBERS, Column
from imagefeed.dataset.errors import CHECK_DISK, UserError, reason_of
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.mixed import open_shards
from imagefeed.dataset.records import FOOTER, HEADER, Record, crc32c, decode_example, filename_before, masked
from imagefeed.dataset.storage import Url
from imagefeed.dataset.streams import open_stream

if TYPE_CHECKING:
    from PIL.Image import Image

FAILS = "fails its checksum"
# Rows of the index that are checked at once. All 1,281,167 of ImageNet took 22 ms instead of 17, and 40 MB.
CHECKED_ROWS = 1 << 16


class CorruptRecord(UserError):
    """A record whose bytes are not those that were packed."""


class Dataset:
    """The images and labels of a split, in the order of the shards, which is shuffled once. A map-style dataset for PyTorch.

        val = Dataset("/data/imagenet-256", "val")
        image, label = val[17]              # PIL.Image.Image, RGB; int
        print(len(val), val.classes[label], val.filename(17))
        first = val[:100]                   # a Dataset of 100 images; nothing is read yet

    `dataset` is the folder that `build` wrote, its URL, or its Manifest. `labels` (`targets`) is int32 (images,), -1 for an
    unknown class; `classes` has the name of each label, and `class_to_idx` the label of each name. Opening raises UserError if
    the dataset is incomplete or damaged; reading an image raises CorruptRecord if its checksum fails, and IndexError if there is
    none of that number. `ImageLoader` is many times faster.
    """

    def __init__(self, dataset: str | Path | Url | Manifest, split: str):
        self.manifest = dataset if isinstance(dataset, Manifest) else Manifest.load(dataset)
        self.split = split
        self.classes = self.manifest.classes
        self._reader = RecordReader(self.manifest, split)
        self._ids: np.ndarray | range = range(len(self._reader))
        self.labels = self._reader.labels

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, number: "int | slice") -> "tuple[Image, int] | Dataset":
        if isinstance(number, slice):
            return self._part(number)
        if not isinstance(number, numbers.Integral):
            raise TypeError(f"images are numbered: give a whole number or a slice, not {number!r}")
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no image {number}; the {len(self):,} images of split {self.split} are numbered from 0")
        return self.image(number), int(self.labels[number])

    def __reduce__(self) -> tuple:
        return _reopened, (self.manifest, self.split, self._ids)  # worker processes open it anew

    @property
    def ids(self) -> np.ndarray:
        """The record ids of the images, int64 (images,)."""
        return np.asarray(self._ids, np.int64)

    @property
    def is_whole(self) -> bool:
        """Whether it holds each image of the split."""
        return len(self) == len(self._reader)

    @property
    def targets(self) -> list[int]:
        """The labels as torchvision's datasets have them."""
        return self.labels.tolist()

    @property
    def class_to_idx(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}

    def image(self, number: int) -> "Image":
        """An image as it is stored, RGB."""
        from PIL import Image  # ImageLoader imports this module too, and does without Pillow

        data = self.jpeg(number).tobytes()
        # Image.open takes 60 us more, a tenth of the decoding, to read the header in Python.
        return Image.frombytes("RGB", jpeg_size(data)[::-1], data, "jpeg", "RGB", "")

    def jpeg(self, number: int) -> np.ndarray:
        """The JPEG of an image as a read-only uint8 array (bytes,)."""
        return self._reader.jpeg(self._ids[number])

    def filename(self, number: int) -> str:
        """The path of the image in the raw tree."""
        return self._reader.filename(self._ids[number])

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns that were kept with the images."""
        return tuple(self.manifest.columns)

    def column(self, name: str) -> "np.ndarray | Column":
        """The values of a column, by number of the image: numbers as an array (images,) or (images, width), otherwise a sequence
        of str or of arrays. Opens the column's files, whose checksum is verified (1 ms for 2 MB)."""
        column = self.manifest.load_column(self.split, name).take(self._ids)
        return column.values if column.kind == NUMBERS else column

    def _part(self, part: slice) -> "Dataset":
        return _reopened(self.manifest, self.split, self._ids[part], self._reader)


def _reopened(manifest: Manifest, split: str, ids: "np.ndarray | range", reader: "RecordReader | None" = None) -> Dataset:
    dataset = Dataset.__new__(Dataset)
    dataset.manifest, dataset.split, dataset.classes = manifest, split, manifest.classes
    dataset._reader = reader or RecordReader(manifest, split)
    dataset._ids, dataset.labels = ids, dataset._reader.labels[ids]
    return dataset


class RecordReader:
    """The records of a split by record id: `reader[record_id]` is the JPEG as a read-only uint8 array.

    Opening checks that each shard exists, has its length and, by two of its records, its content, and raises UserError
    otherwise; so does the first read of a shard, if its file is another one by then. A record that cannot be read, because the
    disk fails or the shard has been shortened meanwhile, raises CorruptRecord, as with `verify_checksums` one does whose bytes
    differ from the CRC-32C in the index.
    """

    def __init__(self, manifest: Manifest, split: str, verify_checksums: bool = True, cache: BlockCache | None = None):
        self.split = split
        self.verify_checksums = verify_checksums
        self._index = manifest.load_index(split)
        self.labels = np.ascontiguousarray(self._index["label"])  # (records,) int32
        self._paths = [manifest.place_of(shard) for shard in manifest.split(split).shards]
        sizes = [shard.bytes for shard in manifest.split(split).shards]
        self.reported: set[int] = set()  # corrupt records of which the log tells
        _check_index(self._index, np.array(sizes), manifest.index_path(split))
        digest = manifest.split(split).digest
        # `remote` has the shards that are in stores, if there are any.
        self._shards, self.remote = open_shards(self._index, self._paths, sizes, digest, verify_checksums, cache)

    def __len__(self) -> int:
        return len(self._index)

    def jpeg(self, record_id: int) -> np.ndarray:
        """The JPEG of a record, read-only (bytes,); raises CorruptRecord."""
        _, _, length, _, _ = self._index[record_id].item()
        data = np.empty(length, np.uint8)
        if self.gather(np.array([record_id]), data, length).any():
            raise self.damage(record_id)
        data.setflags(write=False)
        return data

    __getitem__ = jpeg

    def filename(self, record_id: int) -> str:
        """The path of the raw image that a record was made from; raises CorruptRecord. Takes 6 us."""
        shard, start, offset, length = self._extent(record_id)
        try:
            return filename_before(self._shards.view(shard, start + HEADER.size, offset).tobytes(), length)
        except (ValueError, OSError, EOFError):
            raise self.damage(record_id) from None

    def record(self, record_id: int) -> Record:
        """All of a record; raises CorruptRecord unless it is as it was packed."""
        shard, start, offset, length = self._extent(record_id)
        try:
            return self._decode(self._shards.view(shard, start + HEADER.size, offset + length + FOOTER.size).tobytes())
        except (ValueError, OSError, EOFError):
            raise self.damage(record_id) from None

    def records(self, record_ids: range) -> Iterator[Record | CorruptRecord]:
        """All of consecutive records of a shard, each or the error that `record` raises; from a store by large requests."""
        place = self._paths[int(self._index["shard"][record_ids[0]])] if record_ids else None
        with open_stream(place) if isinstance(place, Url) else contextlib.nullcontext() as stream:
            for record_id in record_ids:
                try:
                    if stream is not None:
                        _, start, offset, length = self._extent(record_id)
                        with contextlib.suppress(ValueError):  # else it is fetched once more
                            yield self._decode(stream.read(start + HEADER.size, offset + length + FOOTER.size))
                            continue
                    yield self.record(record_id)
                except CorruptRecord as error:
                    yield error

    def _decode(self, frame: bytes) -> Record:
        """The record in a frame of TFRecord, whose header is left out; raises ValueError."""
        payload = frame[: -FOOTER.size]
        if self.verify_checksums and (masked(crc32c(payload)),) != FOOTER.unpack(frame[-FOOTER.size :]):
            raise ValueError
        return decode_example(payload)

    def _extent(self, record_id: int) -> tuple[int, int, int, int]:
        """The shard of a record, where it starts there, where its JPEG does, and the length of that."""
        shard, offset, length, *_ = self._index[record_id].item()
        start = 0
        if record_id:
            before, before_offset, before_length, *_ = self._index[record_id - 1].item()
            start = before_offset + before_length + FOOTER.size if before == shard else 0
        return shard, start, offset, length

    def _read_again(self, record_id: int) -> bytes:
        """The JPEG of a record whose bytes in memory are bad, from its shard; raises CorruptRecord."""
        shard, offset, length, crc, _ = self._index[record_id].item()
        try:
            data, changed = self._shards.read(shard, offset, offset + length)
        except OSError as error:
            raise self._corrupt(record_id, f"cannot be read ({reason_of(error)})", CHECK_DISK) from None
        if len(data) == length and (not self.verify_checksums or google_crc32c.value(data) == crc):
            return data
        what = FAILS if len(data) == length else "lies beyond the end of the shard"
        raise self._corrupt(record_id, what + (", as the shard has changed since it was opened" if changed else ""))

    def damage(self, record_id: int) -> CorruptRecord:
        """The error to raise for a record that cannot be read or fails its checksum."""
        try:
            self._read_again(record_id)
        except CorruptRecord as error:
            return error
        return self._corrupt(record_id, FAILS)

    def _corrupt(self, record_id: int, what: str, remedy: str = "delete the shard and run build again") -> CorruptRecord:
        shard, offset, *_ = self._index[record_id].item()
        return CorruptRecord(f"{self._paths[shard]}: record {record_id} of {self.split} (byte {offset}) {what}; {remedy}")

    def gather(self, record_ids: np.ndarray, out: np.ndarray, stride: int) -> np.ndarray:
        """Copies the JPEGs of records (N,) into `out`, at least N * stride uint8: each at a multiple of `stride`, which must be
        `longest` or more, and zeros after it. Returns bool (N,): True for those that cannot be read or, if `verify_checksums`,
        fail their checksum; these were read a second time."""
        rows = self._index[record_ids]
        bad = self._shards.gather(rows, out, stride, self.verify_checksums)
        for at in np.flatnonzero(bad).tolist():
            with contextlib.suppress(CorruptRecord):
                data = self._read_again(record_ids[at])
                out[at * stride :][: len(data)] = np.frombuffer(data, np.uint8)
                bad[at] = False
        return bad

    def lengths(self, record_ids: np.ndarray) -> np.ndarray:
        """The length in bytes (N,) of each JPEG of records (N,)."""
        return self._index["length"][record_ids]

    def rows(self, record_ids: np.ndarray) -> np.ndarray:
        """The rows of the index (N,) of records (N,)."""
        return self._index[record_ids]

    def are_local(self, record_ids: np.ndarray) -> np.ndarray:
        """Whether the shards (N,) of records (N,) are files."""
        return np.zeros(len(record_ids), bool) if self.remote is None else self.remote.are_local(self._index["shard"][record_ids])

    def longest(self, record_ids: np.ndarray) -> int:
        """The greatest of their lengths; 0 if N is 0."""
        return int(self.lengths(record_ids).max(initial=0))

    def will_need(self, record_ids: np.ndarray) -> None:
        """Has records (N,) on their way into memory, neighbors in one go, and returns without waiting."""
        self._shards.will_need(self._index[record_ids])

    def close(self) -> None:
        """Releases the shards; a map is unmapped when its last view is gone."""
        self._shards.close()


def jpeg_size(jpeg: "np.ndarray | bytes") -> tuple[int, int]:
    """Height and width in pixels, from the frame header of a baseline JPEG (ITU T.81, B.2.2)."""
    at = 2
    while at + 9 <= len(jpeg):
        _, marker, length, _, height, width = struct.unpack_from(">BBHBHH", jpeg, at)  # type: ignore[arg-type]
        if marker == 0xC0:
            return height, width
        at += 2 + length
    raise UserError("a record's JPEG has no frame header; run imagefeed verify OUT --deep")


def _check_index(index: np.ndarray, sizes: np.ndarray, path: Path | Url) -> None:
    """Raises UserError if a row points outside its shard: reading there would end the process."""
    for begin in range(0, len(index), CHECKED_ROWS):
        rows = index[begin : begin + CHECKED_ROWS]
        known = rows["shard"] < len(sizes)
        # Written as a subtraction: the sum of an offset near 2**64 and a length would wrap around to a small number.
        inside = known & (rows["offset"] <= sizes[np.where(known, rows["shard"], 0)] - rows["length"])
        if not inside.all():
            record_id = begin + int(np.argmin(inside))
            raise UserError(f"{path}: record {record_id} lies outside its shard; delete the index and run build again")
