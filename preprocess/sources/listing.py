"""Lists of images: the name, the label and the place of the bytes of each image in a raw tree."""

import contextlib
import errno
import functools
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from imagefeed.dataset.columns import Column
from imagefeed.dataset.decision import Decision
from imagefeed.dataset.errors import UserError
from imagefeed.dataset.files import naming, read_at, read_file
from imagefeed.dataset.records import NO_LABEL
from imagefeed.preprocess.image import BadImage
from imagefeed.preprocess.sources.columns import digest
from imagefeed.preprocess.sources.remote import ReadAhead, RemotePath, read_ahead

# The place of an image's bytes: the number of the source's file, the first byte, the number of bytes.
PLACE_DTYPE = np.dtype([("file", "<u4"), ("offset", "<u8"), ("size", "<u8")])
OWN_FILE = 2**32 - 1  # instead of a file's number: the image is a file of its own, at its path
MAX_BYTES = 1 << 29  # larger files are not read: no image with an accepted number of pixels is this large
TOO_LARGE = f"{{}} bytes are more than {MAX_BYTES}"
# Errors of a single file. Others (EIO, ESTALE, EMFILE) are faults of the machine and end the build.
UNREADABLE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EINVAL}


READ_AT_ONCE = 1 << 20

Stamp = tuple[int, int]  # the size and the modification time (ns) of a file
NO_STAMP = -1, 0  # of a file that cannot be read
Root = Path | RemotePath
R = TypeVar("R", bound=Root)


class SourceImage(NamedTuple):
    """The bytes of an image are the `size` bytes of `file` at `offset`. Both paths are relative to the root of the raw tree."""

    path: str  # for reports
    label: int
    file: str
    offset: int = 0
    size: int = -1  # the whole file
    reason: str = ""  # why the image is bad, if the listing already knows
    note: str = ""  # for the report


@dataclass(frozen=True)
class SourceSplit:
    """The images of a split, as columns: 1,280,000 paths take about 150 MB, and an object for each would double that."""

    paths: list[str]
    labels: np.ndarray  # int32, NO_LABEL if unknown
    places: np.ndarray | None = None  # PLACE_DTYPE, if images lie inside other files
    reasons: dict[int, str] = field(default_factory=dict)  # why an image is bad, by its position
    notes: dict[int, str] = field(default_factory=dict)  # notes on the file that an image was unpacked from, likewise
    columns: dict[str, Column] = field(default_factory=dict)  # with the values of packed images, too

    def __len__(self) -> int:
        return len(self.paths)


class Packed(Protocol):
    """A file of many images that cannot be read in place, such as a video. A frozen dataclass, identified by its repr.

    `num_images` is 0 if only unpacking can tell.
    """

    file: str
    split: str
    num_images: int

    def read(self, root: Root) -> Generator[tuple[str, int, bytes] | None, None, str | None]:
        """Yields (name, label, bytes) of its images, or None to take back all images so far; may return a note for the report.
        Raises BadImage if the whole file is bad; it is then one image with its `label`."""


@dataclass(frozen=True)
class PackedTask:
    """A packed file for a worker to read."""

    root: Root
    packed: Packed

    def __str__(self) -> str:
        return self.packed.file

    def read(self, add: Callable[[str, int, bytes], None], take_back: Callable[[], None]) -> tuple[str, str]:
        """Calls `add` with each image, and `take_back` if those so far must not be used. Returns the reason if the whole file is
        bad, after which none of its images count, else the note for the report.

        How many images precede an error may depend on timing.
        """
        images = self.packed.read(self.root)
        try:
            while True:
                image = next(images)
                take_back() if image is None else add(*image)
        except StopIteration as end:
            return "", end.value or ""
        except BadImage as error:
            take_back()
            return str(error), ""


class ListedPacked(Packed, Protocol):
    """A packed file of a listing, whose labels are positions in the listing's `names`."""

    def decided(self, split: str, labels: Sequence[int]) -> Packed:
        """The same file once its split has a name, and the class `names[n]` of its listing the label `labels[n]`."""


