"""Raw files at a URL: listed once with their sizes and ETags, then read by ranged GETs that are pinned to both."""

import fnmatch
import hashlib
import io
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.storage import ObjectVersion, Url, place, store_of

READABLE = (".tar", ".parquet", ".beton", ".ffcv")
ONLY = "of RAW at a URL, only .tar, .parquet and .beton files are read"
REMEDY = "put images into tars, as in: tar -cf train.tar -C FOLDER .; or copy RAW to a disk"
MAX_OTHERS = 20_000  # objects listed without a readable one among them: a folder of images may have a million
# A GET costs about as much as reading 0.25 MB more of an object does, so gaps up to that are read through.
NEAR, FAR_READ, NEAR_READ, MOST = 1 << 18, 1 << 12, 1 << 14, 1 << 22
THREADS = 16  # of one process; each waits for a GET
# What is fetched before it is packed: images, at 30 ms a GET 500 a second; and bytes, of large ones.
AHEAD, AHEAD_BYTES = 48, 1 << 26
STREAMS = 4  # columns of a Parquet file that are read at once
BRACES = re.compile(r"\{([^{}]*)\}")


class Sized(Protocol):
    @property
    def size(self) -> int: ...


Image = TypeVar("Image", bound=Sized)
T = TypeVar("T")


