"""The tables of docs/clusters.md about reading from file systems in user space: what it costs, and what a failed read becomes."""

import mmap
import os
import sys
import time
from pathlib import Path

from tables.clusters_mounts import mounted
from tables.common import IMAGEFEED, ROOT, Table

requests = Table("requests", ["How 106,496 bytes of a file on bindfs are read, cold", "READ requests", "bytes asked for"])
RECORD, FROM = 106_496, 3_000_000


def counted(read):
    Path("back").mkdir()
    Path("back/shard").write_bytes(os.urandom(8_000_000))
    with open("log.txt", "wb+") as log, mounted("bindfs -d {folder} {at}", "back", log) as there:
        if not there:
            return []
        log.truncate(0)
        with open("one/shard", "rb") as file:
            read(file)
        time.sleep(0.5)
        lines = [
            line
            for line in Path("log.txt").read_text(errors="replace").splitlines()
            if line.strip().startswith("read[") and "flags" in line
        ]
        return [len(lines), f"{sum(int(line.split('] ')[1].split()[0]) for line in lines):,}"]


def by_map(*advice):
    def read(file):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
            start = FROM // mmap.PAGESIZE * mmap.PAGESIZE
            for each in advice:
                view.madvise(each, start, FROM + RECORD - start)
            bytes(view[FROM : FROM + RECORD])

    return read


def by_random_map(*advice):
    return by_map(mmap.MADV_RANDOM, *advice)


for label, read in {
    "`os.pread`": lambda file: os.pread(file.fileno(), RECORD, FROM),
    "a slice of a map": by_map(),
    "the same after `MADV_RANDOM`": by_random_map(),
    "the same after `MADV_RANDOM` and `MADV_WILLNEED`, as imagefeed does": by_random_map(mmap.MADV_WILLNEED),
}.items():
    requests.add(label, [])(lambda read=read: counted(read))


failed = Table("failed", ["A read error (EIO) in the middle of a file", "what the program gets"])
SIZE, BAD = 800_000, (400_000, 400_001)


def failing(label, packages):
    """Adds a row whose function reads a file "x" of 100,000 float64 of 1.0, or "x.jpg", of which a byte cannot be read."""

    def register(read):
        def measured():
            sys.path.append(str(ROOT))
            from tests import faultyfs

            if os.getuid() or not os.path.exists("/dev/fuse"):
                print("needs root and /dev/fuse")
                return []
            Path("disk").mkdir()
            Path("disk/x").write_bytes(b"\0\0\0\0\0\0\xf0\x3f" * (SIZE // 8))
            if "JPEG" in label or "images" in label:
                photograph("disk/raw/train/a/x.jpg")
                os.link("disk/raw/train/a/x.jpg", "disk/x.jpg")
            bad = {name: BAD for name in ("x", "x.jpg")}
            with faultyfs.mounted(Path("disk"), Path("mount"), eio=bad, direct=True):
                try:
                    return [read()]
                except Exception as error:  # the cell is which one
                    return [f"{type(error).__name__}: {str(error).replace(os.getcwd(), '...')}"]

        failed.add(label, packages)(measured)
        return read

    return register


def photograph(path):
    """A JPEG of noise of more than SIZE bytes."""
    import numpy as np
    from PIL import Image

    Path(path).parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)).save(path, quality=95)


@failing("`open(path, 'rb').read()` of Python 3.11", [])
def plain():
    return f"{len(open('mount/x', 'rb').read()):,} bytes"


@failing("`os.pread` of the whole file", [])
def by_pread():
    with open("mount/x", "rb", buffering=0) as file:
        return f"{len(os.pread(file.fileno(), SIZE, 0)):,} of {SIZE:,} bytes, no error; the next call fails"


@failing("`np.fromfile(path)` of NumPy 2.4.6", ["numpy==2.4.6"])
def by_numpy():
    import numpy as np

    values = np.fromfile("mount/x")
    right = int((values == 1).cumprod().sum())
    return f"**an array of {len(values):,} numbers, no error; only the first {right:,} were read**"


@failing("a JPEG by OpenCV 5.0.0.93, `imread`", ["numpy==2.4.6", "pillow==12.1.1", "opencv-python-headless==5.0.0.93"])
def by_opencv():
    import cv2
    import numpy as np

    image = cv2.imread("mount/x.jpg")
    same = (image == cv2.imread("disk/x.jpg")).all((1, 2))
    return f"**an image of {image.shape[1]} x {image.shape[0]}, no error; its lower {np.mean(~same):.0%} is missing**"


@failing("a JPEG by Pillow 12.1.1", ["numpy==2.4.6", "pillow==12.1.1"])
def by_pillow():
    from PIL import Image

    return f"an image of {Image.open('mount/x.jpg').convert('RGB').size}"


@failing("images by imagefeed, `build`", [IMAGEFEED])
def by_build():
    import imagefeed

    return f"{imagefeed.build('mount/raw', 'packed', size=64, workers=1).num_records} records"
