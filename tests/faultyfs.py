"""A file system that fails: the files of a folder, read-only, with faults in chosen places.

    with faultyfs.mounted(folder, tmp_path / "mount", short=4096, eio={"x.jpg": (40_000, 60_000)}) as root: ...

`short`: a read gives at most so many bytes (direct_io, as the page cache would take a short read for the end of the file).
`eio`: reading these bytes of the files of that name fails. `direct`: direct_io, which refuses shared memory maps.
It speaks the kernel's protocol itself (include/uapi/linux/fuse.h), so tests need only /dev/fuse and the right to mount.
"""

import contextlib
import ctypes
import errno
import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_NOSUID, MS_NODEV, MNT_DETACH = 1, 2, 4, 2
LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 5, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, BATCH_FORGET = 25, 26, 27, 28, 29, 42
DIRECT_IO, KEEP_CACHE = 1, 2
MAX_REQUEST = 1 << 20


@contextlib.contextmanager
def mounted(folder, at, **faults):
    """Yields `at`, where the file system is mounted. Skips the test where this is not possible."""
    at.mkdir(exist_ok=True)
    command = [sys.executable, "-S", __file__, str(folder), str(at), json.dumps(faults)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        if server.stdout.readline() != b"mounted\n":
            import pytest  # half a second, which the server does not need

            pytest.skip(f"no FUSE here: {server.communicate()[1].decode().strip()[-200:]}")
        yield at
    finally:
        LIBC.umount2(os.fsencode(at), MNT_DETACH)
        server.terminate()
        server.communicate()


def serve(folder, at, faults):
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},max_read={MAX_REQUEST}".encode()
    if LIBC.mount(b"faulty", os.fsencode(at), b"fuse", MS_RDONLY | MS_NOSUID | MS_NODEV, options):
        raise OSError(ctypes.get_errno(), "cannot mount")
    print("mounted", flush=True)
    paths, numbers = {1: folder}, {folder: 1}  # by node number, and back
    files = {}  # by handle
    while True:
        try:
            request = os.read(device, MAX_REQUEST + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                return
            if error.errno in (errno.ENOENT, errno.EINTR):
                continue
            raise
        _, kind, unique, node = struct.unpack_from("<IIQQ", request)
        if kind in (FORGET, BATCH_FORGET):
            continue
        try:
            code, answer = 0, respond(kind, node, request[40:], paths, numbers, files, faults)
        except OSError as error:
            code, answer = -error.errno, b""
        with contextlib.suppress(FileNotFoundError):  # the one who asked is gone
            os.write(device, struct.pack("<IiQ", 16 + len(answer), code, unique) + answer)


def respond(kind, node, body, paths, numbers, files, faults):
    if kind == INIT:
        return struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 17, 0, 16, 12, 1 << 17, 1, 0, 0, 0)
    if kind == STATFS:
        return bytes(40) + struct.pack("<III28x", 4096, 255, 4096)
    path = paths[node]
    valid_s = 0 if faults.get("short") else 1  # the kernel sets the size that it remembers to where a short read ends
    if kind == LOOKUP:
        path = os.path.join(path, os.fsdecode(body.rstrip(b"\0")))
        found = attributes(path)
        number = numbers.setdefault(path, len(numbers) + 1)
        paths[number] = path
        return struct.pack("<QQQQII", number, 0, 1, valid_s, 0, 0) + found
    if kind == GETATTR:
        return struct.pack("<QII", valid_s, 0, 0) + attributes(path)
    if kind == READLINK:
        return os.fsencode(os.readlink(path))
    if kind in (OPEN, OPENDIR):
        handle = os.open(path, os.O_RDONLY)
        files[handle] = None if kind == OPEN else [".", "..", *sorted(os.listdir(path))]
        return struct.pack("<QII", handle, DIRECT_IO if faults.get("direct") or faults.get("short") else 0, 0)
    if kind in (RELEASE, RELEASEDIR):
        (handle,) = struct.unpack_from("<Q", body)
        del files[handle]
        os.close(handle)
        return b""
    if kind == FLUSH:
        return b""
    if kind == READ:
        handle, offset, size = struct.unpack_from("<QQI", body)
        begin, end = faults.get("eio", {}).get(os.path.basename(path), (0, 0))
        if begin < offset + size and offset < end:
            raise OSError(errno.EIO, "injected")
        return os.pread(handle, min(size, faults.get("short", size)), offset)
    if kind == READDIR:
        handle, offset, size = struct.unpack_from("<QQI", body)
        entries = b""
        for number, name in enumerate(files[handle][offset:], offset + 1):
            data = os.fsencode(name)
            entry = struct.pack("<QQII", 1, number, len(data), 0) + data + bytes(-len(data) % 8)
            if len(entries) + len(entry) > size:
                break
            entries += entry
        return entries
    raise OSError(errno.ENOSYS, "not here")


def attributes(path):
    found = os.lstat(path)
    times = found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns
    seconds, rests = zip(*(divmod(time, 10**9) for time in times), strict=True)
    mode = found.st_mode & ~0o222 if stat.S_ISREG(found.st_mode) else found.st_mode
    owner = found.st_nlink, found.st_uid, found.st_gid, 0, 4096, 0
    return struct.pack("<6Q10I", found.st_ino, found.st_size, found.st_blocks, *seconds, *rests, mode, *owner)


if __name__ == "__main__":
    serve(str(Path(sys.argv[1]).resolve()), sys.argv[2], json.loads(sys.argv[3]))
