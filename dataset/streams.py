"""Files and objects read from begin to end: an object by large requests, the next of which are under way while one is used."""

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from imagefeed.dataset.files import read_at
from imagefeed.dataset.storage import Url, store_of

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

    def __init__(self, url: Url):
        self._url, self._version = url, store_of(url).head(url)
        self._pool = ThreadPoolExecutor(AHEAD, "stream")
        self._pieces: deque[tuple[int, Future[bytes]]] = deque()  # with where they begin
        self._next, self._closed = 0, False
        self.size = self._version.size

    def close(self) -> None:
        """Has the requests under way given up: a store that is silent would hold up whoever waits for them."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, begin: int, end: int) -> bytes:
        return store_of(self._url).get(self._url, begin, end, self._version, lambda: not self._closed)

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
                self._pieces.append((self._next, self._pool.submit(self._fetch, self._next, until)))
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
    with contextlib.closing(ObjectStream(where)) as stream:
        yield stream
