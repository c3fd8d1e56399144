"""Files that are written whole or not at all, their hashes, and locks between processes."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from imagefeed.dataset.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` is whole or absent, even after a crash."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is synced and takes the name `path` at the end; an exception leaves nothing behind."""
    # The process id keeps a worker that outlived a killed run from writing into the file of the next run.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Has the new names in a folder survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Gives an OSError without a file name, as those of read(2) are, the name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_at(handle: int, size: int, offset: int, path: Path | str) -> bytes:
    """The `size` bytes of the open file `path` from `offset` on; fewer only if it ends before. An OSError names `path`.

    One pread(2) may give fewer: file systems in user space answer at most so much at a time, and Linux at most 2 GB.
    """
    with naming(path):
        data = os.pread(handle, size, offset)
        if len(data) == size:
            return data
        pieces = [data]
        while data:
            offset, size = offset + len(data), size - len(data)
            data = os.pread(handle, size, offset)
            pieces.append(data)
    return b"".join(pieces)


def read_file(path: Path | str) -> bytes:
    """The content of a file. An OSError names it."""
    with naming(path), open(path, "rb") as file:
        return file.read()


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. An OSError names the file."""
    with naming(path), open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, sentence: str, shared: bool = False) -> Iterator[int]:
    """Holds a lock on `path`, a folder or a file, which is created if it does not exist.

    Raises UserError(sentence) if another process holds the lock; any number may hold it `shared`. The lock ends with the
    process, however that ends. Its holder may delete the file. Yields the descriptor, for `try_lock`.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        here = False
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not try_lock(handle, shared):
                raise UserError(sentence)
            with contextlib.suppress(FileNotFoundError):
                here = os.path.samestat(os.stat(path), os.fstat(handle))
            if here:  # else the last holder has just deleted the file, and the lock excludes nobody
                yield handle
                return
        finally:
            os.close(handle)


def try_lock(handle: int, shared: bool = False) -> bool:
    """Takes the lock, or changes the kind of one that is held; False if another process is in the way."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
