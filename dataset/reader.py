"""Record ids to the bytes of their JPEGs, over memory-mapped shards."""

import ctypes
import mmap
import os
import threading
import weakref
from pathlib import Path

import google_crc32c
import numpy as np

from imagefeed.dataset import gather
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.manifest import Manifest

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PROBED_SHARDS = 300  # 10 ms from memory, 0.1 s from an SSD
NEIGHBOURS_BYTES = 1 << 16  # less between two records is read along with them
MADV_RANDOM = 1  # mman.h; Python's mmap has the number, but not the call for an address
MAP_FAILED = ctypes.c_void_p(-1).value


class CorruptRecord(UserError):
    """A record whose bytes are not those that were packed."""


class RecordReader:
    """The records of a split, by record id: `dataset[record_id]` is the JPEG as a read-only uint8 array, a view.

    Opening checks that each shard is there, whole in length and, by a look at two records, the one that was packed, and raises
    UserError where one is not. A view stays valid as long as it is referred to, also after `close`. With `verify_checksums`, each read
    compares the CRC-32C of the bytes with the index and raises CorruptRecord (22 KB: 1.2 us, of the page cache). A shard that
    is shortened while it is mapped, or a disk that fails to read, ends the process (SIGBUS), as with any memory map.
    """

    def __init__(self, manifest: Manifest, split: str, verify_checksums: bool = True):
        self.split = split
        self.verify_checksums = verify_checksums
        self._index = np.asarray(manifest.load_index(split))  # still mapped; without memmap's cost on each access
        self.labels = np.ascontiguousarray(self._index["label"])  # (records,) int32
        self._paths = [manifest.root / shard.name for shard in manifest.split(split).shards]
        self._sizes = [shard.bytes for shard in manifest.split(split).shards]
        self._maps: dict[int, np.ndarray] = {}
        self._addresses = np.zeros(len(self._paths), np.int64)
        self._lock = threading.Lock()  # reading ahead maps shards too, from another thread
        for path, size in zip(self._paths, self._sizes, strict=True):
            check_size(path, size)
        check_index(self._index, np.array(self._sizes), manifest.index_path(split))
        if verify_checksums:
            check_content(self._index, self._paths)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, record_id: int) -> np.ndarray:
        return self.jpeg(record_id)

    def jpeg(self, record_id: int) -> np.ndarray:
        """The JPEG bytes of a record, (bytes,) uint8; raises CorruptRecord."""
        shard, offset, length, crc, _ = self._index[record_id].item()
        data = self._map(shard)[offset : offset + length]
        if self.verify_checksums and google_crc32c.value(data) != crc:
            raise self.damage(record_id)
        return data

    def damage(self, record_id: int) -> CorruptRecord:
        """What is to be said of a record that fails its checksum."""
        shard, offset, *_ = self._index[record_id].item()
        return CorruptRecord(
            f"{self._paths[shard]}: record {record_id} of {self.split} (byte {offset}) fails its checksum; "
            "delete the shard and run build again"
        )

    def gather(self, record_ids: np.ndarray, out: np.ndarray, stride: int) -> np.ndarray:
        """Copies the JPEGs of records (N,) into `out`, uint8 of N * stride or more, each at a multiple of `stride` and with zeros
        after it; none is longer (`longest`). Returns bool (N,), which of them fail their checksum; none without `verify_checksums`."""
        rows = self._index[record_ids]
        self._map_all(rows["shard"])
        bad = np.empty(len(rows), bool)
        gather.gather(rows, self._addresses, out, stride, self.verify_checksums, bad)
        return bad

    def longest(self, record_ids: np.ndarray) -> int:
        """Bytes of the longest JPEG of records (N,), 0 of none."""
        return int(self._index["length"][record_ids].max(initial=0))

    def will_need(self, record_ids: np.ndarray) -> None:
        """Asks the system to read records (N,) into the page cache, neighbors in one go, and does not wait for it."""
        rows = self._index[record_ids]
        if not len(rows):
            return
        self._map_all(rows["shard"])
        starts = self._addresses[rows["shard"]] + rows["offset"].astype(np.int64)
        order = np.argsort(starts)
        starts, ends = starts[order], (starts + rows["length"])[order]
        first = np.concatenate([[True], starts[1:] - ends[:-1] > NEIGHBOURS_BYTES])
        last = np.concatenate([first[1:], [True]])
        gather.will_need(starts[first], ends[last] - starts[first])

    def close(self) -> None:
        """Lets go of the maps; each is unmapped when its last view is gone."""
        self._addresses[:] = 0
        self._maps.clear()

    def _map_all(self, shards: np.ndarray) -> None:
        for shard in np.unique(shards[self._addresses[shards] == 0]).tolist():
            self._map(shard)

    def _map(self, shard: int) -> np.ndarray:
        found = self._maps.get(shard)
        if found is None:
            with self._lock:
                if shard not in self._maps:
                    check_size(self._paths[shard], self._sizes[shard])  # again: hours may lie between opening and first read
                    mapped = map_file(self._paths[shard], self._sizes[shard])
                    self._addresses[shard] = mapped.ctypes.data
                    self._maps[shard] = mapped
                found = self._maps[shard]
        return found


