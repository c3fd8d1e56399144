"""Blocks of remote datasets on a local disk, for all epochs, runs and ranks of a machine.

FOLDER/NAME.block is whole or absent. While it is fetched it is FOLDER/.NAME.part, whose lock one process holds; should that be
killed, the lock is free, and the next process begins anew. FOLDER/.bytes holds how many bytes there are, parts included, and
its lock guards that number.
"""

import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from imagefeed.dataset import gather
from imagefeed.dataset.errors import UserError, reason_of
from imagefeed.dataset.shards import map_file

PATIENCE_S = 60  # for a process that fetches a block, and may have been stopped
POLL_S = 0.01
LOOKED_AT = 128  # files a block to remove: a look into the folder takes 2 us each, and fetching a block 30 ms or more
FOREIGN, KNOWN, STALE = range(3)  # blocks, by who needs them; the last are evicted first
log = logging.getLogger("imagefeed")
NextUse = Callable[[str], int | None]  # when the block of a name is needed next; None for one that this run does not know


class BlockCache:
    """A folder that holds at most `limit` bytes, by default half of what is free, whichever processes write into it.

    Raises UserError if the folder cannot be written to. Later failures to write are said once, and blocks then stay in memory.
    """

    def __init__(self, folder: str | Path, limit: int | None = None):
        self.folder = Path(folder)
        self.opened_s = int(time.time())
        self._failed = False  # to write
        self._victims: list[tuple[tuple[int, int], str, int]] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._counted() as counted:
                counted.bytes = self._clean()
                if limit is None:
                    limit = (shutil.disk_usage(self.folder).free + counted.bytes) // 2
        except OSError as error:
            raise UserError(
                f"{self.folder}: blocks cannot be kept there ({reason_of(error)}); give another folder as `cache_dir`"
            ) from None
        self.limit = limit

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def find(self, name: str, size: int) -> np.ndarray | None:
        """The block as a read-only map (size,), or None if it is not there. A file of another length is removed."""
        path = self._path(name)
        try:
            found = os.stat(path)
            if found.st_size != size:
                self.remove(name)
                return None
            with contextlib.suppress(OSError):
                os.utime(path)
            mapped = map_file(path, size)
        except OSError:
            return None
        gather.will_need(np.array([mapped.ctypes.data]), np.array([size]))
        return mapped

    def fetch(self, name: str, memory: np.ndarray, first: int, next_use: NextUse, fetch: Callable[[], None]) -> np.ndarray | None:
        """The block as `find` gives it, once this process or another has fetched it.

        `fetch` fills `memory`, uint8 (size,); if it was called and there is no room for a file, None. `first` is when the block
        is needed.
        """
        handle = None if self._failed else self._claim(name)
        if handle is None:
            found = self.find(name, len(memory))
            if found is None:
                fetch()
            return found
        try:
            if (found := self.find(name, len(memory))) is not None:  # of the process that held the lock before
                self._part(name).unlink(missing_ok=True)
                return found
            reserved = self._reserve(name, handle, len(memory), first, next_use)
            try:
                fetch()
                if not reserved:
                    return None
                write_all(handle, memory)
                os.rename(self._part(name), self._path(name))
            except OSError as error:
                self._tell(error)
                self._release(name, len(memory))
                return None
            except BaseException:
                self._release(name, len(memory) if reserved else 0)
                raise
            return self.find(name, len(memory))
        finally:
            os.close(handle)

    def remove(self, name: str) -> None:
        """Removes a block, which may be mapped."""
        path = self._path(name)
        with contextlib.suppress(OSError), self._counted() as counted:
            size = os.stat(path).st_size
            path.unlink()
            counted.bytes -= size

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.block"

    def _part(self, name: str) -> Path:
        return self.folder / f".{name}.part"

    def _claim(self, name: str) -> int | None:
        """The open file to write the block into, locked; None if the block has come, or cannot be written."""
        path, until = self._part(name), time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                self._tell(error)
                return None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.stat(path), os.fstat(handle)):
                    return handle
            except FileNotFoundError:  # the last holder has just renamed it
                pass
            except BlockingIOError:
                time.sleep(POLL_S)
            except OSError as error:  # no locks on this file system
                os.close(handle)
                self._tell(error)
                return None
            os.close(handle)
            if self._path(name).exists():
                return None
        return None

    def _reserve(self, name: str, handle: int, size: int, first: int, next_use: NextUse) -> bool:
        """Makes room for the block and counts its bytes; leaves no file if there is none."""
        try:
            with self._counted() as counted:
                counted.bytes += size - os.fstat(handle).st_size  # of a process that was killed
                if counted.bytes > self.limit:
                    counted.bytes -= self._evict(counted.bytes - self.limit, first, next_use)
                if counted.bytes <= self.limit:
                    counted.write()  # if the process ends here, there is less than it says
                    os.ftruncate(handle, size)
                    return True
                counted.bytes -= size
                self._part(name).unlink(missing_ok=True)
        except OSError as error:
            self._tell(error)
        return False

    def _release(self, name: str, size: int) -> None:
        with contextlib.suppress(OSError), self._counted() as counted:
            self._part(name).unlink(missing_ok=True)
            counted.bytes -= size

    def _evict(self, excess: int, first: int, next_use: NextUse) -> int:
        """Removes blocks of `excess` bytes or more, none that is needed before `first`; returns how many bytes."""
        freed = 0
        for looked in (False, True):
            while self._victims and freed < excess:
                (known, use), name, size = self._victims.pop()
                if known == KNOWN and use <= first:
                    self._victims.clear()
                    break
                with contextlib.suppress(FileNotFoundError):  # another rank was faster
                    self._path(name).unlink()
                    freed += size
            if freed >= excess or looked:
                break
            self._victims = self._choose(next_use)
        return freed

    def _choose(self, next_use: NextUse) -> list[tuple[tuple[int, int], str, int]]:
        """Order, name and size of blocks to remove, the first to go last: those that nobody has used since this cache was opened,
        then those of this run, the farthest next use first, then those of others, the longest unused first."""
        found = []
        for name, status in self._files(".block"):
            use, used_s = next_use(name), int(status.st_mtime)
            if use is not None:
                order = KNOWN, use
            else:
                order = (FOREIGN if used_s >= self.opened_s else STALE), -used_s
            found.append((order, name, status.st_size))
        return sorted(found)[-max(1, len(found) // LOOKED_AT) :]

    def _files(self, suffix: str) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(suffix):
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.name.removesuffix(suffix), entry.stat()

    def _clean(self) -> int:
        """Removes parts that nobody writes, and returns the bytes of all other files."""
        total = 0
        for name, _ in list(self._files(".part")):
            path = self.folder / f"{name}.part"
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:
                    total += os.fstat(file.fileno()).st_size
        return total + sum(status.st_size for _, status in self._files(".block"))

    @contextlib.contextmanager
    def _counted(self) -> Iterator["Counted"]:
        """Holds the lock on the number of bytes, which may be changed."""
        handle = os.open(self.folder / ".bytes", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            text = os.pread(handle, 32, 0)
            counted = Counted(handle, int(text) if text.strip().isdigit() else self._clean())
            yield counted
            counted.write()
        finally:
            os.close(handle)

    def _tell(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            log.warning(
                "%s: blocks cannot be kept there (%s), so that each epoch fetches them again; free some space or give another "
                "cache_dir",
                self.folder, reason_of(error),
            )  # fmt: skip


@dataclasses.dataclass
class Counted:
    """How many bytes there are, for the holder of the lock."""

    handle: int
    bytes: int

    def write(self) -> None:
        os.pwrite(self.handle, b"%-31d\n" % max(self.bytes, 0), 0)


def write_all(handle: int, memory: np.ndarray) -> None:
    """Writes to the file from its start; write(2) may take a part."""
    view, at = memoryview(memory.data), 0
    while at < len(view):
        at += os.pwrite(handle, view[at:], at)