@dataclass
class Listing:
    """Images as a layout finds them, all of one split, as columns; `decide` (decide.py) makes a Source of all listings.

    `names[codes[n]]` is the class of image n, and a code of -1 says that it is unknown. `split` is the name that the raw tree
    gives the split, None if it gives none. `folder`, relative to the root, holds the class folders `names`, if there are any.
    """

    split: str | None
    paths: list[str]
    names: tuple[str, ...]
    codes: np.ndarray  # int32
    places: np.ndarray | None = None  # PLACE_DTYPE, if images lie inside other files
    reasons: dict[int, str] = field(default_factory=dict)  # why an image is bad, by its position
    packed: tuple[ListedPacked, ...] = ()  # files to unpack; their classes are `names` too
    packed_unlabeled: int = 0  # how many images of `packed` are of unknown class
    packed_names: Collection[str] = ()  # the classes of the others
    folder: str | None = None
    columns: Mapping[str, Sequence] = field(default_factory=dict)  # values of all its images, those of packed files last

    @property
    def num_images(self) -> int:
        """The number of images, as far as it is known before files are unpacked."""
        return len(self.paths) + sum(packed.num_images for packed in self.packed)


@dataclass
class RawTree:
    """All listings of a raw tree, in the order of its splits. `order` has the class names in label order, if a file of the tree
    gives it; a listed class missing there is an error. `skipped` counts the skipped files by kind."""

    root: Root
    layout: str
    listings: list[Listing]
    order: tuple[str, ...] = ()
    titles: dict[str, str] = field(default_factory=dict)  # common names by class
    files: tuple[str, ...] = ()  # those that places refer to
    skipped: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)  # what the user may not expect; without the path of the root


class Unpacked(NamedTuple):
    """The result of unpacking a file. Its images come last in its split, after those of earlier packed files."""

    file: str
    split: str
    num_images: int
    stamp: Stamp  # of the packed file


@dataclass(frozen=True)
class Source:
    """A raw tree, with everything decided."""

    root: Root
    layout: str
    classes: tuple[str, ...]  # in the order of their labels
    splits: dict[str, SourceSplit]
    titles: tuple[str, ...] = ()  # common names of the classes, if the tree has them
    files: tuple[str, ...] = ()  # those that places refer to
    packed: tuple[Packed, ...] = ()  # files to unpack before their images can be read, as `options` say
    unpacked: tuple[Unpacked, ...] = ()  # instead of `packed`, once they are
    options: dict[str, Any] = field(default_factory=dict)  # options of the build that determine its images, besides the listing
    decision: Decision = field(default_factory=Decision)

    @property
    def statistics_split(self) -> str:
        """The split of the statistics: the training split, if there is one."""
        return self.decision.train_split or next(iter(self.splits))

    @property
    def num_images(self) -> int:
        return sum(self.count(split) for split in self.splits)

    def count(self, split: str) -> int:
        """The number of images of a split, including those of packed files as far as it is known."""
        return len(self.splits[split]) + sum(packed.num_images for packed in self.packed if packed.split == split)

    def images(self, split: str, order: np.ndarray) -> list[SourceImage]:
        found = self.splits[split]
        images = [SourceImage(found.paths[at], int(found.labels[at]), found.paths[at]) for at in order]
        if found.places is None:
            return images
        return [
            image
            if file == OWN_FILE
            else SourceImage(
                image.path, image.label, self.files[file], offset, size, found.reasons.get(at, ""), found.notes.get(at, "")
            )
            for image, at, (file, offset, size) in zip(images, np.asarray(order).tolist(), found.places[order].tolist())
        ]

    def column_digests(self) -> dict[str, str]:
        """A hash of the values of each column."""
        names = [name for split in self.splits.values() for name in split.columns]
        return {name: digest(split.columns[name] for split in self.splits.values()) for name in dict.fromkeys(names)}

    def fingerprint(self) -> str:
        """A hash of all paths, labels, places and columns: a build resumes only with the images it began with.

        Taken before packed files are unpacked, so that it does not depend on how far a build has come.
        """
        found = hashlib.sha256("\0".join((*self.classes, "", *self.files)).encode("utf-8", "surrogateescape"))
        for name, split in self.splits.items():
            found.update(f"\0\0{name}\0".encode("utf-8", "surrogateescape"))
            found.update("\0".join(split.paths).encode("utf-8", "surrogateescape"))
            found.update(split.labels.tobytes())
            if split.places is not None:
                found.update(split.places.tobytes())
        for packed in self.packed:
            found.update(repr(packed).encode("utf-8", "surrogateescape"))
        if columns := self.column_digests():
            found.update(repr(columns).encode())
        return found.hexdigest()


def read_images(root: Root, images: Iterable[SourceImage]) -> Iterator[tuple[SourceImage, Callable[[], tuple[bytes, Stamp]]]]:
    """Each image with a function that does `read_stamped` of it; those of a URL are fetched ahead."""
    read = functools.partial(read_stamped, root)
    if isinstance(root, RemotePath):
        return read_ahead(read, images)
    return ((image, functools.partial(read, image)) for image in images)


