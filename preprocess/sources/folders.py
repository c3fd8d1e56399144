"""The images of folders: RAW/CLASS/IMAGE, RAW/SPLIT/CLASS/IMAGE, and Kaggle's ILSVRC/Data/CLS-LOC. Links are followed."""

import csv
import os
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.records import NO_LABEL
from imagefeed.preprocess.sources.listing import Source, SourceSplit, is_folder, scan
from imagefeed.preprocess.sources.video import Video, part_videos, video_options

SYNSETS, SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"
KAGGLE_DATA = Path("ILSVRC/Data/CLS-LOC")


def find_folders(root: Path, split: str | None, frames_per_second: float) -> Source:
    """Lists the images of folders of classes, or of splits of those; with `split`, the folders are classes of that split."""
    folders = _folders(root)
    if not folders:
        raise UserError(f"{root}: no folders in it; images are expected as {root}/train/CLASS/IMAGE or {root}/CLASS/IMAGE")
    if split is not None:
        splits = {split: folders}
    elif all(_holds_folders(folder) for folder in folders.values()):
        splits = {name: _folders(folder) for name, folder in folders.items()}
    else:
        raise UserError(
            f"{root}: its folders hold images, so they are classes and not splits; say which split they are, as in: --split train"
        )
    classes = tuple(sorted({name for found in splits.values() for name in found}))
    label_of = {name: label for label, name in enumerate(classes)}
    listed: dict[str, SourceSplit] = {}
    videos: list[Video] = []
    for name, found in splits.items():
        listed[name], of_split = _list_classes(root, name, found, label_of, frames_per_second)
        videos += of_split
    return Source(root, "folders", classes, listed, packed=tuple(videos), options=video_options(videos, frames_per_second))


def holds_kaggle(root: Path) -> bool:
    """Whether `root` is what Kaggle's ImageNet archive unpacks to, or the CLS-LOC folder of it."""
    return (root / KAGGLE_DATA).is_dir() or _beside(root, SYNSETS) is not None or _beside(root, SOLUTION) is not None


def find_kaggle(root: Path, frames_per_second: float) -> Source:
    """Lists train/WNID/IMAGE, val/IMAGE with the labels of LOC_val_solution.csv, and test/IMAGE, whose labels are unknown."""
    data = root / KAGGLE_DATA if (root / KAGGLE_DATA).is_dir() else root
    folders = {name: folder for name, folder in _folders(data).items() if name in ("train", "val", "test")}
    if not folders:
        raise UserError(f"{data}: no folder train, val or test in it; unpack Kaggle's archive there")
    titles = _read_synsets(root)
    by_class = {name: _folders(folder) for name, folder in folders.items() if name == "train" or _holds_folders(folder)}
    wnids = {wnid for found in by_class.values() for wnid in found}
    classes = tuple(sorted(titles or wnids))
    label_of = {name: label for label, name in enumerate(classes)}
    if strange := sorted(wnids - label_of.keys()):
        raise UserError(f"{data}: {strange[0]} is no class of {SYNSETS}; remove the folder, or take the mapping of the same data")
    splits: dict[str, SourceSplit] = {}
    videos: list[Video] = []
    for name in ("train", "val", "test"):
        if name in by_class:
            splits[name], of_split = _list_classes(root, name, by_class[name], label_of, frames_per_second)
            videos += of_split
        elif name in folders and (paths := _files(folders[name], os.path.relpath(folders[name], root), _identities(root))):
            unknown = np.full(len(paths), NO_LABEL, np.int32)
            splits[name] = SourceSplit(paths, _val_labels(root, paths, label_of) if name == "val" else unknown)
    return Source(
        root,
        "Kaggle's ImageNet",
        classes,
        splits,
        tuple(titles[name] for name in classes) if titles else (),
        packed=tuple(videos),
        options=video_options(videos, frames_per_second),
    )


def _beside(root: Path, name: str) -> Path | None:
    """Kaggle's tables lie beside the folder ILSVRC; `root` may be the one that holds it, or the CLS-LOC folder in it."""
    places = [root / name]
    if root.absolute().parts[-3:] == KAGGLE_DATA.parts:
        places.append(root.absolute().parents[2] / name)
    return next((path for path in places if path.is_file()), None)


def _read_synsets(root: Path) -> dict[str, str]:
    """What people call each WordNet id: lines such as "n01440764 tench, Tinca tinca"."""
    path = _beside(root, SYNSETS)
    if path is None:
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {wnid: title.strip() for wnid, _, title in (line.partition(" ") for line in lines) if wnid}


def _val_labels(root: Path, paths: list[str], label_of: dict[str, int]) -> np.ndarray:
    """Labels by LOC_val_solution.csv, whose lines give the class with each box: "NAME,n03995372 85 1 499 272 ..."."""
    path = _beside(root, SOLUTION)
    if path is None:
        raise UserError(f"{root}: the labels of split val are in {SOLUTION}, which is not there; put it there")
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        wnids = {row[0]: row[1].partition(" ")[0] for row in csv.reader(file) if len(row) > 1}
    labels = np.empty(len(paths), np.int32)
    for at, image in enumerate(paths):
        wnid = wnids.get(os.path.splitext(os.path.basename(image))[0])
        if wnid not in label_of:
            what = "is not in it" if wnid is None else f"is {wnid} there, which is no class"
            raise UserError(f"{path}: {image} {what}; download the table again, or remove the image")
        labels[at] = label_of[wnid]
    return labels


def _list_classes(
    root: Path, split: str, folders: dict[str, Path], label_of: dict[str, int], frames_per_second: float
) -> tuple[SourceSplit, list[Video]]:
    paths: list[str] = []
    counts = []
    for folder in folders.values():
        images = _files(folder, os.path.relpath(folder, root), _identities(root, folder.parent))
        if not images:
            raise UserError(f"{folder}: the class has no images; put some in, or remove the folder")
        paths += images
        counts.append(len(images))
    labels = np.repeat(np.array([label_of[name] for name in folders], np.int32), counts)
    return part_videos(root, split, paths, labels, frames_per_second)


def _folders(folder: Path) -> dict[str, Path]:
    return {entry.name: Path(entry.path) for entry in scan(folder) if is_folder(entry)}


def _holds_folders(folder: Path) -> bool:
    return any(is_folder(entry) for entry in scan(folder))


def _identities(*folders: Path) -> tuple[tuple[int, int], ...]:
    """What tells a folder from others, whatever links lead to it."""
    return tuple((status.st_dev, status.st_ino) for status in map(os.stat, folders))


def _files(folder: Path | str, prefix: str, above: tuple[tuple[int, int], ...]) -> list[str]:
    """Paths of all files below a class's folder; `above` holds the folders on the way, to end loops of links.

    A link that leads nowhere is listed too: it is then rejected by name, not passed over in silence.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return []
    found: list[str] = []
    for entry in scan(folder):
        path = f"{prefix}/{entry.name}"
        if is_folder(entry):
            found += _files(entry.path, path, (*above, here))
        else:
            found.append(path)
    return found
