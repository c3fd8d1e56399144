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


class SourceImage(NamedTuple):
    """`path` is relative to the root of the raw tree, and the image's name in reports."""

    path: str
    label: int


@dataclass(frozen=True)
class Source:
    """A raw tree: for each split the sorted paths of its images and their labels, 0-based in sorted class name order.

    Paths are plain strings in one list for each split: 1,280,000 of them take about 150 MB, objects would take twice that.
    """

    root: Path
    layout: str
    classes: tuple[str, ...]
    paths: dict[str, list[str]]
    labels: dict[str, np.ndarray]

    @property
    def num_images(self) -> int:
        return sum(map(len, self.paths.values()))

    def images(self, split: str, order: np.ndarray) -> list[SourceImage]:
        paths, labels = self.paths[split], self.labels[split]
        return [SourceImage(paths[at], int(labels[at])) for at in order]

    def fingerprint(self) -> str:
        """A hash of all paths and labels: a build goes on only with the images it began with."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for split, paths in self.paths.items():
            digest.update(f"\0\0{split}\0".encode("utf-8", "surrogateescape"))
            digest.update("\0".join(paths).encode("utf-8", "surrogateescape"))
            digest.update(self.labels[split].tobytes())
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
    classes = sorted({name for found in splits.values() for name in found})
    label_of = {name: label for label, name in enumerate(classes)}
    paths: dict[str, list[str]] = {}
    labels: dict[str, np.ndarray] = {}
    for name, found in splits.items():
        paths[name] = []
        counts = []
        for folder in found.values():
            images = _files(folder, os.path.relpath(folder, root), ())
            if not images:
                raise UserError(f"{folder}: the class has no images; put some in, or remove the folder")
            paths[name] += images
            counts.append(len(images))
        labels[name] = np.repeat(np.array([label_of[class_name] for class_name in found], np.int32), counts)
    return Source(root, "folders", tuple(classes), paths, labels)


def read_image(root: Path, image: SourceImage) -> bytes:
    """The bytes of an image as they are in the raw tree."""
    with open(os.path.join(root, image.path), "rb", buffering=0) as file:
        return file.read()


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