def read_image(root: Root, image: SourceImage) -> bytes:
    """The bytes of an image, fewer than its size if the file ends early. Raises BadImage if it cannot be read."""
    return read_stamped(root, image)[0]


def read_stamped(root: Root, image: SourceImage) -> tuple[bytes, Stamp]:
    """The bytes of an image, as `read_image` gives them, and the stamp of the file that they lie in.

    A read that fails says nothing of the image, so its OSError ends the build.
    """
    if image.reason:
        raise BadImage(image.reason)
    if isinstance(root, RemotePath) and not os.path.isabs(image.file):  # as those are that were unpacked
        if image.size > MAX_BYTES:
            raise BadImage(TOO_LARGE.format(image.size))
        file = root / image.file
        return file.read(image.size, image.offset), file.stamp
    path = os.path.join(str(root), image.file)
    try:
        # O_NONBLOCK, because opening a named pipe would otherwise block the worker forever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
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
            raise BadImage(TOO_LARGE.format(size))
        return read_at(handle, size, image.offset, path), (status.st_size, status.st_mtime_ns)
    finally:
        os.close(handle)


def read_through(path: str) -> None:
    """Reads a file of any size, to raise the OSError that another reader may have taken for the end or for damage."""
    with naming(path), open(path, "rb", buffering=0) as file:
        while file.read(READ_AT_ONCE):
            pass


@contextlib.contextmanager
def opened(path: Root) -> Iterator[tuple[Callable[[int, int], bytes], int]]:
    """A function (size, offset) that reads a file, and its size."""
    if isinstance(path, RemotePath):
        yield ReadAhead(path), path.size
    else:
        with open(path, "rb", buffering=0) as file:
            yield functools.partial(read_at, file.fileno(), path=file.name), os.fstat(file.fileno()).st_size


def read_raw(path: Root) -> bytes:
    """The content of a file."""
    return path.read_bytes() if isinstance(path, RemotePath) else read_file(path)


def stamp_of(root: Root, name: str) -> Stamp:
    """The stamp of a file below `root`; at a URL, the one it had when RAW was listed."""
    if isinstance(root, Path) or os.path.isabs(name):
        return file_stamp(os.path.join(str(root), name))
    return (root / name).stamp


def file_stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except ValueError:  # a zero byte in the path
        return NO_STAMP
    except OSError as error:
        if error.errno in UNREADABLE:
            return NO_STAMP
        raise
    return status.st_size, status.st_mtime_ns


def list_folder(folder: Root | str) -> tuple[list[str], list[str]]:
    """The names of the files and of the folders in a folder, sorted, without hidden ones. Links to folders are folders."""
    if isinstance(folder, RemotePath):
        return folder.list()
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                try:
                    (folders if entry.is_dir() else files).append(name)
                except OSError as error:  # a link to itself counts as a file, which is rejected when it is read
                    if error.errno not in UNREADABLE:
                        raise
                    files.append(name)
    except FileNotFoundError:
        raise UserError(f"{folder}: no such folder; check the path of the raw images") from None
    except NotADirectoryError:
        raise UserError(f"{folder}: not a folder; give the folder that holds the raw images") from None
    files.sort()
    folders.sort()
    return files, folders


def find_files(root: R, suffixes: str | tuple[str, ...]) -> tuple[R, list[str]]:
    """The folder and the names of the files in `root` with one of the suffixes; `root` may also be one such file."""
    if root.is_file():
        return root.parent, [root.name]  # type: ignore[return-value]
    return root, [name for name in list_folder(root)[0] if name.endswith(suffixes) and (root / name).is_file()]


def list_images(split: str | None, paths: list[str], names: Sequence[str | None] | None, folder: str | None = None) -> Listing:
    """A listing of images that each have a class in `names`, or that are all of unknown class."""
    return Listing(split, paths, *code_classes([None] * len(paths) if names is None else names), folder=folder)


def code_classes(names: Sequence[str | None]) -> tuple[tuple[str, ...], np.ndarray]:
    """The different classes, and the position among them (int32) of each of `names`; NO_LABEL for None and "", unknown ones."""
    classes = tuple(dict.fromkeys(name for name in names if name))
    code_of: dict[str | None, int] = {None: NO_LABEL, "": NO_LABEL}
    code_of |= {name: code for code, name in enumerate(classes)}
    return classes, np.array([code_of[name] for name in names], np.int32)
