"""Reads records by id from memory-mapped shards: `Dataset` as images, `RecordReader` as bytes, fast."""

import contextlib
import ctypes
import errno
import mmap
import numbers
import os
import struct
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

from imagefeed.dataset import gather
from imagefeed.dataset.columns import NUMBERS, Column
from imagefeed.dataset.errors import CHECK_DISK, UserError, reason_of
from imagefeed.dataset.files import read_at
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.records import FOOTER, HEADER, INDEX_DTYPE, Record, crc32c, decode_example, filename_before, masked

if TYPE_CHECKING:
    from PIL.Image import Image

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PROBED_SHARDS = 300  # 10 ms from memory, 0.1 s from an SSD
NEIGHBORS_BYTES = 1 << 16  # a smaller gap between two records is read along with them
MADV_RANDOM = 1  # mman.h; Python's mmap has the number, but not the call for an address
# The file system has no maps, or this process has too many of them (vm.max_map_count).
MAP_REFUSED = {errno.ENODEV, errno.ENOMEM, errno.EPERM, errno.EACCES, errno.EINVAL}
FAILS = "fails its checksum"
Version = tuple[int, int, int]  # of a file: inode, size, modification time (ns)
MAP_FAILED = ctypes.c_void_p(-1).value


class CorruptRecord(UserError):
    """A record whose bytes are not those that were packed."""


