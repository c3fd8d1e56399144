"""Finds the images of a raw tree and their labels, without opening one of them.

A layout is folders of classes, RAW/CLASS/IMAGE, or of splits of those, RAW/SPLIT/CLASS/IMAGE. Links are followed.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preprocess.errors import UserError

# Where the bytes of an image lie: in which of the source's files, from which byte on, how many.
PLACE_DTYPE = np.dtype([("file", "<u4"), ("offset", "<u8"), ("size", "<u8")])
NO_LABEL = -1


class SourceImage(NamedTuple):
    """`path` names the image in reports; its bytes are `size` from `offset` on of `file`, or all of it where size is -1.

    Both paths are relative to the root of the raw tree.
    """

    path: str
    label: int
    file: str
    offset: int = 0
    size: int = -1


@dataclass(frozen=True)
class SourceSplit:
    """The images of a split: names, labels (int32, NO_LABEL where it is not known), and PLACE_DTYPE rows where images lie
    inside other files. Plain strings in one list: 1,280,000 take about 150 MB, an object for each would double that.
    """

    paths: list[str]
    labels: np.ndarray
    places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Source:
    """A raw tree: its splits, and its classes in the order of their labels.

    `titles` are what people call the classes, where the raw tree says it; `files` what the places of images refer to.
    """

    root: Path
    layout: str
    classes: tuple[str, ...]
    splits: dict[str, SourceSplit]
    titles: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def num_images(self) -> int:
        return sum(map(len, self.splits.values()))

    def images(self, split: str, order: np.ndarray) -> list[SourceImage]:
        found = self.splits[split]
        if found.places is None:
            return [SourceImage(found.paths[at], int(found.labels[at]), found.paths[at]) for at in order]
        return [
            SourceImage(found.paths[at], int(found.labels[at]), self.files[file], offset, size)
            for at, (file, offset, size) in zip(order, found.places[order].tolist())
        ]

    def fingerprint(self) -> str:
        """A hash of all paths, labels and places: a build goes on only with the images it began with."""
        digest = hashlib.sha256("\0".join((*self.classes, "", *self.files)).encode("utf-8", "surrogateescape"))
        for name, split in self.splits.items():
            digest.update(f"\0\0{name}\0".encode("utf-8", "surrogateescape"))
            digest.update("\0".join(split.paths).encode("utf-8", "surrogateescape"))
            digest.update(split.labels.tobytes())
            if split.places is not None:
                digest.update(split.places.tobytes())
        return digest.hexdigest()


def find_images(root: Path, split: str | None = None) -> Source:
    """Lists the images below `root`; with `split`, its folders are the classes of that one split.

    Raises UserError where the layout is none of those known, or a class is empty.
    """
    folders = _folders(root)
    if not folders:
        raise UserError(
            f"{root}: no folders in it; images are expected as {root}/train/CLASS/IMAGE or {root}/CLASS/IMAGE"
        )
    if split is not None:
        splits = {split: folders}
    elif all(_holds_folders(folder) for folder in folders.values()):
        splits = {name: _folders(folder) for name, folder in folders.items()}
    else:
        raise UserError(
            f"{root}: its folders hold images, so they are classes and not splits; say which split they are, "
            "as in: --split train"
        )
    classes = tuple(sorted({name for found in splits.values() for name in found}))
    label_of = {name: label for label, name in enumerate(classes)}
    return Source(
        root, "folders", classes, {name: _list_split(root, found, label_of) for name, found in splits.items()}
    )


def read_image(root: Path, image: SourceImage) -> bytes:
    """The bytes of an image as they are in the raw tree; fewer than its size where its file ends early."""
    with open(os.path.join(root, image.file), "rb", buffering=0) as file:
        if image.size < 0:
            return file.read()
        return os.pread(file.fileno(), image.size, image.offset)


def _list_split(root: Path, folders: dict[str, Path], label_of: dict[str, int]) -> SourceSplit:
    paths: list[str] = []
    counts = []
    for folder in folders.values():
        images = _files(folder, os.path.relpath(folder, root), ())
        if not images:
            raise UserError(f"{folder}: the class has no images; put some in, or remove the folder")
        paths += images
        counts.append(len(images))
    return SourceSplit(paths, np.repeat(np.array([label_of[name] for name in folders], np.int32), counts))


def _scan(folder: Path | str) -> list[os.DirEntry]:
    """Entries by name, hidden ones left out."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no such folder; check the path of the raw images") from None
    except NotADirectoryError:
        raise UserError(f"{folder}: not a folder; give the folder that holds the raw images") from None


def _folders(folder: Path) -> dict[str, Path]:
    return {entry.name: Path(entry.path) for entry in _scan(folder) if entry.is_dir()}


def _holds_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in _scan(folder))


def _files(folder: Path | str, prefix: str, above: tuple[tuple[int, int], ...]) -> list[str]:
    """Paths of all files below a class's folder; `above` holds the folders on the way, to end loops of links.

    A link that leads nowhere is listed too: it is then rejected by name, not passed over in silence.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return []
    found: list[str] = []
    for entry in _scan(folder):
        path = f"{prefix}/{entry.name}"
        if entry.is_dir():
            found += _files(entry.path, path, (*above, here))
        else:
            found.append(path)
    return found
