"""Files that are written whole or not at all, their hashes, and locks between processes."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

from imagefeed.dataset.errors import UserError, reason_of

TEMPORARY = re.compile(r"\.(.+?)\.(?:([A-Za-z0-9_-]+)\.[0-9a-f]{8}|\d+)\.tmp")  # the name to be, and the owner
ABANDONED_S = 3600  # even a slow disk takes some bytes every few minutes
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_owner: ContextVar[str] = ContextVar("owner", default="")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` is whole or absent, even after a crash."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is synced and takes the name `path` at the end; an exception leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{owner()}.{secrets.token_hex(4)}.tmp")
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


def owner() -> str:
    """Who owns the temporary files that this process makes: the host, and the part of a build (see `owned`).

    Their names hold it, and a random word: other machines write into the same folder, in containers each process may have the
    id 1, and a worker that outlived a killed run must not write into the file of the next run.
    """
    return _owner.get() or re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]


@contextlib.contextmanager
def owned(name: str) -> Iterator[None]:
    """Has temporary files belong to `name`."""
    token = _owner.set(name)
    try:
        yield
    finally:
        _owner.reset(token)


def temporaries(folder: Path) -> Iterator[tuple[Path, str]]:
    """The temporary files in a folder and their owners; "" for those of imagefeed 0.1."""
    for path in folder.glob(".*.tmp"):
        if match := TEMPORARY.fullmatch(path.name):
            yield path, match[2] or ""


def remove_temporaries(folder: Path) -> None:
    """Removes the temporary files of this owner, whose other processes must have ended, and those that nobody has written to for
    ABANDONED_S."""
    others = []
    for path, name in temporaries(folder):
        if name == owner():
            path.unlink(missing_ok=True)
        else:
            others.append(path)
    now_s = time_of(folder) if others else 0
    for path in others:
        with contextlib.suppress(FileNotFoundError):
            if now_s - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


def check_append(folder: Path) -> None:
    """Raises UserError if files in a folder cannot be appended to: mounts of object stores say so only at the first write."""
    path = folder / f".append.{owner()}.{secrets.token_hex(4)}.tmp"
    try:
        path.write_bytes(b"1")
        try:
            with open(path, "ab", buffering=0) as file:
                file.write(b"2")
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            raise UserError(
                f"{folder}: its file system does not append to files ({reason_of(error)}), as a training must; mount it "
                "with a write cache (rclone: --vfs-cache-mode writes), or choose another folder"
            ) from None
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def time_of(folder: Path) -> float:
    """The time by the clock of a folder's file system, which may be another machine's."""
    path = folder / f".clock.{owner()}.{secrets.token_hex(4)}.tmp"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


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
            try:
                free = try_lock(handle, shared)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                raise UserError(
                    f"{path}: its file system has no file locks ({reason_of(error)}); mount it with them (Lustre: -o flock), or "
                    "choose another folder"
                ) from None
            if not free:
                raise UserError(sentence)
            with contextlib.suppress(FileNotFoundError):
                here = os.path.samestat(os.stat(path), os.fstat(handle))
            if here:  # else the last holder has just deleted the file, and the lock excludes nobody
                yield handle
                return
        finally:
            # A mount without a write cache (rclone) says only here that it opens no existing file to write. Nothing was written.
            with contextlib.suppress(OSError):
                os.close(handle)


def try_lock(handle: int, shared: bool = False) -> bool:
    """Takes the lock, or changes the kind of one that is held; False if another process is in the way."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