class Dataset:
    """The images and labels of a split, in the order of the shards, which is shuffled once. A map-style dataset for PyTorch.

        val = Dataset("/data/imagenet-256", "val")
        image, label = val[17]              # PIL.Image.Image, RGB; int
        print(len(val), val.classes[label], val.filename(17))
        first = val[:100]                   # a Dataset of 100 images; nothing is read yet

    `dataset` is the folder that `build` wrote, or its Manifest. `labels` (`targets`) is int32 (images,), -1 for an unknown class;
    `classes` has the name of each label, and `class_to_idx` the label of each name. Opening raises UserError if the dataset is
    incomplete or damaged; reading an image raises CorruptRecord if its checksum fails, and IndexError if there is none of that
    number. `ImageLoader` is many times faster.
    """

    def __init__(self, dataset: str | Path | Manifest, split: str):
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

    def __init__(self, manifest: Manifest, split: str, verify_checksums: bool = True):
        self.split = split
        self.verify_checksums = verify_checksums
        self._index = manifest.load_index(split)
        self.labels = np.ascontiguousarray(self._index["label"])  # (records,) int32
        self._paths = [manifest.root / shard.name for shard in manifest.split(split).shards]
        self._sizes = [shard.bytes for shard in manifest.split(split).shards]
        self.reported: set[int] = set()  # corrupt records of which the log tells
        self._lock = threading.Lock()  # reading ahead maps shards too, from another thread
        _check_index(self._index, np.array(self._sizes), manifest.index_path(split))
        self._open()

    def _open(self) -> None:
        self._maps: dict[int, np.ndarray | None] = {}  # None where the file system refuses maps
        self._addresses = np.zeros(len(self._paths), np.int64)
        self._versions = list(map(_check_size, self._paths, self._sizes))
        if self.verify_checksums:
            probed = np.linspace(0, len(self._paths) - 1, min(len(self._paths), PROBED_SHARDS)).astype(int)
            _check_content(self._index, self._paths, probed)

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
            return filename_before(self._view(shard, start + HEADER.size, offset).tobytes(), length)
        except (ValueError, OSError, EOFError):
            raise self.damage(record_id) from None

    def record(self, record_id: int) -> Record:
        """All of a record; raises CorruptRecord unless it is as it was packed."""
        shard, start, offset, length = self._extent(record_id)
        try:
            frame = self._view(shard, start + HEADER.size, offset + length + FOOTER.size).tobytes()
            payload = frame[: -FOOTER.size]
            if self.verify_checksums and (masked(crc32c(payload)),) != FOOTER.unpack(frame[-FOOTER.size :]):
                raise ValueError
            return decode_example(payload)
        except (ValueError, OSError, EOFError):
            raise self.damage(record_id) from None

    def _extent(self, record_id: int) -> tuple[int, int, int, int]:
        """The shard of a record, where it starts there, where its JPEG does, and the length of that."""
        shard, offset, length, *_ = self._index[record_id].item()
        start = 0
        if record_id:
            before, before_offset, before_length, *_ = self._index[record_id - 1].item()
            start = before_offset + before_length + FOOTER.size if before == shard else 0
        return shard, start, offset, length

    def _view(self, shard: int, begin: int, end: int) -> np.ndarray:
        """The bytes of a shard from `begin` to `end`. Raises OSError if they cannot be read, EOFError if it ends before."""
        self._map(shard)
        row = np.array([(shard, begin, end - begin, 0, 0)], INDEX_DTYPE)
        out, bad = np.empty(end - begin, np.uint8), np.empty(1, bool)
        gather.gather(row, self._addresses, out, len(out), False, bad)
        if not bad:
            return out
        with open(self._paths[shard], "rb") as file:
            data = read_at(file.fileno(), len(out), begin, file.name)
        if len(data) < len(out):
            raise EOFError
        return np.frombuffer(data, np.uint8)

    def _read_file(self, record_id: int) -> bytes:
        """The JPEG of a record whose bytes in memory are bad, from its file; raises CorruptRecord."""
        shard, offset, length, crc, _ = self._index[record_id].item()
        path = self._paths[shard]
        try:
            with open(path, "rb") as file:
                data, version = read_at(file.fileno(), length, offset, path), _version(os.fstat(file.fileno()))
        except OSError as error:
            raise self._corrupt(record_id, f"cannot be read ({reason_of(error)})", CHECK_DISK) from None
        if len(data) == length and (not self.verify_checksums or google_crc32c.value(data) == crc):
            return data
        what = FAILS if len(data) == length else "lies beyond the end of the shard"
        changed = "" if version == self._versions[shard] else ", as the shard has changed since it was opened"
        raise self._corrupt(record_id, what + changed)

    def damage(self, record_id: int) -> CorruptRecord:
        """The error to raise for a record that cannot be read or fails its checksum."""
        try:
            self._read_file(record_id)
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
        self._map_all(rows["shard"])
        bad = np.empty(len(rows), bool)
        gather.gather(rows, self._addresses, out, stride, self.verify_checksums, bad)
        for at in np.flatnonzero(bad).tolist():
            with contextlib.suppress(CorruptRecord):
                data = self._read_file(record_ids[at])
                out[at * stride :][: len(data)] = np.frombuffer(data, np.uint8)
                bad[at] = False
        return bad

    def lengths(self, record_ids: np.ndarray) -> np.ndarray:
        """The length in bytes (N,) of each JPEG of records (N,)."""
        return self._index["length"][record_ids]

    def longest(self, record_ids: np.ndarray) -> int:
        """The greatest of their lengths; 0 if N is 0."""
        return int(self.lengths(record_ids).max(initial=0))

    def will_need(self, record_ids: np.ndarray) -> None:
        """Asks the system to read records (N,) into the page cache, neighbors in one go, and returns without waiting."""
        rows = self._index[record_ids]
        if not len(rows):
            return
        self._map_all(rows["shard"])
        starts = self._addresses[rows["shard"]] + rows["offset"].astype(np.int64)
        order = np.argsort(starts)
        starts, ends = starts[order], (starts + rows["length"])[order]
        first = np.concatenate([[True], starts[1:] - ends[:-1] > NEIGHBORS_BYTES])
        last = np.concatenate([first[1:], [True]])
        gather.will_need(starts[first], ends[last] - starts[first])

    def close(self) -> None:
        """Releases the maps; each is unmapped when its last view is gone."""
        self._addresses[:] = 0
        self._maps.clear()

    def _map_all(self, shards: np.ndarray) -> None:
        for shard in np.unique(shards[self._addresses[shards] == 0]).tolist():
            self._map(shard)

    def _map(self, shard: int) -> None:
        if shard in self._maps:
            return
        with self._lock:
            if shard in self._maps:
                return
            path, size = self._paths[shard], self._sizes[shard]
            version = _check_size(path, size)  # again: opening may have been hours ago
            if version != self._versions[shard]:
                _check_content(self._index, self._paths, np.array([shard]))
                self._versions[shard] = version
            try:
                mapped = map_file(path, size)
                self._addresses[shard] = mapped.ctypes.data
            except OSError as error:
                if error.errno not in MAP_REFUSED:
                    raise
                mapped = None  # its records are read one by one
            self._maps[shard] = mapped