@dataclass(frozen=True)
class RemotePath:
    """An object or folder `at` below the URL `root`, with what `Path` has for layouts that are read in place.

    `versions` has the size and the ETag of every object below `root`, by its path, as they were when RAW was listed.
    """

    root: Url
    versions: dict[str, ObjectVersion]
    at: str = ""

    def __str__(self) -> str:
        return f"{self.root}/{self.at}" if self.at else str(self.root)

    def __truediv__(self, name: str) -> "RemotePath":
        return replace(self, at="/".join(filter(None, (*self.at.split("/"), *name.split("/")))))

    @property
    def name(self) -> str:
        return self.at.rpartition("/")[2] or self.root.name

    @property
    def parent(self) -> "RemotePath":
        return replace(self, at=self.at.rpartition("/")[0])

    def is_file(self) -> bool:
        return self.at in self.versions

    exists = is_file

    def is_dir(self) -> bool:
        return any(name.startswith(self._prefix) for name in self.versions)

    def with_name(self, name: str) -> "RemotePath":
        return self.parent / name

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Objects and folders below, by a pattern with as many parts."""
        wanted = pattern.split("/")
        found = {tuple(name.removeprefix(self._prefix).split("/")[: len(wanted)]) for name in self._names}
        return (self / "/".join(each) for each in found if len(each) == len(wanted) and all(map(fnmatch.fnmatch, each, wanted)))

    def list(self) -> tuple[list[str], list[str]]:
        """The names of the objects and of the folders directly below, sorted."""
        below = [name.removeprefix(self._prefix).split("/") for name in self._names]
        return sorted(name for name, *more in below if not more), sorted({name for name, *more in below if more})

    @property
    def _prefix(self) -> str:
        return f"{self.at}/" if self.at else ""

    @property
    def _names(self) -> Iterator[str]:
        return (name for name in self.versions if name.startswith(self._prefix))

    @property
    def version(self) -> ObjectVersion:
        return self.versions[self.at]

    @property
    def size(self) -> int:
        return self.version.size

    @property
    def stamp(self) -> tuple[int, int]:
        """Size and ETag as two numbers, which take the place of the size and time of a file."""
        size, etag = self.version
        return size, int.from_bytes(hashlib.sha256(etag.encode()).digest()[:8]) >> 1 if etag else 0

    def read(self, size: int, offset: int) -> bytes:
        """Exactly these bytes, by one GET. Raises UserError if the object is no longer the one that was listed."""
        return store_of(self.root).get(self.root / self.at, offset, offset + size, self.version) if size else b""

    def read_bytes(self) -> bytes:
        return self.read(self.size, 0)


class ReadAhead:
    """Reads of a remote file, where reads near one another share a GET, of more bytes the longer they go on."""

    def __init__(self, path: RemotePath):
        self.path, self.start, self.data, self.ahead = path, 0, b"", 0

    def __call__(self, size: int, offset: int) -> bytes:
        """The bytes from `offset` on, fewer than `size` only at the end of the file."""
        size = max(min(size, self.path.size - offset), 0)
        if not self.start <= offset <= self.start + len(self.data) - size:
            self.ahead = min(max(4 * self.ahead, NEAR_READ), MOST) if self.near(offset) else FAR_READ
            self.data = self.path.read(min(max(size, self.ahead), self.path.size - offset), offset)
            self.start = offset
        at = offset - self.start
        return self.data[at : at + size]

    def near(self, offset: int) -> bool:
        return self.start <= offset <= self.start + len(self.data) + NEAR


class RemoteFile(io.RawIOBase):
    """A remote file for pyarrow, which reads several columns in turn: each has its read-ahead."""

    def __init__(self, path: RemotePath):
        self.path, self.position = path, 0
        self.streams = [ReadAhead(path)]

    def read(self, size: int | None = -1) -> bytes:
        stream = next((each for each in self.streams if each.near(self.position)), None)
        if stream is None:
            stream = ReadAhead(self.path)
        self.streams = [*(each for each in self.streams if each is not stream), stream][-STREAMS:]
        data = stream(self.path.size if size is None or size < 0 else size, self.position)
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.path.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def read_ahead(read: Callable[[Image], T], images: Iterable[Image]) -> Iterator[tuple[Image, Callable[[], T]]]:
    """Each image and a function that returns what `read(image)` does, which has begun for the next ones already."""
    waiting: deque = deque()
    size = 0  # of those that wait
    threads = ThreadPoolExecutor(THREADS)
    try:
        for image in images:
            waiting.append((image, threads.submit(read, image).result))
            size += image.size
            while len(waiting) > AHEAD or size > AHEAD_BYTES:
                size -= waiting[0][0].size
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        threads.shutdown(cancel_futures=True)


def open_raw(raw: "str | Path | Url") -> "Path | RemotePath":
    """RAW as given: a path, or a URL, whose objects are listed here.

    A URL may be a folder of a bucket, an object, or a pattern of objects, such as https://host/train-{000000..000999}.tar.
    """
    url = place(raw)
    if isinstance(url, Path):
        return url
    if "{" in str(url):
        return _expand(str(url))
    if url.scheme in ("http", "https") and not url.name.endswith(READABLE):
        raise UserError(f"{url}: a plain web server cannot be listed; give a .tar or .parquet file, or train-{{000..123}}.tar")
    if url.name.endswith(READABLE):
        return RemotePath(url.parent, {url.name: _head(url)}, url.name)
    versions: dict[str, ObjectVersion] = {}
    readable = False
    for name, version in store_of(url).list(url):
        if all(part[:1] not in ("", ".") for part in name.split("/")):
            versions[name] = version
            readable = readable or name.endswith(READABLE)
        if len(versions) > MAX_OTHERS and not readable:
            break
    if not versions:
        raise UserError(f"{url}: no objects below it; check the URL of the raw images")
    if not readable:
        raise UserError(f"{url}: {ONLY}, and it holds none; {REMEDY}")
    return RemotePath(url, versions)


def _head(url: Url) -> ObjectVersion:
    try:
        return store_of(url).head(url)
    except FileNotFoundError:
        raise UserError(f"{url}: no such object; check the URL of the raw images") from None


def _expand(pattern: str) -> RemotePath:
    """The objects of a pattern: {000..123} stands for numbers of so many digits, {a,b} for each of the words."""
    choices = []
    for inside in BRACES.findall(pattern):
        if match := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
            numbers = range(int(match[1]), int(match[2]) + 1)
            choices.append([f"{number:0{len(match[1])}d}" for number in numbers])
        else:
            choices.append(inside.split(","))
    root = pattern[: pattern.index("{")].rpartition("/")[0]
    texts = BRACES.split(pattern.removeprefix(f"{root}/"))[::2]
    names = ["".join(map("".join, zip(texts, (*chosen, "")))) for chosen in itertools.product(*choices)]
    if not names or not root.rpartition("://")[2]:
        raise UserError(f"{pattern}: a pattern of no object; write it as in https://HOST/FOLDER/train-{{000000..000999}}.tar")
    with ThreadPoolExecutor(THREADS) as threads:
        return RemotePath(Url(root), dict(zip(names, threads.map(lambda name: _head(Url(root) / name), names))))
