"""Files and objects read from begin to end: an object by large requests, the next of which are under way while one is used."""

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from imagefeed.dataset.files import read_at
from imagefeed.dataset.storage import ObjectVersion, Url, store_of

REQUEST = 8 << 20
AHEAD = 3  # requests under way, 24 MB


class FileStream:
    """An open file of `size` bytes."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self.size = os.fstat(file.fileno()).st_size

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`, fewer at the end of the file. An OSError names it."""
        return read_at(self._file.fileno(), max(end - begin, 0), begin, self._path)


class ObjectStream:
    """An object of `size` bytes. Each byte is fetched once if no read begins before the last one did."""

    def __init__(self, url: Url, version: ObjectVersion, pool: ThreadPoolExecutor):
        self._url, self._version, self._pool = url, version, pool
        self._pieces: deque[tuple[int, Future[bytes]]] = deque()  # with where they begin
        self._next = 0
        self.size = version.size

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`, fewer at the end of the object."""
        end = min(end, self.size)
        if begin >= end:
            return b""
        if self._pieces and not self._pieces[0][0] <= begin <= self._next:  # back, or far ahead
            self._pieces.clear()
        if not self._pieces:
            self._next = begin
        while self._pieces and begin >= self._pieces[0][0] + REQUEST:
            self._pieces.popleft()
        found: list[bytes] = []
        at = 0
        while not found or at < end:
            while len(self._pieces) < len(found) + 1 + AHEAD and self._next < self.size:
                until = min(self._next + REQUEST, self.size)
                self._pieces.append(
                    (self._next, self._pool.submit(store_of(self._url).get, self._url, self._next, until, self._version))
                )
                self._next = until
            start, piece = self._pieces[len(found)]
            data = piece.result()
            at = start + len(data)
            found.append(data[max(begin - start, 0) : end - start])
        return found[0] if len(found) == 1 else b"".join(found)


@contextlib.contextmanager
def open_stream(where: Path | Url) -> Iterator[FileStream | ObjectStream]:
    """Opens a file or an object; raises FileNotFoundError if there is none."""
    if isinstance(where, Path):
        with open(where, "rb") as file:
            yield FileStream(file, where)
        return
    with ThreadPoolExecutor(AHEAD, "stream") as pool:
        try:
            yield ObjectStream(where, store_of(where).head(where), pool)
        finally:
            pool.shutdown(cancel_futures=True)