def jpeg_size(jpeg: "np.ndarray | bytes") -> tuple[int, int]:
    """Height and width in pixels, from the frame header of a baseline JPEG (ITU T.81, B.2.2)."""
    at = 2
    while at + 9 <= len(jpeg):
        _, marker, length, _, height, width = struct.unpack_from(">BBHBHH", jpeg, at)  # type: ignore[arg-type]
        if marker == 0xC0:
            return height, width
        at += 2 + length
    raise UserError("a record's JPEG has no frame header; run imagefeed verify OUT --deep")


def _check_size(path: Path, size: int) -> Version:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the shard is missing; run build again to restore it") from None
    if found.st_size != size:
        raise UserError(
            f"{path}: the shard has {found.st_size:,} bytes, the manifest says {size:,}; delete it and run build again"
        )
    return _version(found)


def _version(status: os.stat_result) -> Version:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_index(index: np.ndarray, sizes: np.ndarray, path: Path) -> None:
    """Raises UserError if a row points outside its shard: reading there would end the process."""
    known = index["shard"] < len(sizes)
    # Written as a subtraction: the sum of an offset near 2**64 and a length would wrap around to a small number.
    inside = known & (index["offset"] <= sizes[np.where(known, index["shard"], 0)] - index["length"])
    if not inside.all():
        raise UserError(f"{path}: record {int(np.argmin(inside))} lies outside its shard; delete the index and run build again")


def _check_content(index: np.ndarray, paths: list[Path], probed: np.ndarray) -> None:
    """Raises UserError if neither the first nor the last record of a shard `probed` is intact: it is another file of the same
    length. One corrupt record alone is tolerated, as is one that cannot be read; two raise the OSError."""
    shards = np.ascontiguousarray(index["shard"])
    begins, ends = np.searchsorted(shards, probed), np.searchsorted(shards, probed, "right")
    for shard, begin, end in zip(probed.tolist(), begins.tolist(), ends.tolist(), strict=True):
        if begin == end:
            continue
        failure: Exception = UserError(
            f"{paths[shard]}: the shard is not the one that was packed, though as long; delete it and run build again"
        )
        with open(paths[shard], "rb") as file:
            for _, offset, length, crc, _ in (index[begin].item(), index[end - 1].item()):
                try:
                    if google_crc32c.value(read_at(file.fileno(), length, offset, file.name)) == crc:
                        break
                except OSError as error:
                    failure = error
            else:
                raise failure


def map_file(path: Path, size: int) -> np.ndarray:
    """The file as a read-only (size,) uint8 array, mapped into memory and unmapped with its last view.

    Called through ctypes because Python's own mmap keeps a file descriptor for each map (until 3.13's trackfd), and
    a dataset may have ten thousand shards.
    """
    with open(path, "rb") as file:
        # Private, because a FUSE mount with direct_io refuses shared ones.
        address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, file.fileno(), 0)
    if address == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    # `will_need` asks for records before they are touched. A page touched without it must not bring its neighbors, as many as
    # the disk's read_ahead_kb says.
    LIBC.madvise(address, size, MADV_RANDOM)
    buffer = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(buffer, LIBC.munmap, address, size).atexit = False
    array = np.frombuffer(memoryview(buffer), np.uint8)
    array.setflags(write=False)
    return array
