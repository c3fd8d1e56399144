"""The shards of a split as memory maps: what RecordReader reads from. Those of a store are read by `remote`."""

import ctypes
import errno
import mmap
import os
import threading
import weakref
from pathlib import Path
from typing import Protocol

import google_crc32c
import numpy as np

from imagefeed.dataset import gather
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import read_at
from imagefeed.dataset.records import INDEX_DTYPE

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
Version = tuple[int, int, int]  # of a file: inode, size, modification time (ns)
MAP_FAILED = ctypes.c_void_p(-1).value


class Shards(Protocol):
    """The shards of a split, by the numbers in its index. `rows` are rows of the index (N,)."""

    def gather(self, rows: np.ndarray, out: np.ndarray, stride: int, checked: bool) -> np.ndarray:
        """Copies the JPEGs as RecordReader.gather says. Returns bool (N,): True for those to be read again, because they could
        not be read or, if `checked`, fail their checksum."""

    def view(self, shard: int, begin: int, end: int) -> np.ndarray:
        """The bytes of a shard from `begin` to `end`. Raises OSError if they cannot be read, EOFError if it ends before."""

    def read(self, shard: int, begin: int, end: int) -> tuple[bytes, bool]:
        """The same past every copy in memory, fewer if the shard ends before, and whether it has changed since it was opened.
        Raises OSError."""

    def will_need(self, rows: np.ndarray) -> None:
        """Has the records on their way, neighbors in one go, and returns without waiting."""

    def close(self) -> None:
        """Lets go of files and memory."""


class LocalShards:
    """Shards in files. Opening checks that each exists and has its length and, if `checked`, its content; raises UserError."""

    def __init__(self, index: np.ndarray, paths: list[Path], sizes: list[int], checked: bool):
        self._index, self._paths, self._sizes = index, paths, sizes
        self._lock = threading.Lock()  # reading ahead maps shards too, from another thread
        self._maps: dict[int, np.ndarray | None] = {}  # None where the file system refuses maps
        self._addresses = np.zeros(len(paths), np.int64)
        self._versions = list(map(_check_size, paths, sizes))
        if checked:
            probed = np.linspace(0, len(paths) - 1, min(len(paths), PROBED_SHARDS)).astype(int)
            _check_content(index, paths, probed)

    def gather(self, rows: np.ndarray, out: np.ndarray, stride: int, checked: bool) -> np.ndarray:
        self._map_all(rows["shard"])
        bad = np.empty(len(rows), bool)
        gather.gather(rows, self._addresses, out, stride, checked, bad)
        return bad

    def view(self, shard: int, begin: int, end: int) -> np.ndarray:
        self._map(shard)
        row = np.array([(shard, begin, end - begin, 0, 0)], INDEX_DTYPE)
        out, bad = np.empty(end - begin, np.uint8), np.empty(1, bool)
        gather.gather(row, self._addresses, out, len(out), False, bad)
        if not bad:
            return out
        data, _ = self.read(shard, begin, end)
        if len(data) < len(out):
            raise EOFError
        return np.frombuffer(data, np.uint8)

    def read(self, shard: int, begin: int, end: int) -> tuple[bytes, bool]:
        path = self._paths[shard]
        with open(path, "rb") as file:
            return read_at(file.fileno(), end - begin, begin, path), _version(os.fstat(file.fileno())) != self._versions[shard]

    def will_need(self, rows: np.ndarray) -> None:
        """Asks the system to read the records into the page cache."""
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
