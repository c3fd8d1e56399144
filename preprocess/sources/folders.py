"""Images in folders: RAW/CLASS/IMAGE, RAW/SPLIT/CLASS/IMAGE, and Kaggle's ILSVRC/Data/CLS-LOC. Links are followed."""

import csv
import os
from pathlib import Path

import numpy as np

from imagefeed.dataset.errors import UserError
from imagefeed.dataset.records import NO_LABEL
from imagefeed.preprocess.sources.listing import Source, SourceSplit, is_folder, label_classes, scan

SYNSETS, SOLUTION = "LOC_synset_mapping.txt", "LOC_val_solution.csv"
KAGGLE_DATA = Path("ILSVRC/Data/CLS-LOC")


def find_folders(root: Path, split: str | None) -> Source:
    """Lists the images of folders of splits, or with `split` of folders that are the classes of this split."""
    folders = _folders(root)
    if not folders:
        raise UserError(f"{root}: no folders in it; images are expected as {root}/train/CLASS/IMAGE or {root}/CLASS/IMAGE")
    splits = {split: folders} if split is not None else {name: _folders(folder) for name, folder in folders.items()}
    if not all(splits.values()):
        raise UserError(f"{root}: its folders hold images, so they are classes; name their split, as in: --split train")
    label_of = label_classes(name for found in splits.values() for name in found)
    listed = {name: _list_classes(root, found, label_of) for name, found in splits.items()}
    return Source(root, "folders", tuple(label_of), listed)


def holds_kaggle(root: Path) -> bool:
    """Whether Kaggle's ImageNet archive was unpacked to `root`, or `root` is the CLS-LOC folder in it."""
    return (root / KAGGLE_DATA).is_dir() or _beside(root, SYNSETS) is not None or _beside(root, SOLUTION) is not None


def find_kaggle(root: Path, split: str | None) -> Source:
    """Lists train/WNID/IMAGE, val/IMAGE with the labels of LOC_val_solution.csv, and test/IMAGE, whose labels are unknown."""
    if split is not None:
        raise UserError(f"{root}: Kaggle's folders name their splits themselves; leave out --split")
    data = root / KAGGLE_DATA if (root / KAGGLE_DATA).is_dir() else root
    found = _folders(data)
    folders = {name: found[name] for name in ("train", "val", "test") if name in found}
    if not folders:
        raise UserError(f"{data}: no folder train, val or test in it; unpack Kaggle's archive there")
    titles = _read_synsets(root)
    by_class = {name: _folders(folder) for name, folder in folders.items()}
    wnids = {wnid for found in by_class.values() for wnid in found}
    label_of = label_classes(titles or wnids)
    if unknown := sorted(wnids - label_of.keys()):
        raise UserError(f"{data}: {unknown[0]} is not a class of {SYNSETS}; remove the folder, or use the right {SYNSETS}")
    splits: dict[str, SourceSplit] = {}
    for name, folder in folders.items():
        if name == "train" or by_class[name]:
            splits[name] = _list_classes(root, by_class[name], label_of)
        elif paths := _files(folder, os.path.relpath(folder, root), (_identity(root),)):
            unlabeled = np.full(len(paths), NO_LABEL, np.int32)
            splits[name] = SourceSplit(paths, _val_labels(root, paths, label_of) if name == "val" else unlabeled)
    return Source(root, "Kaggle's ImageNet", tuple(label_of), splits, tuple(titles[name] for name in label_of) if titles else ())


def _beside(root: Path, name: str) -> Path | None:
    """One of Kaggle's tables, which lie beside the folder ILSVRC; `root` may also be the CLS-LOC folder inside it."""
    inside = root.absolute().parts[-3:] == KAGGLE_DATA.parts
    places = [root, root.absolute().parents[2]] if inside else [root]
    return next((place / name for place in places if (place / name).is_file()), None)


def _read_synsets(root: Path) -> dict[str, str]:
    """The common name of each WordNet id, from lines such as "n01440764 tench, Tinca tinca"."""
    path = _beside(root, SYNSETS)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path else ()
    return {wnid: title.strip() for wnid, _, title in (line.partition(" ") for line in lines) if wnid}


def _val_labels(root: Path, paths: list[str], label_of: dict[str, int]) -> np.ndarray:
    """Labels from LOC_val_solution.csv, whose lines give the class with each box: "NAME,n03995372 85 1 499 272 ..."."""
    path = _beside(root, SOLUTION)
    if path is None:
        raise UserError(f"{root}: {SOLUTION}, which has the labels of split val, is missing; put it there")
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        wnids = {row[0]: row[1].partition(" ")[0] for row in csv.reader(file) if len(row) > 1}
    labels = []
    for image in paths:
        wnid = wnids.get(os.path.splitext(os.path.basename(image))[0])
        if wnid not in label_of:
            problem = "is not in it" if wnid is None else f"has class {wnid} in it, which does not exist"
            raise UserError(f"{path}: {image} {problem}; download the table again, or remove the image")
        labels.append(label_of[wnid])
    return np.array(labels, np.int32)


def _list_classes(root: Path, folders: dict[str, Path], label_of: dict[str, int]) -> SourceSplit:
    paths: list[str] = []
    counts = []
    for folder in folders.values():
        images = _files(folder, os.path.relpath(folder, root), (_identity(root), _identity(folder.parent)))
        if not images:
            raise UserError(f"{folder}: the class has no images; add some, or remove the folder")
        paths += images
        counts.append(len(images))
    return SourceSplit(paths, np.repeat(np.array([label_of[name] for name in folders], np.int32), counts))


def _folders(folder: Path) -> dict[str, Path]:
    return {entry.name: Path(entry.path) for entry in scan(folder) if is_folder(entry)}


def _identity(folder: Path | str) -> tuple[int, int]:
    """Identifies a folder, whatever links lead to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _files(folder: Path | str, prefix: str, above: tuple[tuple[int, int], ...]) -> list[str]:
    """Paths of all files below a class's folder; `above` identifies the folders on the way, which ends loops of links.

    Dangling links are listed too, so that they are rejected by name and not silently skipped.
    """
    here = _identity(folder)
    if here in above:
        return []
    found: list[str] = []
    for entry in scan(folder):
        path = f"{prefix}/{entry.name}"
        found += _files(entry.path, path, (*above, here)) if is_folder(entry) else [path]
    return found
