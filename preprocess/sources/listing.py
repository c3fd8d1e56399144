"""What a raw tree holds: the names and labels of its images, and where the bytes of each lie."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.preprocess.image import BadImage

# Where the bytes of an image lie: in which of the source's files, from which byte on, how many.
PLACE_DTYPE = np.dtype([("file", "<u4"), ("offset", "<u8"), ("size", "<u8")])
OWN_FILE = 2**32 - 1  # in place of a file's number: the image is a file of its own, at its path
MAX_BYTES = 1 << 29  # no image of the pixels that are allowed is larger; what is, is not even read
# What is the matter with one file alone. Other errors (EIO, ESTALE, EMFILE) are the machine's, and end the build.
UNREADABLE = {
    errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EINVAL
}  # fmt: skip


class SourceImage(NamedTuple):
    """`path` names the image in reports; its bytes are `size` from `offset` on of `file`, or all of it where size is -1.

    Both paths are relative to the root of the raw tree. `reason` says why it is bad where that is known beforehand.
    """

    path: str
    label: int
    file: str
    offset: int = 0
    size: int = -1
    reason: str = ""


@dataclass(frozen=True)
class SourceSplit:
    """The images of a split: names, labels (int32, NO_LABEL where it is not known), and PLACE_DTYPE rows where images lie
    inside other files. Plain strings in one list: 1,280,000 take about 150 MB, an object for each would double that.
    `reasons` tells, by place in the list, of images that are known to be bad.
    """

    paths: list[str]
    labels: np.ndarray
    places: np.ndarray | None = None
    reasons: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)


class Packed(Protocol):
    """A file of many images that cannot be read in place, such as a video; a frozen dataclass, whose repr identifies it.

    `num_images` is 0 where only unpacking tells.
    """

    file: str
    split: str
    num_images: int

    def read(self, root: Path) -> Iterator[tuple[str, int, bytes]]:
        """(name, label, bytes) of its images; raises BadImage, with the file's `label` kept, where the whole of it is bad."""


@dataclass(frozen=True)
class Source:
    """A raw tree: its splits, and its classes in the order of their labels.

    `titles` are what people call the classes, where the raw tree says it; `files` what the places of images refer to;
    `packed` what has to be unpacked before its images can be read; `options` those that decide what unpacking gives.
    """

    root: Path
    layout: str
    classes: tuple[str, ...]
    splits: dict[str, SourceSplit]
    titles: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    packed: tuple[Packed, ...] = ()
    options: dict[str, float] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return sum(self.count(split) for split in self.splits)

    def count(self, split: str) -> int:
        """The images of a split, those of packed files included as far as they are known."""
        return len(self.splits[split]) + sum(packed.num_images for packed in self.packed if packed.split == split)

    def images(self, split: str, order: np.ndarray) -> list[SourceImage]:
        found = self.splits[split]
        if found.places is None:
            return [SourceImage(found.paths[at], int(found.labels[at]), found.paths[at]) for at in order]
        return [
            SourceImage(found.paths[at], int(found.labels[at]), found.paths[at])
            if file == OWN_FILE
            else SourceImage(found.paths[at], int(found.labels[at]), self.files[file], offset, size, found.reasons.get(at, ""))
            for at, (file, offset, size) in zip(np.asarray(order).tolist(), found.places[order].tolist())
        ]

    def fingerprint(self) -> str:
        """A hash of all paths, labels and places: a build goes on only with the images it began with.

        Taken before packed files are unpacked, so that it is the same for a build that has done so.
        """
        digest = hashlib.sha256("\0".join((*self.classes, "", *self.files)).encode("utf-8", "surrogateescape"))
        for name, split in self.splits.items():
            digest.update(f"\0\0{name}\0".encode("utf-8", "surrogateescape"))
            digest.update("\0".join(split.paths).encode("utf-8", "surrogateescape"))
            digest.update(split.labels.tobytes())
            if split.places is not None:
                digest.update(split.places.tobytes())
        for packed in self.packed:
            digest.update(repr(packed).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def read_image(root: Path, image: SourceImage) -> bytes:
    """The bytes of an image as they are in the raw tree; fewer than its size where its file ends early.

    Raises BadImage with the reason where it cannot be read, or is no regular file.
    """
    if image.reason:
        raise BadImage(image.reason)
    try:
        # Not waiting: opening a named pipe would otherwise stop the worker for ever.
        handle = os.open(os.path.join(root, image.file), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise BadImage("cannot be read: its path holds a zero byte") from None
    except OSError as error:
        if error.errno in UNREADABLE:
            raise BadImage(f"cannot be read: {error.strerror}") from None
        raise
    try:
        status = os.fstat(handle)
        size = status.st_size if image.size < 0 else image.size
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("cannot be read: not a regular file")
        if size > MAX_BYTES:
            raise BadImage(f"{size} bytes are more than {MAX_BYTES}")
        return os.pread(handle, size, image.offset)
    finally:
        os.close(handle)


def scan(folder: Path | str) -> list[os.DirEntry]:
    """The entries of a folder by name, hidden ones left out."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no such folder; check the path of the raw images") from None
    except NotADirectoryError:
        raise UserError(f"{folder}: not a folder; give the folder that holds the raw images") from None


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a link to one; a link to itself is none, and rejected when it is to be read."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in UNREADABLE:
            return False
        raise