def check_size(path: Path, size: int) -> None:
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: the shard is missing; run build again to restore it") from None
    if found != size:
        raise UserError(f"{path}: the shard has {found:,} bytes, the manifest says {size:,}; delete it and run build again")


def check_index(index: np.ndarray, sizes: np.ndarray, path: Path) -> None:
    """Raises UserError where a row points outside its shard: reading there would end the process."""
    known = index["shard"] < len(sizes)
    # The room is what is subtracted from: the sum of an offset near 2**64 and a length would come round to a small one.
    inside = known & (index["offset"] <= sizes[np.where(known, index["shard"], 0)] - index["length"])
    if not inside.all():
        raise UserError(f"{path}: record {int(np.argmin(inside))} lies outside its shard; delete the index and run build again")


def check_content(index: np.ndarray, paths: list[Path]) -> None:
    """Raises UserError where neither the first nor the last record of a shard is what was packed: it is another file of the same
    length. One corrupt record is none; PROBED_SHARDS are looked at, two reads each."""
    probed = np.linspace(0, len(paths) - 1, min(len(paths), PROBED_SHARDS)).astype(int)
    shards = np.ascontiguousarray(index["shard"])
    begins, ends = np.searchsorted(shards, probed), np.searchsorted(shards, probed, "right")
    for shard, begin, end in zip(probed.tolist(), begins.tolist(), ends.tolist(), strict=True):
        if begin == end:
            continue
        with open(paths[shard], "rb") as file:
            whole = [
                google_crc32c.value(os.pread(file.fileno(), length, offset)) == crc
                for _, offset, length, crc, _ in (index[begin].item(), index[end - 1].item())
            ]
        if not any(whole):
            raise UserError(
                f"{paths[shard]}: the shard is not the one that was packed, though as long; delete it and run build again"
            )


def map_file(path: Path, size: int) -> np.ndarray:
    """The file as a read-only (size,) uint8 array, mapped into memory and unmapped with its last view.

    Called through ctypes because Python's own mmap keeps a file descriptor for each map (until 3.13's trackfd), and
    a dataset may have ten thousand shards.
    """
    with open(path, "rb") as file:
        address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    # Records are asked for before they are touched (will_need). What is touched unasked must not bring its surroundings: a page
    # of it would, as much as the disk's read_ahead_kb says.
    LIBC.madvise(address, size, MADV_RANDOM)
    buffer = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(buffer, LIBC.munmap, address, size).atexit = False
    array = np.frombuffer(buffer, np.uint8)
    array.setflags(write=False)
    return array
