"""The table of docs/clusters.md about file systems in user space (FUSE): what works on a mount.

Each mounts a folder of this machine twice, as two machines would, in a mount namespace that ends with the measurement.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tables.common import IMAGEFEED, ROOT, Table

SFTP = "sshfs x:{folder} {at} -f -o '%sdir_cache=no,ssh_command=sh -c /usr/lib/openssh/sftp-server'"
RCLONE = "rclone mount --dir-cache-time 0 --attr-timeout 0 {folder} {at}"
SYSTEMS = {
    "bindfs 1.14.7": "bindfs -f {folder} {at}",
    "sshfs 3.7.3": SFTP % "",
    "the same, `direct_io`": SFTP % "direct_io,",
    "mergerfs 2.33.5": "mergerfs -f {folder} {at}",
    "gocryptfs 2.3": "gocryptfs -q -fg -sharedstorage -extpass echo -extpass secret {folder} {at}",
    "rclone 1.60.1 `mount`": RCLONE,
    "the same, `--vfs-cache-mode writes`": RCLONE + " --vfs-cache-mode writes --vfs-write-back 0 --cache-dir {at}-cache",
}
WAIT_S = 20


@contextlib.contextmanager
def mounted(command, folder, log=None):
    """Mounts `folder` by `command` at ./one and ./two; yields whether it could."""
    words = shlex.split(command)
    program = words[0]
    if os.getuid() or not os.path.exists("/dev/fuse") or not shutil.which(program):
        print(f"needs root, /dev/fuse and {program}: apt-get install {program} openssh-sftp-server")
        yield False
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None):  # a mount namespace, private
        raise OSError(ctypes.get_errno(), "no mount namespace")
    Path(folder).mkdir(exist_ok=True)
    if program == "gocryptfs":
        init = ["gocryptfs", "-q", "-init", "-extpass", "echo", "-extpass", "secret", folder]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
    running = []
    try:
        for at in ("one", "two"):
            Path(at).mkdir()
            line = [word.format(folder=os.path.abspath(folder), at=os.path.abspath(at)) for word in words]
            running.append(subprocess.Popen(line, stdout=log or subprocess.DEVNULL, stderr=log or subprocess.DEVNULL))
            until = time.monotonic() + WAIT_S
            while not os.path.ismount(at):
                if time.monotonic() > until:
                    raise RuntimeError(f"{' '.join(line)} does not mount")
                time.sleep(0.05)
        yield True
    finally:
        for at in ("one", "two"):
            subprocess.run(["umount", "-l", at], check=False, stderr=subprocess.DEVNULL)
        for process in running:
            process.terminate()


def outcome(work):
    """ "yes", or how it fails."""
    try:
        return work() or "yes"
    except Exception as error:  # the cell is which one
        text = str(error).strip().splitlines()[-1] if str(error).strip() else ""
        if isinstance(error, OSError) and error.errno:
            text = os.strerror(error.errno)
        return f"**{type(error).__name__}**: {text[:60]}" if text else f"**{type(error).__name__}**"


def second_lock(other):
    with open("one/lock", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        time.sleep(1.2)
        try:
            with open(f"{other}/lock") as second:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "refused"
    return "**granted**"


def exclusive():
    with open("one/once", "w"):
        time.sleep(1.2)
        try:
            with open("two/once", "x"):
                return "**created twice**"
        except FileExistsError:
            return "refused"


def mapped(access):
    Path("one/map").write_bytes(bytes(100_000))
    with open("one/map", "rb") as file, mmap.mmap(file.fileno(), 0, **access) as view:
        view[50_000]


def appended():
    Path("one/append").write_text("a")
    with open("one/append", "a") as file:
        file.write("b")
    return "yes" if Path("one/append").read_text() == "ab" else "**lost**"


def saved(kind):
    import numpy as np

    if kind == "npz":
        np.savez("one/x.npz", np.zeros(10))
        return None
    if kind == "safetensors":
        from safetensors.numpy import save_file

        return save_file({"x": np.zeros(10)}, "one/x.safetensors")
    import sqlite3

    with contextlib.closing(sqlite3.connect("one/x.db")) as base:
        base.execute("create table x (y)")
        base.commit()
    return None


def removed():
    os.mkdir("one/folder")
    with open("one/folder/open", "w"):
        shutil.rmtree("one/folder")


def linked():
    Path("one/target").write_text("x")
    os.link("one/target", "one/hard")


def built():
    """Builds a dataset on the mount, verifies it and reads it through the other one."""
    import numpy as np
    from PIL import Image

    for number in range(40):
        folder = Path(f"raw/train/class{number % 2}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), number, np.uint8)).save(folder / f"{number}.png")
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    for words in ("build raw one/out --workers 1 --size 32", "verify two/out --workers 1"):
        done = subprocess.run(
            [sys.executable, "-m", "imagefeed", *words.split()], env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return f"**{done.stderr.strip().splitlines()[-1].removeprefix('Error: ')}**"
    import imagefeed

    with imagefeed.ImageLoader("two/out", "train", crop_size=32, batch_size=8) as loader:
        if sum(len(images) for images, _ in loader) != 40:
            raise RuntimeError("records are missing")
    return "yes"


OPERATIONS = {
    "`flock` of a file that this machine holds": lambda: second_lock("one"),
    "`flock` of a file that another machine holds": lambda: second_lock("two"),
    "`open(path, 'x')` 1.2 s after another machine's, which is still open": exclusive,
    "`mmap` with `ACCESS_READ`, `np.memmap(mode='r')`": lambda: mapped({"access": mmap.ACCESS_READ}),
    "`mmap` with `ACCESS_COPY` (`MAP_PRIVATE`)": lambda: mapped({"access": mmap.ACCESS_COPY}),
    "append to a file": appended,
    "`os.link`": linked,
    "`shutil.rmtree` of a folder with a file that is open": removed,
    "`np.savez`": lambda: saved("npz"),
    "safetensors 0.8.0, `save_file`": lambda: saved("safetensors"),
    "sqlite, a new database": lambda: saved("sqlite"),
    "imagefeed `build`; `verify` and `ImageLoader` through the other mount": built,
}
mounts = Table("mounts", ["What is done"], list(OPERATIONS))
PACKAGES = [IMAGEFEED, "--no-deps safetensors==0.8.0"]


def column(name):
    with mounted(SYSTEMS[name], "back") as there:
        return [outcome(work) for work in OPERATIONS.values()] if there else []


for name in SYSTEMS:
    mounts.add(name, PACKAGES)(lambda name=name: column(name))
